"""audit.json: what an audit found, beside the logs that it is about.

    {"format": "clip-forget-audit/1",
     "audits": {dataset: {label: {"adapter_sha256": ..., "settings": {...},
                                  "classes": {class: {measure: {...}, "seconds": {measure: s},
                                                      "verdict": [...]}}}}}}

`label` is that of logs.json. Every measure's own file says what its numbers are.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import atomic_path, json_bytes, lock, read_json
from engine.schema import check_audits

AUDIT = "audit.json"
FORMAT = "clip-forget-audit/1"
Audits = dict[str, dict[str, dict[str, Any]]]


def read_audits(folder: str | Path) -> Audits:
    """Data set -> label -> audit; empty if the folder has none.

    Raises:
        UserError: a file that is torn, no audit, or of another shape (see `engine.schema`). It
            is left as it is.
    """
    path = Path(folder) / AUDIT
    if not path.exists():
        return {}
    record = read_json(path, "the audit")
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{path} is no audit of format {FORMAT!r}; move it away and audit again")
    check_audits(record.get("audits"), path)
    return record["audits"]


class Record:
    """The audits of a folder, to which others are added.

    Each is made JSON once, however often the file is written, and the file is read again only where
    somebody else has written it meanwhile.
    """

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder) / AUDIT
        self._known: tuple[int, ...] | None = None  # the file as it was read or written last
        self._texts: dict[str, dict[str, bytes]] = {}  # data set -> label -> JSON

    def merge(self, entries: Iterable[tuple[str, str, dict[str, Any]]]) -> None:
        """Add or replace audits (data set, label, entry); everything else in the file stays.

        Raises:
            UserError: as `read_audits`, or a file that cannot be written.
        """
        with lock(self._path):
            if self._now() != self._known:
                there = read_audits(self._path.parent)
                self._texts = {
                    dataset: {label: json_bytes(entry) for label, entry in labels.items()}
                    for dataset, labels in there.items()
                }
                self._known = self._now()
            for dataset, label, entry in entries:
                self._texts.setdefault(dataset, {})[label] = json_bytes(entry)
            labels = {dataset: _object(texts) for dataset, texts in self._texts.items()}
            text = _object({"format": json_bytes(FORMAT), "audits": _object(labels)})
            with atomic_path(self._path) as temporary:
                temporary.write_bytes(text + b"\n")
            self._known = self._now()

    def _now(self) -> tuple[int, ...] | None:
        """What tells the file from any other that was written at its place; None if none is."""
        if not self._path.exists():
            return None
        found = self._path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns


def _object(members: dict[str, bytes]) -> bytes:
    """A JSON object of members that are JSON."""
    parts = [json_bytes(name) + b": " + text for name, text in members.items()]
    return b"{" + b", ".join(parts) + b"}"
