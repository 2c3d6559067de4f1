"""The console: what is printed where, exit codes, and one line for every error."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from transformer_vq.cli import COMMANDS, run

TINY = [
    "train.steps=4",
    "train.seq_len=32",
    "train.batch_size=2",
    "train.warmup=1",
    "eval.every=2",
    "checkpoint.every=2",
    "model.layers=2",
    "model.width=16",
    "model.key_dim=8",
    "model.value_dim=8",
    "model.window=8",
    "model.block_len=8",
    "model.quantizer.codes=8",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("console")
    (folder / "text.txt").write_text("".join(f"line {i} of some text, {i * i % 7}\n" for i in range(600)))
    return folder


@pytest.fixture(scope="module")
def settings(place) -> list[str]:
    return [*TINY, f"data.source={place / 'text.txt'}", f"data.cache={place / 'cache'}"]


@pytest.fixture(scope="module")
def trained(place, settings) -> str:
    """A finished run."""
    folder = str(place / "run")
    assert run(["train", "lm/tiny", *settings, f"run_dir={folder}", "--quiet"]) == 0
    return folder


def error_of(capsys, *arguments: str) -> str:
    """The one line that a command with bad input prints."""
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    return err.removeprefix("error: ").strip()


# Start


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "lm/tiny", "model.width=zero"]])
def test_help_and_complaints_do_not_import_torch(arguments):
    code = f"import sys; from transformer_vq.cli import run; run({arguments}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_help_names_every_command(capsys):
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


def test_the_version_is_the_packages(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"transformer-vq {metadata.version('transformer-vq')}\n"


def test_no_arguments_show_the_help_and_no_empty_error(capsys):
    run([])
    out, err = capsys.readouterr()
    assert "doctor" in out and "error" not in err


def test_module_can_be_started_and_hands_on_the_exit_code():
    done = subprocess.run(
        [sys.executable, "-m", "transformer_vq", "plot", "nowhere"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train"], "Missing argument 'CONFIG'"),
        (["train", "lm/tiny", "--resmue"], "--resmue"),
        (["train", "lm/tinny"], "did you mean lm/tiny?"),
        (["train", "lm/tiny", "model.widht=3"], "model.widht: no such key; did you mean model.width?"),
        (["train", "lm/tiny", "model.quantizer.codes=0"], "model.quantizer.codes = 0: must be at least 1"),
        (["train", "lm/tiny", "model.quantizer.estimator=rotatoin"], "did you mean 'rotation'?"),
        (["train", "lm/tiny", "--resume", "--overwrite", "--dry-run"], "--resume goes on with a run and --overwrite"),
        (["describe", "lm/tiny", "model.backend=blockwize"], "model.backend = blockwize"),
        (["describe", "lm/tiny", "data.tokenizer=bpe:7"], "data.tokenizer = bpe:7"),
        (["data", "lm/tiny", "data.source=/nowhere"], "data.source = /nowhere: no such file or folder"),
        (["eval", "nowhere"], "nowhere"),
        (["generate", "nowhere"], "nowhere"),
        (["generate", "nowhere", "--tokens", "many"], "--tokens"),
        (["generate", "nowhere", "--top-p", "2"], "--top-p 2.0: must be greater than 0 and at most 1"),
        (["generate", "nowhere", "--prompt-file", "missing"], "--prompt-file missing: No such file"),
        (["plot", "nowhere"], "nowhere: no metrics.jsonl"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(capsys, arguments, words):
    assert words in error_of(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--context", "0"], "--context 0: must be full, or a number"),
        (["--context", "wide"], "--context wide"),
        (["model.width=3"], "model.width=3: a trained model is scored as it is"),
        (["data.tokenizer=bpe:300"], "data.tokenizer=bpe:300"),
    ],
)
def test_bad_input_of_eval(capsys, trained, arguments, words):
    capsys.readouterr()
    assert words in error_of(capsys, "eval", trained, *arguments)


def test_a_checkpoint_that_is_not_there_is_named_with_those_that_are(capsys, trained):
    capsys.readouterr()
    assert "2, 4" in error_of(capsys, "eval", f"{trained}@3")


def test_an_expected_failure_is_one_line_and_exit_code_one(capsys, place, settings):
    folder = place / "diverges"
    assert run(["train", "lm/tiny", *settings, f"run_dir={folder}", "train.lr=1e30", "train.clip=null", "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: step ")
    assert err.count("\n") == 1


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr("transformer_vq.evaluation.plots.write_plots", lambda folder: 1 / 0)
    for name in ("metrics.jsonl", "config.yaml"):
        (tmp_path / name).touch()
    with pytest.raises(ZeroDivisionError):
        run(["plot", str(tmp_path)])


# What commands print


def test_train_prints_one_json_object(capsys, trained):
    capsys.readouterr()
    assert run(["train", trained, "--json", "--quiet"]) == 0  # finished: nothing is done, its summary comes back
    out, err = capsys.readouterr()
    assert json.loads(out)["steps"] == 4
    assert err == ""


def test_other_processes_of_a_launcher_print_nothing(capsys, monkeypatch, trained):
    capsys.readouterr()
    monkeypatch.setenv("RANK", "1")
    assert run(["train", trained, "--dry-run"]) == 0
    assert run(["train", trained, "--dry-run", "--json"]) == 0
    assert run(["train", "lm/tiny", "model.widht=3"]) == 2
    assert capsys.readouterr() == ("", "")


def test_dry_run_writes_nothing(capsys, place, settings):
    folder = place / "planned"
    arguments = ["train", "lm/tiny", *settings, f"run_dir={folder}", "--dry-run"]
    assert run(arguments) == 0
    assert str(folder) in capsys.readouterr().out
    assert run([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["tokens"] == 4 * 2 * 32
    assert plan["config"]["model"]["width"] == 16
    assert not folder.exists()


def test_a_moved_run_goes_on_where_it_is(capsys, place, trained, monkeypatch):
    monkeypatch.chdir(place)
    assert run(["train", "run", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["config"]["run_dir"] == "run"
    assert plan["finished"]


def test_eval_of_several_contexts(capsys, trained):
    capsys.readouterr()
    assert run(["eval", trained, "--split", "test", "--context", "full", "--context", "16"]) == 0
    out = capsys.readouterr().out
    assert "context full" in out
    assert "context 16" in out
    assert "layer 1" in out


def test_eval_repeats_the_numbers_of_the_summary(capsys, trained):
    capsys.readouterr()
    assert run(["eval", trained, "--split", "test", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    summary = json.loads((Path(trained) / "summary.json").read_text())
    assert found["contexts"][0]["bits_per_byte"] == pytest.approx(summary["test"]["bits_per_byte"], rel=1e-6)
    assert found["step"] == 4


def test_eval_and_length_score_recurrences_apart(capsys, trained):
    capsys.readouterr()
    assert run(["eval", trained, "--split", "test", "--recurrence", "3"]) == 0
    out = capsys.readouterr().out
    assert "the 3 tokens before last occurred" in out and "more than" in out
    assert run(["eval", trained, "eval.recurrence=3", "--split", "test", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["contexts"][0]
    assert found["recurrence/all/tokens"] + found["recurrence/none/tokens"] == found["tokens"]
    assert run(["length", trained, "--times", "4", "--recurrence", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [group["group"] for group in found["recurrences"][trained]][:2] == ["all", "none"]
    assert run(["length", trained, "--times", "4", "--recurrence", "3"]) == 0
    assert "where the 3 tokens before last occurred" in capsys.readouterr().out
    assert "--recurrence" in error_of(capsys, "eval", trained, "--recurrence", "9")


def test_eval_of_other_text(capsys, place, trained):
    capsys.readouterr()
    (place / "other.txt").write_text("quite another text\n" * 400)
    assert run(["eval", trained, f"data.source={place / 'other.txt'}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["contexts"][0]["tokens"] == 379  # 5 % of 7,600 bytes, less the first


def test_eval_of_too_little_text_is_the_users_input(capsys, place, trained):
    capsys.readouterr()
    (place / "short.txt").write_text("twenty characters ..")
    assert "valid of" in error_of(capsys, "eval", trained, f"data.source={place / 'short.txt'}")


def test_generate_prints_prompt_and_text(capsys, trained):
    capsys.readouterr()
    assert run(["generate", trained, "--prompt", "line ", "--tokens", "8", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("line ")


def test_generate_batches_prompts_and_files_and_the_empty_prompt(capsys, place, trained):
    capsys.readouterr()
    (place / "prompt.txt").write_text("from a file")
    arguments = [
        "--prompt",
        "a",
        "--prompt-file",
        str(place / "prompt.txt"),
        "--samples",
        "2",
        "--tokens",
        "5",
        "--json",
    ]
    assert run(["generate", trained, *arguments]) == 0
    texts = json.loads(capsys.readouterr().out)["texts"]
    assert [text["prompt"] for text in texts] == ["a", "a", "from a file", "from a file"]
    assert all(len(text["tokens"]) == 5 for text in texts)
    assert run(["generate", trained, "--tokens", "5", "--seed", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["texts"][0]["tokens"]) == 5


def test_a_tokenizer_without_line_ends_wants_a_prompt(capsys, trained, monkeypatch):
    capsys.readouterr()
    monkeypatch.setattr("transformer_vq.data.tokenizers.Tokenizer.encode", lambda self, text: [])
    assert "give it some text" in error_of(capsys, "generate", trained)
    assert run(["generate", trained, "--prompt", "a", "--tokens", "2"]) == 0


def test_describe_folds_equal_layers_and_gives_each_in_json(capsys):
    layers = 'model.per_layer={"1-2": {estimator: rotation}}'
    assert run(["describe", "lm/tiny", layers]) == 0
    first_columns = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[:4]]
    assert first_columns == ["layers", "0", "1-2", "3"]
    assert run(["describe", "lm/tiny", layers, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [layer["estimator"] for layer in found["layers"]] == ["ste", "rotation", "rotation", "ste"]
    assert found["backend"]["reason"]


def test_data_describes_the_corpus(capsys, settings):
    assert run(["data", "lm/tiny", *settings]) == 0
    assert "sha256" in capsys.readouterr().out
    assert run(["data", "lm/tiny", *settings, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["splits"]) == {"train", "valid", "test"}


def test_plot_lists_the_pictures(capsys, trained):
    capsys.readouterr()
    assert run(["plot", trained, "--json"]) == 0
    plots = json.loads(capsys.readouterr().out)["plots"]
    assert all(Path(plot).is_file() for plot in plots)
    assert len(plots) == 4


def test_an_estimator_in_the_working_folder_is_found(tmp_path):
    (tmp_path / "mine_here.py").write_text("def double(k, q):\n    return q + 2 * (k - k.detach())\n")
    call = [Path(sys.executable).parent / "transformer-vq", "describe", "lm/tiny", "--json"]
    done = subprocess.run(
        [*call, "model.quantizer.estimator=mine_here:double"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["layers"][0]["estimator"] == "mine_here:double"


def test_the_doctor_refuses_what_a_trained_model_cannot_change(capsys, trained):
    assert "examined as it is" in error_of(capsys, "doctor", trained, "model.quantizer.estimator=rotation")
    assert "no attention backend" in error_of(capsys, "doctor", "lm/tiny", "model.backend=foo")


def test_the_doctor_prints_one_json_object(capsys, trained):
    capsys.readouterr()
    assert run(["doctor", trained, "--batches", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"layer", "kind", "checks", "status"} <= found["layers"][0].keys() and "step" in found["looked_at"]


def test_the_doctor_takes_a_certain_checkpoint(capsys, trained):
    assert run(["doctor", f"{trained}@best", "--batches", "1"]) == 0
    capsys.readouterr()
    assert "123456" in error_of(capsys, "doctor", f"{trained}@123456")


def test_a_run_dir_that_cannot_be_made_is_one_line(capsys, settings):
    assert error_of(capsys, "train", "lm/tiny", *settings, "run_dir=/dev/null/x", "--quiet").startswith("run_dir = ")


def test_a_tiny_temperature_takes_the_likeliest(capsys, trained):
    call = ["generate", trained, "--prompt", "def ", "--tokens", "5", "--json", "--temperature"]
    texts = []
    for temperature in ("0", "1e-40"):
        capsys.readouterr()
        assert run([*call, temperature]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_bits_by_position_of_several_runs(capsys, tmp_path, trained):
    picture = tmp_path / "positions.png"
    capsys.readouterr()
    assert run(["length", trained, f"{trained}@best", "--times", "4", "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "0-15" in out and "91-127" in out and picture.read_bytes().startswith(b"\x89PNG")
    assert "is there already" in error_of(capsys, "length", trained, "--plot", str(picture))
    assert "at most" in error_of(capsys, "length", trained, "--times", "100000")
    assert ".png, .svg or .pdf" in error_of(capsys, "length", trained, "--plot", "x.txt")
    assert run(["length", trained, "--times", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["positions"][trained][-1]["stop"] == 128 and found["trained_on"][trained] == 32
