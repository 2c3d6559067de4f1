"""Files that are whole or not there, one line where one cannot be written, and UTF-8 whatever the locale says."""

from __future__ import annotations

import errno
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from transformer_vq import files
from transformer_vq.config import RunConfig, load_config, save_config, validate
from transformer_vq.files import WriteError, complaint, in_units, lock, write, write_text, writing

REASONS = {
    errno.ENOSPC: "No space left on device",
    errno.EDQUOT: "Disk quota exceeded",
    errno.EFBIG: "File too large",
    errno.EROFS: "Read-only file system",
    errno.EACCES: "Permission denied",
}


@pytest.mark.parametrize("number", REASONS)
def test_a_failed_write_leaves_the_old_file_and_names_the_new(tmp_path, number):
    path = tmp_path / "numbers.json"
    write_text(path, "old")

    def fail(place: Path) -> None:
        place.write_text("half", encoding="utf-8")
        raise OSError(number, REASONS[number])

    with pytest.raises(WriteError, match=rf"numbers\.json: cannot be written: {REASONS[number]}"):
        write(path, fail, need=12_345)
    assert [p.name for p in tmp_path.iterdir()] == ["numbers.json"] and files.read_text(path) == "old"


def test_what_is_needed_and_free_is_said(tmp_path):
    with pytest.raises(WriteError, match=r"x: cannot be written: .* \(3\.2 MB are needed, [\d.]+ [kMGT]B are free\)"):  # noqa: SIM117
        with writing(tmp_path / "x", 3_200_000):
            raise OSError(errno.ENOSPC, "No space left on device")


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (KeyError("x"), OSError(errno.ENOENT, "no such file"), ValueError("os error"), RuntimeError("a bug")):
        with pytest.raises(type(error)) as caught, writing(tmp_path):
            raise error
        assert caught.value is error
    assert complaint(PermissionError(errno.EACCES, "denied", "x")) is None  # outside `writing` it may have been a read


def test_it_passes_between_processes():
    error = pickle.loads(pickle.dumps(WriteError("x: cannot be written")))
    assert type(error) is WriteError and str(error) == "x: cannot be written"


def test_units():
    found = {n: in_units(n) for n in (0, 999, 1000, 3_200_000, 5 * 10**13)}
    assert [*found.values()] == ["0 bytes", "999 bytes", "1 kB", "3.2 MB", "50 TB"]


def test_a_lock_is_held_once(tmp_path):
    path = tmp_path / "new" / ".lock"
    with lock(path), pytest.raises(BlockingIOError), lock(path, patience=0.05):
        pass
    with lock(path):
        pass


WITHOUT_FCNTL = """
import sys
import psutil  # which needs resource where there is one
for name in ("fcntl", "resource"):
    sys.modules[name] = None
from pathlib import Path
from transformer_vq.files import lock
from transformer_vq.training.run_folder import RunFolder
import transformer_vq.studies.folder, transformer_vq.machine
assert transformer_vq.machine.peak_resident() > 2**20
with lock(Path(sys.argv[1])):
    print("held")
"""


def test_fcntl_is_not_needed(tmp_path):
    command = [sys.executable, "-c", WITHOUT_FCNTL, str(tmp_path / ".lock")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "held\n"


SAVE = """
import sys
from pathlib import Path
from transformer_vq.config import RunConfig, load_config, save_config
config = load_config(sys.argv[1], [], RunConfig)
assert config.data.document_separator == chr(0xB6), config
save_config(config, Path(sys.argv[2]))
"""


def test_configs_are_utf_8_in_any_locale(tmp_path):
    config = validate({"data": {"document_separator": "¶"}}, RunConfig)
    save_config(config, tmp_path / "a.yaml")
    assert "¶".encode() in (tmp_path / "a.yaml").read_bytes()
    command = [sys.executable, "-c", SAVE, str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": ":".join(sys.path)}
    subprocess.run(command, check=True, env=ascii_only)
    assert load_config(tmp_path / "b.yaml", [], RunConfig) == config


def test_libraries_that_say_it_in_their_own_words(full_disk):
    """numpy leaves the number out and safetensors leaves it in its text."""
    big = np.zeros(4_000_000, np.uint8)
    for save in (lambda path: big.tofile(path), lambda path: save_file({"x": torch.from_numpy(big)}, path)):
        with pytest.raises(WriteError, match=r"x: cannot be written: No space left on device \(4 MB are needed"):
            write(full_disk / "x", save, big.nbytes)
        assert list(full_disk.iterdir()) == []
