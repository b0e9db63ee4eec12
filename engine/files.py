"""Writing files so that nothing is lost, and names and paths that stay where they belong."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from filelock import FileLock, Timeout

from forgetting.errors import ProblemError

LOCK_TIMEOUT = 600.0  # seconds
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
EMPTY_NAME = "%"  # no escaped name is a bare percent sign, so it can stand for ""
TEMPORARY = ".tmp-" + 16 * "[0-9a-f]" + "*"  # the names of files and folders in the making
MARKED = 2**20  # bytes at the start of a file of ours that hold its mark


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the body a temporary path; put what it wrote there at `path` in one step.

    The body creates a file or a folder at the path it is given. If it succeeds, that is synced to
    disk and renamed to `path`: a reader sees the old content or the new, never a part. If it
    raises, the temporary is removed and `path` stays as it was. Missing parent folders are made.
    A folder cannot replace a folder that has content.

    The temporary has the name of `path`, in a folder beside it that is locked: what a killed
    process left is known by its lock, which is gone, and removed by the next one that writes there.

    Raises ProblemError if the place cannot be written (read-only, full, no folder).
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        workshop, held = _workshop(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    temporary = workshop / path.name
    try:
        yield temporary
        if temporary.is_file():
            _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        # What the body failed to read or to download is not a failure to write here.
        here = str(error.filename).startswith(str(temporary))
        if here or (error.filename is None and error.errno in WRITE_ERRORS):
            raise _cannot_write(path, error) from error
        raise
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
        os.close(held)


def _workshop(parent: Path) -> tuple[Path, int]:
    """A new folder for what is in the making, and the descriptor that holds it locked."""
    while True:
        # Not made by tempfile: what that makes is private (0600).
        folder = parent / f".tmp-{secrets.token_hex(8)}"
        folder.mkdir()
        held = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks: nothing is ever swept there
            fcntl.flock(held, fcntl.LOCK_EX)
        if folder.exists():  # else it was swept before it was locked
            return folder, held
        os.close(held)


def sweep(folder: Path, again: bool = False) -> None:
    """Remove what killed processes left in the making in a folder: temporaries that nobody holds
    locked. Looks once a process, and `again` where a run begins: a process may do several, and
    another may have been killed since."""
    if again:
        _sweep.cache_clear()
    _sweep(folder.absolute(), os.getpid())  # a child that was forked is a process of its own


@cache
def _sweep(folder: Path, process: int) -> None:
    for path in folder.glob(TEMPORARY):
        with suppress(OSError):
            held = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            finally:
                os.close(held)


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> ProblemError:
    return ProblemError(f"cannot write {path}: {error.strerror or error}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def readable(path: str | os.PathLike[str]) -> Iterator[str]:
    """Another name of a file, for libraries that read none whose name is no UTF-8, and that say of
    a file that may not be read that it is not there.

    Raises OSError if the file cannot be opened, which says why.
    """
    with open(path, "rb") as file:
        yield f"/dev/fd/{file.fileno()}" if os.name == "posix" else os.fspath(path)


def refuse_existing(path: str | os.PathLike[str], instead: str = "choose another name") -> None:
    """ProblemError if there is something at `path`, so that nothing of the user's is overwritten."""
    if os.path.lexists(path):
        raise ProblemError(f"{os.fspath(path)} exists and is not overwritten; {instead}")


def refuse_foreign(path: str | os.PathLike[str], mark: str) -> None:
    """ProblemError if there is something at `path` that does not hold `mark`, as all that we write
    there does: nothing of the user's is overwritten; or if nothing can be written there."""
    place = next(above for above in Path(path).absolute().parents if os.path.exists(above))
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        code = errno.EACCES if place.is_dir() else errno.ENOTDIR
        raise _cannot_write(Path(path), OSError(code, os.strerror(code)))
    try:
        with open(path, "rb") as file:
            start = file.read(MARKED)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _cannot_write(Path(path), error) from error
    if mark.encode() not in start and start.strip(b"\0"):  # a power cut leaves nothing, or zeros
        raise ProblemError(
            f"{os.fspath(path)} is there and was not written by this program; move it away or "
            "choose another name"
        )


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


class NoJSON(ProblemError):
    """A file that is there and can be read, and is no JSON."""


def parse_json(text: str) -> Any:
    """What JSON says; None for its NaN, since nothing was measured there.

    Raises:
        ValueError: no JSON, nested too deeply, or an object with one key twice.
    """

    def whole(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {twice!r} stands twice in one object")
        return found

    try:
        return json.loads(text, parse_constant=lambda _: None, object_pairs_hook=whole)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: str | os.PathLike[str], what: str = "") -> Any:
    """What a JSON file holds, see `parse_json`; `what` says what kind of file it is.

    Raises:
        NoJSON: no JSON, or not in UTF-8; ProblemError: a file that cannot be read.
    """
    text = read_text(path, what)
    try:
        return parse_json(text)
    except ValueError as error:
        raise NoJSON(f"{what} {os.fspath(path)} is not JSON ({error})".strip()) from error


def json_bytes(obj: Any, indent: int | None = None) -> bytes:
    """`obj` as JSON in UTF-8, floats at full precision; compact unless indented: files that grow
    with the number of classes take ten times as long to write with an indent."""
    text = json.dumps(obj, indent=indent, ensure_ascii=False)
    # A byte of a file name that is no UTF-8 is a lone surrogate, which JSON spells like Python.
    return text.encode("utf-8", errors="backslashreplace")


def write_json_atomic(obj: Any, path: str | os.PathLike[str], indent: int | None = None) -> None:
    """Write `obj` as JSON by `atomic_path`, see `json_bytes`."""
    text = json_bytes(obj, indent)
    with atomic_path(path) as temporary:
        temporary.write_bytes(text + b"\n")


class Growing:
    """A JSON file of two levels, name -> label -> entry, that is written again and again.

    Each entry is made JSON once, however often the file is written, and the file is read again only
    where somebody else has written it meanwhile. Use it under the `lock` of the file.

    Args:
        read: the file's objects, none where there is no file.
    """

    def __init__(self, path: Path, read: Callable[[], dict[str, dict[str, Any]]]) -> None:
        self._path, self._read = path, read
        self._stamp: tuple[int, ...] | None = None  # of the file that holds what is known
        self._known: dict[str, dict[str, Any]] = {}
        self._texts: dict[tuple[str, str], tuple[Any, bytes]] = {}  # an entry and its JSON

    def load(self) -> dict[str, dict[str, Any]]:
        """What the file holds, to be added to; an entry is replaced, never changed inside."""
        if self._stamp is None or self._stamp != self._now():
            self._known, self._texts = self._read(), {}
        self._stamp = None  # what is added and not written is not relied on
        return self._known

    def save(self, head: Mapping[str, Any] | None = None, below: str = "") -> None:
        """Write what `load` gave and what was added, as the member `below` of `head`, if given."""
        names = {
            name: {label: self._text(name, label, entry) for label, entry in entries.items()}
            for name, entries in self._known.items()
        }
        text = _members({name: _members(texts) for name, texts in names.items()})
        if head is not None:
            text = _members({key: json_bytes(value) for key, value in head.items()} | {below: text})
        with atomic_path(self._path) as temporary:
            temporary.write_bytes(text + b"\n")
        self._stamp = self._now()

    def _text(self, name: str, label: str, entry: Any) -> bytes:
        known, text = self._texts.get((name, label), (None, b""))
        if known is not entry:
            text = json_bytes(entry)
            self._texts[name, label] = entry, text
        return text

    def _now(self) -> tuple[int, ...] | None:
        """What tells the file from any other that was written at its place; None if none is."""
        if not self._path.exists():
            return None
        found = self._path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns


def _members(texts: Mapping[str, bytes]) -> bytes:
    """A JSON object of members that are JSON."""
    return b"{" + b", ".join(json_bytes(key) + b": " + text for key, text in texts.items()) + b"}"


class Batch:
    """Collects items and hands them to `write` together, about once a second and at the end.

        with Batch(write) as batch:
            batch.add(item)

    Writing again and again what a file already holds would take longer than the work. A killed
    process loses what it had collected. Where writing is slow it is done less often, so that it
    never takes more than a twentieth of the time.
    """

    INTERVAL = 1.0  # seconds
    SHARE = 20  # times as long as a write took, at least, until the next one

    def __init__(self, write: Callable[[list[Any]], None]) -> None:
        self._write = write
        self._items: list[Any] = []
        self._due = time.monotonic() + self.INTERVAL

    def add(self, item: Any) -> None:
        """Keep an item, and write all that were kept if it is time."""
        self._items.append(item)
        if time.monotonic() >= self._due:
            self.flush()

    def flush(self) -> None:
        """Write what was kept."""
        items, self._items = self._items, []
        started = time.monotonic()
        if items:
            self._write(items)
        ended = time.monotonic()
        self._due = ended + max(self.INTERVAL, self.SHARE * (ended - started))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.flush()  # also on an error or Ctrl-C: what is done is done


class _NamedLock(FileLock):
    """A FileLock that says in one line which file another process holds."""

    def acquire(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().acquire(*args, **kwargs)
        except Timeout as error:
            raise ProblemError(
                f"another process holds {self.lock_file} since {self.timeout:.0f} s; "
                "wait for it to end and start again"
            ) from error
        except OSError as error:
            raise _cannot_write(Path(self.lock_file), error) from error


def lock(path: str | os.PathLike[str], timeout: float = LOCK_TIMEOUT) -> FileLock:
    """A lock on `path` between processes, for `with`: the file `path` + ".lock" beside it.

    Entering waits for at most `timeout` seconds, then raises ProblemError naming the file. The lock
    ends with its process, however that ends; the empty lock file stays.
    """
    path = Path(path)
    _make_parent(path)
    return _NamedLock(f"{path}.lock", timeout=timeout)


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
