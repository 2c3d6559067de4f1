"""One way from a name to a function, for everything that a table lists and a user may extend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any


def resolve(name: str, table: Mapping[str, Callable[..., Any]], what: str) -> Callable[..., Any]:
    """The function that `name` stands for: a key of `table`, or `module:function` of the user's own.

    Raises ValueError that says what exists; an error inside the user's module is raised as it is.
    """
    if name in table:
        return table[name]
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name):
        near = get_close_matches(name, table, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"no {what} {name!r}{hint} There is {', '.join(sorted(table))}, or module:function")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise  # the module is there; something that it imports is not
        raise ValueError(f"{what} {name!r}: there is no module {module_name!r}") from error
    function: object = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"{what} {name!r}: module {module_name!r} has no function {attribute!r}")
    return function
