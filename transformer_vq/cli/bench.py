"""`transformer-vq bench attention|quantize|images|generation|train`: side-by-side timings, never tests."""

from __future__ import annotations

import json as parser
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from transformer_vq.cli.arguments import Json, check_plot
from transformer_vq.cli.console import console, print_json

bench = typer.Typer(help="Side-by-side timings on this machine: medians and ratios.", no_args_is_help=True)
Repeats = Annotated[int | None, typer.Option("--repeats", min=1, help="Timed turns; their median is shown.")]


@bench.command()
def attention(
    lengths: Annotated[
        list[int] | None, typer.Option("--length", min=1, help="Tokens, may be given several times.")
    ] = None,
    repeats: Repeats = None,
    compare_up_to: Annotated[
        int | None, typer.Option("--compare-up-to", min=0, help="Longest text of the other side; 32768 by default.")
    ] = None,
    measured: Annotated[
        list[Path] | None,
        typer.Option("--from", metavar="FILE.json", help="Show what --json printed before, in place of measuring."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw it; nothing is written without.")
    ] = None,
    json: Json = False,
) -> None:
    """VQ attention beside PyTorch's causal attention on the same keys, forward and backward.

    Several --from are put together; of a length that is in more than one, the last counts.
    """
    check_plot(plot)
    if measured:
        found = joined([_read(path) for path in measured])
        _show("attention", found["machine"], found["rows"], json)
    else:
        found = _measure("attention", json, lengths=lengths, repeats=repeats, compare_up_to=compare_up_to)
    if plot is not None:
        from transformer_vq.bench.attention import draw
        from transformer_vq.evaluation.plots import save_figure

        save_figure(draw(found["rows"], found["machine"]), plot)


def joined(files: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What several files hold, a row a length."""
    rows = {row["tokens"]: row for found in files for row in found["rows"]}
    machines = dict.fromkeys(found["machine"] for found in files)
    return {"machine": "; ".join(machines), "rows": [rows[tokens] for tokens in sorted(rows)]}


def _read(path: Path) -> dict[str, Any]:
    """What --json printed.  Raises ConfigError."""
    from transformer_vq.config import ConfigError

    try:
        found: dict[str, Any] = parser.loads(path.read_text(encoding="utf-8"))
        if found["bench"] != "attention" or not all(
            {"tokens", "vq_ms", "sdpa_ms"} <= row.keys() for row in found["rows"]
        ):
            raise ValueError("another benchmark's")
        found["machine"] = str(found["machine"])
    except OSError as error:
        raise ConfigError(f"--from {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"--from {path}: is not what `bench attention --json` prints") from None
    return found


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


def _measure(name: str, json: bool, **options: Any) -> dict[str, Any]:
    """Run the benchmark of that name with the options given, print its rows, and return them and the machine."""
    import platform

    import torch

    module = import_module(f"transformer_vq.bench.{name}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    where = f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    console(to_stderr=True).print(f"bench {name} on {where}; runs take turns, which takes a while")
    rows = module.run(**{key: value for key, value in options.items() if value is not None})
    _show(name, where, rows, json)
    return {"machine": where, "rows": rows}


def _show(name: str, where: str, rows: list[dict[str, Any]], json: bool) -> None:
    if json:
        print_json({"bench": name, "machine": where, "rows": rows})
    else:
        import_module(f"transformer_vq.bench.{name}").table(rows, f"{name}: {where}")
