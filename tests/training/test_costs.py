"""What a run costs: in its records and summary, and what cannot be known left out."""

import json

import pytest
import torch
from tiny_run import tiny_run
from toy_task import toy_config, train_toy

from transformer_vq.models.describe import describe
from transformer_vq.training import LanguageTask, run
from transformer_vq.training import peak as module
from transformer_vq.training.costs import talk
from transformer_vq.training.peak import Peak, measured, on_data_sheet, peak

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def records(run_dir) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "train"]


def test_records_and_summary(tmp_path, monkeypatch):
    monkeypatch.setattr(LanguageTask, "finish", lambda self, folder: None)
    config = tiny_run(tmp_path, train__log_every=4, eval__every=8, checkpoint__every=6)
    summary = run(config, quiet=True)
    found = records(tmp_path / "run")
    cost = summary["cost"]
    flops = 3 * describe(config.model.model_copy(update={"vocab_size": 256}), 24)["flops_per_token"]
    assert cost["flops_per_token"] == flops and cost["peak_from"] == "measured" and cost["peak_flops"] > 1e8
    for record in found:
        parts = [record[f"cost/{name}"] for name in ("data", "evaluation", "checkpoint")]
        assert min(parts) >= 0 and sum(parts) <= record["cost/seconds"]
        assert record["cost/mfu"] == pytest.approx(flops * record["tokens_per_s"] / cost["peak_flops"])
        assert record["cost/peak_bytes"] > 2**26 and record["cost/read_per_s"] > 0
        assert "cost/communication" not in record
    at = {record["step"]: record for record in found}
    assert [step for step in at if at[step]["cost/evaluation"]] == [12, 20]  # after step 8, and after 16
    assert [step for step in at if at[step]["cost/checkpoint"]] == [8, 12, 16, 20]  # of 6, 8 (the best), 12, 18
    for name in ("seconds", "evaluation", "data"):
        assert cost[name] >= sum(record[f"cost/{name}"] for record in found) > 0
    assert cost["mfu"] == pytest.approx(flops * summary["tokens_per_s"] / cost["peak_flops"])


def test_a_task_whose_operations_nobody_counts_has_no_mfu(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "measured", None)  # nothing is measured either
    summary = train_toy(toy_config(tmp_path / "run", log_every=10))
    assert "mfu" not in summary["cost"] and all("cost/mfu" not in record for record in records(tmp_path / "run"))


def test_the_summary_counts_what_came_before_a_resume(tmp_path):
    first = train_toy(toy_config(tmp_path / "run", steps=10))
    second = train_toy(toy_config(tmp_path / "run", steps=20), resume=True)
    assert second["cost"]["seconds"] > sum(record["cost/seconds"] for record in records(tmp_path / "run"))
    assert len(records(tmp_path / "run")) == 20 and first["cost"]["checkpoint"] > 0


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
        ("NVIDIA H100 PCIe", 756.0, 51.0),
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
        ("NVIDIA L40S", 362.0, 91.6),
        ("NVIDIA L40", None, None),
        ("NVIDIA L4", 121.0, 30.3),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("NVIDIA GeForce RTX 9999", None, None),
    ],
)
def test_peaks_of_data_sheets(name, bf16, fp32, monkeypatch):
    assert on_data_sheet(name, "bf16") == (bf16 and bf16 * 1e12)
    assert on_data_sheet(name, "fp32") == (fp32 and fp32 * 1e12)
    assert on_data_sheet(name, "fp64") is None
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")  # TF32 is another peak
    assert on_data_sheet(name, "fp32") is None


def test_a_peak_that_is_not_known_is_measured(monkeypatch):
    seconds = iter([9.0, 1e-4, 9.0, 0.02, 0.04, 0.01, 0.03, 0.03, 0.03])  # the first of a size warms up
    sizes = []
    monkeypatch.setattr(module, "_timed", lambda a: sizes.append((len(a), a.dtype)) or next(seconds))
    measured.cache_clear()
    try:
        assert peak(CPU, "bf16") == peak(CPU, "bf16") == Peak(2 * 1024**3 / 0.01, "measured")
    finally:
        measured.cache_clear()
    assert sizes == [(512, torch.bfloat16)] * 2 + [(1024, torch.bfloat16)] * 7


def test_where_talk_can_be_told():
    assert talk(CPU, 1, False) == talk(CPU, 2, True) == talk(GPU, 2, True) == ()
    assert talk(CPU, 2, False) == ("communication", "gradients") and talk(GPU, 2, False) == ("gradients",)
