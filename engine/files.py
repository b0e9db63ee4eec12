"""Text and JSON of foreign files, their shape, and names of files.

Files are written by `forgetting.io.atomic_path`: whole or not at all.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from forgetting.errors import ProblemError, in_range, line, shown


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """The text of a regular file in UTF-8; `what` says what kind of file it is. ProblemError if it
    is missing, would be waited for (a pipe, a device), or is no UTF-8."""
    where = f"{what} {os.fspath(path)}".strip()
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ProblemError(f"{where} is not a regular file")
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ProblemError(f"{where} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ProblemError(f"{where} is not UTF-8 text ({error})") from error


def parse_json(text: str) -> Any:
    """What JSON says; None for its NaN, since nothing was measured there. ValueError for no JSON,
    or an object with one key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        ((key, count),) = Counter(key for key, _ in pairs).most_common(1) or [("", 0)]
        if count > 1:
            raise ValueError(f"the key {key!r} stands twice in one object")
        return dict(pairs)

    try:
        return json.loads(text, parse_constant=lambda _: None, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: str | os.PathLike[str], what: str = "") -> Any:
    """What a regular JSON file holds, by `parse_json`; ProblemError if it cannot be read."""
    text = read_text(path, what)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ProblemError(f"{what} {os.fspath(path)} is not JSON ({error})".strip()) from error


def write_json_atomic(obj: Any, path: str | os.PathLike[str]) -> None:
    """Write `obj` as JSON in UTF-8, floats at full precision."""
    from forgetting.io import write_bytes  # who only reads files does not wait for torch

    # A byte of a file name that is no UTF-8 is a lone surrogate, which JSON spells like Python.
    write_bytes(f"{json.dumps(obj, ensure_ascii=False)}\n".encode(errors="backslashreplace"), path)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in lower-case hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def escape(name: str) -> str:
    """A class name as one ASCII file name: no separator, not hidden, never "." or ".." or empty.
    Two names never become one; there are cars called "C/V"."""
    escaped = quote(name, safe=" ()'", errors="surrogatepass") or "%"  # which no other name becomes
    return "%2E" + escaped[1:] if escaped.startswith(".") else escaped


class Kind(NamedTuple):
    """A kind of value, in words and as a test."""

    words: str
    fits: Callable[[Any], bool]


TEXT = Kind("a text", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
FRACTION = Kind("a number from 0 to 1", lambda value: value is None or in_range(value, 0, 1))


def check(value: Any, shape: Any, where: str | Path, *path: str | int) -> None:
    """Raise ProblemError unless a value, at the keys `path` of the file `where`, has a shape: a
    `Kind`; a list of one shape (`[TEXT]`), or of one and `...` for at least one element;
    `{str: shape}` for an object with any keys; or an object with the keys that are named, where "?"
    behind a name lets it be missing and other keys hold anything."""

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
    elif str in shape:
        for key, element in value.items():
            check(element, shape[str], where, *path, key)
    else:
        for key, inner in shape.items():
            name = key.removesuffix("?")
            if name in value:
                check(value[name], inner, where, *path, name)
            elif name == key:
                raise refuse(f"an object with {name}")
