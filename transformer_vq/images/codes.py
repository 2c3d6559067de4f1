"""Tokens of pictures: a folder's codes into a file and back, with a trained image model.

The file is a .npz without pickles: `codes` (n, R, H, h, w) in the smallest unsigned type, `names` (n,) of the pictures'
paths in the folder.

Axes:   n pictures  R residual stages  H product parts  h, w height and width of the grid
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from transformer_vq.config import ConfigError, load_config
from transformer_vq.config.images import ImageRunConfig, check_grid
from transformer_vq.data.npz import read_array
from transformer_vq.data.pictures import header, open_picture
from transformer_vq.evaluation.mode import evaluating
from transformer_vq.files import write, writing
from transformer_vq.images.batches import to_bytes, to_unit
from transformer_vq.images.model import ImageModel
from transformer_vq.images.pictures import Alike, Prepare, to_image
from transformer_vq.images.sources.folder import picture_files
from transformer_vq.training.checkpoints import load_json, load_tensors, verify
from transformer_vq.training.origin import find_checkpoint

BATCH = 64
NO_CODES = "this run's quantizer is `none`: it has no codes"


class LoadedImageRun(NamedTuple):
    """A trained image model."""

    config: ImageRunConfig
    model: ImageModel
    """In evaluation mode."""
    folder: Path
    channels: int


def load_image_run(run: str, device: torch.device | str = "cpu") -> LoadedImageRun:
    """The model of `RUN[@best|@last|@STEP]`, by default the last.  Raises ConfigError, CheckpointError."""
    checkpoint = find_checkpoint(run)
    folder = checkpoint.parents[1]
    config = load_config(folder, [], ImageRunConfig)
    verify(checkpoint)
    channels = int(load_json(folder / "data.json")["shape"][0])
    model = ImageModel(config.images, channels, config.seed)
    if config.train.precision == "fp64":
        model = model.double()
    model.load_state_dict(load_tensors(checkpoint / "model.safetensors"))
    return LoadedImageRun(config, model.to(device).eval(), folder, channels)


def encode_folder(run: LoadedImageRun, folder: Path, out: Path) -> tuple[int, tuple[int, ...]]:
    """Write the codes of every picture below `folder` to `out`; returns how many, and the shape of one's codes.

    Raises ConfigError before anything is written when a picture cannot be read or does not fit.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    files, *_ = picture_files(folder)
    alike = Alike(str(folder), run.config.data.size, run.channels)
    for path in files:
        found = header(path, str(path), upright=run.config.data.size is None)
        alike.show(path.relative_to(folder).as_posix(), found.channels, found.size)
    shape = alike.shape()
    try:
        check_grid(run.config.images, shape.height, shape.width)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    codes = np.concatenate(list(_encode(run, files, Prepare(shape.channels, run.config.data.size))))
    if not codes.size:
        raise ConfigError(NO_CODES)
    names = np.array([path.relative_to(folder).as_posix() for path in files])
    small = codes.astype(np.min_scalar_type(int(codes.max())))

    def save(place: Path) -> None:
        with place.open("wb") as file:  # a name without .npz stays as it is
            np.savez_compressed(file, codes=small, names=names)

    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write(out, save, small.nbytes + names.nbytes)
    return len(files), codes.shape[1:]


def _encode(run: LoadedImageRun, files: list[Path], prepare: Prepare) -> Iterator[NDArray[np.int64]]:
    with evaluating(run.model) as device:
        for start in range(0, len(files), BATCH):
            raw = np.stack([prepare(open_picture(path, str(path))) for path in files[start : start + BATCH]])
            pictures = to_unit(torch.from_numpy(raw).to(device)).to(run.model.last_layer.dtype)
            yield run.model.encode(pictures).cpu().numpy()


def decode_file(run: LoadedImageRun, source: Path, out: Path) -> int:
    """Turn the codes in `source` back into PNG files below `out`, named as they were; returns how many.

    Raises ConfigError before anything is written when the file is not one that `encode_folder` wrote for such a model.
    """
    codes, names = _read(source)
    try:
        pictures = list(_decode(run, codes))
    except ValueError as error:
        raise ConfigError(f"{source}: does not fit this run: {error}") from None
    for name, picture in zip(names, np.concatenate(pictures), strict=True):
        path = out / (name if name.lower().endswith(".png") else f"{name}.png")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write(path, partial(to_image(picture).save, format="png"))
    return len(names)


def _decode(run: LoadedImageRun, codes: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
    with evaluating(run.model) as device:
        for start in range(0, len(codes), BATCH):
            part = torch.from_numpy(codes[start : start + BATCH]).to(device)
            yield to_bytes(run.model.decode(part)).cpu().numpy()


def _read(source: Path) -> tuple[NDArray[np.int64], list[str]]:
    try:
        codes, names = read_array(source, "codes"), [str(name) for name in read_array(source, "names")]
    except ConfigError as error:
        raise ConfigError(f"{source}: not a file of codes: {str(error).removeprefix('data.source: ')}") from None
    whole = codes.ndim == 5 and codes.size and codes.dtype.kind in "ui" and len(names) == len(codes)
    inside = all(not PurePosixPath(n).is_absolute() and ".." not in PurePosixPath(n).parts for n in names)
    if not whole or not inside or len(set(names)) != len(names):
        raise ConfigError(f"{source}: not a file of codes (codes {codes.dtype} {codes.shape}, {len(names)} names)")
    return codes.astype(np.int64), names
