"""Tokens as text that can be seen, and the text around a token.

A token's bytes may be half a character, a control character or white space: what cannot be seen is written out.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformer_vq.data import Tokenizer
from transformer_vq.evaluation.stopping import NEIGHBOURS, new_bytes

BEFORE, AFTER = 28, 18
"""Characters of context."""
LONGEST = 32
"""Characters of a token that are shown."""
SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍", "\\": "\\"}


class Speller:
    """The text of one tokenizer's tokens, each looked up once."""

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int]) -> None:
        self.tokenizer, self.ids = tokenizer, ids
        self._names: dict[int, str] = {}

    def name(self, token: int) -> str:
        """A token by itself, white space written out; `<17>` where no byte stands behind it."""
        if token not in self._names:
            text = self.tokenizer.decode_bytes([token])
            self._names[token] = cut(visible(text)) if text else f"<{token}>"
        return self._names[token]

    def around(self, at: int) -> tuple[str, str, str]:
        """The text before token `at`, its own, and the text after: white space as it is, but for ends of lines."""
        first = max(0, at - BEFORE)
        before = self.tokenizer.decode_bytes(self.ids[first:at])
        rest = self.tokenizer.decode_bytes(self.ids[first : at + 1 + AFTER])
        own = self.bytes_at(at)
        after = rest[len(before) + len(own) :] if rest.startswith(before + own) else b""
        words = (visible(text, spaces=False) for text in (before, own, after))
        left, middle, right = words
        return left[-BEFORE:], cut(middle), right[:AFTER]

    def bytes_at(self, at: int) -> bytes:
        """What token `at` adds to the text before it."""
        decode = self.tokenizer.decode_bytes
        return new_bytes(self.ids[max(0, at - NEIGHBOURS) : at], self.ids[at], decode)


def visible(text: bytes, spaces: bool = True) -> str:
    """Bytes as characters, those that are no UTF-8 as \\xHH, and what cannot be seen by a sign or its number.

    spaces: a space gets its sign too.
    """
    shown = []
    for c in text.decode("utf-8", errors="backslashreplace"):
        if c == " " and not spaces:
            shown.append(c)
        elif c in SIGNS:
            shown.append(SIGNS[c])
        else:
            shown.append(c if c.isprintable() else f"\\u{{{ord(c):x}}}")
    return "".join(shown)


def cut(text: str) -> str:
    """Not longer than a table can take."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
