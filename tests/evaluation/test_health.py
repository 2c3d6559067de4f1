"""Codebook health of a whole split: of all its keys at once, however it was cut."""

from __future__ import annotations

import pytest
import torch
from models_for_evaluation import tiny_model, tiny_split

from transformer_vq.evaluation import language
from transformer_vq.evaluation.language import evaluate

NAMES = {"usage", "perplexity", "dead_codes", "norm_ratio", "cosine", "relative_error", "key_rank", "code_rank"}


def effective_rank(rows):
    """exp(entropy of the singular values) of (H, N, K), mean over heads."""
    sigma = torch.linalg.svdvals(rows.double())
    return torch.special.entr(sigma / sigma.sum(-1, keepdim=True)).sum(-1).exp().mean()


def keys_and_results(model, tokens):
    """What every quantizer saw and gave when the text is read in one call."""
    seen = []
    hooks = [
        layer.quantizer.register_forward_hook(lambda _, inputs, result: seen.append((inputs[0], result)))
        for layer in model.layers
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("kind", ["vq", "fsq"])
def test_equals_the_numbers_of_all_keys_at_once(kind, monkeypatch):
    monkeypatch.setattr(language, "PIECE", 9)
    model, split = tiny_model(kind), tiny_split(200)
    got = evaluate(model, split, "full", batch_size=1)
    tokens = torch.from_numpy(split.tokens[None, :-1].astype("int64"))
    for i, (k, result) in enumerate(keys_and_results(model, tokens)):
        heads, size, _ = model.layers[i].quantizer.codebook.shape
        counts = torch.stack([torch.bincount(result.codes[0, h], minlength=size) for h in range(heads)]).double()
        share = counts / counts.sum(-1, keepdim=True)
        q, width = result.quantized, k.norm(dim=-1)
        want = {
            "usage": (counts > 0).double().mean(),
            "perplexity": torch.special.entr(share).sum(-1).exp().mean(),
            "dead_codes": (counts == 0).sum(-1).double().mean(),
            "norm_ratio": (q.norm(dim=-1) / width).mean(),
            "cosine": torch.cosine_similarity(k, q, dim=-1).mean(),
            "relative_error": ((k - q).norm(dim=-1) / width).mean(),
            "key_rank": effective_rank(k[0]),
            "code_rank": effective_rank(model.layers[i].quantizer.codebook.detach()),
        }
        assert {name: got[f"layer{i}/{name}"] for name in NAMES} == pytest.approx(
            {name: value.item() for name, value in want.items()}, rel=1e-6
        )


def test_overlapping_windows_count_every_key_once(monkeypatch):
    model, split = tiny_model(layers=1), tiny_split(101)  # in one layer, keys don't depend on the context
    full, windows = evaluate(model, split, "full"), evaluate(model, split, 8)
    for name in NAMES:
        assert windows[f"layer0/{name}"] == pytest.approx(full[f"layer0/{name}"], rel=1e-10)


def test_layers_that_do_not_quantize_have_no_health():
    got = evaluate(tiny_model("vq", per_layer={"1": {"kind": "none"}}), tiny_split(60), 16)
    assert {key for key in got if "/" in key} == {f"layer0/{name}" for name in NAMES}


def test_nothing_listens_afterwards():
    model = tiny_model()
    evaluate(model, tiny_split(60))
    assert not any(layer.quantizer._forward_hooks for layer in model.layers)
