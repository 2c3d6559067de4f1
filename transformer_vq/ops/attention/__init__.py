"""VQ attention: one definition, several backends, one signature."""

from transformer_vq.ops.attention.backends import BACKENDS
from transformer_vq.ops.attention.dispatch import resolve_backend, vq_attention
from transformer_vq.ops.attention.full import FullState, full_attention
from transformer_vq.ops.attention.state import AttentionState, initial_state

__all__ = [
    "BACKENDS",
    "AttentionState",
    "FullState",
    "full_attention",
    "initial_state",
    "resolve_backend",
    "vq_attention",
]
