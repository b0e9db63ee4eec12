"""Messages on the screen, the log file of a run, and progress bars.

Results are printed. All else goes through `logger`: `info` for the course of the work, `warning`
for what a reader of the numbers must know, `debug` for `log.txt` alone. Dassl's own Logger is not
used: it closes the console once it is collected.
"""

import logging
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from logging.handlers import MemoryHandler
from pathlib import Path
from threading import RLock
from typing import Any

from tqdm import tqdm

from forgetting.errors import ProblemError

LOG = "log.txt"
REPORTED = ("torch", "torchvision", "open_clip_torch", "numpy", "pillow", "scikit-learn")
INTERVAL = 30.0  # seconds between two states of a bar where no terminal shows it

# tqdm's default lock is shared with forked processes: one that is killed while it holds the lock
# would stop all others.
tqdm.set_lock(RLock())


class Screen(logging.Handler):
    """Writes messages to stdout, on a terminal above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr.isatty():
            tqdm.write(self.format(record), file=sys.stdout)
        else:
            print(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class Bar(tqdm):
    """A tqdm bar whose note appears when the bar is drawn, and does not draw it."""

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        super().set_postfix_str(s, refresh=False)
        self.update(0)


class LogFile(logging.FileHandler):
    """A log file; one that cannot be written ends the run with one line."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise ProblemError(f"cannot write {self.baseFilename}: {sys.exc_info()[1]}")


logger = logging.getLogger("clip_forget")
logger.setLevel(logging.DEBUG)
logger.propagate = False
screen = Screen(logging.INFO)
logger.addHandler(screen)


@contextmanager
def quiet(on: bool = True) -> Iterator[None]:
    """Show warnings alone on the screen within the body, if `on`; restore the level afterwards."""
    before = screen.level
    screen.setLevel(logging.WARNING if on else before)
    try:
        yield
    finally:
        screen.setLevel(before)


@cache
def once(level: int, text: str) -> None:
    """Log a message that stays true, once in a run."""
    logger.log(level, text)


def progress(
    items: Iterable[Any] | None = None,
    desc: str = "",
    total: float | None = None,
    initial: float = 0,
    unit: str = "it",
) -> Bar:
    """A tqdm bar with the time left. A file gets a state every half minute, not ten per second."""
    terminal = sys.stderr.isatty()
    return Bar(
        items,
        desc=desc,
        total=total,
        initial=initial,
        unit=f" {unit}" if unit != "it" else unit,
        leave=False,
        disable=screen.level > logging.INFO,
        delay=0.5 if terminal else INTERVAL,
        mininterval=0.1 if terminal else INTERVAL,
        miniters=0,
        dynamic_ncols=True,
    )


@contextmanager
def run_log() -> Iterator[Callable[[Path], None]]:
    """Record what is logged within the body. The function that is yielded takes a folder, and
    appends all of it and what follows to `log.txt` there; ProblemError if that cannot be written. A
    run that is refused before writes nothing."""
    once.cache_clear()
    memory = MemoryHandler(10**6, flushLevel=logging.CRITICAL + 1)
    logger.addHandler(memory)

    def keep(folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = LogFile(folder / LOG, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise ProblemError(f"cannot write the log in {folder}: {error.strerror}") from error
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        memory.setTarget(file)
        memory.flush()
        memory.capacity = 1  # from now on each line at once

    try:
        yield keep
    except BaseException as error:
        with suppress(ProblemError):  # a full disk takes no more lines
            logger.debug(f"ended by {type(error).__name__}: {error}")
        raise
    finally:
        logger.removeHandler(memory)
        for handler in filter(None, (memory.target, memory)):
            with suppress(OSError):
                handler.close()


def environment() -> str:
    """Versions, threads and the device."""
    import torch

    lines = [f"Python: {platform.python_version()} on {platform.platform()}"]
    for package in REPORTED:
        with suppress(PackageNotFoundError):
            lines.append(f"{package}: {version(package)}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    lines.append(f"device: {device}, torch threads: {torch.get_num_threads()}")
    return "\n".join(lines)
