"""Where files are kept that can be made again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from transformer_vq.config import DataConfig


def default_cache() -> Path:
    """Where this system wants files that can be made again."""
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "transformer_vq" / "tokens"


def cache_of(config: DataConfig) -> Path:
    """`data.cache`, or the default."""
    return Path(config.cache).expanduser() if config.cache else default_cache()
