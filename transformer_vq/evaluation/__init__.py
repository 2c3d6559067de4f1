"""Numbers, pictures and text from a finished model. Names are resolved on first use: pictures need no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformer_vq.evaluation.generation import continuations, generate
    from transformer_vq.evaluation.language import default_context, evaluate
    from transformer_vq.evaluation.mixture import evaluate_sources
    from transformer_vq.evaluation.plots import write_plots

__all__ = ["continuations", "default_context", "evaluate", "evaluate_sources", "generate", "write_plots"]

_HOME = {
    "continuations": "generation",
    "generate": "generation",
    "default_context": "language",
    "evaluate": "language",
    "evaluate_sources": "mixture",
    "write_plots": "plots",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
