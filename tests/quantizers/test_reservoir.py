"""Keys that a hash puts first: the same however they are dealt out, and the host reads none of them in a step."""

from __future__ import annotations

import pytest
import torch
from forked import torchrun
from torch import Tensor

from transformer_vq.ops.estimators.noise import Noise
from transformer_vq.quantizers import build_quantizer
from transformer_vq.quantizers.reservoir import Reservoir
from transformer_vq.quantizers.scheduled import Gathered

H, T, K, SIZE = 2, 7, 3, 10
SCRIPT = """
import sys, torch, torch.distributed as dist
from quantizers.test_reservoir import SHARES, NoReading, sample, text
folder = sys.argv[1]
dist.init_process_group("gloo")
rank, found = dist.get_rank(), {}
for name, shares in SHARES.items():
    found[name] = sample(*(x[shares[rank]] for x in text())).join(text()[0])
    one = sample(*(x[shares[rank]] for x in text()))
    with NoReading():
        found[name + ", ranked"] = one.ranked(text()[0])
torch.save(found, f"{folder}/found{rank}.pt")
dist.destroy_process_group()
"""
SHARES = {
    "even": [slice(0, 2), slice(2, 4), slice(4, 6)],
    "one has nothing": [slice(0, 5), slice(0, 0), slice(5, 6)],
    "one has all": [slice(0, 0), slice(0, 6), slice(0, 0)],
    "few": [slice(0, 1), slice(0, 0), slice(0, 0)],
    "none": [slice(0, 0)] * 3,
}
"""Rows of the text that each of three processes has."""


class NoReading(torch.utils._python_dispatch.TorchDispatchMode):
    """What the host reads, or what it must know the size of, is an error."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        if func is torch.ops.aten.index.Tensor:
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a mask as an index"
        return func(*args, **(kwargs or {}))


def text() -> tuple[Tensor, Tensor, Tensor]:
    """Keys (6, H, T, K), a mask (6, T) and names (6, T)."""
    generator = torch.Generator().manual_seed(0)
    k, mask = torch.randn(6, H, T, K, generator=generator), torch.rand(6, T, generator=generator) < 0.7
    return k, mask, torch.arange(6 * T).view(6, T)


def sample(k: Tensor, mask: Tensor, names: Tensor) -> Reservoir:
    """Of these rows, one after another as micro-batches come."""
    kept = Reservoir(SIZE)
    for b in range(len(k)):
        kept.add(k[b : b + 1], mask[b : b + 1], Noise(torch.tensor(0), names[b : b + 1]))
    return kept


@pytest.mark.distributed
def test_processes_keep_what_one_would_and_do_not_read_it(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    torchrun(3, str(tmp_path / "script.py"), str(tmp_path), GLOO_SOCKET_IFNAME="lo")
    every = [torch.load(tmp_path / f"found{rank}.pt") for rank in range(3)]
    for name, shares in SHARES.items():
        rows = torch.cat([torch.arange(6)[share] for share in shares])
        want = sample(*(x[rows] for x in text())).keys(text()[0])
        assert want.shape == (H, min(SIZE, int(text()[1][rows].sum())), K)
        for found in every:
            keys, n = found[f"{name}, ranked"]
            assert torch.equal(found[name], want)
            assert n == want.shape[1] and torch.equal(keys[:, :n], want)


def test_reading_is_noticed():
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReading():
        sample(*text()).join()
    with pytest.raises(AssertionError, match="a mask"), NoReading():
        sample(*text()).keys(text()[0])


@pytest.mark.parametrize(
    "kind", [{"kind": "simvq", "codes": 4}, {"kind": "fsq", "levels": [4]}, {"kind": "bsq", "bits": 2}]
)
def test_kinds_that_need_no_keys_start_late_all_the_same(kind):
    """The training loop lets every quantizer that starts gather its keys."""
    q = build_quantizer({**kind, "start_step": 1}, H, K)
    q.set_step(1)
    q.gather()
    with pytest.raises(Gathered):
        q(torch.randn(2, H, T, K))
    q.finish_gathering()
    assert q.started and not q.due
