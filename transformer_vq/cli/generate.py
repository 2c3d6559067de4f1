"""`transformer-vq generate RUN`: text from a trained model, as it comes when a person watches."""

from __future__ import annotations

import codecs
import math
import os
import re
import sys
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from transformer_vq.cli.arguments import Json, Run
from transformer_vq.cli.console import print_json, printable
from transformer_vq.cli.runs import open_run

if TYPE_CHECKING:
    from transformer_vq.data import Tokenizer
    from transformer_vq.evaluation.stopping import Continuation
    from transformer_vq.training import LoadedRun

Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="Text to continue; may be given several times.")]
Files = Annotated[
    list[str] | None, typer.Option("--prompt-file", metavar="FILE", help="A file to continue; - is standard input.")
]
Samples = Annotated[int, typer.Option(min=1, help="Texts per prompt.")]
Tokens = Annotated[int, typer.Option(min=0, help="Tokens to generate.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token, inf draws evenly.")]
TopK = Annotated[int | None, typer.Option(min=1, help="Draw among the k likeliest tokens.")]
TopP = Annotated[
    float | None, typer.Option(help="Draw from the nucleus: the likeliest tokens with this much of the mass.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**62, help="Text r of the batch is drawn with seed + r.")]
Stops = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        metavar="TEXT",
        help="End a text before TEXT; may be given several times. Understands \\n, \\t, \\0, \\xHH, \\\\.",
    ),
]
StopTokens = Annotated[
    list[int] | None,
    typer.Option("--stop-token", metavar="ID", min=0, help="End a text before this token; may be given several times."),
]
ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"0": b"\0", b"\\": b"\\"}


class Stream(Protocol):
    """Writes text as it comes: (row, bytes), and at the end what is left of a character."""

    def __call__(self, row: int, text: bytes, final: bool = False) -> None: ...


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
    stop: Stops = None,
    stop_token: StopTokens = None,
    json: Json = False,
) -> None:
    """Continue prompts with text from a trained model.

    A prompt is bytes, and is decoded together with what follows it; what is not UTF-8 shows as a replacement character.
    """
    from transformer_vq.config import ConfigError

    if math.isnan(temperature):
        raise ConfigError(f"--temperature {temperature}: must be a number, at least 0; 0 takes the likeliest token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"--top-p {top_p}: must be greater than 0 and at most 1")
    stops = [stop_bytes(text) for text in stop or []]
    given = [("--prompt", argument_bytes(text)) for text in prompt or []]
    given += [(f"--prompt-file {name}", read_prompt(name)) for name in prompt_file or []]
    named = [pair for pair in given or [("--prompt", b"")] for _ in range(samples)]
    loaded = open_run(run)

    from transformer_vq.evaluation import continuations

    tokenizer, start = loaded.tokenizer, start_token(loaded)
    for token in stop_token or []:
        if token >= tokenizer.vocab_size:
            raise ConfigError(f"--stop-token {token}: the tokenizer has the ids 0 to {tokenizer.vocab_size - 1:,}")
    encoded = [encode(tokenizer, text, where) for where, text in named]
    if start is None and not all(encoded):
        raise ConfigError("--prompt: the tokenizer finds no token in it, nor in an end of line; give it some text")
    streams = not json and len(named) == 1 and sys.stdout.isatty()
    write = stream(named[0][1]) if streams else None
    found = continuations(
        loaded.model,
        encoded,
        tokens,
        temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        on_text=write,
        start=start,
        stop=stops,
        stop_tokens=frozenset(stop_token or []),
        tokenizer=tokenizer,
    )
    if write is not None:
        write(0, b"", final=True)
        sys.stdout.write("\n")
        return
    pairs = [decoded(text, row.text) for (_, text), row in zip(named, found, strict=True)]
    if json:
        listed = [
            {"prompt": before, "text": after, "tokens": row.tokens, **ended(row)}
            for (before, after), row in zip(pairs, found, strict=True)
        ]
        print_json({"run": run, "step": loaded.step, "seed": seed, "texts": listed})
        return
    for i, (before, after) in enumerate(pairs):
        heading = f"--- {i + 1} of {len(pairs)}\n" if len(pairs) > 1 else ""
        print(f"{heading}{before}{after}")


def argument_bytes(text: str) -> bytes:
    """The bytes of a word on the command line, whatever their encoding."""
    try:
        return os.fsencode(text)
    except UnicodeEncodeError:  # called from Python where the file system's encoding lacks a letter
        return text.encode(errors="surrogatepass")


def stop_bytes(text: str) -> bytes:
    """A stop string, its escapes \\n, \\r, \\t, \\0, \\xHH and \\\\ resolved.  Raises ConfigError for an empty one."""
    from transformer_vq.config import ConfigError

    def meant(match: re.Match[bytes]) -> bytes:
        escape = match[1]
        if escape[:1] == b"x":
            return bytes([int(escape[1:], 16)])
        return ESCAPES[escape]

    if not text:
        raise ConfigError("--stop: is empty, and would end every text before it begins")
    return re.sub(rb"\\(x[0-9a-fA-F]{2}|[nrt0\\])", meant, argument_bytes(text))


def encode(tokenizer: Tokenizer, text: bytes, where: str) -> list[int]:
    """Ids of a prompt.  Raises ConfigError when it is not UTF-8 and the tokenizer reads nothing else."""
    from transformer_vq.config import ConfigError

    if tokenizer.reads_text:
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{where}: is not UTF-8 at byte {error.start}; this run's tokenizer ({tokenizer.name}) reads text, "
                "only a run with data.tokenizer = bytes reads any bytes"
            ) from None
    ids: list[int] = tokenizer.encode_bytes(text).tolist()
    return ids


def decoded(prompt: bytes, continuation: bytes) -> tuple[str, str]:
    """Both as text. A character that begins in the prompt and ends in the continuation stands in the continuation."""
    alone, whole = prompt.decode(errors="replace"), (prompt + continuation).decode(errors="replace")
    if not whole.startswith(alone):
        alone = alone[:-1]
    return alone, whole[len(alone) :]


def ended(row: Continuation) -> dict[str, str | int]:
    """Why a text ends: all its tokens are there, or a stop string or token came."""
    if row.stop is None:
        return {"ended": "length"}
    if isinstance(row.stop, int):
        return {"ended": "stop", "stop_token": row.stop}
    return {"ended": "stop", "stop": row.stop.decode(errors="replace")}


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


def stream(prompt: bytes) -> Stream:
    """Writes the prompt, then each character as soon as its last byte is there."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(row: int, text: bytes, final: bool = False) -> None:
        sys.stdout.write(printable(decoder.decode(text, final)))
        sys.stdout.flush()

    write(0, prompt)
    return write
