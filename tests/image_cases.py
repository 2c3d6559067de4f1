"""Small image runs for tests: scikit-learn's 8x8 digits, a network of a few thousand parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from transformer_vq.config import validate
from transformer_vq.config.images import ImageRunConfig, ImagesConfig

NETWORK = {"width": 4, "multipliers": [1, 2], "blocks": 1, "code_dim": 6}


def images_config(quantizer: dict[str, Any] | None = None, **keys: Any) -> ImagesConfig:
    return validate({**NETWORK, "quantizer": quantizer or {"codes": 16}, **keys}, ImagesConfig)


def run_config(run_dir: Path, images: dict[str, Any] | None = None, **blocks: dict[str, Any]) -> ImageRunConfig:
    tree: dict[str, Any] = {
        "run_dir": str(run_dir),
        "data": {
            "source": "digits",
            "max_images": 60,
            "cache": str(run_dir.parent / "cache"),
            **blocks.get("data", {}),
        },
        "images": {**NETWORK, "quantizer": {"codes": 16}, **(images or {})},
        "train": {"steps": 4, "batch_size": 8, "warmup": 1, "log_every": 1, **blocks.get("train", {})},
        "eval": {"every": None, "batch_size": 16, "frechet": "none", **blocks.get("eval", {})},
        "checkpoint": blocks.get("checkpoint", {}),
    }
    return validate(tree, ImageRunConfig)


def write_pictures(
    folder: Path, count: int = 40, size: tuple[int, int] = (8, 8), mode: str = "RGB", seed: int = 0
) -> Path:
    """Random pictures a00.png, a01.png, ... of (width, height)."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    for i in range(count):
        Image.fromarray(random.integers(256, size=shape, dtype=np.uint8)).save(folder / f"a{i:02d}.png")
    return folder
