"""Modules that quantize keys: keys in; codes, quantized keys, codebook and losses out.

To add one: a subclass of `Quantizer` and its name in the dict below, or `kind: module:Class` in a config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformer_vq.config.quantizer import QUANTIZER
from transformer_vq.quantizers.base import Quantized, Quantizer
from transformer_vq.quantizers.fsq import FiniteScalarQuantizer
from transformer_vq.quantizers.none import NoQuantizer
from transformer_vq.quantizers.vq import VectorQuantizer

QUANTIZERS: dict[str, type[Quantizer]] = {
    "vq": VectorQuantizer,
    "fsq": FiniteScalarQuantizer,
    "ifsq": FiniteScalarQuantizer,
    "none": NoQuantizer,
}

__all__ = ["QUANTIZERS", "Quantized", "Quantizer", "build_quantizer"]


def build_quantizer(config: Any, heads: int, dim: int, seed: int = 0, layer: int = 0) -> Quantizer:
    """The quantizer of one layer: `config` a settings object or a dict like `quantizer:` in a config.

    heads and dim are those of the keys; (seed, layer) determine the initial values.
    """
    settings = QUANTIZER.validate_python(dict(config)) if isinstance(config, Mapping) else config
    return QUANTIZERS[settings.kind](settings, heads, dim, seed, layer)  # type: ignore[call-arg]
