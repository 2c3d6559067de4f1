"""What `describe` says of memory, in JSON and in words."""

from __future__ import annotations

import json

import pytest

from transformer_vq.cli import run
from transformer_vq.cli.describe import BATCHES, facts, memory
from transformer_vq.config import RunConfig, load_config
from transformer_vq.evaluation.generation import PREFILL
from transformer_vq.models.footprint import decoding
from transformer_vq.training.memory import gib

SMALL = ["lm/tiny", "model.layers=2", "model.width=32", "model.value_dim=64", "train.seq_len=64"]


@pytest.mark.parametrize(("precision", "dtypes"), [("bf16", ("fp32", "bf16")), ("fp64", ("fp64",))])
def test_decoding_by_type_and_batch(precision, dtypes, capsys):
    config = [*SMALL, f"train.precision={precision}"]
    assert run(["describe", *config, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["memory"]
    texts = told["decoding_by"]
    assert [(text["dtype"], text["batch"]) for text in texts] == [(dtype, n) for dtype in dtypes for n in BATCHES]
    assert told["decoding"] == texts[0] and all(text["length"] == 64 for text in texts)
    by = {(text["dtype"], text["batch"]): text for text in texts}
    for dtype in dtypes:
        one, many = by[dtype, 1], by[dtype, 64]
        assert one["parameters"] == many["parameters"] and many["state"] == 64 * one["state"]
        assert one["total"] < by[dtype, 8]["total"] < many["total"]
    if dtypes == ("fp32", "bf16"):
        assert (
            by["bf16", 1]["parameters"] < by["fp32", 1]["parameters"]
            and by["bf16", 8]["state"] < by["fp32", 8]["state"]
        )
    assert run(["describe", *config]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for dtype in dtypes:
        amounts = [gib(by[dtype, batch]["total"]) for batch in BATCHES]
        assert f"in {dtype} {amounts[0]} for 1 at a time, {amounts[1]} for 8, {amounts[2]} for 64" in said


@pytest.mark.parametrize("kind", ["simvq", "fsq", "bsq", "none"])
def test_every_kind_of_quantizer_has_an_estimate_in_every_type(kind):
    """Buffers may change their type with the weights, as SimVQ's codes do."""
    settings = load_config("lm/tiny", [f"model.quantizer={{kind: {kind}}}", "model.layers=1"], RunConfig)
    found = facts(settings)["memory"]
    assert "error" not in found and [text["dtype"] for text in found["decoding_by"]] == ["fp32"] * 3 + ["bf16"] * 3


def test_batches_are_counted_one_by_one(monkeypatch):
    """Chunks of work fill up: what a GPU takes for 8 texts is not on a line between 1 and 64."""
    monkeypatch.setattr("transformer_vq.training.memory.available", lambda device: 2**40)
    overrides = ["model.layers=1", "model.quantizer={kind: vq, codes: 512}"]
    settings = load_config("lm/tiny", overrides, RunConfig)
    model = settings.model.model_copy(update={"vocab_size": 256})
    found = memory(settings.model_copy(update={"model": model}), "cuda")["decoding_by"]
    for text in found:
        alone = decoding(model, text["batch"], text["length"], PREFILL, dtype=text["dtype"], device="cuda")
        assert text["total"] == alone.total
