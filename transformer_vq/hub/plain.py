"""Settings without pydantic, for an exported folder: the same names and values as `config/`, nothing checked.

Exported code reads its settings from here (see flat.py). What is in `config.json` was checked when it was exported, and
is complete: every layer's quantizer is written out.
"""

from __future__ import annotations

import math
from typing import Any

PAPER_BLOCK = 128


class ConfigError(ValueError):
    """The user's input is wrong."""


class ValidationError(ValueError):
    """Never raised here; pydantic's name, which the quantizers catch."""


class Settings:
    """Attributes as they are given."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def model_dump(self, **_: Any) -> dict[str, Any]:
        """Plain values again."""
        return {key: value for key, value in self.__dict__.items() if not isinstance(value, Settings)}


class KeyQuantizer(Settings):
    """The quantizer of one layer."""

    codes: int

    @property
    def size(self) -> int:
        """S, the number of codes per key head."""
        return self.codes


class VQConfig(KeyQuantizer):
    """`kind: vq`."""


class SimVQConfig(KeyQuantizer):
    """`kind: simvq`."""


class FSQConfig(KeyQuantizer):
    """`kind: fsq`."""

    levels: list[int]

    @property
    def size(self) -> int:
        """The product of the levels."""
        return math.prod(self.levels)


class IFSQConfig(FSQConfig):
    """`kind: ifsq`."""


class SignConfig(KeyQuantizer):
    """Signs."""

    bits: int

    @property
    def size(self) -> int:
        """A bit an axis."""
        return 1 << self.bits


class LFQConfig(SignConfig):
    """`kind: lfq`."""


class BSQConfig(SignConfig):
    """`kind: bsq`."""


class NoneConfig(Settings):
    """`kind: none`."""


class CustomConfig(Settings):
    """`kind: module:Class`, which no export has."""


KINDS: dict[str, type[Settings]] = {
    "vq": VQConfig,
    "simvq": SimVQConfig,
    "fsq": FSQConfig,
    "ifsq": IFSQConfig,
    "lfq": LFQConfig,
    "bsq": BSQConfig,
    "none": NoneConfig,
}
QUANTIZERS: tuple[type[Settings], ...] = tuple(KINDS.values())


class QUANTIZER:
    """Where `config/` has a validator."""

    @staticmethod
    def validate_python(values: dict[str, Any]) -> Settings:
        """The settings of a kind."""
        return KINDS[values["kind"]](**values)


class TransformerVQConfig(Settings):
    """The keys of `model:`, and `vocab_size`."""

    per_layer: dict[str, dict[str, Any]]
    layers: int
    heads: int
    kv_heads: int | None
    cache: bool
    block_len: int | str
    gradients: str

    @property
    def block_length(self) -> int | None:
        """L; None where it is speed alone and nobody set it."""
        if self.block_len != "auto":
            return int(self.block_len)
        return PAPER_BLOCK if self.gradients == "block" else None

    @property
    def full_attention(self) -> bool:
        """True when some layer keeps every key."""
        return self.cache and any(isinstance(q, NoneConfig) for q in self.layer_quantizers())

    @property
    def key_value_heads(self) -> int:
        """Key and value heads, `kv_heads` or as many as query heads."""
        return self.kv_heads or self.heads

    def layer_quantizers(self) -> list[Settings]:
        """The settings of each layer's quantizer, in order."""
        return [QUANTIZER.validate_python(self.per_layer[str(i)]) for i in range(self.layers)]


def validate(tree: dict[str, Any], schema: type[Settings]) -> Any:
    """Settings of plain values."""
    return schema(**tree)


def lack(module: str, what: str = "") -> str:
    """The sentence where a package is not there."""
    return f"{what}{': ' if what else ''}needs {module}: pip install {module.replace('_', '-')}"


def explain(error: BaseException, *_: Any) -> str:
    """Its text."""
    return str(error)
