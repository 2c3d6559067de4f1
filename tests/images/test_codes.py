from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from image_cases import run_config, write_pictures
from PIL import Image

from transformer_vq.cli import run as console
from transformer_vq.config import ConfigError, save_config
from transformer_vq.images import run
from transformer_vq.images.codes import decode_file, encode_folder, load_image_run
from transformer_vq.images.metrics import reconstruct
from transformer_vq.images.task import ImageTask


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("codes") / "r"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageTask, "finish", lambda self, folder: None)  # no plots
        run(run_config(folder, {"product": 2, "quantizer": {"codes": 300}}), quiet=True)
    return folder


def test_folder_to_codes_and_back_is_the_reconstruction(trained, tmp_path, capsys):
    pictures = write_pictures(tmp_path / "p" / "in", count=70, mode="L").parent
    assert console(["encode", str(trained), str(pictures), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"codes": str(trained / "codes" / "p.npz"), "images": 70, "shape": [1, 2, 4, 4]}
    with np.load(told["codes"]) as file:
        assert file["codes"].dtype == np.uint16 and file["names"][0] == "in/a00.png"
    assert console(["decode", str(trained), told["codes"], "--out", str(tmp_path / "back"), "--json"]) == 0
    model = load_image_run(str(trained)).model
    for name in ("in/a00.png", "in/a69.png"):
        raw = torch.from_numpy(np.asarray(Image.open(pictures / name))[None, None].copy())
        want = reconstruct(model, raw)[0, 0].numpy()
        got = np.asarray(Image.open(tmp_path / "back" / name))
        assert np.abs(want.astype(int) - got).max() <= 1  # another batch size rounds differently


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such folder"),
        (lambda p: p.mkdir(), "no pictures there"),
        (lambda p: write_pictures(p, mode="RGB"), None),  # converted, as the run's pictures are grey
        (lambda p: write_pictures(p, mode="L", size=(7, 8)), "make no whole grid"),
    ],
)
def test_encode_refuses_what_does_not_fit_and_writes_nothing(trained, tmp_path, make, message):
    make(tmp_path / "p")
    loaded, out = load_image_run(str(trained)), tmp_path / "out" / "c.npz"
    if message is None:
        encode_folder(loaded, tmp_path / "p", out)
        return
    with pytest.raises(ConfigError, match=message):
        encode_folder(loaded, tmp_path / "p", out)
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"codes": np.full((1, 1, 2, 4, 4), 300, np.int64), "names": np.array(["a.png"])}, "there are 300"),
        ({"codes": np.zeros((1, 1, 1, 4, 4), np.int64), "names": np.array(["a.png"])}, "1 stages of 2 parts"),
        ({"codes": np.zeros((1, 1, 2, 4, 4), np.int64), "names": np.array(["../a.png"])}, "not a file of codes"),
        ({"codes": np.zeros((2, 1, 2, 4, 4), np.int64), "names": np.array(["a.png"])}, "not a file of codes"),
        ({"codes": np.zeros((1, 1, 2, 4, 4), np.float32), "names": np.array(["a.png"])}, "not a file of codes"),
        ({"tokens": np.zeros(3)}, "not a file of codes"),
    ],
)
def test_decode_refuses_other_files_and_writes_nothing(trained, tmp_path, content, message):
    np.savez(tmp_path / "c.npz", **content)
    with pytest.raises(ConfigError, match=message):
        decode_file(load_image_run(str(trained)), tmp_path / "c.npz", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_run_without_codes_has_none_to_write(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageTask, "finish", lambda self, folder: None)
    run(run_config(tmp_path / "r", {"quantizer": {"kind": "none"}}), quiet=True)
    with pytest.raises(ConfigError, match="has no codes"):
        encode_folder(load_image_run(str(tmp_path / "r")), write_pictures(tmp_path / "p", mode="L"), tmp_path / "c.npz")
    assert not (tmp_path / "c.npz").exists()


def test_console_plans_refuses_and_draws(trained, tmp_path, capsys):
    save_config(run_config(tmp_path / "new"), tmp_path / "c.yaml")
    assert console(["images", str(tmp_path / "c.yaml"), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["finished"] is False and "grid 4x4x6, vq of 16 codes" in plan["describe"]["model"]
    assert console(["images", str(tmp_path / "c.yaml"), "images.widht=3"]) == 2
    assert capsys.readouterr().err == "error: images.widht: no such key; did you mean images.width?\n"
    assert not (tmp_path / "new").exists()
    assert console(["plot", str(trained), "--json"]) == 0
    drawn = {Path(path).name for path in json.loads(capsys.readouterr().out)["plots"]}
    assert "quality.png" in drawn and "loss.png" not in drawn


def test_a_full_disk_is_one_line_and_leaves_nothing(trained, tmp_path, capsys, request):
    pictures = write_pictures(tmp_path / "in", count=3, mode="L")
    assert console(["encode", str(trained), str(pictures), "--out", str(tmp_path / "x.npz")]) == 0
    request.getfixturevalue("no_room")
    commands = {
        "y.npz": ["encode", str(trained), str(pictures), "--out", str(tmp_path / "y.npz")],
        "a00.png": ["decode", str(trained), str(tmp_path / "x.npz"), "--out", str(tmp_path / "out")],
    }
    for name, command in commands.items():
        capsys.readouterr()
        assert console(command) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and f"{name}: cannot be written: No space left on device" in line
    assert not (tmp_path / "y.npz").exists() and list((tmp_path / "out").iterdir()) == []
