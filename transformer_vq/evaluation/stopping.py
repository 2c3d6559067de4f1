"""Where a generated text ends: at a stop string, at a stop token, or at the most tokens asked for.

A stop string is looked for in the bytes of the continuation alone, across the borders of tokens, and is no part of the
text; neither is a stop token. The tokens of a text are the fewest that hold it: where a token reaches into the stop
string, that token is the last.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

Decode = Callable[[Iterable[int]], bytes]
"""Token ids to the bytes behind them, as `Tokenizer.decode_bytes` does it."""
NEIGHBOURS = 8  # tokens before a new one that may change its bytes, in tokenizers that write words and not bytes


@dataclass(frozen=True)
class Continuation:
    """What follows a prompt."""

    tokens: list[int]
    text: bytes
    """The bytes of the continuation, before what stopped it; empty without a tokenizer."""
    stop: bytes | int | None
    """The string or token that ended it; None: all tokens asked for are there."""


class Row:
    """One text as it grows, until `stop` is not None."""

    def __init__(
        self, prompt: Sequence[int], stops: Sequence[bytes], stop_tokens: Collection[int], decode: Decode | None
    ) -> None:
        self.stop: bytes | int | None = None
        self._stops, self._stop_tokens, self._decode = stops, stop_tokens, decode
        self._tokens: list[int] = []
        self._recent = list(prompt[-NEIGHBOURS:])
        self._text, self._lengths = bytearray(), [0]
        self._shown = 0

    def add(self, token: int) -> None:
        """One more token."""
        if token in self._stop_tokens:
            self.stop = token
            return
        self._tokens.append(token)
        if self._decode is None:
            return
        before = len(self._text)
        self._text += new_bytes(self._recent, token, self._decode)
        self._lengths.append(len(self._text))
        self._recent = [*self._recent, token][-NEIGHBOURS:]
        found = [
            (place, stop)
            for stop in self._stops
            if (place := self._text.find(stop, max(0, before - len(stop) + 1))) >= 0
        ]
        if found:
            place, self.stop = min(found, key=lambda pair: pair[0])
            del self._text[place:]
            self._tokens = self._tokens[: next(n for n, length in enumerate(self._lengths) if length >= place)]

    def fresh(self) -> bytes:
        """Bytes that are new since the last call and cannot turn out to begin a stop string."""
        end = len(self._text)
        if self.stop is None:
            end -= max(
                (n for stop in self._stops for n in range(1, len(stop)) if self._text.endswith(stop[:n])), default=0
            )
        new, self._shown = bytes(self._text[self._shown : end]), max(self._shown, end)
        return new

    def rest(self) -> bytes:
        """What `fresh` held back, when nothing follows any more."""
        new, self._shown = bytes(self._text[self._shown :]), len(self._text)
        return new

    def continuation(self) -> Continuation:
        """The text so far."""
        return Continuation(list(self._tokens), bytes(self._text), self.stop)


def new_bytes(recent: Sequence[int], token: int, decode: Decode) -> bytes:
    """What `token` adds to the text after `recent`: some tokenizers give a token's bytes by its neighbours."""
    before, after = decode(recent), decode([*recent, token])
    return after[len(before) :] if after.startswith(before) else decode([token])
