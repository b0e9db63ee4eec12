"""The committed text files of names: an entry a line, `#` begins a comment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from engine import UserError


def entries(path: Path, what: str) -> Iterator[tuple[str, str]]:
    """The entries of a file, in order: where each stands, as messages begin, and its text.

    Args:
        what: what the file holds, for messages.

    Raises:
        UserError: a file that cannot be read; the message names it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{what}: {path} cannot be read ({error}); it must be a text file with an entry a line"
        ) from error
    for number, line in enumerate(lines, start=1):
        if text := line.split("#", 1)[0].strip():
            yield f"{what}: {path}, line {number}", text
