"""A small Llama, trained here first, is adopted: scored as it came, converted and tuned; what comes out is a run."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from helpers import assert_same
from tiny_run import write_text
from torch.nn import functional as F

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM

from transformer_vq.cli import run as command
from transformer_vq.config import DataConfig, RunConfig, load_config
from transformer_vq.data import eval_windows, prepare, window_batch
from transformer_vq.data.tokenizers import ByteTokenizer
from transformer_vq.evaluation import evaluate
from transformer_vq.hub.adopt import measure
from transformer_vq.hub.adopt.convert import chosen_layers, converted_model
from transformer_vq.hub.adopt.llama import from_llama, load
from transformer_vq.models import TransformerVQ
from transformer_vq.training import load_run, run

T = 48


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text, and beside it a Llama that has learned some of it."""
    folder = tmp_path_factory.mktemp("adopt")
    corpus = prepare(DataConfig(source=str(write_text(folder, 700)), cache=str(folder / "cache")))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=256, num_key_value_heads=2, max_position_embeddings=T, eos_token_id=None, **sizes)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(80):
        rows = window_batch(corpus.splits["train"], 0, step, range(8), 8, T)
        F.cross_entropy(model(rows.tokens).logits.flatten(0, 1), rows.labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "llama")
    (folder / "llama" / "tokenizer.json").write_text(ByteTokenizer().to_json(), encoding="utf-8")
    return folder


def adopt(place, name, *more):
    """The command's exit code."""
    settings = ["model.window=6", "model.quantizer.codes=8", "train.lr=3e-3", "train.batch_size=4", "train.log_every=1"]
    data = [f"data.source={place / 'text.txt'}", f"data.cache={place / 'cache'}", "data.document_separator=null"]
    sizes = ["--calibrate", "600", "--measure", "400"]
    return command(["adopt", str(place / "llama"), str(place / name), *data, *settings, *sizes, *more])


@pytest.fixture(scope="module")
def adopted(place):
    """A run, all layers converted, distilled for 30 steps."""
    assert adopt(place, "run", "--tokens", str(30 * 4 * T), "-q") == 0
    return place / "run", json.loads((place / "run" / "adopt.json").read_text())


def bits(model, split):
    """Bits per byte by hand, of windows that overlap by half."""
    nats, scored = 0.0, 0
    with torch.no_grad():
        for rows in eval_windows(split, T, 8):
            logits = model(rows.tokens).logits.flatten(0, 1)
            nats += F.cross_entropy(logits, rows.labels.flatten(), ignore_index=-100, reduction="sum").item()
            scored += int((rows.labels >= 0).sum())
    return nats / scored / torch.log(torch.tensor(2.0)).item()


def test_each_stage_is_scored_on_what_it_is(place, adopted):
    folder, numbers = adopted
    test = prepare(load_config(folder, [], RunConfig).data).splits["test"]
    score = {stage: numbers[stage]["bits_per_byte"] for stage in ("before", "converted", "tuned")}
    assert score["before"] == pytest.approx(bits(load(str(place / "llama")), test), rel=1e-5)
    assert score["before"] == pytest.approx(bits(load_run(str(folder / "original")).model, test), rel=1e-5)
    assert score["converted"] == pytest.approx(bits(load_run(f"{folder}@0").model, test), rel=1e-5)
    assert score["tuned"] == pytest.approx(bits(load_run(str(folder)).model, test), rel=1e-5)
    cost = score["converted"] - score["before"]
    assert cost > 0.1 and score["tuned"] < score["before"] + 0.2 * cost  # and tuning brings most of it back
    assert numbers["recovered"] == pytest.approx(
        (score["converted"] - score["tuned"]) / (score["converted"] - score["before"])
    )
    page = (folder / "adopt.md").read_text(encoding="utf-8")
    assert (
        f"{score['before']:.4f}" in page and f"{score['tuned']:.4f}" in page and (folder / "plots/adopt.png").is_file()
    )


def test_what_comes_out_is_a_run(place, adopted, capsys):
    folder, numbers = adopted
    assert command(["eval", str(folder), "--split", "test", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["contexts"][0]
    assert found["bits_per_byte"] == pytest.approx(numbers["tuned"]["bits_per_byte"], rel=1e-9)
    asked = ["--prompt", "12 green bottles", "--tokens", "20", "--temperature", "0", "--json"]
    assert command(["generate", str(folder), *asked]) == 0
    told = json.loads(capsys.readouterr().out)["texts"][0]["tokens"]
    model, read = load_run(str(folder)).model, list(b"12 green bottles")
    with torch.no_grad():
        for token in told:  # one token at a time says what the whole text says
            assert token == model(torch.tensor([read])).logits[0, -1].argmax()
            read.append(token)
    assert command(["export", str(folder), str(place / "out")]) == 0
    x = torch.randint(256, (1, 30))
    net = AutoModelForCausalLM.from_pretrained(place / "out", trust_remote_code=False).eval()
    with torch.no_grad():
        assert torch.equal(net(x).logits, load_run(str(folder)).model(x).logits)
    config = load_config(folder, [f"train.steps={numbers['steps'] + 2}"], RunConfig)
    assert run(config, resume=True, quiet=True)["steps"] == numbers["steps"] + 2


def test_codebooks_are_centres_of_the_models_own_keys(place):
    theirs = load(str(place / "llama"))
    original = from_llama(theirs)
    model = converted_model(original, with_codes(original), seed=3)
    x = torch.randint(97, 122, (6, T), generator=torch.Generator().manual_seed(0))
    assert measure.make_codebooks(original, model, [x[:2], x[2:]]) == 6 * T
    for i, layer in enumerate(model.layers):
        seen = []
        hook = theirs.model.layers[i].self_attn.k_proj.register_forward_hook(
            lambda m, a, out, seen=seen: seen.append(out)
        )
        with torch.no_grad():
            theirs(x)
        hook.remove()
        keys = seen[0].unflatten(-1, (2, 8)).permute(2, 0, 1, 3).flatten(1, 2) / 8**0.25  # (Hkv, N, K)
        distance = torch.cdist(keys, layer.quantizer.codebook)
        chosen = distance.argmin(-1)
        centres = torch.stack(
            [torch.stack([k[c == s].mean(0) for s in range(8)]) for k, c in zip(keys, chosen, strict=True)]
        )
        spread = (keys - keys.mean(1, keepdim=True)).norm(dim=-1).mean()
        assert (centres - layer.quantizer.codebook).norm(dim=-1).max() < 0.15 * spread  # ten of Lloyd's steps
        assert distance.amin(-1).mean() < 0.75 * spread


def with_codes(original, **changes):
    kept = {"quantizer": {"kind": "vq", "codes": 8, "init": "kmeans"}, "window": 6, "window_keys": "exact"}
    return original.config.model_validate({**original.config.model_dump(), **kept, **changes})


def test_damage_and_errors_are_those_of_models_with_one_such_layer(place):
    original = from_llama(load(str(place / "llama")))
    test = prepare(DataConfig(source=str(place / "text.txt"), cache=str(place / "cache"))).splits["test"]
    model = converted_model(original, with_codes(original), seed=3)
    x = torch.cat([rows.tokens for rows in itertools.islice(eval_windows(test, T, 2), 2)])
    measure.make_codebooks(original, model, [x])
    score = lambda net: evaluate(net, test, T)["bits_per_byte"]
    before, damage = measure.damage_by_layer(original, model, score)
    for i in range(2):
        alone = converted_model(original, with_codes(original, per_layer={str(1 - i): {"kind": "none"}}), 3, model)
        assert damage[i] == pytest.approx(score(alone) - before, abs=1e-6) and damage[i] != 0
    inputs = []
    hook = original.layers[1].register_forward_hook(lambda m, args, out: inputs.append((args, out[0])))
    with torch.no_grad():
        original(x)
        hook.remove()
        (args, y) = inputs[0]
        wrong = model.layers[1](*args)[0]
    want = ((wrong - y).norm() / (y - args[0]).norm()).item()
    assert measure.errors_by_layer(original, model, [x])[1]["output_error"] == pytest.approx(want, rel=1e-4)


def test_layers_by_damage_and_on_the_text(place):
    assert adopt(place, "some", "--layers", "best:1", "--tokens", "400", "--objective", "text", "-q") == 0
    numbers = json.loads((place / "some" / "adopt.json").read_text())
    damage = [layer["damage"] for layer in numbers["layers"]]
    config = load_config(place / "some", [], RunConfig)
    kinds = [q.kind for q in config.model.layer_quantizers()]
    assert kinds == ["vq" if d == min(damage) else "none" for d in damage] and config.train.teacher is None
    assert chosen_layers("0,2-3", [0.0] * 5) == [0, 2, 3] and chosen_layers("best:2", [3.0, 1.0, 2.0]) == [1, 2]


def test_conversion_alone_is_a_run_too(place, capsys):
    assert adopt(place, "alone", "--tokens", "0", "--json", "model.cache=false") == 0
    numbers = json.loads(capsys.readouterr().out)
    assert "tuned" not in numbers and numbers["converted"]["bits_per_byte"] > numbers["before"]["bits_per_byte"]
    assert command(["eval", str(place / "alone"), "--split", "test", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 0
    assert found["contexts"][0]["bits_per_byte"] == pytest.approx(numbers["converted"]["bits_per_byte"], rel=1e-9)


def test_an_interrupted_tuning_goes_on(place, capsys):
    assert adopt(place, "halfway", "--tokens", "0", "train.steps=2", "-q") == 0
    assert adopt(place, "halfway", "train.steps=2", "--resume", "-q") == 0
    numbers = json.loads((place / "halfway" / "adopt.json").read_text())
    assert numbers["steps"] == 2 and numbers["tokens"] == 2 * 4 * T and numbers["objective"] == "distill"
    assert adopt(place, "halfway", "train.steps=2", "--resume", "-q") == 0  # finished: nothing is done
    assert adopt(place, "halfway", "train.steps=2", "model.window=9", "--resume", "-q") == 2
    assert "model.window: 6 -> " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.width=64"], "model.width = 64: the weights of .* fix 32"),
        (["model.quantizer.kind=fsq"], "model.quantizer.kind = fsq: adopt makes codebooks for vq"),
        (["model.quantizer.init=normal"], "init: kmeans and start_step: 0"),
        (["--layers", "7"], '--layers "7": the model has layers 0-1'),
        (["--layers", "best:3"], "--layers best:3: written best:N, N from 1 to 2"),
        (["--layers", "0", "model.cache=false"], "--layers: with model.cache=false no layer keeps every key"),
        (["--calibrate", "1", "model.quantizer.codes=900"], "are fewer than codes = 900"),
        (["train.seq_len=1000000"], "1000000"),
        (["--resume"], "is no adopted run, it holds no adopt.json"),
    ],
    ids=str,
)
def test_wrong_wishes_are_refused_before_anything_is_written(place, capsys, more, message):
    import re

    assert adopt(place, "never", *more, "-q") == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error.strip().splitlines()) == 1, error
    assert not (place / "never").exists() and not list(place.glob(".writing-*"))


def test_other_models_and_places_are_refused(place, capsys, monkeypatch):
    GPT2Config().save_pretrained(place / "gpt2")
    for model, name, message in (
        (place / "gpt2", "new", "is of type gpt2, which adopt does not know; it knows llama"),
        (place / "nothing", "new", "no model that transformers can read"),
        (place / "llama", "llama", "is there already"),
    ):
        assert command(["adopt", str(model), str(place / name)]) == 2
        assert message in capsys.readouterr().err
    assert command(["adopt", str(place / "llama"), str(place / "gpt2"), "--resume"]) == 2
    assert "is no adopted run" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert adopt(place, "new") == 2 and "adopt: converts in one process" in capsys.readouterr().err


def test_a_quantizer_of_a_window_as_long_as_the_text_costs_nothing(place):
    original = from_llama(load(str(place / "llama")))
    model = converted_model(original, with_codes(original, window=T), seed=0)
    x = torch.randint(256, (2, T))
    with torch.no_grad():
        assert_same({"logits": model(x).logits}, {"logits": original(x).logits}, rtol=1e-5)
    assert isinstance(model, TransformerVQ) and model.layers[0].quantizes
