"""`inspect`: one page that needs nothing else, numbers that are those of the text, and one line for what is wrong."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser

import pytest

from transformer_vq.cli import run

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that every tag is closed, and notes what a browser would fetch, the scripts, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and v[0] != "#"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and v[0] != "#"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        else:
            self.text += data


def numbers(capsys, *arguments: str) -> dict:
    capsys.readouterr()
    assert run(["inspect", *arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert run(["inspect", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    return err


def test_the_page_needs_nothing_else_and_shows_text_as_text(capsys, trained, tmp_path):
    text = "<script>alert('&amp;')</script> </script>\x00\x1b\xff {{ 7 * 7 }} \n" * 4
    (tmp_path / "evil.txt").write_bytes(text.encode("latin-1"))
    out = tmp_path / "page.html"
    assert run(["inspect", trained, str(tmp_path / "evil.txt"), "--out", str(out)]) == 0
    html = out.read_text()
    page = Page(html)
    assert not [url for url in page.fetched if not url.startswith("data:image/png;base64,")]
    assert not re.search(r"@import|url\((?!#)", html)
    assert len(page.scripts) == 2 and "alert" not in "".join(page.scripts) and "49" not in page.text.split("{{")[1][:3]
    assert r"<script>alert('&amp;')</script> </script>\u{0}\u{1b}\xff {{ 7 * 7 }}" in page.text
    views = json.loads(page.scripts[0])["views"]
    assert [view["name"] for view in views] == ["layer 0", "layer 1"]
    assert all(len(view["codes"]) == len(text) and len(view["colours"]) == 8 for view in views)


@pytest.mark.parametrize("which", ["trained", "trained_bpe"])
def test_json_holds_all_numbers_of_the_page(capsys, request, which):
    folder = request.getfixturevalue(which)
    found = numbers(capsys, folder, "--max-tokens", "200", "--split", "test")
    assert found["tokens"] == 200 and found["text"] == "test split" and [x["layer"] for x in found["layers"]] == [0, 1]
    for layer in found["layers"]:
        assert sum(layer["attention"].values()) == pytest.approx(1, abs=1e-12)
        assert [s["start"] for s in layer["positions"][1:]] == [s["stop"] for s in layer["positions"][:-1]]
        assert layer["positions"][-1]["stop"] == 200 and layer["attention"]["beyond"] > 0
        (head,) = layer["heads"]
        assert sum(row["count"] for row in head["by_code"]) == 200 and head["used"] == len(head["by_code"])
        assert sum(row["attention"] for row in head["by_code"]) == pytest.approx(layer["attention"]["beyond"])
        for row in head["by_code"]:
            assert 0 < sum(t["count"] for t in row["tokens"]) <= row["count"]
            assert row["contexts"][0]["token"].replace(" ", "␣") == row["tokens"][0]["token"]


def test_a_given_text_and_layers(capsys, trained, tmp_path, monkeypatch):
    whole = numbers(capsys, trained, "some words")
    assert whole["tokens"] == 10 and whole["text"] == "the text given"
    one = numbers(capsys, trained, "some words", "--layer", "1")
    assert one["layers"] == whole["layers"][1:]
    (tmp_path / "text").write_text("some words")
    assert numbers(capsys, trained, str(tmp_path / "text"))["layers"] == whole["layers"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"some words")))
    assert numbers(capsys, trained, "-")["layers"] == whole["layers"]
    short = numbers(capsys, trained, "x", "--max-tokens", "1")
    assert short["tokens"] == 1 and short["layers"][0]["attention"] == {"itself": 1, "window": 0, "beyond": 0}
    assert short["layers"][0]["heads"][0]["told"] == {"token": None, "previous": None, "nothing": None}


def test_every_kind_has_its_page(capsys, settings, tmp_path):
    folder = tmp_path / "run"
    kinds = ["kind: none", "kind: fsq, levels: [3, 3]", "kind: bsq, bits: 3", "kind: vq, codes: 4, start_step: 99"]
    more = [f"model.per_layer.{i}={{{kind}}}" for i, kind in enumerate(kinds, 1)]
    more += ["model.layers=5", "model.heads=2", "model.kv_heads=2", "model.block=transformer", "model.position=rotary"]
    more += ["model.quantizer={kind: vq, codes: 1}", "train.steps=1", "eval.every=null", f"run_dir={folder}", "--quiet"]
    assert run(["train", "lm/tiny", *settings, *more]) == 0
    capsys.readouterr()
    assert run(["inspect", str(folder), "--max-tokens", "60"]) == 0
    said = capsys.readouterr().out
    assert f"{folder}/inspect.html" in said and "\N{REPLACEMENT CHARACTER}" not in said
    text = Page((folder / "inspect.html").read_text()).text
    assert "Layer 1: Keys are not quantized here" in text and "Layer 1: Full attention: every key is kept" in text
    assert "Layer 4: The quantizer has not started yet" in text and "Layer 4: Full attention" in text
    assert "Key head 1" in text and "layer 3, head 1" in (folder / "inspect.html").read_text()
    assert "is there already" in refusal(capsys, str(folder))
    arguments = ["inspect", str(folder), "x", "--layer", "1", "--out", str(tmp_path / "none.html")]
    assert run(arguments) == 0
    assert "The text in codes" not in Page((tmp_path / "none.html").read_text()).text


def test_one_picture_is_drawn_where_it_is_named(capsys, trained, tmp_path):
    picture = tmp_path / "learned.svg"
    assert run(["inspect", trained, "some words, again", "--plot", str(picture)]) == 0
    assert "</svg>" in picture.read_text() and list(tmp_path.iterdir()) == [picture]
    assert "is there already" in refusal(capsys, trained, "x", "--plot", str(picture))
    assert "must end in .png, .svg or .pdf" in refusal(capsys, trained, "x", "--plot", f"{tmp_path}/a.html")


def test_what_is_wrong_is_one_line(capsys, trained, trained_bpe, tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"good\xff")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "config.yaml").write_text("images: {}\n")
    (tmp_path / "untrained").mkdir()
    (tmp_path / "untrained" / "config.yaml").write_text("seed: 0\n")
    here = str(tmp_path)
    assert "the text given: is empty" in refusal(capsys, trained, "")
    assert "empty: is empty" in refusal(capsys, trained, f"{here}/empty")
    assert "is a folder" in refusal(capsys, trained, here)
    assert "there is no such file" in refusal(capsys, trained, "missing.txt")
    assert "binary: is not UTF-8 at byte 4" in refusal(capsys, trained_bpe, f"{here}/binary")
    assert "layers 0-1" in refusal(capsys, trained, "x", "--layer", "2")
    assert "is there already" in refusal(capsys, trained, "x", "--out", f"{here}/empty")
    assert "must end in .html" in refusal(capsys, trained, "x", "--out", f"{here}/page.pdf")
    assert "there is no folder" in refusal(capsys, trained, "x", "--out", f"{here}/no/page.html")
    assert "image benchmark" in refusal(capsys, f"{here}/images")
    assert "no such checkpoint; steps that have one: none" in refusal(capsys, f"{here}/untrained", "x")
    assert "there is no run folder" in refusal(capsys, f"{here}/nowhere", "x")
    assert "no such checkpoint" in refusal(capsys, f"{trained}@3", "x")
    assert not (tmp_path / "page.html").exists()
