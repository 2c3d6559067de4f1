"""Pure tensor functions: no parameters, no globals."""

from transformer_vq.ops.attention import vq_attention

__all__ = ["vq_attention"]
