"""The run's log: what is printed also goes to `log.txt`, and the first lines say on what it ran.

Dassl's own Logger is not used: it closes the console once it is collected, keeps writing a second
run into the first run's log, and two logs opened within one second overwrite each other.
"""

from __future__ import annotations

import io
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from engine.errors import UserError

REPORTED = ("torch", "torchvision", "open_clip_torch", "numpy", "pillow", "scikit-learn")


class Tee:
    """A text stream that writes to `console` and to `file`; anything else is the console's."""

    def __init__(self, console: TextIO, file: TextIO) -> None:
        self.console, self.file = console, file

    def write(self, text: str) -> int:
        self.file.write(text)
        return self.console.write(text)

    def flush(self) -> None:
        self.console.flush()
        self.file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.console, name)


@contextmanager
def logged() -> Iterator[Callable[[Path], None]]:
    """Keep what is printed until the function that is given is called with a folder, and write it
    and all that follows to `log.txt` there. A run that is refused before that writes nothing.

    An existing log is kept: the new one gets the time, and if need be a number, behind its name.
    The function raises UserError if the file cannot be made.
    """
    tee = Tee(sys.stdout, io.StringIO())

    def keep(folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = _open_new(folder / "log.txt")
        except OSError as error:
            raise UserError(f"cannot write the log in {folder}: {error.strerror}") from error
        file.write(tee.file.getvalue())
        tee.file = file

    sys.stdout = tee
    try:
        yield keep
    finally:
        sys.stdout = tee.console
        tee.file.close()


def _open_new(path: Path) -> TextIO:
    stamp = time.strftime("-%Y-%m-%d-%H-%M-%S")
    names = [path.name, path.name + stamp]
    while True:
        try:  # "x" decides between two processes too; line by line, so a killed run has its log
            return open(
                path.with_name(names[0]), "x", buffering=1, encoding="utf-8",
                errors="backslashreplace",
            )  # fmt: skip
        except FileExistsError:
            names = names[1:] or [f"{path.name}{stamp}-{time.monotonic_ns()}"]


def environment() -> str:
    """Versions, threads and the device, a line each."""
    import torch

    lines = [f"Python: {platform.python_version()} on {platform.platform()}"]
    for package in REPORTED:
        try:
            lines.append(f"{package}: {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package}: missing")
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else platform.machine()
    lines.append(f"device: {'cuda' if cuda else 'cpu'} ({device})")
    lines.append(f"torch threads: {torch.get_num_threads()}")
    return "\n".join(lines)
