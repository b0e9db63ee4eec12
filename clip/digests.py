"""SHA-256 of files, which are read again only when they have changed."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from engine.files import sha256_file
from engine.log import progress
from forgetting.errors import ProblemError
from forgetting.io import write_bytes
from forgetting.models.checkpoint import read_json


def digests(paths: Sequence[str | Path], register: Path) -> list[str]:
    """The SHA-256 of each file, in hex.

    The JSON file `register` remembers them by size, times and inode, for hashing 350 MB takes a
    second. Where it cannot be written, the files are read again next time. Raises OSError for a
    file that cannot be read.
    """
    known, found = _read(register), {}
    absolute = [os.path.abspath(path) for path in paths]
    for path in progress(absolute, "reading files"):
        stat = os.stat(path)
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        entry = known.get(path, [None])
        found[path] = entry if entry[:-1] == stamp else [*stamp, sha256_file(path)]
    if any(known.get(path) != entry for path, entry in found.items()):
        with suppress(ProblemError):
            write_bytes(json.dumps(_read(register) | found).encode(), register)
    return [found[path][-1] for path in absolute]


def _read(register: Path) -> dict[str, list]:
    """What is remembered; nothing if the file is damaged or missing."""
    with suppress(ProblemError):
        if isinstance(content := read_json(register), dict):
            return content
    return {}
