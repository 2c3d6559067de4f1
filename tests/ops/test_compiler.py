"""Tests of what is written in C++ are skipped without a library: where there is a compiler, there must be one."""

import os
import shutil

import pytest

from transformer_vq.ops import linear, rows
from transformer_vq.ops.attention import native
from transformer_vq.ops.kernels.compiler import COMPILERS, library


@pytest.mark.skipif("CXX" in os.environ or not any(map(shutil.which, COMPILERS)), reason="no C++ compiler, or another")
@pytest.mark.parametrize("source", [native.SOURCE, rows.SOURCE, linear.SOURCE], ids=lambda source: source.name)
def test_it_compiles_where_there_is_a_compiler(source):
    assert library(source)
