"""Names, and functions of one's own."""

import math

import pytest

from transformer_vq.ops.resolve import resolve

TABLE = {"ste": math.sin, "rotation": math.cos}


def test_a_name_of_the_table_and_a_function_of_ones_own():
    assert resolve("ste", TABLE, "estimator") is math.sin
    assert resolve("math:tan", TABLE, "estimator") is math.tan


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rotatoin", "no estimator 'rotatoin'; did you mean 'rotation'.*rotation, ste"),
        ("zzz", "no estimator 'zzz'.*rotation, ste, or module:function"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
        ("math.deeper:f", "there is no module 'math.deeper'"),
        ("math:no_such", "module 'math' has no function 'no_such'"),
        ("math:pi", "has no function 'pi'"),
        (":f", "module:function"),
    ],
)
def test_what_is_missing_is_said(name, message):
    with pytest.raises(ValueError, match=message):
        resolve(name, TABLE, "estimator")


def test_an_error_inside_the_users_module_is_theirs(tmp_path, monkeypatch):
    (tmp_path / "broken_of_mine.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        resolve("broken_of_mine:f", TABLE, "estimator")
