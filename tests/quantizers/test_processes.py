"""Two real processes on the CPU: statistics add up, and every draw is the same on both."""

from __future__ import annotations

import pytest
import torch
from forked import torchrun
from helpers import assert_same

from transformer_vq.quantizers import build_quantizer

H, K, S = 2, 4, 6
SCRIPT = """
import sys, torch, torch.distributed as dist
from quantizers.test_reservoir import NoReading
from transformer_vq.config import ConfigError
from transformer_vq.quantizers import build_quantizer
folder, few = sys.argv[1], sys.argv[2] == "few"
dist.init_process_group("gloo")
rank = dist.get_rank()
results = {}
for name, settings in torch.load(f"{folder}/settings.pt").items():
    q = build_quantizer(settings, 2, 4).double()
    keys = torch.load(f"{folder}/keys.pt")
    try:
        for step in range(3):
            q.set_step(step)
            for micro in range(2):
                if not (rank == 1 and step == 1):  # one process has nothing to say in one step
                    k = keys[step, micro, 2 * rank : 2 * rank + 2]
                    q(k[:, :, :2] if few and rank == 0 else k)
            with NoReading():
                q.apply_codebook_statistics()
        results[name] = {"codebook": q.codebook.detach(), "count": q.ema_count}
    except ConfigError as error:
        results[name] = str(error)
torch.save(results, f"{folder}/results{rank}.pt")
dist.destroy_process_group()
"""


def both(folder, settings, keys, few=False):
    """What two processes end with, each with half of every batch."""
    torch.save(settings, folder / "settings.pt")
    torch.save(keys, folder / "keys.pt")
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    torchrun(2, str(folder / "script.py"), str(folder), "few" if few else "all", GLOO_SOCKET_IFNAME="lo")
    return [torch.load(folder / f"results{rank}.pt") for rank in (0, 1)]


@pytest.mark.distributed
def test_two_processes(tmp_path):
    settings = {
        "ema": {"kind": "vq", "codes": S, "ema": 0.8},
        "gradient": {"kind": "vq", "codes": S, "ema": 0.8, "codebook": "gradient"},
        "kmeans": {"kind": "vq", "codes": S, "init": "kmeans"},
        "data": {"kind": "vq", "codes": S, "init": "data"},
        "dead": {"kind": "vq", "codes": S, "ema": 0.5, "dead_code_threshold": 2.0},
    }
    keys = torch.randn(3, 2, 4, H, 10, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, second = both(tmp_path, settings, keys)
    for name in settings:
        assert all(torch.equal(first[name][part], second[name][part]) for part in ("codebook", "count")), name

    alone = build_quantizer(settings["ema"], H, K).double()
    for step in range(3):
        alone(keys[step].flatten(0, 1) if step != 1 else keys[step, :, :2].flatten(0, 1))
        alone.apply_codebook_statistics()
    assert_same(first["ema"], {"codebook": alone.codebook, "count": alone.ema_count}, rtol=1e-13)
    assert not torch.equal(first["dead"]["codebook"], first["ema"]["codebook"])


@pytest.mark.distributed
def test_too_few_keys_stop_every_process(tmp_path):
    """Process 0 has four keys a head, process 1 has twenty: both say so, and none waits for ever."""
    keys = torch.randn(3, 2, 4, H, 10, K, dtype=torch.float64)
    results = both(tmp_path, {"kmeans": {"kind": "vq", "codes": S, "init": "kmeans"}}, keys, few=True)
    assert all("4 a head are fewer than codes = 6" in result["kmeans"] for result in results)
