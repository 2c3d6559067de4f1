"""Freed memory is kept: a second tensor of the same size costs no new pages."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, torch
from transformer_vq.ops.pages import keep_pages

def faults(bytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(bytes // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

size = 40 * 2**20
torch.set_num_threads(1)
usual = [faults(size) for _ in range(3)][-1]
keep_pages()
kept = [faults(size) for _ in range(30)][-1]  # the first ones make room
print(usual, kept)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_second_tensor_needs_no_new_pages():
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    usual, kept = map(int, done.stdout.split())
    assert usual > 100  # 10,240 where pages are 4 KiB
    assert kept < usual / 20
