"""enwik8, the first 10⁸ bytes of an English Wikipedia dump: fetched from where its author keeps it, once.

The hub's LTCB/enwik8 is a loading script, which `datasets` no longer runs; of it the hub keeps a conversion to parquet,
the whole text in one row.
"""

from __future__ import annotations

import os
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from transformer_vq.config import ConfigError
from transformer_vq.files import WriteError, complaint

ADDRESS = "http://mattmahoney.net/dc/enwik8.zip"
HUB = "hf:LTCB/enwik8/enwik8-raw@refs/convert/parquet"
SIZE = 100_000_000
TIMEOUT = 30.0  # seconds without an answer


def fetch(folder: Path) -> Path:
    """The file `enwik8` in `folder`, downloaded unless it is there.  Raises ConfigError with one line; a file that is
    not whole is never left behind."""
    path = folder / "enwik8"
    if path.is_file():
        return path
    hint = (
        f"with the official file of {SIZE:,} bytes at hand: data.source=FILE, or a folder that holds enwik8; from the "
        f"hub: data.source={HUB}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        try:
            archive = Path(place) / "enwik8.zip"
            with urllib.request.urlopen(ADDRESS, timeout=TIMEOUT) as answer, archive.open("wb") as file:
                while block := answer.read(1 << 20):
                    file.write(block)
            with zipfile.ZipFile(archive) as content:
                whole = Path(content.extract("enwik8", place))
        except (OSError, KeyError, zipfile.BadZipFile, urllib.error.URLError) as error:
            if text := complaint(error, path, SIZE):
                raise WriteError(text) from None
            raise ConfigError(f"data.source = enwik8: {ADDRESS} could not be read: {error}; {hint}") from None
        if whole.stat().st_size != SIZE:
            raise ConfigError(f"data.source = enwik8: {ADDRESS} holds {whole.stat().st_size:,} bytes; {hint}")
        os.replace(whole, path)
    return path
