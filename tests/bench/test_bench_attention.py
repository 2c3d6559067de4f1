"""The attention benchmark compares two sides that are alive, and measures memory that is there."""

import pytest

from transformer_vq.bench import attention
from transformer_vq.ops.attention import native
from transformer_vq.ops.attention.block_length import NATIVE, cheapest

SMALL = {"heads": 2, "width": 8, "codes": 4, "window": 8}


def test_rows_hold_both_sides_up_to_the_longest_comparison(monkeypatch):
    monkeypatch.setattr(attention, "peak_memory", lambda length, **sizes: float(length))
    near, far = attention.run(lengths=(32, 64), repeats=2, compare_up_to=32, **SMALL)
    assert (near["tokens"], far["tokens"]) == (32, 64)
    taken = NATIVE if native.refusal("cpu") is None else cheapest(4, 8, 1, 8, 8, two_sided=False)
    assert near["block_len"] == far["block_len"] == taken
    assert near["milliseconds"] > 0 and near["others"]["SDPA"]["ratio"] > 0
    assert near["others"]["ours, full"]["ratio_low"] > 0
    assert near["others"]["flash-attn"]["absent"] and near["others"]["SDPA, cuDNN"]["absent"] == "needs a CUDA device"
    assert far["milliseconds"] > 0 and not far["others"]
    assert (near["peak_mib"], far["peak_mib"]) == (32, 64)


def test_rows_share_the_tokens(monkeypatch):
    asked = []
    monkeypatch.setattr(attention, "peak_memory", lambda length, **sizes: asked.append(sizes) or 1.0)
    found = attention.run(lengths=(16, 64, 256), repeats=2, compare_up_to=0, tokens=128, lookup=True, **SMALL)
    assert [row["rows"] for row in found] == [8, 2, 1] == [sizes["rows"] for sizes in asked]
    assert all(sizes["lookup"] for sizes in asked)


@pytest.mark.slow
def test_memory_is_that_of_a_process_with_pytorch_in_it():
    assert attention.peak_memory(32, block_len=8, **SMALL) > 50
