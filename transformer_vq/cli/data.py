"""`transformer-vq data CONFIG`: prepare the corpus of a config and say what it is."""

from __future__ import annotations

from transformer_vq.cli.arguments import Config, Json, Overrides
from transformer_vq.cli.console import console, print_json, table


def data(config: Config, overrides: Overrides = None, json: Json = False) -> None:
    """Read, split and tokenize a corpus, and describe it."""
    from transformer_vq.config import RunConfig, load_config

    settings = load_config(config, overrides or [], RunConfig)

    from transformer_vq.data import prepare

    talk = console(to_stderr=True)
    with talk.status("preparing the corpus") as status:
        corpus = prepare(settings.data, lambda split, read: status.update(f"{split}: {read / 1e6:,.1f} MB tokenized"))
    splits = {
        name: {"bytes": file.bytes, "tokens": len(file), "documents": len(file.documents), "words": file.words}
        for name, file in corpus.splits.items()
    }
    if json:
        tokenizer = {"name": corpus.tokenizer.name, "vocab_size": corpus.tokenizer.vocab_size}
        about = {
            "name": corpus.name,
            "sha256": corpus.sha256,
            "folder": str(corpus.folder),
            "notes": list(corpus.notes),
        }
        print_json({**about, "tokenizer": tokenizer, "splits": splits})
        return
    out = console()
    sizes = table("split", "bytes", "tokens", "documents", "words")
    for name, numbers in splits.items():
        sizes.add_row(name, *("unknown" if n is None else f"{n:,}" for n in numbers.values()))
    out.print(corpus.name, soft_wrap=True)
    out.print()
    out.print(sizes)
    out.print()
    out.print(f"tokenizer  {corpus.tokenizer.name}", soft_wrap=True)
    out.print(f"sha256     {corpus.sha256}", soft_wrap=True)
    out.print(f"tokens in  {corpus.folder}", soft_wrap=True)
    for note in corpus.notes:
        out.print(f"note       {note}", soft_wrap=True)
