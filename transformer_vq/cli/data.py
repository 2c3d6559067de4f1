"""`transformer-vq data CONFIG`: prepare the corpus of a config and say what it is."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from transformer_vq.cli.arguments import Config, Json, Overrides
from transformer_vq.cli.console import console, print_json, table

if TYPE_CHECKING:
    from transformer_vq.data import Corpus, Mixture


def data(config: Config, overrides: Overrides = None, json: Json = False) -> None:
    """Read, split and tokenize a corpus, and describe it."""
    from transformer_vq.config import RunConfig, load_config

    settings = load_config(config, overrides or [], RunConfig)

    from transformer_vq.data import prepare_sources

    talk = console(to_stderr=True)
    with talk.status("preparing the corpus") as status:
        mixture = prepare_sources(
            settings.data, lambda split, read: status.update(f"{split}: {read / 1e6:,.1f} MB tokenized")
        )
    tokenizer = {"name": mixture.tokenizer.name, "vocab_size": mixture.tokenizer.vocab_size}
    found = {name: about(corpus) for name, corpus in mixture.sources.items()}
    if json:
        print_json({**found[""], "tokenizer": tokenizer} if mixture.alone else together(mixture, found, tokenizer))
        return
    out = console()
    for name, corpus in mixture.sources.items():
        sizes = table("split", "bytes", "tokens", "documents", "words")
        for split, numbers in found[name]["splits"].items():
            sizes.add_row(split, *("unknown" if n is None else f"{n:,}" for n in numbers.values()))
        out.print(
            f"{name}, {mixture.shares[name]:.3g} of the windows: {corpus.name}" if name else corpus.name, soft_wrap=True
        )
        out.print()
        out.print(sizes)
        out.print()
        out.print(f"tokenizer  {corpus.tokenizer.name}", soft_wrap=True)
        out.print(f"sha256     {corpus.sha256}", soft_wrap=True)
        out.print(f"tokens in  {corpus.folder}", soft_wrap=True)
        for note in corpus.notes:
            out.print(f"note       {note}", soft_wrap=True)
        if name != list(mixture.sources)[-1]:
            out.print()


def about(corpus: Corpus) -> dict[str, Any]:
    """What there is to say of one source."""
    splits = {
        name: {"bytes": file.bytes, "tokens": len(file), "documents": len(file.documents), "words": file.words}
        for name, file in corpus.splits.items()
    }
    return {
        "name": corpus.name,
        "sha256": corpus.sha256,
        "folder": str(corpus.folder),
        "notes": list(corpus.notes),
        "splits": splits,
    }


def together(mixture: Mixture, found: dict[str, dict[str, Any]], tokenizer: dict[str, Any]) -> dict[str, Any]:
    """The same keys for several sources, sizes summed, and those of each source under `sources`."""
    splits: dict[str, dict[str, int | None]] = {}
    for split, keys in next(iter(found.values()))["splits"].items():
        columns = {key: [one["splits"][split][key] for one in found.values()] for key in keys}
        splits[split] = {key: None if None in values else sum(values) for key, values in columns.items()}
    return {
        "name": mixture.name,
        "sha256": hashlib.sha256("".join(one["sha256"] for one in found.values()).encode()).hexdigest(),
        "notes": [f"{name}: {note}" for name, one in found.items() for note in one["notes"]],
        "tokenizer": tokenizer,
        "splits": splits,
        "sources": {name: {"weight": mixture.weights[name], **one} for name, one in found.items()},
    }
