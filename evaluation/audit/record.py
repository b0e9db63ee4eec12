"""Audits on disk: one JSON per label beside its adapter, and audit.json compiled from them.

    OUTPUT/DATASET/LABEL.audit.json:
    {"format": "clip-forget-audit/1", "dataset": ..., "label": ..., "adapter_sha256": ...,
     "settings": {...}, "classes": {class: {measure: {...}, "seconds": {measure: s},
                                            "verdict": [...]}}}

    OUTPUT/audit.json:
    {"format": "clip-forget-audit/1", "audits": {dataset: {label: {...}}}}

`label` is that of logs.json. Each measure's own file says what its numbers are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.files import read_json, write_json_atomic
from evaluation.results import AUDIT, place
from forgetting.errors import ProblemError

FORMAT = "clip-forget-audit/1"
SUFFIX = ".audit.json"
Audits = dict[str, dict[str, dict[str, Any]]]  # data set -> label -> audit


def write_audit(folder: Path, dataset: str, label: str, audit: dict[str, Any]) -> None:
    """Write the audit of one label; the file appears whole or not at all."""
    head = {"format": FORMAT, "dataset": dataset, "label": label}
    write_json_atomic(head | audit, folder / f"{place(dataset, label)}{SUFFIX}")


def read_audit(folder: Path, dataset: str, label: str) -> dict[str, Any]:
    """What `write_audit` wrote; empty if the label was not audited."""
    path = folder / f"{place(dataset, label)}{SUFFIX}"
    return _read(path) if path.exists() else {}


def compile_audits(folder: Path) -> None:
    """Write audit.json from the audits of all labels."""
    audits: Audits = {}
    for path in sorted(folder.glob(f"*/*{SUFFIX}")):
        audit = _read(path)
        del audit["format"]
        audits.setdefault(audit.pop("dataset"), {})[audit.pop("label")] = audit
    if audits:
        write_json_atomic({"format": FORMAT, "audits": audits}, folder / AUDIT)


def read_audits(folder: str | Path) -> Audits:
    """The audits of a results folder; empty if it has none.

    Raises:
        ProblemError: audit.json is not JSON, or of another format.
    """
    path = Path(folder) / AUDIT
    return _read(path)["audits"] if path.exists() else {}


def _read(path: Path) -> dict[str, Any]:
    record = read_json(path, "the audit")
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ProblemError(f"{path} is no audit of format {FORMAT!r}; move it away and audit again")
    return record
