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
    assert near["vq_ms"] > 0 and near["sdpa_ms"] > 0 and near["ratio"] > 0
    assert far["vq_ms"] > 0 and far["sdpa_ms"] is None and far["ratio"] is None
    assert (near["peak_mib"], far["peak_mib"]) == (32, 64)


@pytest.mark.slow
def test_memory_is_that_of_a_process_with_pytorch_in_it():
    assert attention.peak_memory(32, block_len=8, **SMALL) > 50


def test_table_shows_what_was_not_measured(capsys):
    rows = [{"tokens": 65_536, "vq_ms": 12.0, "sdpa_ms": None, "ratio": None, "peak_mib": None}]
    attention.table(rows, "attention")
    shown = capsys.readouterr().out
    assert "65,536" in shown and "12" in shown and shown.count("–") == 3
