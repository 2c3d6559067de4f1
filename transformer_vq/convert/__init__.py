"""Models of the paper's own implementation, in and out: parameter names (names.py), files (files.py, flax_tree.py)."""

from transformer_vq.convert.names import from_reference, to_reference

__all__ = ["from_reference", "to_reference"]
