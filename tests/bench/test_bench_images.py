from __future__ import annotations

import pytest

from transformer_vq.bench.images import run


def test_both_are_timed_and_theirs_is_the_yardstick():
    pytest.importorskip("vector_quantize_pytorch")
    small, large = run(codes=16, code_dim=4, width=4, batch_sizes=(2, 4), repeats=2)
    assert (small["batch_size"], large["batch_size"]) == (2, 4)
    theirs = small["others"]["vector-quantize-pytorch"]
    assert theirs["ratio_low"] <= theirs["ratio"] <= theirs["ratio_high"]
    for its in (small, theirs):
        assert its["low"] <= its["milliseconds"] <= its["high"]
        assert its["images_per_s"] == pytest.approx(2e3 / its["milliseconds"])
    assert small["gflop"] > 0 and large["gflop"] == pytest.approx(2 * small["gflop"], rel=1e-3)
