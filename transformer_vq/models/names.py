"""Names in a config that stand for code: estimators, quantizers, attention backends. Checked before data is touched."""

from __future__ import annotations

from collections.abc import Callable

from transformer_vq.config import ConfigError, TransformerVQConfig
from transformer_vq.config.model import layer_range
from transformer_vq.ops import estimators
from transformer_vq.ops.attention import BACKENDS
from transformer_vq.ops.resolve import resolve
from transformer_vq.quantizers import QUANTIZERS


def check_names(config: TransformerVQConfig) -> None:
    """Raise ConfigError, with key, value and what there is, unless every name in `config` stands for something."""
    if config.backend != "auto":
        _check("model.backend", config.backend, lambda name: resolve(name, BACKENDS, "attention backend"))
    for layer, quantizer in enumerate(config.layer_quantizers()):
        where = _where(config, layer)
        _check(f"{where}.kind", quantizer.kind, lambda name: resolve(name, QUANTIZERS, "quantizer"))
        if hasattr(quantizer, "estimator"):
            _check(f"{where}.estimator", quantizer.estimator, estimators.check)


def _check(key: str, name: str, find: Callable[[str], object]) -> None:
    try:
        find(name)
    except ValueError as error:
        raise ConfigError(f"{key} = {name}: {error}") from None


def _where(config: TransformerVQConfig, layer: int) -> str:
    """The key under which a layer's quantizer is set."""
    for text in config.per_layer or {}:
        if layer in layer_range(text, config.layers):
            return f"model.per_layer.{text}"
    return "model.quantizer"
