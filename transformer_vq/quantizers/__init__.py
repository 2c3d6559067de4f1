"""Modules that quantize keys: keys in; codes, quantized keys, codebook and losses out.

To add one: a subclass of `Quantizer` and its name in the dict below, or `kind: module:Class` in a config; such a class
of one's own is built with `heads`, `dim`, `codes` and the config's `options` as keywords.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from transformer_vq.config.base import ConfigError
from transformer_vq.config.explain import explain
from transformer_vq.config.quantizer import QUANTIZER, CustomConfig
from transformer_vq.config.quantizer import QUANTIZERS as _SETTINGS
from transformer_vq.ops.resolve import resolve
from transformer_vq.quantizers.base import Quantized, Quantizer
from transformer_vq.quantizers.fsq import FiniteScalarQuantizer
from transformer_vq.quantizers.none import NoQuantizer
from transformer_vq.quantizers.signs import SignQuantizer
from transformer_vq.quantizers.simvq import SimVectorQuantizer
from transformer_vq.quantizers.vq import VectorQuantizer

QUANTIZERS: dict[str, Callable[..., Quantizer]] = {
    "vq": VectorQuantizer,
    "simvq": SimVectorQuantizer,
    "fsq": FiniteScalarQuantizer,
    "ifsq": FiniteScalarQuantizer,
    "lfq": SignQuantizer,
    "bsq": SignQuantizer,
    "none": NoQuantizer,
}

__all__ = ["QUANTIZERS", "Quantized", "Quantizer", "build_quantizer"]


def build_quantizer(config: Any, heads: int, dim: int, seed: int = 0, layer: int = 0) -> Quantizer:
    """The quantizer of one layer: `config` a settings object or a dict like `quantizer:` in a config.

    heads and dim are those of the keys; (seed, layer) determine the initial values.
    Raises ConfigError for settings that are wrong, an estimator that does not exist or is for images only, and a
    class of one's own that does not take its keywords.
    """
    settings = config
    if isinstance(config, Mapping):
        try:
            settings = QUANTIZER.validate_python(dict(config))
        except ValidationError as error:
            raise ConfigError(f"quantizer.{explain(error, *_SETTINGS)}") from None
    if isinstance(settings, CustomConfig):
        return _custom(settings, heads, dim)
    return QUANTIZERS[settings.kind](settings, heads, dim, seed, layer)


def _custom(config: CustomConfig, heads: int, dim: int) -> Quantizer:
    """A `module:Class` of the user's own."""
    try:
        built = resolve(config.kind, QUANTIZERS, "quantizer")
    except ValueError as error:
        raise ConfigError(f"quantizer.kind = {config.kind}: {error}") from None
    if not (inspect.isclass(built) and issubclass(built, Quantizer)):
        raise ConfigError(f"quantizer.kind = {config.kind}: must be a subclass of transformer_vq.quantizers.Quantizer")
    keywords = {"heads": heads, "dim": dim, "codes": config.codes, **config.options}
    try:
        inspect.signature(built).bind(**keywords)
    except TypeError as error:
        raise ConfigError(f"quantizer.kind = {config.kind}: {error}; it is called with {', '.join(keywords)}") from None
    return built(**keywords)
