"""What the fused kernels need inside is found by their own launcher, which launches nothing."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

pytest.importorskip("triton")

from ops.attention.compiled import meta_call

from transformer_vq.ops.attention.scratch import scratch
from transformer_vq.ops.kernels.device import launched, rehearsal

SHAPE = {"T": 2048, "S": 64, "M": 128, "B": 2, "H": 4, "Hkv": 2}
Q, KEYS, WIDE = 2 * 4 * 2048 * 64 * 2, 2 * 2 * 2048 * 64 * 2, 2
"""Bytes of queries and of keys or values, and how many times as wide fp32 is."""


def needed(backward=False, **more):
    return scratch(meta_call(64, 64, **{**SHAPE, **more}), True, backward)


def test_caches_of_all_blocks():
    """Four blocks of 512 tokens, each with a mean and two counts a code; and one logsumexp each query."""
    caches = needed(S=128) - needed()
    assert caches == 4 * 2 * 2 * 64 * (64 * 2 + 2 * 4)
    assert needed() == pytest.approx(caches + 2 * 4 * 2048 * 4, rel=0.02)


@pytest.mark.parametrize(
    ("options", "forward", "backward"),
    [
        ({"rotary": True}, 2 * Q + KEYS, 4 * Q + 3 * KEYS),  # turned; and what flows back through both ways of seeing
        ({"exact_window": True}, KEYS, 2 * KEYS),
        ({"bias": True}, 0, WIDE * 2 * 4 * 2048 * 129),  # its gradient, in the kernel's layout
    ],
    ids=["rotary", "exact window", "bias"],
)
def test_copies_are_counted(options, forward, backward):
    assert needed(**options) - needed() >= forward
    assert needed(True, **options) - needed(True) >= backward


def test_grows_with_rows_and_not_with_what_exists_at_once():
    found = [needed(True, B=rows) for rows in (1, 2, 4)]
    assert all(b == pytest.approx(2 * a, rel=0.1) for a, b in pairwise(found))


def test_kernels_are_launched_again_afterwards():
    with rehearsal():
        assert launched({(1,): "kernel"}, (1,))(1, BLOCK=2) is None
        with ThreadPoolExecutor(1) as other:
            assert other.submit(launched, {(1,): "kernel"}, (1,)).result() == "kernel"
    assert launched({(1,): "kernel"}, (1,)) == "kernel"
