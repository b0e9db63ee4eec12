"""Writing files so that nothing is lost, and names and paths that stay where they belong."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from filelock import FileLock, Timeout

from engine.errors import UserError

LOCK_TIMEOUT = 600.0  # seconds
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
EMPTY_NAME = "%"  # no escaped name is a bare percent sign, so it can stand for ""


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the body a temporary path beside `path`; put what it wrote there in one step.

    The body creates a file or a folder at the path it is given. If it succeeds, that is synced to
    disk and renamed to `path`: a reader sees the old content or the new, never a part. If it
    raises, the temporary is removed and `path` stays as it was. Missing parent folders are made.
    A folder cannot replace a folder that has content.

    The temporary keeps the suffix of `path`, since some writers choose their format by it.

    Raises UserError if the place cannot be written (read-only, full, no folder).
    """
    path = Path(path)
    # Not made by tempfile: its files are private (0600) and would stay so after the rename.
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}{path.suffix}")
    _make_parent(path)
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
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # gone already, or on a read-only disk
            temporary.unlink()


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror or error}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_existing(path: str | os.PathLike[str], instead: str = "choose another name") -> None:
    """UserError if there is something at `path`, so that nothing of the user's is overwritten."""
    if os.path.lexists(path):
        raise UserError(f"{os.fspath(path)} exists and is not overwritten; {instead}")


def write_json_atomic(obj: Any, path: str | os.PathLike[str], indent: int | None = None) -> None:
    """Write `obj` as JSON by `atomic_path`, floats at full precision; compact unless indented:
    files that grow with the number of classes take ten times as long to write with an indent."""
    text = json.dumps(obj, indent=indent, ensure_ascii=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


class Batch:
    """Collects items and hands them to `write` together, about once a second and at the end.

        with Batch(write) as batch:
            batch.add(item)

    Writing again and again what a file already holds would take longer than the work. A killed
    process loses what it had collected. Where writing is slow it is done less often, so that it
    never takes more than a fifth of the time.
    """

    INTERVAL = 1.0  # seconds
    SHARE = 5  # times as long as a write took, at least, until the next one

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
            raise UserError(
                f"another process holds {self.lock_file} since {self.timeout:.0f} s; "
                "wait for it to end and start again"
            ) from error
        except OSError as error:
            raise _cannot_write(Path(self.lock_file), error) from error


def lock(path: str | os.PathLike[str], timeout: float = LOCK_TIMEOUT) -> FileLock:
    """A lock on `path` between processes, for `with`: the file `path` + ".lock" beside it.

    Entering waits for at most `timeout` seconds, then raises UserError naming the file. The lock
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
    """`root`/`relative`, with `..` resolved; UserError if that leaves `root`.

    For paths that come from a file (a split file names its images). Links are not followed: a
    user may keep an image folder on another disk behind a link of their own.
    """
    text = os.fspath(relative)
    normal = os.path.normpath(text)
    if "\0" in text or os.path.isabs(text) or normal.split(os.sep)[0] == os.pardir:
        raise UserError(f"path {text!r} leads out of {os.fspath(root)}; it must stay below it")
    return Path(root) / normal
