"""The audit of results: every measure for every forgotten class, one file per label."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from datasets import clean_name
from engine.determinism import one_thread
from engine.files import sha256_file
from engine.log import progress
from evaluation.audit import names
from evaluation.audit.case import AuditData, Case, Model
from evaluation.audit.inputs import Encode, Inputs, Places, labels_of, load_inputs
from evaluation.audit.prompts import prompts_for
from evaluation.audit.record import Audits, compile_audits, read_audit, read_audits, write_audit
from evaluation.audit.verdict import verdict
from evaluation.results import Logs, join_label, no_results, place, read_logs, split_label
from forgetting import Adapter, load_adapter, projection_sha256
from forgetting.errors import ProblemError, unknown
from forgetting.problem import LowRankEdit

Measure = Callable[[Case], dict[str, Any]]
MEASURES: dict[str, Measure] = {
    name: import_module(f"evaluation.audit.{name}").measure for name in names.MEASURES
}
STRANGERS = 3  # adapters of other classes among which one is chosen


def audit_folder(
    folder: str | Path,
    datasets: Sequence[str] = (),
    labels: Sequence[str] = (),
    without: Sequence[str] = (),
    seed: int = 0,
    places: Places | None = None,
) -> Audits:
    """Audit the results of a folder, all or those of some data sets and labels.

    Args:
        folder: `results/resultsATTEMPT/seed_SEED`; without: measures to leave out.
        places: where the bundles or images of the run are.

    Returns:
        What the folder's audit.json now holds of these data sets and labels.

    Raises:
        ProblemError: names that are not there, or inputs that are missing or not those of the run.
    """
    for name in without:
        if name not in MEASURES:
            raise unknown("measure", name, list(MEASURES))
    folder = Path(folder)
    logs = read_logs(folder)
    chosen = select(folder, logs, datasets, labels)
    for dataset, some in chosen.items():
        inputs = load_inputs(folder, logs, dataset, places or Places())
        audit_dataset(folder, logs, dataset, some, inputs, seed, without)
    audits = read_audits(folder)
    return {
        dataset: {label: audits[dataset][label] for label in some}
        for dataset, some in chosen.items()
    }


def select(
    folder: Path, logs: Logs, datasets: Sequence[str], labels: Sequence[str]
) -> dict[str, list[str]]:
    """Data set -> labels to audit: the given ones, all where none is given.

    Raises:
        ProblemError: no results there, or none of a given data set or label.
    """
    if not logs:
        raise no_results(folder)
    for name in datasets:
        if name not in logs:
            raise unknown(f"data set in {folder}", name, list(logs))
    known = {name: labels_of(logs, name) for name in datasets or logs}
    everything = [label for some in known.values() for label in some]
    for label in labels:
        if label not in everything:
            raise unknown(f"label in {folder}", label, everything)
    wanted = set(labels or everything)
    chosen = {name: [label for label in some if label in wanted] for name, some in known.items()}
    return {name: some for name, some in chosen.items() if some}


def audit_dataset(
    folder: Path,
    logs: Logs,
    dataset: str,
    labels: Sequence[str],
    inputs: Inputs,
    seed: int = 0,
    without: Sequence[str] = (),
) -> None:
    """Audit labels of one data set, each into its own file, and compile audit.json.

    A label that was audited with the same adapter, seed, texts and measures is not audited again.

    Raises:
        ProblemError: an adapter that is missing or belongs to another projection.
    """
    measures = {name: measure for name, measure in MEASURES.items() if name not in without}
    data = AuditData(inputs.bundle, inputs.others, seed)
    results = Results(folder, labels_of(logs, dataset), data, inputs.encode)
    try:
        with progress(desc=f"audit: {dataset}", total=len(labels)) as bar, one_thread():
            for label in labels:
                bar.set_postfix_str(label[:40])
                cases = results.cases(label)
                stamp = {
                    "adapter_sha256": sha256_file(results.path(label)),
                    "settings": {
                        "seed": seed,
                        "texts": {name: len(case.prompts) for name, case in cases.items()},
                    },
                }
                known = read_audit(folder, dataset, label)
                done = all(known.get(key) == value for key, value in stamp.items())
                if not done or any(measures.keys() - known["classes"][name] for name in cases):
                    classes = {name: audit_class(case, measures) for name, case in cases.items()}
                    write_audit(folder, dataset, label, stamp | {"classes": classes})
                bar.update()
    finally:  # also on an error or Ctrl-C: what is done counts
        compile_audits(folder)


def audit_class(case: Case, measures: dict[str, Measure] = MEASURES) -> dict[str, Any]:
    """What the measures find for one class.

    Returns:
        Measure -> its JSON values, `seconds` (measure -> wall-clock seconds; what classes share
        counts for the first of them), `verdict` (the findings in words).
    """
    found, seconds = {}, {}
    for name, measure in measures.items():
        started = time.perf_counter()
        found[name] = measure(case)
        seconds[name] = time.perf_counter() - started
    return found | {"seconds": seconds, "verdict": verdict(found)}


@dataclass(frozen=True)
class Results:
    """The adapters of one data set in a results folder; `labels` are those of its results."""

    folder: Path
    labels: list[str]
    data: AuditData
    encode: Encode | None = None

    def cases(self, label: str) -> dict[str, Case]:
        """Class -> its case, for every class of a label."""
        adapter = self.adapter(label)
        removed = tuple(adapter.solver.get("removed_names", ()))
        after = Model(self.data, LowRankEdit(adapter.left, adapter.right), removed)
        seen = {*adapter.texts, *map(clean_name, adapter.texts)}
        return {
            name: Case(
                name,
                adapter.classes,
                after,
                *prompts_for(self.data, name, seen, self.encode),
                self.stranger(label, name),
            )
            for name in adapter.classes
        }

    def stranger(self, label: str, name: str) -> tuple[list[str], LowRankEdit] | None:
        """For a class of a label one of a few other adapters that forget none of its classes,
        always the same one; None if there is none."""
        draw = random.Random(f"{self.data.seed}/{self.data.bundle.dataset}/{label}")
        others = sorted(other for other in self.labels if other != label)
        drawn = sorted(draw.sample(range(len(others)), min(STRANGERS, len(others))))
        classes = set(split_label(label))
        few = [others[i] for i in drawn if not classes & set(split_label(others[i]))]
        if not few:
            return None
        generator = self.data.generator(name, "undo")
        adapter = self.adapter(few[int(torch.randint(len(few), (1,), generator=generator))])
        return adapter.classes, LowRankEdit(adapter.left, adapter.right)

    @cached_property
    def projection(self) -> str:
        return projection_sha256(self.data.bundle.text_projection)

    def path(self, label: str) -> Path:
        """The file of a label's adapter."""
        return self.folder / f"{place(self.data.bundle.dataset, label)}.safetensors"

    def adapter(self, label: str) -> Adapter:
        """A label's adapter.

        Raises:
            ProblemError: there is none, or it forgets other classes, or belongs to another
                projection than the bundle's.
        """
        path, dataset = self.path(label), self.data.bundle.dataset
        if not path.is_file():
            raise ProblemError(f"the adapter of {dataset} / {label} is missing: {path}")
        adapter = load_adapter(path)
        if join_label(adapter.classes) != label:
            raise ProblemError(f"{path} forgets {join_label(adapter.classes)!r}, not {label!r}")
        if adapter.projection_sha256 != self.projection:
            raise ProblemError(
                f"{path} was made for another text projection than that of {dataset}; audit with "
                "what it was made from"
            )
        return adapter
