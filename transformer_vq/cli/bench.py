"""`transformer-vq bench attention|quantize|images|generation|train|communication|context|all`: never tests."""

from __future__ import annotations

import json as json_
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from transformer_vq.cli.arguments import Json, check_plot
from transformer_vq.cli.console import console, print_json, table
from transformer_vq.cli.threads import wait_shortly

bench = typer.Typer(help="Side-by-side timings on this machine: medians and ratios.", no_args_is_help=True)


@bench.callback()
def _as_in_training() -> None:
    wait_shortly()


Repeats = Annotated[int | None, typer.Option("--repeats", min=1, help="Timed turns; their median is shown.")]
Out = Annotated[Path | None, typer.Option("--out", help="Also write the JSON object to this file.")]
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot", help="Also draw it, log-log, with the roofline of this device, measured: FILE.png, .svg or .pdf."
    ),
]

Shape = Annotated[
    str | None, typer.Option("--shape", help="Of the models: small or 125M; without it, small on a CPU, 125M on a GPU.")
]


@bench.command()
def attention(
    lengths: Annotated[
        list[int] | None, typer.Option("--length", min=1, help="Tokens, may be given several times.")
    ] = None,
    repeats: Repeats = None,
    json: Json = False,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """VQ attention beside full and linear attention of others on the same keys, forward and backward."""
    _measure("attention", json, out, plot, lengths=lengths, repeats=repeats)


@bench.command()
def quantize(
    vectors: Annotated[
        list[int] | None, typer.Option("--vectors", min=1, help="Keys, may be given several times.")
    ] = None,
    repeats: Repeats = None,
    json: Json = False,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """One step of the quantizer beside vector-quantize-pytorch's, time and memory."""
    _measure("quantize", json, out, plot, vectors=vectors, repeats=repeats)


@bench.command()
def images(
    batch_sizes: Annotated[
        list[int] | None, typer.Option("--batch-size", min=1, help="Images of a step, may be given several times.")
    ] = None,
    repeats: Repeats = None,
    json: Json = False,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """A training step of a VQ-VAE with our quantizer and with vector-quantize-pytorch's."""
    _measure("images", json, out, plot, batch_sizes=batch_sizes, repeats=repeats)


@bench.command()
def generation(
    positions: Annotated[
        list[int] | None, typer.Option("--position", min=1, help="Tokens read before, may be given several times.")
    ] = None,
    shape: Shape = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="fp32, bf16 or fp64, of weights and state.")] = None,
    repeats: Repeats = None,
    json: Json = False,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Time per generated token at several positions, beside Llama's and full attention's."""
    _measure("generation", json, out, plot, positions=positions, shape=shape, dtype=dtype, repeats=repeats)


@bench.command()
def train(
    lengths: Annotated[
        list[int] | None, typer.Option("--length", min=1, help="Tokens of a row, may be given several times.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="The step under train.compile takes part too; that compiles first.")
    ] = False,
    shape: Shape = None,
    precision: Annotated[str | None, typer.Option("--precision", help="fp32 or bf16 (autocast).")] = None,
    repeats: Repeats = None,
    json: Json = False,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """A training step of a model beside one of Llama of the same shape, and of ours with full attention."""
    options = {"lengths": lengths, "repeats": repeats, "compiled": compiled, "shape": shape, "precision": precision}
    _measure("train", json, out, plot, **options)


@bench.command()
def communication(
    lengths: Annotated[
        list[int] | None, typer.Option("--length", min=1, help="Tokens, may be given several times.")
    ] = None,
    processes: Annotated[
        list[int] | None,
        typer.Option("--processes", min=2, help="That share a sequence; up to 4 are started, for more by formula."),
    ] = None,
    json: Json = False,
    out: Out = None,
) -> None:
    """Bytes a process and layer sends under train.context_parallel, beside ring attention's."""
    _measure("communication", json, out, lengths=lengths, processes=processes)


@bench.command()
def scaling(
    models: Annotated[
        list[str] | None, typer.Option("--model", help="125M, 350M, 1.3B, 2.7B or 7B, may be given several times.")
    ] = None,
    lengths: Annotated[
        list[int] | None, typer.Option("--length", min=512, help="Tokens of a row, may be given several times.")
    ] = None,
    gpus: Annotated[list[int] | None, typer.Option("--gpus", min=1, help="May be given several times.")] = None,
    memory: Annotated[float, typer.Option("--memory", min=1, help="Of a GPU, in GB.")] = 80,
    json: Json = False,
    out: Out = None,
) -> None:
    """On paper: memory of a GPU and bytes it sends a step, and the cheapest layout that fits."""
    from transformer_vq.bench.scaling import MODELS
    from transformer_vq.config import ConfigError

    if unknown := [name for name in models or [] if name not in MODELS]:
        raise ConfigError(f"--model {unknown[0]}: must be one of {', '.join(MODELS)}")
    if odd := [n for n in gpus or [] if n > 8 and n % 8]:
        raise ConfigError(f"--gpus {odd[0]}: must be up to 8, or whole machines of 8")
    _measure("scaling", json, out, models=models, lengths=lengths, gpus=gpus, memory=memory * 1e9)


@bench.command()
def context(
    lengths: Annotated[
        list[int] | None, typer.Option("--length", min=1, help="Tokens of the row, may be given several times.")
    ] = None,
    processes: Annotated[int, typer.Option("--processes", min=2, help="That share the row, one thread each.")] = 2,
    evaluation: Annotated[
        bool, typer.Option("--evaluation", help="Its evaluation with full context in place of the step.")
    ] = False,
    repeats: Repeats = None,
    json: Json = False,
    out: Out = None,
) -> None:
    """A training step on one long row, cut over CPU processes and by one process alone."""
    _measure("context", json, out, lengths=lengths, processes=processes, evaluation=evaluation, repeats=repeats)


@bench.command("all")
def all_(
    page: Annotated[Path, typer.Option("--page", help="The page to write; numbers and pictures go beside it.")] = Path(
        "docs/results/speed.md"
    ),
    section: Annotated[
        list[str] | None,
        typer.Option("--section", help="Only this one, may be given several times; without it, those still missing."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what is there already, too.")] = False,
    only_page: Annotated[bool, typer.Option("--only-page", help="Measure nothing: write the page anew.")] = False,
) -> None:
    """Measure everything on the device at hand, section by section, and write the page of speed.

    A section takes a few minutes and is kept as soon as it is done, so a stopped command goes on where it was.
    Sections of other devices stay as they are.
    """
    from transformer_vq.bench.page import SECTIONS, missing, record, write_page
    from transformer_vq.config import ConfigError

    if unknown := [name for name in section or [] if name not in SECTIONS]:
        raise ConfigError(f"--section {unknown[0]}: must be one of {', '.join(SECTIONS)}")
    screen = console(to_stderr=True)
    wanted = [] if only_page else section or (list(SECTIONS) if again else missing(page))
    for name in wanted:
        screen.print(f"bench all: {name}")
        record(page, name)
    write_page(page)
    screen.print(f"{page} is written; numbers and pictures are in {page.with_suffix('')}")


def _measure(name: str, json: bool, out: Path | None = None, plot: Path | None = None, **options: Any) -> None:
    """Run the benchmark of that name with the options given, and print its rows.

    What is left out is, on a GPU, as the benchmark's own ON_GPU says, and else as its `run` does.
    """
    from transformer_vq.bench import device
    from transformer_vq.bench.comparison import absent, cells
    from transformer_vq.bench.page import on_gpu

    module, facts = import_module(f"transformer_vq.bench.{name}"), device.about()
    check_plot(plot)
    for name_, target in (("--out", out), ("--plot", plot)):
        _writable(name_, target)
    where, sized = device.line(facts), hasattr(module, "AXIS")
    console(to_stderr=True).print(f"bench {name} on {where}; runs take turns, which takes a while")
    given = {key: value for key, value in options.items() if value is not None}
    found: dict[str, Any] = {"bench": name, "machine": where, **facts}
    chosen = (on_gpu(module) if facts["kind"] == "cuda" else {}) | given
    rows = module.run(**chosen)
    if sized:
        ceilings = device.ceilings(device.type_of(chosen, module.TYPE))
        found["ceilings"] = ceilings._asdict()
    found["rows"] = rows
    if plot is not None:
        from transformer_vq.bench.plot import picture

        picture(module, rows, ceilings, plot, f"{name}: {facts['device']}")
    if out is not None:
        from transformer_vq.files import write_text

        write_text(out, json_.dumps(found, indent=1) + "\n")
    title = f"{name}: {where}"
    if json:
        print_json(found)
    elif sized:
        _show(*cells(rows, module.AXIS, module.MORE), absent(rows), title)
    else:
        module.table(rows, title)


def _show(headings: tuple[str, ...], lines: list[tuple[str, ...]], absent: Mapping[str, str], title: str) -> None:
    """A table, and who took no part."""
    out, shown = console(), table(*headings, title=title)
    for line in lines:
        shown.add_row(*line)
    out.print(shown)
    for name, why in absent.items():
        out.print(f"{name}: absent, {why}")


def _writable(option: str, target: Path | None) -> None:
    """Raise ConfigError before minutes of measuring when the folder is not there, or the file is."""
    from transformer_vq.config import ConfigError

    if target is not None and not target.resolve().parent.is_dir():
        raise ConfigError(f"{option} {target}: there is no folder {target.parent}")
    if target is not None and target.exists():
        raise ConfigError(f"{option} {target}: is there already; name another file")
