"""Names and numbers inside Markdown: what is written is what is shown, in tables, headings, emphasis and code."""

from __future__ import annotations

import re
from typing import Any

SPECIAL = re.compile(
    r"[\\`*|$]"  # escapes, code, emphasis, cells, formulas
    r"|~(?=~)"  # struck through
    r"|(?<![^\W_])_|_(?![^\W_])"  # emphasis; not inside a word like bits_per_byte
    r"|\](?=[(\[:])"  # links and footnotes
    r"|^[#>]"  # headings, quotations
)


class Verbatim(str):
    """Markdown of our own, which stands as it is."""

    __slots__ = ()


def escape(value: Any) -> Any:
    """Text as Markdown that shows it, in one line; other values, and `Verbatim`, as they are."""
    if not isinstance(value, str) or isinstance(value, Verbatim):
        return value
    text = re.sub(r"\s*[\r\n]+\s*", " ", clean(value))
    text = SPECIAL.sub(lambda match: "\\" + match[0], text)
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", re.sub(r"&(?=#?\w+;)", "&amp;", text))


def code(text: str) -> Verbatim:
    """`text` between as many backticks as it needs."""
    text = " ".join(clean(text).split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return Verbatim(f"{ticks}{space}{text}{space}{ticks}")


def fence(text: str) -> Verbatim:
    """A block of code."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Verbatim(f"{ticks}\n{clean(text)}\n{ticks}")


def clean(text: str) -> str:
    """Without characters that no page shows: control characters, halves of pairs."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)
