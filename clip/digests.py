"""SHA-256 of files, which are read again only when they have changed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.files import lock, read_json, sha256_file, write_json_atomic
from engine.log import logger, progress
from engine.schema import Register, fault
from forgetting.errors import ProblemError


def digests(paths: Sequence[str | Path], register: Path | None) -> list[str]:
    """The SHA-256 of each file, in hex.

    The JSON file `register` remembers them by size, times and inode, for hashing 350 MB takes a
    second; None: nothing does. Where it cannot be written, the files are read again next time.
    Raises OSError for a file that cannot be read.
    """
    if register is None:
        return [sha256_file(path) for path in paths]
    known = _read(register)
    found: dict[str, list[Any]] = {}
    places = [os.path.abspath(path) for path in paths]
    for path in progress(places, "reading files"):
        stat = os.stat(path)
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        entry = known.get(path, [])
        same = entry[:-1] == stamp and isinstance(entry[-1], str)
        found[path] = entry if same else [*stamp, sha256_file(path)]
    if found != {path: known.get(path) for path in found}:
        with suppress(ProblemError), lock(register):
            write_json_atomic(_read(register) | found, register)
    return [found[path][-1] for path in places]


def _read(register: Path) -> dict[str, list[Any]]:
    """What is remembered; nothing if that is damaged or missing."""
    if not register.exists():
        return {}
    try:
        content = read_json(register, "the register of files")
    except ProblemError as error:
        logger.info(f"clip: {error}; it is made again")
        return {}
    if fault(Register, content):
        logger.info(f"clip: {register} is no register of files; it is made again")
        return {}
    return content
