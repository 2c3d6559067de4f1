"""The paper's checkpoints through run folders and back, bit for bit, and one line for every error."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from transformer_vq import TransformerVQ, TransformerVQConfig
from transformer_vq.cli import run
from transformer_vq.convert import reference_settings, to_reference
from transformer_vq.reference_files import read_reference, write_reference
from transformer_vq.training import load_run

SHAPE = {"layers": 4, "width": 16, "key_dim": 8, "value_dim": 12, "window": 4, "block_len": 4, "gradients": "block"}
MODELS = {
    "untied": {"tied_embedding": False, "final_norm": False},
    "tied": {"tied_embedding": True, "absolute_positions": True, "logit_scale": 0.5},
}


def reference(dtype=torch.float32, vocab_size=259, **changes):
    """A model, and what the paper's code would have saved of it; nothing is left at 0 or 1."""
    config = TransformerVQConfig(vocab_size=vocab_size, quantizer={"kind": "vq", "codes": 6}, **SHAPE | changes)
    model = TransformerVQ(config, seed=3).to(dtype)
    with torch.no_grad():
        for x in (*model.parameters(), *(layer.quantizer.ema_sum for layer in model.layers)):
            x.add_(0.1 * torch.randn(x.shape))
    params = to_reference(model)
    unused = "token_embedder/bias_out"
    params[unused] = np.random.default_rng(0).normal(size=vocab_size).astype(params[unused].dtype)
    if config.tied_embedding:
        model.head_bias.data = torch.from_numpy(params[unused].copy())
    return model, params


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", [".npz", ""], ids=["npz", "orbax"])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_there_and_back_is_bitwise(tmp_path, capsys, kind, changes, dtype):
    if kind == "":
        pytest.importorskip("orbax.checkpoint")
    model, params = reference(dtype, **changes)
    settings = reference_settings(model.config)
    write_reference(tmp_path / f"theirs{kind}", params, settings)
    if kind == "":  # an Orbax folder holds no settings
        (tmp_path / "model.yaml").write_text(json.dumps({"model": model.config.model_dump(exclude={"vocab_size"})}))
    given = ["--config", str(tmp_path / "model.yaml")] if kind == "" else []
    assert run(["convert", str(tmp_path / f"theirs{kind}"), str(tmp_path / "run"), *given]) == 0
    assert "arrays" in capsys.readouterr().out

    loaded = load_run(str(tmp_path / "run"))
    tokens = torch.randint(259, (2, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens).logits, model.eval()(tokens).logits)
    assert loaded.tokenizer.name == "bytes+3" and loaded.tokenizer.encode("a") == [100]

    assert run(["convert", str(tmp_path / "run"), str(tmp_path / f"again{kind}"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["arrays"] == len(params)
    again = read_reference(tmp_path / f"again{kind}")
    assert same(again.params, params) and (again.settings == settings if kind else again.settings is None)
    assert not list(tmp_path.glob(".writing*"))


def test_a_train_state_and_prefixes_are_understood(tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    _, params = reference()
    np.savez(tmp_path / "prefixed.npz", **{f"params/{name}": x for name, x in params.items()})
    assert same(read_reference(tmp_path / "prefixed.npz").params, params)
    tree = {"step": np.array(7), "params": {"a": {"b": params["token_embedder/embs"]}}, "opt_state": {"m": np.ones(3)}}
    orbax.PyTreeCheckpointer().save(tmp_path / "state_7", tree)
    assert same(read_reference(tmp_path / "state_7").params, {"a/b": params["token_embedder/embs"]})


def test_a_converted_run_is_scored_and_continued(tmp_path, capsys):
    model, params = reference()
    write_reference(tmp_path / "theirs.npz", params, reference_settings(model.config))
    (tmp_path / "text.txt").write_text("some text to read, line by line\n" * 200)
    assert run(["convert", str(tmp_path / "theirs.npz"), str(tmp_path / "run")]) == 0
    data = [f"data.source={tmp_path / 'text.txt'}", f"data.cache={tmp_path / 'cache'}"]
    assert run(["eval", str(tmp_path / "run"), *data, "--split", "valid", "--max-tokens", "50"]) == 0
    tune = ["train.steps=1", "train.seq_len=16", "train.batch_size=2", "train.warmup=0", "eval.every=null"]
    start = [f"train.init_from={tmp_path / 'run'}", f"run_dir={tmp_path / 'tuned'}"]
    assert run(["train", str(tmp_path / "run" / "config.yaml"), *data, *tune, *start, "--quiet"]) == 0


def error_of(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert run(["convert", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys):
    model, params = reference()
    npz, out = tmp_path / "theirs.npz", tmp_path / "run"
    write_reference(npz, params, reference_settings(model.config))
    assert "no such file" in error_of(capsys, tmp_path / "none.npz", out)
    (tmp_path / "broken.npz").write_bytes(b"none")
    assert "not readable as .npz" in error_of(capsys, tmp_path / "broken.npz", out)
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    assert "holds no token_embedder/embs" in error_of(capsys, tmp_path / "other.npz", out)
    np.savez(tmp_path / "bare.npz", **params)
    assert "--config lm/enwik8" in error_of(capsys, tmp_path / "bare.npz", out)
    assert "model.layerz: no such key" in error_of(capsys, npz, out, "model.layerz=3")
    assert "parameters missing: none; unknown" in error_of(capsys, npz, out, "model.layers=2")
    assert "q_proj/kernel has shape (16, 8), (16, 4) is expected" in error_of(capsys, npz, out, "model.key_dim=4")
    assert "is there already" in error_of(capsys, npz, tmp_path)
    assert "no such model: position: rotary" in error_of(capsys, npz, out, "model.position=rotary")
    assert "would be trained anew" in error_of(capsys, npz, out, "data.tokenizer=bpe:300")
    model, params = reference(vocab_size=40)
    write_reference(tmp_path / "words.npz", params, reference_settings(model.config))
    assert "has 40 token ids, which are not bytes" in error_of(capsys, tmp_path / "words.npz", out)
    assert not out.exists() and not list(tmp_path.glob(".writing*"))

    assert run(["convert", str(npz), str(out)]) == 0
    assert "a run has its own" in error_of(capsys, out, tmp_path / "x.npz", "model.layers=2")
    assert "is there already" in error_of(capsys, out, npz)
    assert "steps that have one: 0" in error_of(capsys, f"{out}@7", tmp_path / "x.npz")
