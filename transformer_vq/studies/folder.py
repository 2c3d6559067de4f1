"""A study's folder: who writes there, and what became of each run.

    study.yaml          the study as it was when its first run started; what must not change is checked against it
    .lock, .holder      held while `study run` works here, and by whom
    RUN/status.json     how a run ended, and where and when it ran
    RUN/log.txt         what it printed

Everything is written to a temporary name and renamed, so that a kill leaves the old text or the new one.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformer_vq.config import ConfigError, save_config, validate
from transformer_vq.config.load import difference, read_yaml
from transformer_vq.config.study import StudyConfig
from transformer_vq.files import lock, read_text, write_text

FIXED = (
    "base",
    "design",
    "baseline",
    "against",
    "primary",
    "split",
    "equivalence",
    "gate",
    "branch",
)  # once the first run has started
RESULTS = ("done", "diverged")  # anything else is tried again


@contextmanager
def study_folder(study: StudyConfig) -> Iterator[Path]:
    """The study's folder, held by this process alone.

    Raises ConfigError when another process runs a study there, when another study lives there, or when what was fixed
    before the first run (the primary comparison above all) has been changed since.
    """
    folder = Path(study.run_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run_dir = {folder}: is a file; a folder is needed")
    if (folder / "config.yaml").is_file():
        raise ConfigError(f"run_dir = {folder}: is the folder of a run; a study needs one of its own")
    try:
        with lock(folder / ".lock"):
            check_identity(study, folder)
            write_text(folder / ".holder", f"{os.getpid()} on {platform.node()}")
            save_config(study, folder / "study.yaml")
            yield folder
    except BlockingIOError:
        holder = read_text(folder / ".holder") if (folder / ".holder").is_file() else "unknown"
        raise ConfigError(f"run_dir = {folder}: a study is being run there, by process {holder}") from None


def check_identity(study: StudyConfig, folder: Path) -> None:
    """Raises ConfigError when `folder` holds another study, or this one with another primary comparison."""
    if not (folder / "study.yaml").is_file():
        return
    before = validate(read_yaml(folder / "study.yaml"), StudyConfig)
    changed = difference(_identity(before), _identity(study))
    if changed:
        raise ConfigError(
            f"run_dir = {folder}: holds another study, or this one before a change of what is fixed when the first run "
            f"starts ({'; '.join(changed)}); choose another run_dir"
        )


def _identity(study: StudyConfig) -> dict[str, Any]:
    tree = study.model_dump(mode="json")
    factors = {key: "varied" for key in (*tree["factors"], *(["variant"] if tree["variants"] else []))}
    return {**{key: tree[key] for key in FIXED}, "factors": factors}


def read_status(folder: Path) -> dict[str, Any]:
    """How the run in `folder` stands; `{"state": "waiting"}` where nothing is known."""
    try:
        status: dict[str, Any] = json.loads(read_text(folder / "status.json"))
    except FileNotFoundError:
        return {"state": "done" if (folder / "summary.json").is_file() else "waiting"}
    return status


def write_status(folder: Path, **changes: Any) -> None:
    """Change entries of a run's status."""
    known = read_status(folder) if (folder / "status.json").is_file() else {}
    write_text(folder / "status.json", json.dumps({**known, **changes}, indent=1, default=str))
