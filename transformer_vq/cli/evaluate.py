"""`transformer-vq eval RUN`: bits per byte and codebook health of a trained model on a whole split."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from transformer_vq.cli.arguments import Json, Overrides, Run
from transformer_vq.cli.console import console, number, print_json, progress_bar, table
from transformer_vq.cli.runs import folder_of, launched, open_run

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate import Accelerator

    from transformer_vq.config import RunConfig
    from transformer_vq.data import Mixture
    from transformer_vq.training import LoadedRun

Split = Annotated[Literal["valid", "test", "train"], typer.Option(help="The split to score.")]
Contexts = Annotated[
    list[str] | None,
    typer.Option("--context", metavar="full|W", help="Context, may be given several times; by default the config's."),
]
Recurrence = Annotated[
    int | None,
    typer.Option(
        min=2,
        max=8,
        metavar="N",
        help="Score apart targets whose preceding N tokens occurred before, by how many windows ago; by default the "
        "config's.",
    ),
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=1, help="Score only the first of them.")]

SCORES = {
    "bits_per_byte": "bits per byte",
    "bits_per_token": "bits per token",
    "perplexity": "perplexity per token",
    "word_perplexity": "perplexity per word",
    "tokens": "tokens",
    "bytes": "bytes",
}
HEALTH = {
    "usage": "usage",
    "perplexity": "perplexity",
    "dead_codes": "unused codes",
    "norm_ratio": "‖q‖/‖k‖",
    "cosine": "cosine",
    "relative_error": "relative error",
    "key_rank": "key rank",
    "code_rank": "code rank",
}


def eval_(
    run: Run,
    overrides: Overrides = None,
    split: Split = "valid",
    context: Contexts = None,
    max_tokens: MaxTokens = None,
    recurrence: Recurrence = None,
    json: Json = False,
) -> None:
    """Score a trained model on a whole split.

    Several contexts stand side by side. Nothing is written. Under torchrun or accelerate launch the processes share
    the work, and the numbers are those of one.

    Settings that may change are those of data and eval, such as data.source=other.txt.
    """
    contexts = [parse_context(text) for text in context or []]
    results = []
    with launched(run) as accelerator:
        loaded = open_run(run, accelerator.device)

        from transformer_vq.evaluation import default_context, evaluate_sources
        from transformer_vq.training.distributed import crew

        settings = settings_for(loaded, run, overrides or [])
        mixture = read_sources(settings, loaded, run, accelerator)
        usual = settings.eval.context or default_context(loaded.model, settings.train.seq_len)
        for width in contexts or [usual]:
            with progress_bar(f"{split}, context {width}") as progress:
                results.append(
                    evaluate_sources(
                        loaded.model,
                        mixture,
                        split,
                        width,
                        settings.eval.batch_size,
                        max_tokens,
                        reset_documents=settings.data.document_boundaries == "reset",
                        recurrence=recurrence or settings.eval.recurrence,
                        progress=progress,
                        crew=crew(accelerator, in_step=False),
                    )
                )
    if json:
        print_json({"run": run, "step": loaded.step, "split": split, "contexts": results})
        return
    out = console()
    out.print(f"{run}, step {loaded.step}, split {split}", soft_wrap=True)
    out.print()
    out.print(scores_table(results))
    if mixture.alone is None:
        out.print()
        out.print(sources_table(mixture.shares, results))
    if recurrence := recurrence or settings.eval.recurrence:
        out.print()
        out.print(recurrence_table(results, recurrence, loaded.model.config.window))
    if any(key.startswith("layer") and "/" in key for key in results[0]):
        out.print()
        out.print(health_table(results[0]))
    for note in notes(loaded, results, mixture):
        out.print(f"note: {note}", soft_wrap=True)


def parse_context(text: str) -> Any:
    """`full` or a number.  Raises ConfigError."""
    from transformer_vq.config import ConfigError

    if text == "full":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--context {text}: must be full, or a number of tokens, at least 1")
    return int(text)


def settings_for(loaded: LoadedRun, run: str, overrides: Sequence[str]) -> RunConfig:
    """The run's settings with `overrides` of data and eval; other text is read with the run's own tokenizer."""
    from transformer_vq.config import ConfigError
    from transformer_vq.config.recall import load_text_config

    for override in overrides:
        if not override.startswith(("data.", "eval.")) or override.startswith("data.tokenizer"):
            raise ConfigError(
                f"{override}: a trained model is scored as it is; only data.source and the like can change"
            )
    folder = folder_of(run)
    one = any(text.startswith("data.source=") for text in overrides) and loaded.config.data.mix is not None
    settings = load_text_config(folder, ["data.mix=null", *overrides] if one else overrides)
    trains = settings.data.tokenizer.startswith("bpe:")
    if not settings.data.tokenizer.startswith("bytes") and (not trains or settings.data != loaded.config.data):
        settings = with_own_tokenizer(settings, folder)
    return settings


def with_own_tokenizer(settings: RunConfig, folder: Path) -> RunConfig:
    """Whatever has become of the file, the name or the text that the tokenizer came from."""
    data = settings.data.model_copy(update={"tokenizer": str(folder / "tokenizer.json")})
    return settings.model_copy(update={"data": data})


def read_sources(settings: RunConfig, loaded: LoadedRun, run: str, accelerator: Accelerator | None = None) -> Mixture:
    """The sources as the run's own tokens, prepared now where they are not in the cache, by the main process."""
    from transformer_vq.data import check_sources, prepare_sources

    def prepared() -> Mixture:
        mixture = prepare_sources(settings.data)
        if mixture.tokenizer.sha256 != loaded.tokenizer.sha256:  # trained anew, it became another
            mixture = prepare_sources(with_own_tokenizer(settings, folder_of(run)).data)
        return mixture

    with console(to_stderr=True).status("preparing the corpus"):
        if accelerator is not None:
            from transformer_vq.training.distributed import on_main

            on_main(accelerator, lambda: prepared() and None, long=True)
        mixture = prepared()
    check_sources(mixture, seq_len=1)
    return mixture


def scores_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """One row a score, one column a context."""
    out = table("", *(f"context {result['context']}" for result in results))
    for key, label in SCORES.items():
        if key in results[0]:
            out.add_row(label, *(number(result[key]) for result in results))
    return out


def sources_table(shares: Mapping[str, float], results: Sequence[Mapping[str, Any]]) -> Table:
    """One row a source: its weight, and bits per byte, or per token, by context."""
    key = "bits_per_byte" if "bits_per_byte" in results[0] else "bits_per_token"
    out = table("source", "share", *(f"{SCORES[key]}, context {result['context']}" for result in results))
    for name, share in shares.items():
        out.add_row(name, number(share), *(number(result[f"{name}/{key}"]) for result in results))
    return out


def recurrence_table(results: Sequence[Mapping[str, Any]], n: int, window: int) -> Table:
    """One row a group of targets, nearest first: how many there are, and bits per byte, or per token, by context."""
    from transformer_vq.evaluation.recurrence import PREFIX, group_names, words

    key = "bits_per_byte" if "bits_per_byte" in results[0] else "bits_per_token"
    out = table(
        f"the {n} tokens before last occurred",
        "targets",
        *(f"{SCORES[key]}, context {result['context']}" for result in results),
    )
    for name in group_names():
        bits = (number(result.get(f"{PREFIX}/{name}/{key}")) for result in results)
        out.add_row(words(name, window), number(results[0][f"{PREFIX}/{name}/tokens"]), *bits)
    return out


def health_table(result: Mapping[str, Any]) -> Table:
    """One row a layer that quantizes."""
    out = table("codebook", *HEALTH.values())
    for layer in sorted({int(match[1]) for key in result if (match := re.match(r"layer(\d+)/", key))}):
        out.add_row(f"layer {layer}", *(number(result[f"layer{layer}/{name}"]) for name in HEALTH))
    return out


def notes(loaded: LoadedRun, results: Sequence[Mapping[str, Any]], mixture: Mixture) -> list[str]:
    """What a reader of the table must know."""
    apart = (
        []
        if mixture.alone is not None
        else ["all sources together are their mean by weights; tokens and bytes are sums"]
    )
    if not loaded.model.keeps_every_key:
        return apart
    lines = apart
    if any(result["context"] == "full" for result in results):
        lines.append("layers with full attention keep every key: memory grew with the split, time with its square")
    if any(result["context"] != "full" for result in results):
        lines.append("windows of W tokens overlap by half: a token sees W/2 to W tokens; compare models at the same W")
    if loaded.config.model.position == "xl":
        lines.append("the XL bias of full-attention layers is materialised as a mask of length × length")
    return lines
