"""What the other tests' launcher promises: all output, the first failure ends the rest, too late is never right."""

from __future__ import annotations

import time

import pytest
from forked import torchrun

SCRIPT = """
import os, sys, time
rank, what = os.environ["RANK"], sys.argv[1]
print("rank", rank, "of", os.environ["WORLD_SIZE"], what, flush=True)
if what == "fail" and rank == "1":
    sys.exit(3)
if what != "done":
    time.sleep(60)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return str(path)


@pytest.mark.distributed
def test_output_and_failures(script):
    said = torchrun(2, script, "done")
    assert "rank 0 of 2 done" in said and "rank 1 of 2 done" in said
    began = time.monotonic()
    assert "rank 1 of 2 fail" in torchrun(2, script, "fail", fails=True)
    assert time.monotonic() - began < 40, "the other one sleeps for a minute"
    with pytest.raises(AssertionError, match="rank 1 of 2 done"):
        torchrun(2, script, "done", fails=True)


@pytest.mark.distributed
@pytest.mark.parametrize("fails", [True, False])
def test_being_late_is_no_failure_that_was_expected(script, fails):
    with pytest.raises(AssertionError, match="after 2 seconds they are still at it"):
        torchrun(2, script, "sleep", fails=fails, timeout=2)
