"""The run's log: what is printed to stdout also goes to `log.txt`. Used under both engines.

Dassl's own Logger is not handed on, because its `close`, which `__del__` calls, closes the
console: once it is collected (a second `main()` in one process, a test that puts stdout back),
every later print fails. It also keeps writing the second run into the first run's log, has no
`isatty` or `encoding`, and two logs opened within one second overwrite each other.
"""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from engine.errors import UserError

LOG_SUFFIXES = (".txt", ".log")


class Tee:
    """A text stream that writes to `console` and to `file`; anything else is the console's."""

    def __init__(self, console: TextIO, file: TextIO) -> None:
        self.console = console
        self.file = file

    def write(self, text: str) -> int:
        written = self.console.write(text)
        self.file.write(text)
        return written

    def flush(self) -> None:
        self.console.flush()
        self.file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["console"], name)

    def __del__(self) -> None:
        self.file.close()  # and never the console


def hold_log() -> None:
    """Keep what is printed from now on for the file that `setup_logger` opens later.

    A run that is refused before that writes nothing.
    """
    sys.stdout = Tee(sys.stdout, io.StringIO())


def setup_logger(output: str | None = None) -> None:
    """Copy stdout from now on to `output` (a .txt or .log file) or to `output`/log.txt.

    An existing log is kept: the new one gets the time, and if need be a number, behind its name.
    What `hold_log` kept is written first. A log that an earlier call opened is closed. With None
    nothing happens. Signature as Dassl's.

    Raises UserError if the file cannot be made.
    """
    if output is None:
        return
    path = Path(output)
    if path.suffix not in LOG_SUFFIXES:
        path = path / "log.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _open_new(path)
    except OSError as error:
        raise UserError(f"cannot write the log {path}: {error.strerror}") from error
    console = sys.stdout
    if isinstance(console, Tee):
        previous, console = console, console.console
        if isinstance(previous.file, io.StringIO):
            file.write(previous.file.getvalue())
        previous.file.close()
    sys.stdout = Tee(console, file)


def _open_new(path: Path) -> TextIO:
    stamp = time.strftime("-%Y-%m-%d-%H-%M-%S")
    names = [path.name, path.name + stamp]
    while True:
        try:  # "x" decides between two processes too; line by line, so a killed run has its log
            return open(path.with_name(names[0]), "x", buffering=1, encoding="utf-8")
        except FileExistsError:
            names = names[1:] or [f"{path.name}{stamp}-{time.monotonic_ns()}"]
