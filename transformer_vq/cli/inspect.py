"""`transformer-vq inspect RUN [TEXT]`: one HTML page of what a run's codes mean."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from transformer_vq.cli.arguments import Json, Run, check_plot
from transformer_vq.cli.console import console, number, print_json, print_lines, progress_bar, table
from transformer_vq.cli.evaluate import Split, read_sources, settings_for
from transformer_vq.cli.generate import argument_bytes, encode
from transformer_vq.cli.runs import folder_of, open_run

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.table import Table

    from transformer_vq.training import LoadedRun

Text = Annotated[
    str | None,
    typer.Argument(
        metavar="TEXT", help="A file, - for standard input, or the text itself; by default the run's own, see --split."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE.html", help="Where the page goes; by default inspect.html in the run folder."),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Read only the first of them.")]
Codes = Annotated[int, typer.Option("--codes", min=1, help="Codes of a layer that are listed, the most frequent ones.")]
Layers = Annotated[
    list[int] | None,
    typer.Option("--layer", metavar="I", min=0, help="A layer to look at, may be given several times; all by default."),
]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE.png", help="One picture beside the page, of the last layer that has codes."),
]
BYTES_PER_TOKEN = 32
"""So many bytes of a file are read for each token that is wanted; tokens of text have about four."""


class Chosen(NamedTuple):
    """The text to look at."""

    name: str
    tokens: NDArray[Any]
    documents: NDArray[Any] | None
    """First token of each, where the run was trained to see none beyond its own; else None."""


def inspect(
    run: Run,
    text: Text = None,
    split: Split = "valid",
    max_tokens: MaxTokens = 16_384,
    codes: Codes = 12,
    layer: Layers = None,
    out: Out = None,
    plot: Plot = None,
    json: Json = False,
) -> None:
    """Write one HTML page of what a run's codes mean, by layer: tokens of a code in context, a map, attention, angles.

    The page needs no network. --json prints its numbers, and writes a page only where --out names one; so does --plot.
    """
    from transformer_vq.config import ConfigError

    check_language(run)
    check_plot(plot)
    target = page_path(run, out, json or plot is not None)
    loaded = open_run(run)
    chosen = choose(loaded, run, text, split, max_tokens)
    layers = list(dict.fromkeys(layer or range(loaded.config.model.layers)))
    for i in layers:
        if i >= loaded.config.model.layers:
            raise ConfigError(f"--layer {i}: the model has layers 0-{loaded.config.model.layers - 1}")

    from transformer_vq.inspect.numbers import layers_of
    from transformer_vq.inspect.reading import read
    from transformer_vq.inspect.spelling import Speller

    say = console(to_stderr=json)
    print_lines(
        say,
        {
            "run": f"{run}, step {loaded.step}",
            "text": f"{chosen.name}, {len(chosen.tokens):,} tokens",
            "writes to": ", ".join(str(path) for path in (target, plot) if path) or "standard output",
        },
    )
    with progress_bar("reading") as progress:
        readings = read(loaded.model, chosen.tokens, layers, chosen.documents, progress=progress)
    speller = Speller(loaded.tokenizer, chosen.tokens.tolist())
    found = layers_of(readings, chosen.tokens, speller)
    if target is not None:
        from transformer_vq.files import write_text
        from transformer_vq.inspect.page import Inspected, render

        page = Inspected(
            run=run,
            step=loaded.step,
            text=chosen.name,
            command=command(run, text, split, max_tokens, layer, codes),
            layers=found,
            readings=readings,
            tokens=chosen.tokens,
            speller=speller,
            records=records(run, loaded.step),
            window=loaded.config.model.window,
        )
        write_text(target, render(page, codes))
    if plot is not None:
        coded = [row["layer"] for row in found if row["heads"]]
        if not coded:
            raise ConfigError(f"--plot {plot}: no layer has codes to show")
        from transformer_vq.evaluation.plots import save_figure
        from transformer_vq.inspect.learned import learned

        save_figure(learned(found, readings, coded[-1]), plot)
    if json:
        print_json(
            {"run": run, "step": loaded.step, "text": chosen.name, "tokens": len(chosen.tokens), "layers": found}
        )
        return
    say.print()
    say.print(layers_table(found))
    written = {name: str(path) for name, path in (("page", target), ("picture", plot)) if path}
    print_lines(say, {**written, "next": f"transformer-vq inspect {run} 'Some text' --out other.html"})


def check_language(run: str) -> None:
    """Raises ConfigError for a run of the image benchmark, whose codes have no tokens."""
    from transformer_vq.config import ConfigError
    from transformer_vq.config.load import find_config, read_yaml

    folder = folder_of(run)
    if (folder / "config.yaml").is_file() and "images" in read_yaml(find_config(folder)):
        raise ConfigError(f"{run}: is a run of the image benchmark; inspect reads runs of a language model")


def page_path(run: str, out: Path | None, only_if_named: bool) -> Path | None:
    """Where the page is written, None: nowhere.  Raises ConfigError before any work where something is there."""
    from transformer_vq.config import ConfigError

    if out is None and only_if_named:
        return None
    target = folder_of(run) / "inspect.html" if out is None else out
    where = "--out " if out is not None else ""
    if target.exists():
        raise ConfigError(f"{where}{target}: is there already; name another file with --out")
    if out is not None and target.suffix not in (".html", ".htm"):
        raise ConfigError(f"--out {target}: must end in .html")
    if out is not None and not target.absolute().parent.is_dir():
        raise ConfigError(f"--out {target}: there is no folder {target.parent}")
    return target


def choose(loaded: LoadedRun, run: str, text: str | None, split: str, most: int) -> Chosen:
    """The first `most` tokens of TEXT, or of a split of the run's own.  Raises ConfigError where there is none."""
    import numpy as np

    from transformer_vq.config import ConfigError

    if text is None:
        settings = settings_for(loaded, run, [])
        name, file = next(iter(read_sources(settings, loaded, run).files(split).items()))
        file = file.head(most)
        resets = settings.data.document_boundaries == "reset"
        said = f"{split} split" + (f" of {name}" if loaded.config.data.mix else "")
        return Chosen(said, np.asarray(file.tokens), file.documents if resets else None)
    name, content = given(text, most * BYTES_PER_TOKEN)
    tokens = np.array(encode(loaded.tokenizer, content, name)[:most], np.int64)
    if len(tokens) == 0:
        raise ConfigError(f"{name}: has no token of this run's tokenizer; a text of at least one is needed")
    return Chosen(name, tokens, None)


def given(text: str, most: int) -> tuple[str, bytes]:
    """The name of TEXT and at most its first `most` bytes, no character cut in two.  Raises ConfigError."""
    from transformer_vq.config import ConfigError
    from transformer_vq.data.documents import character_start

    if text == "-":
        name, content = "standard input", sys.stdin.buffer.read(most + 4)
    elif text and _is(text, Path.is_dir):
        raise ConfigError(f"{text}: is a folder; name a file in it")
    elif text and _is(text, Path.exists):
        name = text
        try:
            with open(text, "rb") as file:
                content = file.read(most + 4)
        except OSError as error:
            raise ConfigError(f"{text}: {error.strerror}") from None
    elif len(text.split()) == 1 and (Path(text).suffix or "/" in text):
        raise ConfigError(f"{text}: there is no such file; text that looks like one comes from standard input, as -")
    else:
        name, content = "the text given", argument_bytes(text)
    if not content:
        raise ConfigError(f"{name}: is empty; a text of at least one token is needed")
    return name, content[: character_start(content, most)] if len(content) > most else content


def _is(text: str, what: Any) -> bool:
    try:
        return bool(what(Path(text)))
    except (OSError, ValueError):  # too long for a name, or with a zero byte in it
        return False


def records(run: str, step: int) -> list[dict[str, Any]]:
    """What the run has recorded up to the checkpoint."""
    from transformer_vq.evaluation.plots import read_metrics

    path = folder_of(run) / "metrics.jsonl"
    return [r for r in read_metrics(path) if r["step"] <= step] if path.is_file() else []


def command(run: str, text: str | None, split: str, max_tokens: int, layers: Sequence[int] | None, codes: int) -> str:
    """The command line that makes the page again; a long text is cut."""
    words = ["transformer-vq", "inspect", run]
    words += [text if len(text) <= 200 else f"{text[:200]}…"] if text is not None else ["--split", split]
    words += ["--max-tokens", str(max_tokens), "--codes", str(codes)]
    words += [word for i in layers or [] for word in ("--layer", str(i))]
    return shlex.join(words)


def layers_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    """One row a layer: codes, what tells them, angle and ratio, and where attention goes."""
    from transformer_vq.inspect.numbers import mean_of_heads
    from transformer_vq.inspect.page import percent

    def share(value: float | None) -> str:
        return percent(value).replace("–", "-").replace("\N{NO-BREAK SPACE}", " ")

    names = ("quantizer", "codes used", "perplexity", "told by token", "angle", "‖q‖/‖k‖", "beyond", "window", "itself")
    out = table("layer", *names)
    for layer in layers:
        used, angle = mean_of_heads(layer, "used"), mean_of_heads(layer, "angle", "mean")
        out.add_row(
            str(layer["layer"]),
            layer["kind"],
            "-" if used is None else f"{used:.0f} of {layer['codes']}",
            number(mean_of_heads(layer, "perplexity")),
            share(mean_of_heads(layer, "told", "token")),
            "-" if angle is None else f"{angle:.0f}°",
            number(mean_of_heads(layer, "ratio", "mean"), 3),
            *(share(layer["attention"][name]) for name in ("beyond", "window", "itself")),
        )
    return out
