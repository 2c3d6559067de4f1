"""Packages that not every installation has: which extra brings them, and one sentence where one is missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from transformer_vq.config.base import ConfigError

EXTRAS = {
    "hub": ("transformers", "huggingface_hub"),
    "tokenizers": ("tiktoken", "sentencepiece"),
    "tracking": ("tensorboard", "wandb", "trackio"),
    "images": ("torchmetrics", "sklearn"),
    "images-fid": ("torchvision", "torch_fidelity"),
    "studies": ("scipy", "statsmodels", "pandas", "pyarrow"),
    "orbax": ("orbax", "jax"),
    "cluster": ("submitit", "ray"),
    "gpu": ("triton",),
    "flash": ("flash_attn",),
}
"""Extras of pyproject.toml, and the modules by which code knows them."""

ALONE = {"vector_quantize_pytorch": "vector-quantize-pytorch==1.32.0", "fla": "flash-linear-attention"}
"""Modules of no extra: what pip calls them."""


class MissingPackage(ConfigError, ImportError):
    """A package is not installed. One line: what needs it, and the command that brings it."""


def wanted(module: str) -> str | None:
    """The argument of `pip install` that brings `module`; None where it is not optional."""
    package = module.partition(".")[0]
    for extra, modules in EXTRAS.items():
        if package in modules:
            return f"'transformer-vq[{extra}]'"
    return ALONE.get(package)


def lack(module: str, what: str = "") -> str:
    """The sentence where `module` is not there: what needs it, and the command that brings it."""
    package = module.partition(".")[0]
    return f"{what}{': ' if what else ''}needs {package}: pip install {wanted(package) or package}"


def need(module: str, what: str) -> Any:
    """The module, imported.  Raises MissingPackage where `what` cannot be had for want of it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if (found := missing(error, what)) is None:
            raise
        raise found from None


def missing(error: ModuleNotFoundError, what: str = "") -> MissingPackage | None:
    """The sentence for an import that failed; None where no extra brings what was not found."""
    name = error.name or ""
    return MissingPackage(lack(name, what)) if wanted(name) else None
