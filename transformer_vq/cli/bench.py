"""`transformer-vq bench attention|quantize|images|generation|train`: side-by-side timings, never tests."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer

from transformer_vq.cli.arguments import Json
from transformer_vq.cli.console import console, print_json

bench = typer.Typer(help="Side-by-side timings on this machine: medians and ratios.", no_args_is_help=True)
Repeats = Annotated[int | None, typer.Option("--repeats", min=1, help="Timed turns; their median is shown.")]


@bench.command()
def attention(
    lengths: Annotated[
        list[int] | None, typer.Option("--length", min=1, help="Tokens, may be given several times.")
    ] = None,
    repeats: Repeats = None,
    json: Json = False,
) -> None:
    """VQ attention beside PyTorch's causal attention on the same keys, forward and backward."""
    _measure("attention", json, lengths=lengths, repeats=repeats)


@bench.command()
def quantize(repeats: Repeats = None, json: Json = False) -> None:
    """One step of the quantizer beside vector-quantize-pytorch's, time and memory."""
    _measure("quantize", json, repeats=repeats)


@bench.command()
def images(repeats: Repeats = None, json: Json = False) -> None:
    """Images per second of a VQ-VAE with our quantizer and with vector-quantize-pytorch's."""
    _measure("images", json, repeats=repeats)


@bench.command()
def generation(repeats: Repeats = None, json: Json = False) -> None:
    """Time per generated token at several positions, beside Llama's."""
    _measure("generation", json, repeats=repeats)


@bench.command()
def train(
    lengths: Annotated[
        list[int] | None, typer.Option("--length", min=1, help="Tokens of a row, may be given several times.")
    ] = None,
    repeats: Repeats = None,
    json: Json = False,
) -> None:
    """A training step of a small model beside one of Llama of the same shape."""
    _measure("train", json, lengths=lengths, repeats=repeats)


def _measure(name: str, json: bool, **options: Any) -> None:
    """Run the benchmark of that name with the options given, and print its rows."""
    import platform

    import torch

    module = import_module(f"transformer_vq.bench.{name}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    where = f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    console(to_stderr=True).print(f"bench {name} on {where}; runs take turns, which takes a while")
    rows = module.run(**{key: value for key, value in options.items() if value is not None})
    if json:
        print_json({"bench": name, "machine": where, "rows": rows})
    else:
        module.table(rows, f"{name}: {where}")
