"""What a stream cannot show is replaced, in every command; one that nobody reads any more, or that is full, is one line
or none."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from transformer_vq.cli import run
from transformer_vq.cli.console import print_lines, table

STUDY = """question: "‖α‖?"
base: recall/mqar
run_dir: {folder}
variants: {{"α ‖x‖ 漢": {{model.quantizer.codes: 16}}, "[red]β[/]": {{model.quantizer.codes: 32}}}}
seeds: [0]
"""


class Terminal(io.TextIOWrapper):
    """A stream of a certain encoding that takes itself for a terminal."""

    def isatty(self) -> bool:
        return True


def shown(monkeypatch, encoding: str, arguments: list[str], terminal: bool = False) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command whose streams have that encoding."""
    kind = Terminal if terminal else io.TextIOWrapper
    streams = {name: kind(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    code = run(arguments)
    monkeypatch.undo()
    return code, *(stream.buffer.getvalue().decode(encoding) for stream in streams.values())


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("cp1252", marks=pytest.mark.slow)])
def test_every_command_prints_in_every_encoding(monkeypatch, tmp_path, trained, encoding):
    study = tmp_path / "study.yaml"
    study.write_text(STUDY.format(folder=tmp_path / "out"), encoding="utf-8")
    commands = [
        ["eval", trained, "--max-tokens", "50"],
        ["generate", trained, "--prompt", "‖漢", "--tokens", "3"],
        ["length", trained, "--times", "2"],
        ["describe", "lm/tiny"],
        ["doctor", trained, "--batches", "1"],
        ["data", trained],
        ["train", trained, "--dry-run"],
        ["images", "images/tiny", "data.source=digits", "--dry-run"],
        ["study", "plan", str(study), "--no-trial"],
        ["study", "report", str(study)],
        *([command, "--help"] for command in ("train", "generate", "study", "bench", "images")),
    ]
    for arguments in commands:
        for terminal in (False, True):
            assert shown(monkeypatch, encoding, arguments, terminal)[0] == 0, (arguments, terminal)
    assert shown(monkeypatch, encoding, ["eval", "‖漢"])[0] == 2


def test_what_can_be_shown_is_shown_and_the_rest_replaced(monkeypatch, trained):
    assert "‖q‖/‖k‖" in shown(monkeypatch, "utf-8", ["eval", trained])[1]
    assert "?q?/?k?" in shown(monkeypatch, "cp1252", ["eval", trained])[1]
    assert (
        "caf\xe9 ?" in shown(monkeypatch, "latin-1", ["generate", trained, "--prompt", "café 漢", "--tokens", "0"])[1]
    )
    assert "error: nowhere ?: no" in shown(monkeypatch, "ascii", ["train", "nowhere 漢"])[2]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_json_is_json_in_every_encoding(monkeypatch, tmp_path, trained, encoding):
    out = shown(monkeypatch, encoding, ["generate", trained, "--prompt", "‖漢é", "--tokens", "2", "--json"])[1]
    assert json.loads(out)["texts"][0]["prompt"] == "‖漢é" and out.isascii()


def test_a_process_of_another_encoding(trained):
    done = subprocess.run(
        [sys.executable, "-m", "transformer_vq", "eval", trained],
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"?q?/?k?" in done.stdout


def test_files_are_utf_8_whatever_the_locale(tmp_path, settings):
    (tmp_path / "base.yaml").write_text('extends: lm/tiny\ndata: {document_separator: "‖"}\n', encoding="utf-8")
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    call = [sys.executable, "-m", "transformer_vq", "train", str(tmp_path / "base.yaml"), *settings]
    done = subprocess.run(
        [*call, f"run_dir={tmp_path / 'run'}", "-q"], env={**os.environ, **plain}, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert "document_separator: ‖" in (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    again = subprocess.run([*call, "data.source=schön"], env={**os.environ, **plain}, capture_output=True, check=False)
    assert again.stderr == b"error: data.source = sch??n: is not text in this locale, whose encoding is ascii\n"


def test_a_reader_that_leaves_early_causes_no_traceback():
    for command in ("train --help", "describe lm/tiny --json"):
        program = f"{sys.executable} -m transformer_vq {command} | true"
        assert subprocess.run(["sh", "-c", program], capture_output=True, check=False).stderr == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
def test_a_full_disk_and_a_closed_stream():
    program = f"{sys.executable} -m transformer_vq --help"
    done = subprocess.run(["sh", "-c", f"{program} > /dev/full"], capture_output=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(rb"error: (standard output|a file: cannot be written): No space left on device\n", done.stderr)
    done = subprocess.run(["sh", "-c", f"{program} >&-"], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_names_are_text_in_tables_and_never_markup():
    out = Console(file=io.StringIO(), width=120)
    rows = table("[red]arm", "β[/]", title="[bold]t")
    rows.add_row("[link=x]y[/link]", "\x1b[31mred :smile: \a")
    out.print(rows)
    print_lines(out, {"[b]": "[i]i[/i]"})
    text = out.file.getvalue()
    for part in ("[red]arm", "β[/]", "[bold]t", "[link=x]y[/link]", "\N{REPLACEMENT CHARACTER}[31mred :smile:", "[b]"):
        assert part in text
    assert "\x1b" not in text and "\a" not in text
