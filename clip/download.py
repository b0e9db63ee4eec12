"""Download one file: resumed where it broke off, checked by SHA-256, put in place whole."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

from filelock import FileLock

from engine.files import sha256_file
from engine.log import progress
from forgetting.errors import ProblemError

CHUNK = 1 << 20  # bytes
MB = 1e6
TIMEOUT = 30  # seconds without a byte


def download(url: str, sha256: str, path: Path) -> Path:
    """Fetch `url` to `path` unless it is there; return `path`.

    An interrupted download leaves `path` + ".part", and the next call goes on from its end.
    Raises ProblemError naming the address, the place for a file put there by hand, and --weights.
    """
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.is_file():  # another process fetched it while this one waited
            return path
        part = path.with_name(path.name + ".part")
        try:
            _fetch(url, part)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise ProblemError(
                f"cannot download {url} ({reason}); put the file at {path} by hand, or pass "
                "--weights PATH; what has arrived is kept and the next call goes on from there"
            ) from error
        found = sha256_file(part)
        if found != sha256:
            part.unlink()
            raise ProblemError(
                f"{url} gave a file of SHA-256 {found}, not {sha256}; it was thrown away"
            )
        os.replace(part, path)
    return path


def _fetch(url: str, part: Path) -> None:
    """Append to `part` what it lacks of `url`; OSError or HTTPException if that breaks off."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing beyond the end: all of it is here
            return
        raise
    with response:
        resumed = response.status == 206
        start = have if resumed else 0  # a server without ranges sends all of it again
        length = response.headers.get("Content-Length", "")  # whatever a server writes there
        total = start + int(length) if length.isdecimal() else None
        with (
            open(part, "ab" if resumed else "wb") as file,
            progress(None, part.stem, total and total / MB, start / MB, "MB") as bar,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk) / MB)
    if total is not None and part.stat().st_size < total:
        raise OSError(f"broke off after {part.stat().st_size} of {total} bytes")
