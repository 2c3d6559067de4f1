"""`transformer-vq generate RUN`: text from a trained model, as it comes when a person watches."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from transformer_vq.cli.arguments import Json, Run
from transformer_vq.cli.console import print_json
from transformer_vq.cli.runs import open_run

if TYPE_CHECKING:
    from transformer_vq.data import Tokenizer
    from transformer_vq.training import LoadedRun

Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="Text to continue; may be given several times.")]
Files = Annotated[
    list[str] | None, typer.Option("--prompt-file", metavar="FILE", help="A file to continue; - is standard input.")
]
Samples = Annotated[int, typer.Option(min=1, help="Texts per prompt.")]
Tokens = Annotated[int, typer.Option(min=0, help="Tokens to generate.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")]
TopK = Annotated[int | None, typer.Option(min=1, help="Draw among the k likeliest tokens.")]
TopP = Annotated[
    float | None, typer.Option(help="Draw from the nucleus: the likeliest tokens with this much of the mass.")
]
Seed = Annotated[int, typer.Option(min=0, help="Text r of the batch is drawn with seed + r.")]


def generate(
    run: Run,
    prompt: Prompts = None,
    prompt_file: Files = None,
    samples: Samples = 1,
    tokens: Tokens = 256,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Continue prompts with text from a trained model."""
    from transformer_vq.config import ConfigError

    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"--top-p {top_p}: must be greater than 0 and at most 1")
    given = [text.encode() for text in prompt or []] + [read_prompt(name) for name in prompt_file or []]
    texts = [text for text in given or [b""] for _ in range(samples)]
    loaded = open_run(run)

    from transformer_vq.evaluation import generate as continue_

    tokenizer, start = loaded.tokenizer, start_token(loaded)
    encoded = [tokenizer.encode_bytes(text).tolist() for text in texts]
    if start is None and not all(encoded):
        raise ConfigError("--prompt: the tokenizer finds no token in it, nor in an end of line; give it some text")
    streams = not json and len(texts) == 1 and sys.stdout.isatty()
    if streams:
        sys.stdout.write(printable(texts[0].decode(errors="replace")))
    new = continue_(
        loaded.model,
        encoded,
        tokens,
        temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        on_token=stream(tokenizer) if streams else None,
        start=start,
    )
    if streams:
        sys.stdout.write("\n")
        return
    pairs = [(text.decode(errors="replace"), tokenizer.decode(row)) for text, row in zip(texts, new, strict=True)]
    if json:
        listed = [
            {"prompt": before, "text": after, "tokens": row} for (before, after), row in zip(pairs, new, strict=True)
        ]
        print_json({"run": run, "step": loaded.step, "seed": seed, "texts": listed})
        return
    for i, (before, after) in enumerate(pairs):
        heading = f"--- {i + 1} of {len(pairs)}\n" if len(pairs) > 1 else ""
        print(f"{heading}{before}{after}")


def read_prompt(name: str) -> bytes:
    """The bytes of a file, or of standard input.  Raises ConfigError."""
    from transformer_vq.config import ConfigError

    if name == "-":
        return sys.stdin.buffer.read()
    try:
        with open(name, "rb") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"--prompt-file {name}: {error.strerror}") from None


def start_token(loaded: LoadedRun) -> int | None:
    """What a text without a prompt begins after: the end of the document separator, or of a line; None: no token."""
    ends = loaded.tokenizer.encode(loaded.config.data.document_separator or "\n")
    return ends[-1] if ends else None


def stream(tokenizer: Tokenizer) -> Callable[[Sequence[int]], None]:
    """Writes each token's text as soon as its last byte is there."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    recent: list[int] = []

    def write(new: Sequence[int]) -> None:
        before = len(tokenizer.decode_bytes(recent))
        recent.append(new[0])
        sys.stdout.write(printable(decoder.decode(tokenizer.decode_bytes(recent)[before:])))
        sys.stdout.flush()
        del recent[:-4]  # some tokenizers give a token's text by its neighbours

    return write


def printable(text: str) -> str:
    """Without what would steer a terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
