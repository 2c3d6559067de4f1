"""Recipes: the paper's numbers [Lingle 2309.16354, tables 4-6, 10], and siblings that differ as they say."""

from __future__ import annotations

import re

import pytest

from transformer_vq.config import RunConfig, TransformerVQConfig, load_config
from transformer_vq.config.load import recipes, recipes_folder
from transformer_vq.models.describe import describe

PAPER = ["enwik8", "pg19", "imagenet64"]
COMMON = {
    **{"model.block": "gau", "model.layers": 48, "model.heads": 1, "model.key_dim": 128, "model.position": "xl"},
    **{"model.window": 512, "model.block_len": 512, "model.cache": True, "model.grad_through_cache": True},
    **{"model.quantizer.codes": 512, "model.quantizer.ema": 0.99, "model.quantizer.commit": 1e-4},
    **{"model.quantizer.kind": "vq", "model.quantizer.estimator": "ste", "model.gradients": "block"},
    **{"train.batch_size": 128, "train.warmup": 10_000, "train.schedule": "cosine", "train.final_lr": 0.1},
    **{"data.order": "streams", "model.position_base": 100_000.0, "model.kv_heads": None, "model.per_layer": None},
}
LARGE = {
    **{"model.width": 2048, "model.value_dim": 4096, "model.tied_embedding": True, "model.final_norm": True},
    **{"model.logit_scale": 0.005, "train.optimizer": "adafactor", "train.lr": 1e-2, "train.steps": 500_000},
    **{"train.weight_decay": 0.0, "train.clip": None, "data.document_boundaries": "reset"},
}


def dropouts(embedding: float, sinusoid: float, residual: float, layer: float) -> dict[str, float]:
    rates = {"embedding": embedding, "sinusoid": sinusoid, "residual": residual, "layer": layer}
    return {f"model.dropout_{name}": rate for name, rate in rates.items()}


NUMBERS = {
    "enwik8": {
        **{"model.width": 768, "model.value_dim": 1536, "model.tied_embedding": False, "model.final_norm": False},
        **{"model.logit_scale": 1.0, "model.absolute_positions": False, **dropouts(0.0, 0.2, 0.5, 0.3)},
        **{"train.optimizer": "adamw", "train.lr": 4e-4, "train.betas": (0.9, 0.98), "train.eps": 1e-9},
        **{"train.weight_decay": 2e-4, "train.decay_scaled_by_lr": False, "train.clip": 0.1, "train.steps": 125_000},
        **{"train.seq_len": 2048, "train.updates_per_sequence": 4, "data.tokenizer": "bytes"},
    },
    "pg19": {
        **LARGE,
        **{"model.absolute_positions": False, **dropouts(0.0, 0.1, 0.1, 0.1)},
        **{"train.seq_len": 2048, "train.updates_per_sequence": 4, "data.tokenizer": "bpe:32000"},
    },
    "imagenet64": {
        **LARGE,
        **{"model.absolute_positions": True, **dropouts(0.0, 0.1, 0.0, 0.0)},
        **{"train.seq_len": 1536, "train.updates_per_sequence": 8, "data.tokenizer": "bytes", "data.image_size": 64},
    },
}
VOCABULARY = {"bytes": 256}
PARAMETERS = {"enwik8": 190e6, "pg19": 1.3e9, "imagenet64": 1.2e9}  # as published, to their digits


def settings(name: str) -> RunConfig:
    return load_config(f"lm/{name}", [], RunConfig)


def model(name: str) -> TransformerVQConfig:
    run = settings(name)
    kind, _, size = run.data.tokenizer.partition(":")
    return run.model.model_copy(update={"vocab_size": int(size) if size else VOCABULARY[kind]})


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_numbers(name):
    run = settings(name)
    for key, want in (COMMON | NUMBERS[name]).items():
        got = run
        for part in key.split("."):
            got = getattr(got, part)
        assert got == want, key


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_sizes(name):
    found = describe(model(name), 2048)
    codebooks = 48 * 512 * 128
    assert found["parameters"] + codebooks == pytest.approx(PARAMETERS[name], rel=0.05)


@pytest.mark.parametrize("name", [f"{name}{size}" for name in PAPER for size in ("", "-small", "-tiny")])
def test_the_baseline_differs_in_the_quantizer_and_its_folder_alone(name):
    ours, full = settings(name), settings(f"{name}-full")
    assert {q.kind for q in full.model.layer_quantizers()} == {"none"} and full.run_dir == f"{ours.run_dir}-full"
    assert describe(model(name), 2048)["parameters"] == describe(model(f"{name}-full"), 2048)["parameters"]
    memory = {"checkpoint_activations": name.endswith("-small")}  # and micro_batch: never the result
    same = {
        "run_dir": "",
        "eval": ours.eval,
        "model": ours.model.model_copy(update={"quantizer": full.model.quantizer, **memory}),
        "train": ours.train.model_copy(update={"micro_batch": None}),
    }
    assert full.model_copy(update={**same, "model": full.model}) == ours.model_copy(update=same)
    assert full.train.model_copy(update={"micro_batch": None}) == same["train"]
    assert full.eval.context == ours.train.seq_len * ours.train.updates_per_sequence


@pytest.mark.parametrize("name", [f"{name}{size}" for name in PAPER for size in ("-small", "-tiny")])
def test_smaller_ones_keep_the_shape(name):
    ours, large = settings(name), settings(name.partition("-")[0])
    for part in ("block", "position", "tied_embedding", "final_norm", "absolute_positions", "gradients"):
        assert getattr(ours.model, part) == getattr(large.model, part), part
    assert ours.model.layers % 2 == 0 and ours.model.quantizer.kind == "vq"
    assert ours.train.optimizer == large.train.optimizer and ours.data.order == "streams"
    assert ours.train.updates_per_sequence > 1
    if name.endswith("-small"):
        assert (ours.model.window, ours.model.quantizer.codes) == (512, 512)


@pytest.mark.parametrize("name", [f"{name}{size}" for name in PAPER for size in ("", "-small")])
def test_the_parameters_that_are_told(name):
    text = (recipes_folder() / "lm" / f"{name}.yaml").read_text()
    told = re.search(r"([\d,]{9,}) parameters|`describe`: ([\d,]{9,})", " ".join(re.split(r"\s*\n# ", text)))
    assert describe(model(name), 2048)["parameters"] == int((told[1] or told[2]).replace(",", ""))


@pytest.mark.parametrize("name", PAPER)
def test_a_sequence_is_as_long_as_the_papers(name):
    train = settings(name).train
    assert train.seq_len * train.updates_per_sequence == {"imagenet64": 64 * 64 * 3}.get(name, 8192)


@pytest.mark.parametrize("name", [name for name in recipes() if name.startswith("lm/")])
def test_every_recipe_is_valid(name):
    load_config(name, [], RunConfig)
