"""The audit of a data set's results: every measure for every forgotten class, resumable."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from datasets import plain
from engine.determinism import one_thread
from engine.errors import UserError, unknown
from engine.files import inside, sha256_file
from evaluation.audit import (
    confusion,
    destinations,
    neighbours,
    paraphrase,
    relearning,
    residue,
    retrieval,
    undo,
)
from evaluation.audit.case import Case, Model
from evaluation.audit.inputs import Inputs, recover, select
from evaluation.audit.prompts import prompts_for
from evaluation.audit.record import Audits, merge_audit, read_audits
from evaluation.audit.verdict import verdict
from evaluation.results import SETTINGS, Logs, join_label, read_logs
from evaluation.zero_shot import Factors
from forgetting import load_adapter, projection_sha256

MEASURES = {
    "paraphrase": paraphrase.measure,
    "neighbours": neighbours.measure,
    "destinations": destinations.measure,
    "confusion": confusion.measure,
    "residue": residue.measure,
    "retrieval": retrieval.measure,
    "undo": undo.measure,
    "relearning": relearning.measure,
}
STRANGERS = 3  # adapters of other classes that an attacker holds


def audit_folder(
    folder: str | Path,
    datasets: Sequence[str] = (),
    labels: Sequence[str] = (),
    without: Sequence[str] = (),
    seed: int = 0,
    **places: str | None,
) -> Audits:
    """Audit the results of a folder, all or those of some data sets and labels.

    Args:
        folder: `results/resultsATTEMPT/seed_SEED`.
        without: names of `MEASURES` to leave out.
        places: `features`, `root`, `cache`, `weights`, where the run's own are no longer right.

    Returns:
        What the folder's audit.json now holds of these data sets and labels.

    Raises:
        UserError: names that are not there, or inputs of the run that are gone or have changed.
    """
    for name in without:
        if name not in MEASURES:
            raise unknown("measure", name, list(MEASURES))
    folder = Path(folder)
    logs = read_logs(folder)
    chosen = select(folder, logs, datasets, labels)
    for dataset, names in chosen.items():
        inputs = recover(folder, logs, dataset, places)
        audit_dataset(folder, logs, dataset, names, inputs, seed, without)
    audits = read_audits(folder)
    return {
        dataset: {label: audits[dataset][label] for label in names}
        for dataset, names in chosen.items()
    }


def audit_dataset(
    folder: Path,
    logs: Logs,
    dataset: str,
    labels: Sequence[str],
    inputs: Inputs,
    seed: int = 0,
    without: Sequence[str] = (),
) -> None:
    """Audit labels of one data set and merge what is found into the folder's audit.json.

    What an audit of the same adapter, seed and texts has measured is kept, and not measured again.

    Args:
        without: measures to leave out.

    Raises:
        UserError: an adapter that is gone or belongs to another projection.
    """
    done = read_audits(folder).get(dataset, {})
    before = Model(inputs.bundle)
    measures = {name: measure for name, measure in MEASURES.items() if name not in without}
    with tqdm(labels, desc=f"audit: {dataset}", unit="class") as bar:
        for label in bar:
            bar.set_postfix_str(label[:40], refresh=False)
            solver = logs[dataset][label].get("solver") or {}
            path = _adapter_path(folder, dataset, label, solver)
            adapter = load_adapter(path)
            if join_label(adapter.classes) != label:
                raise UserError(f"{path} forgets {join_label(adapter.classes)!r}, not {label!r}")
            cases = _cases(before, inputs, adapter, solver, seed)
            settings = {
                "seed": seed,
                "texts": {name: len(case.prompts) for name, case in cases.items()},
            }
            stamp = {"adapter_sha256": sha256_file(path), "settings": settings}
            there = done.get(label, {})
            same = all(there.get(key) == value for key, value in stamp.items())
            kept = there["classes"] if same else {name: {} for name in cases}
            if all(set(measures) <= set(kept[name]) for name in cases):
                continue
            strangers = _strangers(folder, logs, dataset, label, seed)
            with one_thread():
                classes = {
                    name: audit_class(replace(case, strangers=strangers), measures, kept[name])
                    for name, case in cases.items()
                }
            merge_audit(folder, dataset, label, stamp | {"classes": classes})


def audit_class(
    case: Case, measures: dict[str, Any] = MEASURES, known: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What the measures find for one class, what each took, and the findings in words.

    Args:
        known: an earlier answer for the same case; its measures are taken from there.

    Returns:
        Measure -> its JSON values, `seconds` (measure -> wall-clock seconds), `verdict`.
    """
    known = known or {}
    found = {name: known[name] for name in MEASURES if name in known}
    seconds = dict(known.get("seconds", {}))
    for name, measure in measures.items():
        if name not in found:
            started = time.perf_counter()
            found[name] = measure(case)
            seconds[name] = time.perf_counter() - started
    return found | {"seconds": seconds, "verdict": verdict(case.name, found)}


def _cases(
    before: Model, inputs: Inputs, adapter: Any, solver: dict[str, Any], seed: int
) -> dict[str, Case]:
    """A case for every class of an adapter."""
    bundle = inputs.bundle
    if adapter.projection_sha256 != projection_sha256(bundle.text_projection):
        raise UserError(
            f"the adapter of {', '.join(adapter.classes)} was made for another text projection "
            f"than that of {bundle.dataset}; audit with what it was made from"
        )
    removed = tuple(solver.get("removed_names", ()))
    after = Model(bundle, (adapter.left, adapter.right), removed)
    cases = {}
    for name in adapter.classes:
        seen = set(solver.get("texts") or map(plain, adapter.classes))
        prompts, unmeasured = prompts_for(bundle, name, seen, inputs.encode)
        cases[name] = Case(
            name=name,
            forgotten=list(adapter.classes),
            before=before,
            after=after,
            others=inputs.others,
            prompts=prompts,
            unmeasured=unmeasured,
            seed=seed,
        )
    return cases


def _strangers(folder: Path, logs: Logs, dataset: str, label: str, seed: int) -> dict[str, Factors]:
    """Factors of a few other adapters of the data set, the same ones in every run."""
    others = sorted(key for key in logs[dataset] if key not in (label, SETTINGS))
    chosen = random.Random(f"{seed}/{dataset}/{label}").sample(others, min(STRANGERS, len(others)))
    found = {}
    for key in chosen:
        path = _adapter_path(folder, dataset, key, logs[dataset][key].get("solver") or {})
        adapter = load_adapter(path)
        found[key] = (adapter.left, adapter.right)
    return found


def _adapter_path(folder: Path, dataset: str, label: str, solver: dict[str, Any]) -> Path:
    if "adapter" not in solver:
        raise UserError(
            f"{folder}: the results of {dataset} / {label} name no adapter; an audit needs results "
            "of this repository's trainers"
        )
    path = inside(folder, solver["adapter"])
    if not path.is_file():
        raise UserError(f"the adapter of {dataset} / {label} is gone: {path}; run forget_clip.sh")
    return path
