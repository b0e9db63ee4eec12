"""audit.json: what an audit found, beside the logs that it is about.

    {"format": "clip-forget-audit/1",
     "audits": {dataset: {label: {"adapter_sha256": ..., "settings": {...},
                                  "classes": {class: {measure: {...}, "seconds": {measure: s},
                                                      "verdict": [...]}}}}}}

`label` is that of logs.json. Every measure's own file says what its numbers are.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from engine.files import Growing, lock, read_json
from engine.schema import check_audits
from forgetting.errors import ProblemError

AUDIT = "audit.json"
CSV = "audit.csv"  # its numbers as a table
FORMAT = "clip-forget-audit/1"
Audits = dict[str, dict[str, dict[str, Any]]]


def read_audits(folder: str | Path) -> Audits:
    """Data set -> label -> audit; empty if the folder has none.

    Raises:
        ProblemError: a file that is torn, no audit, or of another shape (see `engine.schema`). It
            is left as it is.
    """
    path = Path(folder) / AUDIT
    if not path.exists():
        return {}
    record = read_json(path, "the audit")
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ProblemError(f"{path} is no audit of format {FORMAT!r}; move it away and audit again")
    check_audits(record.get("audits"), path)
    return record["audits"]


@lru_cache(maxsize=4)
def _growing(path: Path) -> Growing:
    return Growing(path, partial(read_audits, path.parent))


def merge_audits(folder: str | Path, entries: Iterable[tuple[str, str, dict[str, Any]]]) -> None:
    """Add or replace audits (data set, label, entry); everything else in the file stays.

    Raises:
        ProblemError: as `read_audits`, or a file that cannot be written.
    """
    path = Path(folder).absolute() / AUDIT
    with lock(path):
        file = _growing(path)
        audits = file.load()
        for dataset, label, entry in entries:
            audits.setdefault(dataset, {})[label] = entry
        file.save({"format": FORMAT}, "audits")
