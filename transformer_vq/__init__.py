"""Transformer-VQ: language models whose attention keys are vector-quantized, in linear time  [Lingle 2309.16354].

Names are resolved on first use: importing the package does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformer_vq.config import TransformerVQConfig
    from transformer_vq.models import TransformerVQ

__version__ = "0.1.0"
__all__ = ["TransformerVQ", "TransformerVQConfig", "__version__"]

_HOME = {"TransformerVQ": "transformer_vq.models", "TransformerVQConfig": "transformer_vq.config"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
