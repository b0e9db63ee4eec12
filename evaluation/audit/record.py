"""The names in an audit, and its files: one per label, and audit.json compiled from them.

    OUTPUT/DATASET/LABEL.audit.json: {"format": FORMAT, "dataset": ..., "label": ...,
        "adapter_sha256": ..., "settings": {...}, "classes": {class: `run.audit_class`}}
    OUTPUT/audit.json: {"format": FORMAT, "audits": {dataset: {label: {...}}}}

`label` is that of logs.json. Each measure's own file says what its numbers are.
"""

from pathlib import Path
from typing import Any

from engine.files import read_json, write_json_atomic
from evaluation.results import AUDIT
from forgetting.errors import ProblemError

FORMAT = "clip-forget-audit/4"
SUFFIX = ".audit.json"
Audits = dict[str, dict[str, dict[str, Any]]]  # data set -> label -> audit
MEASURES = (  # each a module of this package with a function `measure`, in the order they run in
    "examples",
    "paraphrase",
    "neighbours",
    "destinations",
    "residue",
    "retrieval",
    "undo",
    "relearning",
)
ATTACKERS = {  # what each attacker holds
    "original_known": "the changed weights and the original",
    "alone": "the changed weights alone",
}
RELEARNING = {  # how each method uses the images
    "cache": "kept beside the model",
    "refit": "its name learnt anew",
}


def compile_audits(folder: Path) -> None:
    """Write audit.json from the audits of all labels."""
    audits: Audits = {}
    for path in sorted(folder.glob(f"*/*{SUFFIX}")):
        audit = read_audit(path)
        del audit["format"]
        audits.setdefault(audit.pop("dataset"), {})[audit.pop("label")] = audit
    if audits:
        write_json_atomic({"format": FORMAT, "audits": audits}, folder / AUDIT)


def read_audits(folder: str | Path) -> Audits:
    """The audits of a results folder; empty if it has none. Raises ProblemError for a file that is
    not JSON, or of another format."""
    return read_audit(Path(folder) / AUDIT).get("audits", {})


def read_audit(path: Path) -> dict[str, Any]:
    """What is in an audit file; empty if there is none."""
    if not path.exists():
        return {}
    record = read_json(path, "the audit")
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ProblemError(f"{path} is no audit of format {FORMAT!r}; move it away and audit again")
    return record
