"""The language-model task on a tiny corpus: exact resume, warm starts, summaries, and what a run folder holds."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from helpers import timeless
from tiny_run import tiny_run

from transformer_vq.config import ConfigError, RunConfig, load_config
from transformer_vq.data.documents import Piece
from transformer_vq.data.tokenizers import train_bpe
from transformer_vq.evaluation import evaluate
from transformer_vq.training import LanguageTask, TrainingInterrupted, load_run, run
from transformer_vq.training.checkpoints import load_tensors


def records(config: RunConfig) -> list[dict]:
    with open(f"{config.run_dir}/metrics.jsonl") as file:
        return [timeless(json.loads(line)) for line in file]


def tensors(config: RunConfig, step: int = 20) -> dict[str, torch.Tensor]:
    folder = Path(config.run_dir) / "checkpoints" / f"step-{step:08d}"
    parts = ("model", "model-optimizer", *(["carried-0"] if config.data.order == "streams" else []))
    return {f"{part}/{k}": v for part in parts for k, v in load_tensors(folder / f"{part}.safetensors").items()}


DROPOUTS = {f"model__dropout_{where}": 0.2 for where in ("embedding", "sinusoid", "residual", "layer")}


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Pictures take longer than these runs; one test draws them."""
    if "run_folder" not in request.node.name:
        monkeypatch.setattr("transformer_vq.evaluation.plots.write_plots", lambda folder: [])


@pytest.mark.parametrize(
    "settings",
    [
        {"data__order": "windows", **DROPOUTS},
        {"data__order": "streams", "data__document_boundaries": "reset", **DROPOUTS},
        {"data__order": "streams", "train__updates_per_sequence": 3, "train__optimizer": "muon", "model__conv": 4},
        {"data__order": "streams", "model__per_layer": {"0": {"kind": "none"}, "1": {"start_step": 12}}},
        {"model__quantizer": {"codes": 8, "init": "kmeans", "start_step": 6, "dead_code_threshold": 0.5}},
    ],
    ids=["windows", "streams", "muon", "growing-state", "late-start"],
)
def test_resumed_equals_straight_bit_for_bit(tmp_path, monkeypatch, settings):
    settings = {"train__micro_batch": 2, **settings}
    straight, stopped = (tiny_run(tmp_path, name, **settings) for name in ("straight", "stopped"))
    want = run(straight, quiet=True)
    set_step = LanguageTask.set_step
    monkeypatch.setattr(
        LanguageTask,
        "set_step",
        lambda self, step: [set_step(self, step), os.kill(os.getpid(), signal.SIGINT) if step == 9 else None],
    )
    with pytest.raises(TrainingInterrupted, match="after step 10 of 20"):
        run(stopped, quiet=True)
    monkeypatch.undo()
    got = run(stopped, quiet=True, resume=True)
    assert records(stopped) == records(straight)
    expected = tensors(straight)
    assert tensors(stopped).keys() == expected.keys()
    for name, tensor in tensors(stopped).items():
        assert torch.equal(tensor, expected[name]), name
    assert got["test"] == want["test"]


def test_streams_carry_their_state_and_windows_do_not(tmp_path, monkeypatch):
    seen = []
    forward = LanguageTask.losses

    def spy(self, player, module, batch):
        seen.append(0 if not self.states else int(self.states[batch.slot].position[0]))
        return forward(self, player, module, batch)

    monkeypatch.setattr(LanguageTask, "losses", spy)
    run(tiny_run(tmp_path, "streams", data__order="streams", train__updates_per_sequence=3, train__steps=6), quiet=True)
    assert seen == [0, 24, 48, 72, 24, 48]  # before the fresh rows are reset
    seen.clear()
    run(tiny_run(tmp_path, "windows", train__steps=2), quiet=True)
    assert seen == [0, 0]


def test_summary_and_records(tmp_path):
    config = tiny_run(tmp_path, eval__every=10, eval__max_tokens=100)
    summary = run(config, quiet=True)
    for split in ("valid", "test"):
        assert summary[split]["bits_per_byte"] > 0 and summary[split]["perplexity"] > 1
        assert {"layer0/perplexity", "layer1/usage"} <= summary[split].keys()
    assert summary["tokens"] == 20 * 4 * 24 and summary["steps"] == 20 and summary["parameters"] > 1000
    assert summary["versions"]["torch"] == torch.__version__
    train, valid, test = ([r for r in records(config) if r["split"] == s] for s in ("train", "valid", "test"))
    assert [r["step"] for r in train] == list(range(1, 21)) and [r["tokens"] for r in train][-1] == 1920
    assert [r["step"] for r in valid] == [10, 20] and [r["step"] for r in test] == [20]
    assert valid[0]["tokens"] == 960  # tokens trained on, not tokens evaluated
    one = train[4]
    assert one["bits_per_byte"] == pytest.approx(one["loss_lm"] / math.log(2))  # one token is one byte
    assert one["loss"] == pytest.approx(one["loss_lm"] + 1e-4 * one["loss_commit"])
    assert {"lr", "grad_norm", "layer0/perplexity", "layer1/norm_ratio"} <= one.keys()
    for name in ("task_share", "key_rank", "code_rank"):
        assert [r["step"] for r in train if f"layer0/{name}" in r] == [1, 10, 20]
    assert sum(r["loss"] for r in train[-3:]) < sum(r["loss"] for r in train[:3])


def test_the_run_folder_says_everything(tmp_path):
    config = tiny_run(tmp_path, model__per_layer={"1": {"estimator": "rotation"}})
    summary = run(config, quiet=True)
    folder = tmp_path / "run"
    written = load_config(folder, [], RunConfig)
    assert [q["estimator"] for q in written.model.per_layer.values()] == ["ste", "rotation"]
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert list((folder / "plots").glob("*.png"))
    loaded = load_run(str(folder))
    assert loaded.step == 20 and not loaded.model.training
    split = LanguageTask(config, torch.device("cpu")).mixture.sources[""].splits["test"]
    assert evaluate(loaded.model, split, batch_size=2)["bits_per_byte"] == summary["test"]["bits_per_byte"]
    assert run(written, quiet=True) == summary  # its own config file is the same config


@pytest.mark.parametrize("before", [{"kind": "none"}, {"kind": "fsq", "levels": [4, 2]}, {"kind": "vq", "codes": 4}])
def test_warm_start_takes_what_fits(tmp_path, before, capsys):
    """A quantizer is taken whole or not at all: a codebook of other size leaves its flag behind too."""
    source = tiny_run(tmp_path, "source", model__quantizer=before)
    run(source, quiet=True)
    config = tiny_run(tmp_path, "warm", train__init_from=f"{source.run_dir}@20", train__steps=1, train__lr=1e-12)
    run(config)
    got, want = tensors(config, 1), tensors(source)
    for name, tensor in got.items():
        if name.startswith("model/") and ".quantizer." not in name:
            torch.testing.assert_close(tensor, want[name], rtol=0, atol=1e-10)
    assert "model/layers.0.quantizer.ema_sum" in got
    screen = " ".join(capsys.readouterr().err.split())
    assert "6 start fresh (layers.0.quantizer" in screen and ("not used" in screen) == (before["kind"] != "none")


def test_a_warm_start_from_other_tokens_leaves_embedding_and_head_fresh(tmp_path, capsys):
    """Two vocabularies of 280, trained on two texts: their rows mean other tokens. By content, whatever the name."""
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    source = tiny_run(tmp_path, "source", data__tokenizer="bpe:280", train__steps=2)
    run(source, quiet=True)
    other.write_text(text.read_text().replace("green bottles", "yellow lemons"))
    warm = {"train__init_from": source.run_dir, "train__steps": 1, "train__lr": 1e-12}
    elsewhere = {"data__source": str(other), **warm}
    run(tiny_run(tmp_path, "trained anew", data__tokenizer="bpe:280", **elsewhere))
    screen = " ".join(capsys.readouterr().err.split())
    assert "its tokenizer is another: embedding and head start fresh" in screen
    run(tiny_run(tmp_path, "its own", data__tokenizer=source.run_dir, **elsewhere))
    assert "its tokenizer is another" not in " ".join(capsys.readouterr().err.split())
    theirs = load_tensors(Path(source.run_dir) / "checkpoints" / "step-00000002" / "model.safetensors")
    for name, taken in (("trained anew", False), ("its own", True)):
        ours = load_tensors(tmp_path / name / "checkpoints" / "step-00000001" / "model.safetensors")
        for tensor in ("embedding.weight", "head.weight"):
            same = torch.allclose(ours[tensor], theirs[tensor], rtol=0, atol=1e-9)
            assert same == taken, (name, tensor)


def test_a_run_goes_on_with_its_own_tokenizer_alone(tmp_path, monkeypatch):
    """The file that `data.tokenizer` names has become another since."""
    file = tmp_path / "t.json"
    text = Piece((tmp_path / "text.txt").read_bytes() if (tmp_path / "text.txt").exists() else b"green", True, "", 0)
    train_bpe(260, [text]).save(tmp_path)
    (tmp_path / "tokenizer.json").rename(file)
    config = tiny_run(tmp_path, data__tokenizer=str(file), checkpoint__every=2, train__steps=4)
    set_step = LanguageTask.set_step
    stop = lambda self, step: [set_step(self, step), os.kill(os.getpid(), signal.SIGINT) if step == 2 else None]
    monkeypatch.setattr(LanguageTask, "set_step", stop)
    with pytest.raises(TrainingInterrupted):
        run(config, quiet=True)
    monkeypatch.undo()
    monkeypatch.setattr("transformer_vq.evaluation.plots.write_plots", lambda folder: [])
    before = file.read_text()
    train_bpe(260, [Piece(b"lemon lemon", True, "", 0)]).save(tmp_path)
    (tmp_path / "tokenizer.json").rename(file)
    with pytest.raises(ConfigError, match="is no longer the tokenizer that"):
        run(config, quiet=True, resume=True)
    file.write_text(before)
    assert run(config, quiet=True, resume=True)["steps"] == 4


def test_a_warm_start_with_a_start_step_begins_unquantized(tmp_path):
    source = tiny_run(tmp_path, "source", train__steps=2)
    run(source, quiet=True)
    quantizer = source.model.quantizer.model_dump() | {"start_step": 2}
    config = tiny_run(
        tmp_path,
        "warm",
        train__init_from=source.run_dir,
        train__steps=3,
        model__quantizer=quantizer,
        model__per_layer=None,
    )
    run(config, quiet=True)
    own = [r["loss"] - r["loss_lm"] for r in records(config) if r["split"] == "train"]
    assert own[:2] == [0, 0] and own[2] > 0


@pytest.mark.parametrize(
    ("origin", "says"),
    [
        ("nowhere", "there is no run folder"),
        ("{run}@7", "steps that have one: 20"),
        ("{run}@worst", "no such checkpoint"),
    ],
)
def test_a_warm_start_from_nothing_is_refused(tmp_path, origin, says):
    source = tiny_run(tmp_path, "source")
    run(source, quiet=True)
    config = tiny_run(tmp_path, "warm", train__init_from=origin.format(run=source.run_dir))
    with pytest.raises(ConfigError, match=says):
        run(config, quiet=True)
    assert not (tmp_path / "warm").exists()


def test_full_attention_is_evaluated_in_windows(tmp_path):
    summary = run(tiny_run(tmp_path, model__quantizer={"kind": "none"}, train__steps=2), quiet=True)
    assert summary["test"]["context"] == 24


def test_accumulation_equals_one_batch(tmp_path):
    """Codebooks too: statistics of all micro-batches are applied once a step."""
    whole, parts = (
        tiny_run(
            tmp_path, f"m{size}", train__micro_batch=size, train__precision="fp64", data__document_boundaries="reset"
        )
        for size in (4, 1)
    )
    run(whole, quiet=True)
    run(parts, quiet=True)
    want = tensors(whole)
    for name, tensor in tensors(parts).items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-9, atol=1e-10, msg=name)
    assert want["model/layers.0.quantizer.ema_sum"].dtype == torch.float64


def test_bf16_learns_and_keeps_its_weights_wide(tmp_path):
    config = tiny_run(tmp_path, train__precision="bf16", data__order="streams")
    run(config, quiet=True)
    losses = [r["loss"] for r in records(config) if r["split"] == "train"]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(t.dtype != torch.bfloat16 for name, t in tensors(config).items() if name.startswith("model"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model__vocab_size": 100}, r"model\.vocab_size = 100: must be at least 256"),
        ({"train__seq_len": 100_000}, r"train\.seq_len = 100000"),
        ({"data__source": "/nowhere.txt"}, "nowhere"),
    ],
)
def test_bad_input_leaves_no_run(tmp_path, settings, says):
    with pytest.raises(ConfigError, match=says):
        run(tiny_run(tmp_path, **settings), quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_first_screen_says_what_is_about_to_happen(tmp_path, capsys):
    run(tiny_run(tmp_path, train__steps=1))
    screen = capsys.readouterr().err
    for heading in ("data", "model", "state", "attention", "training", "device", "writes to"):
        assert f"\n{heading} " in f"\n{screen}"
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.timeout(3600)  # what a time limit interrupts in a compiler looks like an error of the compiler
def test_compiled_equals_eager(tmp_path):
    eager, compiled = (
        tiny_run(tmp_path, str(on), train__compile=on, train__precision="fp64", eval__every=10) for on in (False, True)
    )
    run(eager, quiet=True)
    run(compiled, quiet=True)
    want = tensors(eager)
    for name, tensor in tensors(compiled).items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-9, atol=1e-10, msg=name)


def test_a_backend_that_cannot_run_here_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = tiny_run(tmp_path, model__backend="triton")
    with pytest.raises(ConfigError, match="backend triton: needs a GPU, and tensors are on cpu") as error:
        run(config, quiet=True)
    assert "\n" not in str(error.value) and not Path(config.run_dir).exists()
