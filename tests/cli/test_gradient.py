"""`doctor RUN --gradient` on a trained model, and what it refuses."""

from __future__ import annotations

import json

import pytest

from transformer_vq.cli import run
from transformer_vq.config import validate
from transformer_vq.config.recall import RecallRunConfig
from transformer_vq.training import recall

FEW = ["--gradient", "--keys", "8", "--draws", "64", "--estimator", "ste", "--estimator", "ibq"]


def test_a_language_model_is_compared_and_drawn(capsys, trained, tmp_path):
    capsys.readouterr()
    picture = tmp_path / "gradients.png"
    assert run(["doctor", f"{trained}@best", *FEW, "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("looked at the weights of step ") and ", 8 x 32 tokens of " in out.splitlines()[0]
    assert "ste (the run's)" in out and "cosine at 0.25" in out and "draws with another code" in out
    assert picture.stat().st_size > 1000


def test_the_numbers_are_one_json_object(capsys, trained):
    capsys.readouterr()
    assert run(["doctor", trained, *FEW, "--sigma", "0.5", "--through", "window", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [layer["layer"] for layer in found["layers"]] == [0, 1] and found["draws"] == 64
    assert found["through"] == "window"
    assert {a["estimator"] for a in found["layers"][0]["agreements"]} == {"ste", "ibq"}
    assert [truth["sigma"] for truth in found["layers"][0]["truths"]] == [0.5]


def test_a_recall_run_is_looked_at_too(capsys, tmp_path):
    tree = {
        "run_dir": str(tmp_path / "run"),
        "recall": {"vocab": 16, "pairs": 2, "examples": 8},
        "model": {"layers": 1, "width": 16, "key_dim": 8, "value_dim": 8, "window": 4, "quantizer": {"codes": 8}},
        "train": {"steps": 2, "batch_size": 4, "seq_len": 12, "warmup": 1},
    }
    recall.run(validate(tree, RecallRunConfig), quiet=True)
    assert run(["doctor", tree["run_dir"], *FEW]) == 0
    assert "the weights of step 2, 8 x 12 tokens" in capsys.readouterr().out
    assert run(["doctor", tree["run_dir"], *FEW, "model.window=2"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "--gradient", "--estimator", "none_such"], "none_such"),
        (["RUN", "--gradient", "--estimator", "exact"], "for images only"),
        (["RUN", "--gradient", "--draws", "4"], "draws = 4: must be an even number, at least 64"),
        (["RUN", "--gradient", "--keys", "0"], "keys = 0: too few"),
        (["RUN", "--gradient", "--sigma", "-1"], "sigma = -1.0"),
        (["RUN", "--gradient", "--plot", "x.txt"], "must end in .png"),
        (["RUN", "--gradient", "model.window=2"], "examined as it is"),
        (["lm/tiny", "--gradient"], "name a run folder"),
        (["RUN", "--draws", "128"], "--draws: belongs to --gradient"),
    ],
)
def test_bad_input_is_one_line(capsys, trained, words, message):
    capsys.readouterr()
    assert run(["doctor", *(trained if word == "RUN" else word for word in words)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_a_run_without_codebooks_has_nothing_to_compare(capsys, settings, tmp_path):
    folder = str(tmp_path / "run")
    plain = [text for text in settings if "codes" not in text] + ["model.quantizer={kind: none}"]
    assert run(["train", "lm/tiny", *plain, f"run_dir={folder}", "--quiet"]) == 0
    capsys.readouterr()
    assert run(["doctor", folder, *FEW]) == 2
    assert "no layer has a vq or simvq quantizer" in capsys.readouterr().err
