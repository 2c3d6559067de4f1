"""What went out comes back: the same weights, codebooks, numbers and texts; and one line for what does not."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny_run import tiny_run

from transformer_vq.cli import run as command
from transformer_vq.training import load_run, run

transformers = pytest.importorskip("transformers")

VARIANTS = {
    "bytes": {"model__conv": 3, "model__quantizer": {"codes": 8, "dead_code_threshold": 1.0, "init": "kmeans"}},
    "bpe": {
        "data__tokenizer": "bpe:280",
        "model__block": "transformer",
        "model__position": "rotary",
        "model__tied_embedding": True,
        "model__logit_scale": 0.5,
        "model__per_layer": {"0": {"kind": "fsq", "levels": [3, 3]}, "1": {"kind": "simvq", "codes": 8}},
    },
    "fp64": {"train__precision": "fp64", "model__absolute_positions": True, "data__tokenizer": "bytes+3"},
}


def answers(capsys, run_dir: str) -> tuple[dict, str]:
    """What `eval` and `generate` say of a run."""
    capsys.readouterr()
    assert command(["eval", run_dir, "--split", "test", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    asked = ["generate", run_dir, "--prompt", "12 green", "--tokens", "30", "--temperature", "0.7", "--json"]
    assert command(asked) == 0
    told = json.loads(capsys.readouterr().out)
    return {key: scores[key] for key in ("step", "contexts")}, told["texts"]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, id=name, marks=[pytest.mark.slow] * (name != "bytes"))
        for name, changes in VARIANTS.items()
    ],
)
def test_there_and_back_is_bitwise(tmp_path, capsys, changes):
    config = tiny_run(tmp_path, **changes)
    run(config, quiet=True)
    there, back = str(tmp_path / "out"), str(tmp_path / "back")
    assert command(["export", config.run_dir, there]) == 0
    assert command(["import", there, back, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"folder": there, "run": back, "step": 20}
    one, two = load_run(config.run_dir), load_run(back)
    assert one.model.state_dict().keys() == two.model.state_dict().keys()
    for name, tensor in one.model.state_dict().items():
        other = two.model.state_dict()[name]
        assert torch.equal(tensor, other) and tensor.dtype == other.dtype, name
    assert two.tokenizer.sha256 == one.tokenizer.sha256 and type(two.tokenizer) is type(one.tokenizer)
    assert two.config.train == one.config.train and two.config.data.source == one.config.data.source
    here = f"data.cache={config.data.cache}"
    assert command(["describe", back, here]) == 0 and command(["doctor", back, here, "--batches", "1"]) == 0
    assert answers(capsys, back) == answers(capsys, config.run_dir)
    assert command(["export", back, str(tmp_path / "again")]) == 0
    for name in ("model.safetensors", "tokenizer.json", "config.json", "hub_models.py"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def fine_tuned(tmp_path, config) -> tuple[str, torch.nn.Module]:
    """An exported run after two steps of a foreign loop, saved by `save_pretrained`."""
    from transformer_vq.hub import TransformerVQForCausalLM

    assert command(["export", config.run_dir, str(tmp_path / "out")]) == 0
    net = TransformerVQForCausalLM.from_pretrained(tmp_path / "out").train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for seed in range(2):
        tokens = torch.randint(256, (4, 24), generator=torch.Generator().manual_seed(seed))
        net(tokens, labels=tokens).loss.backward()
        optimizer.step()
    net.save_pretrained(tmp_path / "tuned")
    return str(tmp_path / "tuned"), net.eval()


def test_what_was_trained_elsewhere_comes_back_and_training_goes_on(tmp_path, capsys):
    config = tiny_run(tmp_path)
    run(config, quiet=True)
    tuned, net = fine_tuned(tmp_path, config)
    back = str(tmp_path / "back")
    assert command(["import", tuned, back]) == 2
    assert "tuned: holds no tokenizer.json; save the tokenizer there, or say data.tokenizer=" in capsys.readouterr().err
    assert command(["import", tuned, str(tmp_path / "named"), "data.tokenizer=bytes"]) == 0
    shutil.copy(tmp_path / "out" / "tokenizer.json", tuned)
    assert command(["import", tuned, back]) == 0
    loaded, tokens = load_run(back), torch.arange(40)[None]
    assert loaded.step == 22 and loaded.tokenizer.name == "bytes" and loaded.config.data.tokenizer == "bytes"
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens).logits, net(tokens).logits)
        assert not torch.equal(loaded.model(tokens).logits, load_run(config.run_dir).model(tokens).logits)
    data = f"data.cache={config.data.cache}"
    capsys.readouterr()
    for flags in ([], ["--resume"]):  # there is no optimizer's state, and nothing is trained from scratch in its place
        assert command(["train", f"{back}/config.yaml", data, *flags]) == 2
        assert f"imported, without an optimizer's state to go on with; train.init_from={back} starts" in (
            capsys.readouterr().err
        )
    asked = ["train", f"{back}/config.yaml", data, f"run_dir={tmp_path / 'more'}", f"train.init_from={back}"]
    assert command([*asked, "train.steps=3", "train.warmup=0", "train.lr=1e-9"]) == 0
    more = load_run(str(tmp_path / "more"))
    for name, tensor in loaded.model.named_parameters():
        assert torch.allclose(more.model.get_parameter(name), tensor, atol=1e-6), name


def test_a_bf16_folder_is_widened_and_new_tokens_are_kept(tmp_path):
    config = tiny_run(tmp_path)
    run(config, quiet=True)
    assert command(["export", config.run_dir, str(tmp_path / "out")]) == 0
    name = tmp_path / "out"
    net = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, trust_remote_code=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    net.resize_token_embeddings(len(tokenizer))
    net.save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    assert command(["import", str(tmp_path / "half"), str(tmp_path / "back")]) == 0
    loaded = load_run(str(tmp_path / "back"))
    assert loaded.model.config.vocab_size == loaded.tokenizer.vocab_size == 257
    assert loaded.tokenizer.encode("a<|end|>") == [97, 256]
    assert loaded.model.embedding.weight.dtype == torch.float32
    assert torch.equal(loaded.model.embedding.weight.bfloat16(), net.get_input_embeddings().weight)
    assert torch.equal(loaded.model.layers[1].quantizer.ema_sum, net.model.layers[1].quantizer.ema_sum)
    assert command(["eval", str(tmp_path / "back"), f"data.cache={config.data.cache}"]) == 0


def test_what_is_none_of_ours_or_damaged_is_one_line(tmp_path, capsys):
    config = tiny_run(tmp_path)
    run(config, quiet=True)
    assert command(["export", config.run_dir, str(tmp_path / "good")]) == 0

    def refused(change, *more: str) -> str:
        folder = tmp_path / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "good", folder)
        change(folder)
        capsys.readouterr()
        assert command(["import", str(folder), str(tmp_path / "new"), *more]) == 2
        assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".writing-*"))
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    def settings(**changes):
        def change(folder):
            tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            (folder / "config.json").write_text(json.dumps(tree | changes), encoding="utf-8")

        return change

    weights = (tmp_path / "good" / "model.safetensors").read_bytes()
    model = json.loads((tmp_path / "good" / "config.json").read_text(encoding="utf-8"))["model"]
    assert "model_type = llama: must be transformer_vq" in refused(settings(model_type="llama"))
    assert "widht: no such key" in refused(settings(model=model | {"widht": 3}))
    fewer = model | {"layers": 1, "per_layer": {"0": model["per_layer"]["0"]}}
    assert "weights are not those of its config.json: unexpected" in refused(settings(model=fewer))
    assert "mismatched" in refused(settings(model=model | {"key_dim": 4}))
    assert "missing" in refused(settings(model=model | {"conv": 3}))
    assert "damaged, or of no model" in refused(lambda folder: (folder / "config.json").write_text("{"))
    assert "holds no config.json" in refused(lambda folder: (folder / "config.json").unlink())
    adapter = refused(lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"))
    assert "merge_and_unload().save_pretrained" in adapter
    for cut in (weights[:-9], weights[:4], b""):
        assert "weights are not readable" in refused(lambda folder: (folder / "model.safetensors").write_bytes(cut))
    assert "weights are not readable" in refused(lambda folder: (folder / "model.safetensors").unlink())
    assert "holds no tokenizer.json" in refused(lambda folder: (folder / "tokenizer.json").unlink())
    for text in ("{", "[]", '{"model": {}}'):
        assert "not a tokenizer.json" in refused(lambda folder: (folder / "tokenizer.json").write_text(text))
    assert "train.stepz: no such key" in refused(lambda folder: None, "train.stepz=3")
    assert "model.layers=3: model and seed are the folder's" in refused(lambda folder: None, "model.layers=3")
    assert command(["import", str(tmp_path / "good"), str(tmp_path / "run")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert command(["import", str(tmp_path / "nowhere"), str(tmp_path / "new")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
