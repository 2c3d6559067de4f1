"""Nothing in a step mixes devices, makes the host wait, or adds up in any order: found without a GPU."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from device.fake_device import MISTAKES, VARIANTS

import transformer_vq

HERE = Path(__file__).parent


QUICK = ("rotary", "given", "dropout", "gumbel", "losses", "dead codes")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "variants", [QUICK, pytest.param(tuple(v for v in VARIANTS if v not in QUICK), marks=pytest.mark.slow)]
)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_whole_model_on_a_device_that_does_not_exist(tmp_path, variants):
    guard, root = tmp_path / "guard.so", Path(torch.__file__).parent
    flags = ["-shared", "-fPIC", "-std=c++20", f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10"]
    subprocess.run(["g++", str(HERE / "fake_guard.cpp"), "-o", str(guard), *flags], check=True)
    command = [sys.executable, str(HERE / "fake_device.py"), str(guard), *variants]
    done = subprocess.run(command, check=False, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    planted = [f.__name__ for f in MISTAKES]
    mistakes = [case["error"] for case in found if case["how"] in planted]
    assert len(mistakes) == len(MISTAKES) and all(mistakes), "a planted mistake was not noticed"
    package = Path(transformer_vq.__file__).parent.rglob("*.py")
    ops = {op for path in package for op in re.findall(r'custom_op\(\s*"(.+?)"', path.read_text(encoding="utf-8"))}
    assert ops == {case["variant"] for case in found if case["how"] == "opaque"}, "an op hides what it does"
    wrong = [case for case in found if case["error"] and case["how"] not in planted]
    assert not wrong, "\n".join(f"{case['variant']}, {case['how']}: {case['error']}" for case in wrong)
