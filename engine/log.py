"""What is said while work goes on: messages, where a long loop is, and the log of a run.

Results are printed; all else goes through `say`, `warn`, `note` and `Progress`, of which `--quiet`
(`engine.cli`) leaves the warnings. In a run (`logged`) what is printed or said also goes to
`log.txt`, whether or not the screen shows it.

Dassl's own Logger is not used: it closes the console once it is collected, keeps writing a second
run into the first run's log, and two logs opened within one second overwrite each other.
"""

from __future__ import annotations

import io
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import RLock
from typing import Any, Self, TextIO

from tqdm import tqdm
from tqdm.utils import disp_trim

from forgetting.errors import ProblemError

REPORTED = ("torch", "torchvision", "open_clip_torch", "numpy", "pillow", "scikit-learn")


EVERY = 30.0  # seconds between two lines of progress where no terminal shows them, at least
SPARSE = 20  # of a loop that takes longer: a line each time that a twentieth of its time has passed

_quiet = False
_told: set[tuple[object, str]] = set()  # by `once`, on the screen


@contextmanager
def hushed_within() -> Iterator[None]:
    """What `hush` does ends with the body."""
    global _quiet
    before = _quiet
    try:
        yield
    finally:
        _quiet = before


def hush() -> None:
    """From now on the screen shows results, warnings and errors alone."""
    global _quiet
    _quiet = True


def say(text: str) -> None:
    """A message about the work, a line or several."""
    if _quiet:
        note(text)
    else:
        warn(text)


def warn(text: str) -> None:
    """A message that `--quiet` does not hide: numbers may not be what they seem."""
    Progress.make_way()
    print(text, flush=True)


def note(text: str) -> None:
    """A message for the log of the run alone, if there is one."""
    if isinstance(sys.stdout, Tee):
        sys.stdout.file.write(f"{text}\n")


def once(tell: Callable[[str], None], text: str, whose: object = None) -> None:
    """`say` or `warn` what stays true of something: once on the screen, and once in the log of each
    run that comes upon it."""
    key = (whose, text)
    log = sys.stdout.told if isinstance(sys.stdout, Tee) else set()
    if key in log:
        return
    log.add(key)
    if key in _told or (_quiet and tell is say):
        note(text)
    else:
        _told.add(key)
        tell(text)


class Progress(tqdm):
    """Where a long loop is of how many, and the time left: `images 1,024 of 8,041, 05:10 left`.

    On a terminal it is one line that is written over and goes away at the end. A log that is none
    gets a line now and then, the rarer the longer the loop takes. A loop that is over within half a
    second, or within `EVERY`, leaves no trace.

        for name in Progress(names, "audit"): ...
        with Progress(what="images", total=8041) as bar: bar.update(32)

    Args:
        what: what is counted, and of which; done: of `total`, how many were there before; rate:
            words behind the number a second, where that is of interest.
    """

    def __init__(
        self, items: Iterable[Any] | None = None, what: str = "", total: int | None = None,
        done: int = 0, rate: str = "",
    ) -> None:  # fmt: skip
        self.part, self.note, self.per_second = 0.0, "", rate
        self.terminal = sys.stderr.isatty()
        super().__init__(
            items,
            desc=what,
            total=total,
            initial=done,
            leave=False,
            disable=_quiet,
            delay=0.5 if self.terminal else EVERY,
            mininterval=0.1 if self.terminal else EVERY,
            miniters=0,
            dynamic_ncols=True,
        )

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self.iterable:
                yield item
                self.update()

    def update(self, n: float = 1) -> None:
        """`n` more are done."""
        if n:
            self.part = 0.0
        super().update(n)

    def at(self, note: str, part: float = 0.0) -> Self:
        """Say beside the count what is in hand, and how many of those in hand are as good as done;
        it may become fewer, where the work turns out to be longer."""
        self.note, self.part = note, part
        self.update(0)
        return self

    def skip(self, count: int = 1) -> None:
        """Some were done before, and say nothing of the time that the rest takes."""
        if not self.disable:
            self.initial += count
            self.n += count

    def __str__(self) -> str:
        state = self.format_dict
        fresh = self.n - self.initial + self.part
        words = f"{self.desc.removesuffix(': ')} {self.n:,.0f}"
        words += f" of {self.total:,.0f}" if self.total else ""
        parts = [words, self.note]
        if fresh > 0 and state["elapsed"] > 0:
            pace = fresh / state["elapsed"]
            speed = f"{pace:,.{int(pace < 10)}f} {self.per_second}"
            parts.append(speed if self.per_second else "")
            if self.total:
                left = max(0.0, self.total - self.n - self.part)
                parts.append(f"{self.format_interval(left / pace)} left")
        text = ", ".join(filter(None, parts))
        return disp_trim(text, state["ncols"]) if self.terminal and state["ncols"] else text

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if self.terminal:
            return super().display(msg, pos)
        if msg is None:
            self.fp.write(f"{self}\n")
            self.fp.flush()
            self.mininterval = max(EVERY, self.format_dict["elapsed"] / SPARSE)
        return False  # there is nothing to wipe off

    def clear(self, *args: Any, **kwargs: Any) -> None:
        if self.terminal:
            super().clear(*args, **kwargs)

    @classmethod
    def make_way(cls) -> None:
        """Take the lines of all loops off the terminal; each comes back when it goes on."""
        with cls.get_lock():  # other threads have loops too
            for bar in list(getattr(cls, "_instances", ())):
                if hasattr(bar, "start_t"):  # else it is in the making
                    bar.clear(nolock=True)


# tqdm's own lock is shared with forked processes: one that is killed while it holds it would stop
# all others for ever.
Progress.set_lock(RLock())


class Tee:
    """A text stream that writes to `console` and to `file`; anything else is the console's."""

    def __init__(self, console: TextIO, file: TextIO) -> None:
        self.console, self.file = console, file
        self.told: set[tuple[object, str]] = set()  # by `once`

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
    The function raises ProblemError if the file cannot be made.
    """
    tee = Tee(sys.stdout, io.StringIO())

    def keep(folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = _open_new(folder / "log.txt")
        except OSError as error:
            raise ProblemError(f"cannot write the log in {folder}: {error.strerror}") from error
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
