from __future__ import annotations

import pytest

from transformer_vq.bench.images import run


def test_both_are_timed_and_theirs_is_the_yardstick():
    pytest.importorskip("vector_quantize_pytorch")
    ours, theirs = run(codes=16, code_dim=4, width=4, batch_size=2, repeats=2)
    assert (ours["implementation"], theirs["implementation"]) == ("transformer_vq", "vector-quantize-pytorch")
    assert theirs["speedup"] == 1
    assert ours["speedup_low"] <= ours["speedup"] <= ours["speedup_high"]
    assert ours["low"] <= ours["images_per_s"] <= ours["high"]
    assert ours["speedup_low"] <= ours["high"] / theirs["low"]
