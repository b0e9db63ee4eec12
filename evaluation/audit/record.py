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
from engine.files import lock, read_json, write_json_atomic
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


def merge_audits(folder: str | Path, entries: Iterable[tuple[str, str, dict[str, Any]]]) -> None:
    """Add or replace audits (data set, label, entry); everything else in the file stays."""
    path = Path(folder) / AUDIT
    with lock(path):
        audits = read_audits(folder)
        for dataset, label, entry in entries:
            audits.setdefault(dataset, {})[label] = entry
        write_json_atomic({"format": FORMAT, "audits": audits}, path)
