"""The audit of results: every measure for every forgotten class, one file per label."""

import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from datasets import clean_name
from engine.determinism import one_thread
from engine.files import sha256_file, write_json_atomic
from engine.log import progress
from evaluation.audit import record
from evaluation.audit.case import AuditData, Case, Model
from evaluation.audit.inputs import Places, load_inputs
from evaluation.audit.prompts import prompts_for
from evaluation.audit.record import Audits, compile_audits, read_audit, read_audits
from evaluation.audit.verdict import verdict
from evaluation.results import SETTINGS, no_results, place, read_logs
from evaluation.results import SUFFIX as ADAPTER
from forgetting.adapter import load_adapter, projection_sha256
from forgetting.deploy.card import write_card
from forgetting.errors import ProblemError, unknown
from forgetting.problem import LowRankEdit

Measure = Callable[[Case], dict[str, Any]]
MEASURES = {name: import_module(f"evaluation.audit.{name}").measure for name in record.MEASURES}


def audit_folder(
    folder: str | Path,
    datasets: Sequence[str] = (),
    labels: Sequence[str] = (),
    without: Sequence[str] = (),
    seed: int = 0,
    places: Places | None = None,
) -> Audits:
    """Audit the results of a folder, all or those of some data sets and labels, `without` some of
    the measures; returns what the folder's audit.json now holds. Raises ProblemError for names that
    are not there, and for inputs that are missing or not those of the run."""
    folder = Path(folder)
    logs = read_logs(folder)
    if not logs:
        raise no_results(folder)
    for name in datasets:
        if name not in logs:
            raise unknown(f"data set in {folder}", name, list(logs))
    known = {name: [key for key in logs[name] if key != SETTINGS] for name in datasets or logs}
    everything = [label for some in known.values() for label in some]
    for label in labels:
        if label not in everything:
            raise unknown(f"label in {folder}", label, everything)
    for dataset, some in known.items():
        if chosen := [label for label in some if not labels or label in labels]:
            data = load_inputs(folder, logs, dataset, places or Places(), seed)
            audit_dataset(folder, chosen, data, without)
    return read_audits(folder)


def audit_dataset(
    folder: Path, labels: Sequence[str], data: AuditData, without: Sequence[str] = ()
) -> None:
    """Audit labels of one data set, each into its own file and card, and compile audit.json. What
    was audited with the same adapter, seed, texts and measures is not audited again."""
    measures = {name: measure for name, measure in MEASURES.items() if name not in without}
    dataset = data.bundle.dataset
    try:
        with progress(desc=f"audit: {dataset}", total=len(labels)) as bar, one_thread():
            for label in labels:
                bar.set_postfix_str(label[:40])
                adapter = folder / (place(dataset, label) + ADAPTER)
                cases = cases_of(adapter, data)
                texts = {name: len(case.prompts) for name, case in cases.items()}
                stamp = {
                    "format": record.FORMAT,
                    "dataset": dataset,
                    "label": label,
                    "adapter_sha256": sha256_file(adapter),
                    "settings": {"seed": data.seed, "texts": texts},
                }
                path = folder / (place(dataset, label) + record.SUFFIX)
                known = read_audit(path)
                done = all(known.get(key) == value for key, value in stamp.items())
                if not done or any(measures.keys() - known["classes"][name] for name in cases):
                    classes = {name: audit_class(case, measures) for name, case in cases.items()}
                    write_json_atomic(stamp | {"classes": classes}, path)
                write_card(adapter)
                bar.update()
    finally:  # also on an error or Ctrl-C: what is done counts
        compile_audits(folder)


def audit_class(case: Case, measures: dict[str, Measure] = MEASURES) -> dict[str, Any]:
    """What the measures find for one class: measure -> its JSON values, `seconds` (by measure; what
    classes share counts for the first of them), and `verdict` (the findings in words)."""
    found, seconds = {}, {}
    missing = [] if len(case.images) else [f"no image of {case.name!r}"]
    for name, measure in measures.items():
        started = time.perf_counter()
        found[name] = measure(case)
        seconds[name] = time.perf_counter() - started
        missing += [f"{name}: {line}" for line in found[name].pop("not_measured", [])]
    lines = [*verdict(found), *(f"not measured: {line}" for line in missing)]
    return found | {"seconds": seconds, "verdict": lines}


def cases_of(path: Path, data: AuditData) -> dict[str, Case]:
    """Class -> its case, for every class that the adapter at `path` forgets. Raises ProblemError
    if there is no such adapter, or it is of another projection."""
    adapter, bundle = load_adapter(path), data.bundle
    if adapter.projection_sha256 != projection_sha256(bundle.text_projection):
        raise ProblemError(f"{path} was made for another text projection than that of the bundle")
    removed = map(bundle.classnames.index, adapter.solver.get("removed_names", ()))
    after = Model(data, LowRankEdit(adapter.left, adapter.right), tuple(removed))
    seen = {*adapter.texts, *map(clean_name, adapter.texts)}
    return {
        name: Case(name, adapter.classes, after, prompts_for(data, name, seen))
        for name in adapter.classes
    }
