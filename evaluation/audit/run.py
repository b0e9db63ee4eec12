"""The audit of a data set's results: every measure for every forgotten class, resumable."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from datasets import clean_name
from engine.determinism import one_thread
from engine.files import Batch, inside, sha256_file
from engine.log import progress
from evaluation.audit import (
    confusion,
    destinations,
    examples,
    neighbours,
    paraphrase,
    relearning,
    residue,
    retrieval,
    undo,
)
from evaluation.audit.case import Block, Case, Common, Model
from evaluation.audit.inputs import Encode, Inputs, recover, select
from evaluation.audit.prompts import prompts_for
from evaluation.audit.record import Audits, merge_audits, read_audits
from evaluation.audit.verdict import verdict
from evaluation.results import SETTINGS, Logs, join_label, read_logs
from forgetting import Adapter, load_adapter, projection_sha256
from forgetting.errors import ProblemError, unknown

ORDER = (examples, paraphrase, neighbours, destinations, confusion, residue, retrieval, undo)
ORDER += (relearning,)
MEASURES = {module.__name__.rpartition(".")[2]: module.measure for module in ORDER}
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
        folder: `results/resultsATTEMPT/seed_SEED`; without: names of `MEASURES` to leave out.
        places: those of `PLACES` where the run's own are no longer right.

    Returns:
        What the folder's audit.json now holds of these data sets and labels.

    Raises:
        ProblemError: names that are not there, or inputs of the run that are gone or have changed.
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

    Raises:
        ProblemError: an adapter that is gone or belongs to another projection.
    """
    done = read_audits(folder).get(dataset, {})
    results = _Results(folder, logs[dataset], Common(inputs.bundle, inputs.others, seed))
    measures = {name: measure for name, measure in MEASURES.items() if name not in without}
    bar = progress(desc=f"audit: {dataset}", total=len(labels))
    with bar, Batch(partial(merge_audits, folder)) as batch:
        for block in results.blocks(labels, inputs.encode, measures, done, bar):
            with one_thread():
                while block:  # a case that is done is gone, with its scores of all images
                    one = block.popleft()
                    bar.set_postfix_str(one.label[:40])
                    classes = {
                        name: audit_class(one.cases.pop(name), measures, one.kept[name])
                        for name in list(one.cases)
                    }
                    batch.add((dataset, one.label, one.stamp | {"classes": classes}))
                    bar.update()


def audit_class(
    case: Case, measures: dict[str, Any] = MEASURES, known: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What the measures find for one class, what each took, and the findings in words.

    Args:
        known: an earlier answer for the same case; its measures are taken from there.

    Returns:
        Measure -> its JSON values, `seconds` (measure -> wall-clock seconds; what classes share
        that are audited together counts for the first of them), `verdict`.
    """
    known = known or {}
    found = {name: known[name] for name in MEASURES if name in known}
    seconds = dict(known.get("seconds", {}))
    for name, measure in measures.items():
        if name not in found:
            started = time.perf_counter()
            found[name] = measure(case)
            seconds[name] = time.perf_counter() - started
    return found | {"seconds": seconds, "verdict": verdict(found)}


@dataclass(frozen=True)
class _Asked:
    """A label under audit.

    Attributes:
        stamp: what an audit must have been of to be kept; cases: its classes; kept: of each what
            was measured before.
    """

    label: str
    stamp: dict[str, Any]
    cases: dict[str, Case]
    kept: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class _Results:
    """The results of one data set: its part of the logs, and the adapters that they name."""

    folder: Path
    logs: dict[str, Any]
    common: Common

    def blocks(
        self,
        labels: Sequence[str],
        encode: Encode | None,
        measures: Collection[str],
        done: dict[str, Any],
        bar: tqdm,
    ) -> Iterator[deque[_Asked]]:
        """Labels that are audited together, less those of which all is known.

        Args:
            done: label -> an earlier audit.
        """
        block, asked = Block(), deque[_Asked]()
        for label in labels:
            bar.set_postfix_str(label[:40])
            cases = self.cases(label, encode, block)
            texts = {name: len(case.prompts) for name, case in cases.items()}
            settings = {"seed": self.common.seed, "texts": texts}
            stamp = {"adapter_sha256": sha256_file(self.path(label)), "settings": settings}
            there = done.get(label, {})
            same = all(there.get(key) == value for key, value in stamp.items())
            kept = there["classes"] if same else {name: {} for name in cases}
            if all(set(measures) <= set(kept[name]) for name in cases):
                bar.update()
                continue
            cases = {name: self.with_stranger(label, case) for name, case in cases.items()}
            asked.append(_Asked(label, stamp, cases, kept))
            if block.full:
                yield asked
                block, asked = Block(), deque()
        if asked:
            yield asked

    def cases(
        self, label: str, encode: Encode | None, block: Block | None = None
    ) -> dict[str, Case]:
        """A case for every class of a label, in a block with those of others."""
        solver, adapter = self.solver(label), self.adapter(label)
        removed = tuple(solver.get("removed_names", ()))
        change = adapter.left, adapter.right
        after = Model(self.common, change, removed, block or Block())
        seen = set(solver.get("texts") or map(clean_name, adapter.classes))
        return {
            name: Case(name, adapter.classes, after, *prompts_for(self.common, name, seen, encode))
            for name in adapter.classes
        }

    def with_stranger(self, label: str, case: Case) -> Case:
        """The case with one of a few other adapters that forget none of its classes, if there is
        one: the same one in every run."""
        own, others = self.places[label], range(len(self.labels) - 1)
        draw = random.Random(f"{self.common.seed}/{self.common.bundle.dataset}/{label}")
        drawn = sorted(draw.sample(others, min(STRANGERS, len(others))))
        names = [self.labels[place + (place >= own)] for place in drawn]  # its own is none of them
        few = [other for other in names if not set(self.classes(other)) & set(case.forgotten)]
        if not few:
            return case
        chosen = few[int(torch.randint(len(few), (1,), generator=case.generator("undo")))]
        adapter = self.adapter(chosen)
        return replace(case, stranger=(adapter.classes, (adapter.left, adapter.right)))

    @cached_property
    def labels(self) -> list[str]:
        return sorted(key for key in self.logs if key != SETTINGS)

    @cached_property
    def places(self) -> dict[str, int]:
        """Label -> its place among them."""
        return {label: place for place, label in enumerate(self.labels)}

    @cached_property
    def projection(self) -> str:
        return projection_sha256(self.common.bundle.text_projection)

    def solver(self, label: str) -> dict[str, Any]:
        return self.logs[label].get("solver") or {}

    def classes(self, label: str) -> list[str]:
        return list(self.logs[label]["final_results"][self.common.bundle.dataset])

    def path(self, label: str) -> Path:
        """The file of a label's adapter."""
        where = f"{self.common.bundle.dataset} / {label}"
        name = self.solver(label).get("adapter")
        if name is None:
            raise ProblemError(
                f"{self.folder}: the results of {where} name no adapter; an audit needs results of "
                "this repository's trainers"
            )
        path = inside(self.folder, name)
        if not path.is_file():
            raise ProblemError(f"the adapter of {where} is gone: {path}; run forget_clip.sh")
        return path

    def adapter(self, label: str) -> Adapter:
        """A label's adapter, which must be one of its classes and of the bundle's projection."""
        path = self.path(label)
        adapter = load_adapter(path)
        if adapter.classes != self.classes(label):
            raise ProblemError(f"{path} forgets {join_label(adapter.classes)!r}, not {label!r}")
        if adapter.projection_sha256 != self.projection:
            raise ProblemError(
                f"{path} was made for another text projection than that of "
                f"{self.common.bundle.dataset}; audit with what it was made from"
            )
        return adapter
