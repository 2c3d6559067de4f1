"""pydantic's complaints as sentences to a colleague: key, value and what is allowed, in one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

_TAGS = ("vq", "simvq", "fsq", "ifsq", "lfq", "bsq", "none", "custom")  # of the quantizer union, in error paths
_CONTINUES_THE_KEY = re.compile(r"[\w.-]+( = .*)?: ")  # our own messages: `name = value: what is allowed`
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "greater than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}
_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
    "none_required": "null",
}


def one_line(error: BaseException) -> str:
    """An exception's text without line breaks."""
    return " ".join(str(error).split())


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(printable(name) for name in names[:most]) + more


def printable(name: str) -> str:
    """A file's name for a message of one line: line breaks, control characters and bytes that are no text, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def explain(error: ValidationError, *schema: type[BaseModel]) -> str:
    """One line for the first complaint: key, value and what is allowed."""
    complaints = error.errors(include_url=False)
    first = complaints[0]
    path, kind = _strip_tags(first["loc"]), first["type"]
    key, value, context = ".".join(path), first.get("input"), first.get("ctx", {})
    if kind == "extra_forbidden":
        tag = next((str(part) for part in first["loc"] if str(part) in _TAGS), None)
        return f"{key}: no such key{_did_you_mean(path, schema, tag)}"
    if kind == "missing":
        return f"{key}: is missing"
    if kind == "value_error":
        reason = first["msg"].removeprefix("Value error, ")
        separator = " " if reason.startswith('"') else "." if _CONTINUES_THE_KEY.match(reason) else ": "
        return f"{key}{separator}{reason}" if key else reason
    if kind in _BOUNDS:
        argument, words = _BOUNDS[kind]
        return f"{key} = {value}: must be {words} {context[argument]}"
    if len(complaints) > 1 and all(c["loc"][:1] == first["loc"][:1] and c["input"] == value for c in complaints):
        allowed = dict.fromkeys(_allowed(c) for c in complaints)  # branches of a union
        return f"{key} = {_show(value)}: must be {' or '.join(allowed)}"
    return f"{key} = {_show(value)}: must be {_allowed(first)}"


def _allowed(complaint: Any) -> str:
    kind: str = complaint["type"]
    context: dict[str, Any] = complaint.get("ctx", {})
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "").replace(" or ", ", ")
    if kind == "union_tag_not_found":
        return "keys and values, with a kind"
    if kind == "union_tag_invalid":
        return f"of a kind among {context['expected_tags']}, or module:Class".replace("'", "").replace(", custom", "")
    if kind in _BOUNDS:
        argument, words = _BOUNDS[kind]
        return f"{words} {context[argument]}"
    if kind == "string_too_short":
        return "non-empty text"
    if kind in ("too_short", "too_long"):
        words, argument = ("at least", "min_length") if kind == "too_short" else ("at most", "max_length")
        return f"of {words} {context[argument]} entries"
    if kind == "string_pattern_mismatch":
        return f"text like {context['pattern']}"
    return _TYPES.get(kind, f"{complaint['msg'][0].lower()}{complaint['msg'][1:]}")


def _show(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _strip_tags(location: Sequence[Any]) -> list[str]:
    """The dotted path without the tags and type names that pydantic adds for unions."""
    path: list[str] = []
    for part in location:
        text = str(part)
        if (not path or path[-1] == "quantizer") and text in _TAGS:
            continue
        if text in ("int", "constrained-int", "float", "str") or text.startswith("literal["):
            continue
        path.append(text)
    return path


def _did_you_mean(path: Sequence[str], schema: Sequence[type[BaseModel]], tag: str | None) -> str:
    """A hint with the closest known key beside the unknown one, those of kind `tag` in a union; else all there are."""
    known = _fields_at(path[:-1], schema, tag)
    near = difflib.get_close_matches(path[-1], known, n=1)
    if near:
        return f"; did you mean {'.'.join([*path[:-1], near[0]])}?"
    return f"; known {f'with kind {tag}' if tag else 'here'}: {', '.join(known)}" if known else ""


def _fields_at(path: Sequence[str], schema: Sequence[type[BaseModel]], tag: str | None) -> list[str]:
    """Names of the settings at a dotted path; where a union stands there, those of the kind `tag`."""
    classes = list(schema)
    for name in path:
        classes = [
            c for owner in classes if name in owner.model_fields for c in _classes(owner.model_fields[name].annotation)
        ]
    if len(classes) > 1 and tag is not None:
        classes = [c for c in classes if c.model_fields["kind"].default == tag] or classes
    return list(dict.fromkeys(field for c in classes for field in c.model_fields))


def _classes(annotation: Any) -> list[type[BaseModel]]:
    """Every settings class inside an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [c for inner in get_args(annotation) for c in _classes(inner)]
