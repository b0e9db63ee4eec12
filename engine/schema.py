"""The shape of foreign JSON, YAML and lists, checked once where they are read.

A shape is a `Kind`; a list of one shape (`[TEXT]`), or of one and `...` for at least one element;
`{str: shape}` for an object with any keys; or an object with the keys that are named, where "?"
behind a name lets it be missing. Keys that are not named may hold anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from forgetting.errors import ProblemError, line, shown


class Kind(NamedTuple):
    """A kind of value, in words and as a test."""

    words: str
    fits: Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


TEXT = Kind("a text", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
NUMBER = Kind("a number", _number)
NUMBER_OR_NONE = Kind("a number", lambda value: value is None or _number(value))
FRACTION = Kind(
    "a number from 0 to 1", lambda value: value is None or (_number(value) and 0 <= value <= 1)
)


def check(value: Any, shape: Any, where: str | Path, *path: str | int) -> None:
    """Raise ProblemError, one line, unless `value` has a shape; `path` holds the keys that lead to
    it in the file `where`."""

    def refuse(words: str) -> ProblemError:
        keys = line(" / ".join(map(str, path))) or "all of it"
        return ProblemError(f"{where}: {keys} must be {words}, not {shown(value)}")

    if isinstance(shape, Kind):
        if not shape.fits(value):
            raise refuse(shape.words)
    elif isinstance(shape, list):
        if not isinstance(value, list | tuple) or len(value) < len(shape) - 1:
            raise refuse("a list" if len(shape) == 1 else "a list that is not empty")
        for number, element in enumerate(value):
            check(element, shape[0], where, *path, number)
    elif not isinstance(value, dict):
        raise refuse("an object")
    else:
        for key, inner in [(k, shape[str]) for k in value] if str in shape else shape.items():
            name = key.removesuffix("?") if str not in shape else key
            if name in value:
                check(value[name], inner, where, *path, name)
            elif not key.endswith("?"):
                raise refuse(f"an object with {name}")
