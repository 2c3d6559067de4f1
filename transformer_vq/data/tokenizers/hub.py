"""A tokenizer of the Hugging Face hub, `hf:NAME[@REVISION]` or NAME: `tokenizer.json`, else `tokenizer.model`."""

from __future__ import annotations

import re
from pathlib import Path

from transformer_vq.config import ConfigError

PREFIX = "hf:"
FILES = ("tokenizer.json", "tokenizer.model")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")


def is_name(spec: str) -> bool:
    """Written as a name on the hub: `gpt2`, `owner/name`, `owner/name@revision`."""
    return _NAME.fullmatch(spec) is not None


def find(spec: str) -> Path:
    """The file, fetched once and kept in the hub's own cache.  Raises ConfigError, one line saying what was tried."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    name, _, revision = spec.removeprefix(PREFIX).partition("@")
    if not is_name(spec.removeprefix(PREFIX)):
        raise ConfigError(f"data.tokenizer = {spec}: written hf:NAME[@REVISION], as the hub has it")
    why, unreachable = "", False
    for file in FILES:
        try:
            return Path(hf_hub_download(name, file, revision=revision or None, local_files_only=unreachable))
        except EntryNotFoundError as error:  # the next file may be there, or in the cache where there is no network
            unreachable = isinstance(error, LocalEntryNotFoundError)
            why = why or " ".join(str(error).split())
        except Exception as error:  # no network, no such name, no access: the library has a class for each
            why = " ".join(str(error).split())
            break
    at = f" at revision {revision}" if revision else ""
    local = "" if spec.startswith(PREFIX) else "no such file or folder here; "
    raise ConfigError(f"data.tokenizer = {spec}: {local}{' or '.join(FILES)} of {name}{at} on the hub: {why}")
