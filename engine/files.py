"""Text and JSON of foreign files, and names and paths that stay where they belong.

Files are written by `forgetting.io.atomic_path`: whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from forgetting.errors import ProblemError

EMPTY_NAME = "%"  # no escaped name is a bare percent sign, so it can stand for ""


def require_writable(path: str | os.PathLike[str]) -> None:
    """ProblemError unless a file can be written at `path`: nothing is there, or a regular file (no
    device or pipe, in whose place a file would be put), in a folder that can be written to."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ProblemError(f"{os.fspath(path)} is not a regular file; choose another name")
    folder = next(above for above in Path(path).absolute().parents if above.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ProblemError(f"cannot write {os.fspath(path)}: no file can be made in {folder}")


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """The text of a regular file in UTF-8; `what` says what kind of file it is.

    Raises:
        ProblemError: no such file, one that would be waited for (a pipe, a device), or no UTF-8.
    """
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
    """What JSON says; None for its NaN, since nothing was measured there.

    Raises:
        ValueError: no JSON, nested too deeply, or an object with one key twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {twice!r} stands twice in one object")
        return found

    try:
        return json.loads(text, parse_constant=lambda _: None, object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: str | os.PathLike[str], what: str = "") -> Any:
    """What a regular JSON file holds, see `parse_json`; `what` says what kind of file it is.
    Raises ProblemError if it cannot be read or is no JSON."""
    text = read_text(path, what)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ProblemError(f"{what} {os.fspath(path)} is not JSON ({error})".strip()) from error


def write_json_atomic(obj: Any, path: str | os.PathLike[str], indent: int | None = None) -> None:
    """Write `obj` as JSON in UTF-8, floats at full precision; compact unless indented: files that
    grow with the number of classes take ten times as long to write with an indent."""
    from forgetting.io import write_bytes  # who only reads files does not wait for torch

    text = json.dumps(obj, indent=indent, ensure_ascii=False)
    # A byte of a file name that is no UTF-8 is a lone surrogate, which JSON spells like Python.
    write_bytes(text.encode("utf-8", errors="backslashreplace") + b"\n", path)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in lower-case hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def escape(name: str) -> str:
    """A class name as one file name: no separator, not hidden, never "." or ".." or empty.

    Two names never become one. There are cars called "C/V". The result is ASCII; it is up to
    nine times as long as `name`, and file systems end at 255 bytes.
    """
    if not name:
        return EMPTY_NAME
    escaped = quote(name, safe=" ()'", errors="surrogatepass")
    return "%2E" + escaped[1:] if escaped.startswith(".") else escaped


def inside(root: str | os.PathLike[str], relative: str | os.PathLike[str]) -> Path:
    """`root`/`relative`, with `..` resolved; ProblemError if that leaves `root`.

    For paths that come from a file (a split file names its images). Links are not followed: a
    user may keep an image folder on another disk behind a link of their own.
    """
    text = os.fspath(relative)
    normal = os.path.normpath(text)
    if "\0" in text or os.path.isabs(text) or normal.split(os.sep)[0] == os.pardir:
        raise ProblemError(f"path {text!r} leads out of {os.fspath(root)}; it must stay below it")
    return Path(root) / normal
