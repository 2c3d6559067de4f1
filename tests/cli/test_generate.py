"""`generate`: prompts are bytes, numbers go to their limits, texts end where they are told to."""

from __future__ import annotations

import io
import itertools
import json
import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_vq.cli import run
from transformer_vq.cli.generate import decoded, stop_bytes, stream


def texts(capsys, *arguments: str) -> list[dict]:
    capsys.readouterr()
    assert run(["generate", *arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)["texts"]


def error(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert run(["generate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    return err


# Bytes


def test_a_prompt_is_bytes(capsys, trained, tmp_path):
    (tmp_path / "prompt").write_bytes(b"\xff\xfe")
    argument, file = (
        texts(capsys, trained, *where, "--tokens", "4", "--seed", "3")[0]
        for where in (("--prompt", os.fsdecode(b"\xff\xfe")), ("--prompt-file", str(tmp_path / "prompt")))
    )
    assert argument == file and argument["prompt"] == "\ufffd\ufffd"
    for prompt in (b"\xff\xfe", b"caf\xc3", b"\x00\x1b[2J", "é漢😀".encode()):
        assert run(["generate", trained, "--prompt", os.fsdecode(prompt), "--tokens", "2"]) == 0


def test_a_character_may_begin_in_the_prompt_and_end_in_the_continuation():
    assert decoded(b"caf\xc3", b"\xa9s") == ("caf", "és")
    assert decoded(b"caf\xc3", b"s") == ("caf\ufffd", "s")
    assert decoded(b"\xf0\x9f", b"\x98\x80!") == ("", "😀!")
    assert decoded(b"a\xc3", b"") == ("a\ufffd", "")


@given(st.binary(max_size=12), st.binary(max_size=12))
def test_prompt_and_continuation_are_decoded_together(prompt, continuation):
    assert "".join(decoded(prompt, continuation)) == (prompt + continuation).decode(errors="replace")


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=8), st.integers(0, 30), st.lists(st.integers(0, 30), max_size=4))
def test_what_a_terminal_shows_is_the_text(text, border, cuts):
    """Streaming byte by byte, or in any pieces, shows what decoding the whole shows."""
    whole, out = text.encode(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out)
        write, rest = stream(whole[:border]), whole[border:]
        places = sorted({0, len(rest), *(c for c in cuts if c < len(rest))})
        for a, b in itertools.pairwise(places):
            write(0, rest[a:b])
        write(0, b"", final=True)
    assert out.getvalue() == "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)


def test_a_tokenizer_of_text_refuses_other_bytes(capsys, trained_bpe, tmp_path):
    (tmp_path / "prompt").write_bytes(b"good\xff")
    said = error(capsys, trained_bpe, "--prompt", os.fsdecode(b"\xff\xfe"))
    assert "--prompt: is not UTF-8 at byte 0; this run's tokenizer (BPE" in said
    assert "prompt: is not UTF-8 at byte 4" in error(capsys, trained_bpe, "--prompt-file", str(tmp_path / "prompt"))
    assert texts(capsys, trained_bpe, "--prompt", "é", "--tokens", "2")[0]["prompt"] == "é"


# Numbers


def test_temperatures_go_to_their_limits(capsys, trained):
    drawn = {
        t: texts(capsys, trained, "--prompt", "a", "--tokens", "6", "--temperature", t)[0]["tokens"]
        for t in ("0", "5e-324", "1e-300", "1e-45", "1e-39", "1e30", "1e300", "inf")
    }
    assert len({tuple(drawn[t]) for t in ("0", "5e-324", "1e-300", "1e-45", "1e-39")}) == 1
    assert drawn["1e300"] == drawn["inf"] == drawn["1e30"] != drawn["0"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "nan"], "--temperature"),
        (["--temperature", "-0.1"], "--temperature"),
        (["--top-p", "nan"], "--top-p nan: must be greater than 0"),
        (["--top-p", "0"], "--top-p 0.0: must be greater than 0"),
        (["--top-k", "0"], "--top-k"),
        (["--seed", "99999999999999999999"], "--seed"),
        (["--tokens", "-1"], "--tokens"),
        (["--samples", "0"], "--samples"),
        (["--stop", ""], "--stop: is empty"),
        (["--stop-token", "256"], "--stop-token 256: the tokenizer has the ids 0 to 255"),
        (["--stop-token", "-1"], "--stop-token"),
    ],
)
def test_numbers_out_of_range_are_one_line(capsys, trained, arguments, words):
    assert words in error(capsys, trained, *arguments)


def test_large_and_small_numbers_that_are_in_range(capsys, trained):
    plain = texts(capsys, trained, "--prompt", "a", "--tokens", "5")
    assert texts(capsys, trained, "--prompt", "a", "--tokens", "5", "--top-k", "9" * 30, "--top-p", "1") == plain
    likeliest = texts(capsys, trained, "--prompt", "a", "--tokens", "5", "--temperature", "0")
    assert texts(capsys, trained, "--prompt", "a", "--tokens", "5", "--top-p", "1e-300") == likeliest
    assert texts(capsys, trained, "--prompt", "a", "--tokens", "0")[0]["tokens"] == []
    assert len(texts(capsys, trained, "--seed", str(2**62), "--samples", "3", "--tokens", "1")) == 3


# Stops


def test_a_stop_string_ends_each_text_on_its_own(capsys, trained):
    whole = texts(capsys, trained, "--prompt", "a", "--samples", "3", "--tokens", "40")
    stops = [bytes(row["tokens"])[n : n + 2] for row, n in zip(whole, (7, 20, 0), strict=True)]
    given = [word for stop in stops for word in ("--stop", os.fsdecode(stop.replace(b"\\", b"\\\\")))]
    stopped = texts(capsys, trained, "--prompt", "a", "--samples", "3", "--tokens", "40", *given)
    for row, all_of_it in zip(stopped, whole, strict=True):
        text = bytes(all_of_it["tokens"])
        first = min(place for stop in stops if (place := text.find(stop)) >= 0)
        assert bytes(row["tokens"]) == text[:first]
        assert row["text"] == text[:first].decode(errors="replace") and row["ended"] == "stop" and "stop" in row
    assert {row["ended"] for row in whole} == {"length"}


def test_a_stop_token_and_escapes(capsys, trained):
    whole = texts(capsys, trained, "--prompt", "a", "--tokens", "20")[0]["tokens"]
    row = texts(capsys, trained, "--prompt", "a", "--tokens", "20", "--stop-token", str(whole[5]))[0]
    assert row["tokens"] == whole[: whole.index(whole[5])] and row["stop_token"] == whole[5]
    escaped = texts(capsys, trained, "--prompt", "a", "--tokens", "20", "--stop", f"\\x{whole[5]:02x}")[0]
    assert escaped["tokens"] == row["tokens"]
    assert stop_bytes(r"\n\t\0\\n\x41é\q") == b"\n\t\0\\nA" + "é".encode() + rb"\q"


def test_stops_of_a_tokenizer_whose_tokens_are_longer(capsys, trained_bpe):
    whole = texts(capsys, trained_bpe, "--prompt", "line", "--tokens", "30")[0]
    stop = re.search(r"[ -~]{2}", whole["text"][6:])[0]
    row = texts(capsys, trained_bpe, "--prompt", "line", "--tokens", "30", "--stop", stop.replace("\\", "\\\\"))[0]
    assert row["text"] == whole["text"][: whole["text"].index(stop)]
    assert row["tokens"] == whole["tokens"][: len(row["tokens"])] and row["ended"] == "stop"
