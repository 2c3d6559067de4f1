"""The paper's checkpoints through run folders and back, bit for bit, and one line for every error.

golden/flax/checkpoint_3 was written as the paper's code writes: flax 0.6.11, orbax-checkpoint 0.1.7 (on JAX 0.4.13),
`save_checkpoint_multiprocess` of a `TrainState` after three updates, AdamW for the parameters, SGD for the codebooks.
params.npz beside it holds the same parameters as that process saw them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from helpers import assert_same
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from transformer_vq import TransformerVQ, TransformerVQConfig
from transformer_vq.cli import run
from transformer_vq.convert.files import read_reference, write_reference
from transformer_vq.convert.flax_tree import flat, nested, pack, unpack
from transformer_vq.convert.names import reference_settings, to_reference
from transformer_vq.files import WriteError
from transformer_vq.training import load_run

FLAX = Path(__file__).parents[1] / "golden" / "flax"
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


@pytest.mark.parametrize("kind", [".npz", ""], ids=["npz", "folder"])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_there_and_back_is_bitwise(tmp_path, capsys, kind, changes, dtype):
    model, params = reference(dtype, **changes)
    settings = reference_settings(model.config)
    write_reference(tmp_path / f"theirs{kind}", params, settings)
    if kind == "":  # a folder holds no settings
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


@pytest.mark.parametrize("file", sorted(FLAX.parent.glob("*.npz")), ids=lambda file: file.stem)
def test_a_golden_file_keeps_its_log_probabilities_as_a_run(tmp_path, file):
    golden = dict(np.load(file))
    words = {str(i): i for i in range(len(golden["params/token_embedder/embs"]))}
    Tokenizer(WordLevel(words, unk_token="0")).save(str(tmp_path / "words.json"))
    assert run(["convert", str(file), str(tmp_path / "run"), f"data.tokenizer={tmp_path / 'words.json'}"]) == 0
    with torch.no_grad():
        out = load_run(str(tmp_path / "run")).model(torch.from_numpy(golden["window0/tokens_in"]))
    want = torch.from_numpy(golden["window0/logprobs"]).double()
    assert_same({"logprobs": out.logits.double().log_softmax(-1)}, {"logprobs": want}, rtol=1e-5)
    assert run(["convert", str(tmp_path / "run"), str(tmp_path / "back.npz")]) == 0
    assert same(read_reference(tmp_path / "back.npz").params, read_reference(file).params)


@pytest.fixture
def small(tmp_path) -> str:
    """Settings of the model in golden/flax."""
    shape = {"layers": 2, "width": 4, "key_dim": 2, "value_dim": 3, "window": 4, "block_len": 4, "gradients": "block"}
    shape |= {"tied_embedding": False, "final_norm": False, "quantizer": {"kind": "vq", "codes": 3}}
    (tmp_path / "small.yaml").write_text(json.dumps({"model": shape}))
    return str(tmp_path / "small.yaml")


def test_the_file_that_the_paper_s_code_wrote(tmp_path, small):
    """Its parameters are read bitwise; from the run the whole train state comes back as the same bytes."""
    with np.load(FLAX / "params.npz") as file:
        params = dict(file)
    assert same(read_reference(FLAX / "checkpoint_3").params, params)
    assert run(["convert", str(FLAX / "checkpoint_3"), str(tmp_path / "run"), "--config", small]) == 0
    kernel = load_run(str(tmp_path / "run")).model.layers[1].q_proj.weight.T
    assert torch.equal(kernel, torch.from_numpy(params["transformer_layers_0/scanned_attn2/q_proj/kernel"]))
    assert run(["convert", str(tmp_path / "run"), str(tmp_path / "checkpoint_3")]) == 0
    written = (FLAX / "checkpoint_3" / "checkpoint").read_bytes()
    assert (tmp_path / "checkpoint_3" / "checkpoint").read_bytes() == written
    assert [path.name for path in (tmp_path / "checkpoint_3").iterdir()] == ["checkpoint"]

    (tmp_path / "checkpoint_9").write_bytes(written)  # as Flax alone saves: a file where Orbax has a folder
    assert same(read_reference(tmp_path / "checkpoint_9").params, params)


def test_a_trained_run_goes_out_without_the_old_optimizer_s_state(tmp_path, small):
    assert run(["convert", str(FLAX / "checkpoint_3"), str(tmp_path / "run"), "--config", small]) == 0
    (tmp_path / "text.txt").write_text("some text to read, line by line\n" * 200)
    data = [f"data.source={tmp_path / 'text.txt'}", f"data.cache={tmp_path / 'cache'}", f"run_dir={tmp_path / 'tuned'}"]
    tune = ["train.steps=1", "train.seq_len=16", "train.batch_size=2", "train.warmup=0", "eval.every=null"]
    start = f"train.init_from={tmp_path / 'run'}"
    assert run(["train", str(tmp_path / "run" / "config.yaml"), *data, *tune, start, "--quiet"]) == 0
    assert run(["convert", str(tmp_path / "tuned"), str(tmp_path / "out")]) == 0
    assert read_reference(tmp_path / "out").rest == {}
    with np.load(FLAX / "params.npz") as before:
        now = read_reference(tmp_path / "out").params
        assert now.keys() == set(before) and not np.array_equal(now["out_proj/kernel"], before["out_proj/kernel"])


def test_half_precision_is_widened_exactly():
    halves = torch.tensor([1.5, -0.0, float("inf"), 1e-40, 3.1415927]).bfloat16()
    packed = msgpack.ExtType(1, msgpack.packb(((5,), "bfloat16", halves.view(torch.int16).numpy().tobytes())))
    got = torch.from_numpy(flat({"x": packed})["x"].copy())
    assert got.dtype == torch.float32 and torch.equal(got.view(torch.int32), halves.float().view(torch.int32))


def test_our_msgpack_is_orbax_s():
    theirs = pytest.importorskip("orbax.checkpoint").msgpack_utils
    arrays = {"b/x": np.arange(6.0).reshape(2, 3), "b/a": np.array(3, np.int32), "a": np.ones(2, np.float32)}
    tree = {**nested(arrays), "opt_state": [None, [{"count": np.array(2)}]], "step": 7}
    assert pack(tree) == theirs.msgpack_serialize(tree)
    assert same(flat(nested(theirs.msgpack_restore(pack(nested(arrays))))), arrays)
    assert pack(unpack(pack(tree))) == pack(tree)


def test_without_orbax_its_folders_are_refused_in_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "_METADATA").write_text("{}")
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    assert "pip install 'transformer-vq[orbax]'" in error_of(capsys, tmp_path / "new", tmp_path / "run")


def test_prefixes_are_understood(tmp_path):
    _, params = reference()
    np.savez(tmp_path / "prefixed.npz", **{f"params/{name}": x for name, x in params.items()})
    assert same(read_reference(tmp_path / "prefixed.npz").params, params)


def test_folders_of_newer_orbax_are_read_and_ours_by_it(tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    _, params = reference()
    tree = {"step": np.array(7), "params": nested(params), "opt_state": [{"m": np.ones(3)}, {"n": np.ones(2)}]}
    orbax.PyTreeCheckpointer().save(tmp_path / "state_7", tree)
    assert same(read_reference(tmp_path / "state_7").params, params)
    write_reference(tmp_path / "ours", params, {})
    assert same(flat(orbax.PyTreeCheckpointer().restore(tmp_path / "ours")["params"]), params)


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
    npz, out, settings_file = tmp_path / "theirs.npz", tmp_path / "run", tmp_path / "model.yaml"
    settings_file.write_text(json.dumps({"model": model.config.model_dump(exclude={"vocab_size"})}))
    write_reference(npz, params, reference_settings(model.config))
    assert "no such file" in error_of(capsys, tmp_path / "none.npz", out)
    (tmp_path / "broken.npz").write_bytes(b"none")
    assert "not readable as a checkpoint or .npz" in error_of(capsys, tmp_path / "broken.npz", out)
    (tmp_path / "cut").write_bytes((FLAX / "checkpoint_3" / "checkpoint").read_bytes()[:-9])
    assert "incomplete input" in error_of(capsys, tmp_path / "cut", out)
    (tmp_path / "list").write_bytes(msgpack.packb([1]))
    assert "holds list, not a tree" in error_of(capsys, tmp_path / "list", out)
    (tmp_path / "words").write_bytes(msgpack.packb({"params": {"a": "text"}}))
    assert "a holds text, not an array" in error_of(capsys, tmp_path / "words", out)
    np.save(tmp_path / "one.npy", np.ones(3))
    assert "not readable" in error_of(capsys, tmp_path / "one.npy", out)
    assert "neither a file checkpoint nor Orbax's _METADATA" in error_of(capsys, tmp_path, out)
    several = f"error: {FLAX}: holds checkpoints; name one, such as {FLAX / 'checkpoint_3'}\n"
    assert error_of(capsys, FLAX, out) == several
    for text in (b"{", b"[1]", b"\xff"):
        np.savez(tmp_path / "config.npz", **params, config_json=np.frombuffer(text, np.uint8))
        assert "config_json is not the text of a JSON object" in error_of(capsys, tmp_path / "config.npz", out)
    for dtype in (np.float64, np.float16, np.int64, "V2"):
        np.savez(tmp_path / "mixed.npz", **params | {"token_embedder/embs": np.zeros((259, 16), dtype)})
        message = error_of(capsys, tmp_path / "mixed.npz", out, "--config", settings_file)
        assert "all must be float32, or all float64" in message
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


@pytest.mark.parametrize("name", ["out.npz", "out"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, name):
    _, params = reference()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np if name == "out.npz" else Path, "savez" if name == "out.npz" else "write_bytes", full)
    with pytest.raises(WriteError, match=rf"{name}: cannot be written: No space .* kB are needed"):
        write_reference(tmp_path / name, params, {})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_converted_run(tmp_path, capsys, request):
    model, params = reference()
    write_reference(tmp_path / "theirs.npz", params, reference_settings(model.config))
    request.getfixturevalue("no_room")
    assert run(["convert", str(tmp_path / "theirs.npz"), str(tmp_path / "run")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "config.yaml: cannot be written: No space left on device" in line
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.npz"]
