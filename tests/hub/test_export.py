"""A run leaves: its folder loads where this package is not, and continues texts token for token as it does here."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tiny_run import tiny_run

from transformer_vq.cli import run as command
from transformer_vq.config import ConfigError, TransformerVQConfig, validate
from transformer_vq.evaluation.generation import generate
from transformer_vq.training import load_run, run

pytest.importorskip("transformers")
from transformer_vq.hub.export import export
from transformer_vq.hub.runs import from_run

ELSEWHERE = """
import importlib.abc, json, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformer_vq", "pydantic"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
name, prompt = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
ids = tokenizer(prompt, return_tensors="pt")
out = model.generate(**ids, max_new_tokens=16, do_sample=False)
again = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, dtype=torch.float32).train()
again(ids["input_ids"], labels=ids["input_ids"]).loss.backward()
model.save_pretrained(name + "-again")
print(json.dumps({
    "ids": ids["input_ids"][0].tolist(), "out": out[0].tolist(), "text": tokenizer.decode(out[0]),
    "special": [tokenizer.pad_token_id, model.config.pad_token_id, model.config.eos_token_id],
    "end": model.generation_config.eos_token_id, "longest": model.config.max_position_embeddings,
    "foreign": sorted(m for m in sys.modules if m.split(".")[0] in ("transformer_vq", "pydantic")),
}))
"""
VARIANTS = {
    "gau": {"model__conv": 3},
    "transformer": {
        "model__block": "transformer",
        "model__position": "rotary",
        "model__tied_embedding": True,
        "model__per_layer": {"0": {"kind": "fsq", "levels": [3, 3]}, "1": {"kind": "bsq", "bits": 3}},
    },
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Code that is loaded is copied into a cache: not the user's."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize(
    "changes", [VARIANTS["gau"], pytest.param(VARIANTS["transformer"], marks=pytest.mark.slow)], ids=VARIANTS
)
def test_it_continues_texts_elsewhere_as_it_does_here(tmp_path, changes, capsys):
    config = tiny_run(tmp_path, **changes)
    run(config, quiet=True)
    assert command(["export", config.run_dir, str(tmp_path / "out"), "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "hub_models.py"} <= set(files)
    asked = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "out"), "def é("]
    done = subprocess.run(asked, capture_output=True, text=True, encoding="utf-8", check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    here = load_run(config.run_dir)
    prompt = here.tokenizer.encode("def é(")
    assert found["ids"] == prompt and found["foreign"] == []
    assert found["out"] == prompt + list(generate(here.model, [prompt], 16, temperature=0.0)[0])
    assert found["text"] == here.tokenizer.decode(found["out"])
    assert found["special"] == [0, 0, 0] and found["end"] is None and found["longest"] >= 65_536


def test_it_comes_back_where_the_package_is(tmp_path):
    from transformers import AutoModelForCausalLM

    from transformer_vq.hub import TransformerVQForCausalLM

    config = tiny_run(tmp_path)
    run(config, quiet=True)
    assert command(["export", f"{config.run_dir}@last", str(tmp_path / "out")]) == 0
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert isinstance(net, TransformerVQForCausalLM)
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(net.eval()(tokens).logits, load_run(config.run_dir).model(tokens).logits)


def test_the_card_says_how_well_it_does(tmp_path):
    config = tiny_run(tmp_path)
    summary = run(config, quiet=True)
    command(["export", config.run_dir, str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"| test | {summary['test']['bits_per_byte']:.4f} |" in card and "| 1 | " in card
    assert config.data.source in card and "trust_remote_code=True" in card


def test_what_cannot_go_out_is_refused_and_nothing_is_written(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text("from transformer_vq.ops.estimators.rows import ste as half\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    config = tiny_run(tmp_path, model__per_layer={"1": {"estimator": "mine:half"}})
    run(config, quiet=True)
    assert command(["export", config.run_dir, str(tmp_path / "out")]) == 2
    assert "layer 1: estimator = mine:half: is code of your own" in capsys.readouterr().err
    loaded = load_run(config.run_dir)
    for changes, reason in (
        ({"per_layer": {"0": {"kind": "mine:Own", "codes": 8}}}, "layer 0: kind = mine:Own: is code of your own"),
        ({"per_layer": None, "backend": "mine:attend"}, "model.backend = mine:attend: is code of your own"),
    ):
        settings = validate({**loaded.config.model.model_dump(), **changes}, TransformerVQConfig)
        with pytest.raises(ConfigError, match=reason):
            export(
                loaded._replace(config=loaded.config.model_copy(update={"model": settings})),
                tmp_path / "run",
                tmp_path / "out",
            )
    (tmp_path / "there").mkdir()
    assert command(["export", config.run_dir, str(tmp_path / "there")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".writing-*"))


def test_a_tokenizer_that_needs_code_of_ours_is_refused(tmp_path):
    from transformer_vq.data.tokenizers.sentencepiece import SentencePieceTokenizer

    config = tiny_run(tmp_path)
    run(config, quiet=True)
    pieces = SentencePieceTokenizer.__new__(SentencePieceTokenizer)
    with pytest.raises(ConfigError, match=r"data\.tokenizer = .*native tokenizer\.json"):
        export(load_run(config.run_dir)._replace(tokenizer=pieces), tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_is_a_model_without_an_export(tmp_path, tied):
    config = tiny_run(tmp_path, model__tied_embedding=tied)
    run(config, quiet=True)
    ours, theirs = load_run(config.run_dir), from_run(config.run_dir)
    tokens = torch.tensor([ours.tokenizer.encode("def f(")])
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, ours.model(tokens).logits)
    got = theirs.generate(tokens, max_new_tokens=20, do_sample=False)[0, tokens.shape[1] :]
    want = generate(ours.model, tokens.tolist(), 20, temperature=0.0)
    assert got.tolist() == list(want[0])
    assert int(theirs.model.steps) == ours.step == 20
