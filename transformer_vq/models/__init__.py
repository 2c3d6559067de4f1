"""Blocks and the language model: wiring; the arithmetic is in `ops/`."""

from transformer_vq.models.language_model import Output, TransformerVQ
from transformer_vq.models.state import ModelState

__all__ = ["ModelState", "Output", "TransformerVQ"]
