"""Processes that were not started alike say so in one line, and write nothing."""

import re

import pytest
from many_processes import torchrun

from transformer_vq.config import ConfigError
from transformer_vq.training import agreement as module
from transformer_vq.training.agreement import before_joining, check_agreement, code


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        ([{"a": 1}, {"a": 1}], None),
        ([{"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}}], "from process 0 differ process 1 by a.b: 1 -> 3"),
        (
            [{"a": 1}, {"a": 2}, {"a": 1}, {"a": 2}, {"a": 4, "b": 5}],
            "from process 0 differ processes 1, 3 by a: 1 -> 2; process 4 by a: 1 -> 4, b: None -> 5",
        ),
        ([{}, dict.fromkeys("abcdefg", 1)], "by a: None -> 1, b: None -> 1, c: None -> 1, d: None -> 1, 3 more"),
        ([{}, ConfigError("a = 0"), {"a": 1}, ConfigError("a = 0")], "^processes 1, 3: a = 0"),
        ([ConfigError("a = 0"), {}, ConfigError("b = 0")], "^process 0: a = 0; process 2: b = 0"),
        ([ConfigError("a = 0"), ConfigError("a = 0")], "^a = 0"),
    ],
)
def test_what_is_said(monkeypatch, found, complaint):
    monkeypatch.setattr(module, "everyones", lambda value, accelerator: found)
    if complaint is None:
        check_agreement(None, found[0])
        return
    anywhere, begin = complaint.removeprefix("^"), "^" * complaint.startswith("^")
    with pytest.raises(ConfigError, match=begin + re.escape(anywhere) + "$"):
        check_agreement(None, found[0])


def test_alone_it_is_the_error_itself(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    error = ConfigError("a = 0")
    with pytest.raises(ConfigError) as caught, before_joining():
        raise error
    assert caught.value is error


def test_code_is_known_by_its_content(tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(module.transformer_vq, "__file__", str(package / "__init__.py"))
    seen = set()
    for text in ("a = 1", "a = 2"):
        (package / "one.py").write_text(text)
        module._source.cache_clear()
        seen.add(code()["source"])
    module._source.cache_clear()
    assert len(seen) == 2


UNLIKE = """
import contextlib, os, shutil, sys
from pathlib import Path
from tiny_run import tiny_run
from transformer_vq import cli
from transformer_vq.config import ConfigError
from transformer_vq.training import agreement, run
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
def attempt(name, config, **flags):
    try:
        run(config, quiet=True, **flags)
    except ConfigError as error:
        (folder / f"{name}-{rank}").write_text(str(error))
config = tiny_run(folder)
attempt("config", tiny_run(folder, train__lr=0.01 * (1 + rank)))
attempt("flags", config, resume=rank == 1)
source = agreement._source
agreement._source = lambda: f"hash{rank}"
attempt("code", config)
agreement._source = source
own = folder / str(rank)
own.mkdir()
os.chdir(own)
(own / "text.txt").write_text((folder / "text.txt").read_text() + "more" * rank)
unlike = {"data__source": "text.txt", "data__cache": "cache"}
attempt("data", tiny_run(folder, **unlike))
if rank == 1:
    (own / "text.txt").unlink()
attempt("missing", tiny_run(folder, **unlike))
attempt("name", tiny_run(folder, model__quantizer={"codes": 8, "estimator": "nowhere:f" if rank else "ste"}))
invalid = ["train", "lm/tiny", f"run_dir={folder / 'run'}", *(["model.width=0"] if rank else [])]
with (folder / f"invalid-{rank}").open("w") as file, contextlib.redirect_stderr(file):
    assert cli.run(invalid) == 2
"""


@pytest.mark.distributed
def test_two_processes_that_are_unlike(tmp_path):
    script = tmp_path / "unlike.py"
    script.write_text(UNLIKE)
    torchrun(2, str(script), str(tmp_path))
    for name, complaint in {
        "config": r"differ process 1 by train\.lr: 0\.01 -> 0\.02$",
        "flags": r"differ process 1 by --resume: False -> True$",
        "code": r"differ process 1 by code\.source: hash0 -> hash1$",
        "data": r"differ process 1 by data\.text: \w+ -> \w+$",
        "missing": r"text\.txt",
        "name": r"^process 1: .*nowhere",
    }.items():
        said = {(tmp_path / f"{name}-{rank}").read_text() for rank in (0, 1)}
        assert len(said) == 1 and re.search(complaint, said.pop()), name
    said = [(tmp_path / f"invalid-{rank}").read_text() for rank in (0, 1)]
    assert said[0].startswith("error: process 1: model.width = 0: ") and said[0].count("\n") == 1 and not said[1]
    assert not (tmp_path / "run").exists()
