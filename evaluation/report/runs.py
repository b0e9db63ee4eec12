"""The results folders of a report, the methods that they belong to, and the classes of all."""

from __future__ import annotations

import os
import shlex
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from evaluation.results import ARGS, LOGS, SETTINGS, Logs, no_results, read_logs, same_kind
from evaluation.rows import Row, current_audits, mean, rows_of
from forgetting.errors import ProblemError

SEED = "seed_"  # the beginning of a folder's name
WORDS = {"ForgetLoRA": "paper", "ForgetOptimum": "paper, at its optimum", "ForgetExact": "exact"}
ABOUT = ("trainer", "objective", "target", "beta", "backbone", "seed")
QUANTITIES: dict[str, Callable[[Row], float | None]] = {
    "before": lambda row: row.own.before,
    "after": lambda row: row.own.after,
    "worst": lambda row: row.worst,
    "rest": lambda row: row.rest.points,
    "others": lambda row: row.others_mean.points,
    "seconds": lambda row: row.solver.get("seconds"),
}
Key = tuple[str, str, str]  # data set, label, class
Spread = tuple[float | None, float | None]  # a mean, and the standard deviation over seeds


@dataclass(frozen=True)
class Run:
    """One results folder.

    Attributes:
        rows: the worst news first; outdated: labels whose audit is of an adapter that was replaced.
        label: of the method; seed: such as "seed 0", where other folders differ in the seed alone.
    """

    folder: Path
    logs: Logs
    rows: list[Row]
    outdated: list[str]
    label: str = ""
    seed: str = ""

    @property
    def title(self) -> str:
        return ", ".join(filter(None, [self.label, self.seed]))

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Data set -> what all its results share."""
        return {dataset: entries.get(SETTINGS, {}) for dataset, entries in self.logs.items()}

    @property
    def args(self) -> str:
        """The command lines of the run."""
        path = self.folder / ARGS
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    @property
    def audit_command(self) -> str:
        return f"python -m evaluation.audit {shlex.quote(str(self.folder))}"


@dataclass(frozen=True)
class Method:
    """Folders that differ in their seed alone, or one folder."""

    runs: list[Run]

    @property
    def label(self) -> str:
        return self.runs[0].label

    @property
    def rows(self) -> list[Row]:
        return [row for run in self.runs for row in run.rows]

    @property
    def about(self) -> str:
        """What all of its results share, in a line."""
        settings = [each for run in self.runs for each in run.settings.values()]
        settings += [row.solver.get(SETTINGS, {}) for row in self.rows]
        parts = [f"{key} {value}" for key in ABOUT if (value := shared(settings, key))]
        folder = self.runs[0].folder
        if len(self.runs) > 1:
            parts.append(f"mean of {len(self.runs)} seeds, ± is their standard deviation")
            folder = folder.parent
        return ", ".join([*parts, f"folder {folder}"])

    def mean(self, quantity: str) -> Spread:
        """A quantity, averaged over the classes of each seed and then over seeds."""
        return _spread([mean(map(QUANTITIES[quantity], run.rows)) for run in self.runs])

    @cached_property
    def by_class(self) -> dict[str, dict[Key, Spread]]:
        """Quantity -> class -> its mean over seeds, of the classes in which it was measured."""
        values: dict[str, dict[Key, list[float]]] = {q: defaultdict(list) for q in QUANTITIES}
        for row in self.rows:
            for name, quantity in QUANTITIES.items():
                if (value := quantity(row)) is not None:
                    values[name][_key(row)].append(value)
        return {name: {k: _spread(v) for k, v in each.items()} for name, each in values.items()}

    def of_class(self, row: Row, quantity: str) -> Spread:
        """A quantity of one class, averaged over seeds."""
        return self.by_class[quantity].get(_key(row), (None, None))


@dataclass(frozen=True)
class ForgottenClass:
    """A class with its rows of every folder that forgot it, by method and request."""

    dataset: str
    name: str
    results: list[tuple[Method, list[tuple[Run, Row]]]]

    @property
    def rows(self) -> list[tuple[Run, Row]]:
        return [pair for _, rows in self.results for pair in rows]

    @property
    def comes_back(self) -> bool:
        return any(row.comes_back for _, row in self.rows)

    def most(self, quantity: str) -> float:
        """Of all methods the most that is left of it ("left"), or that all else lost ("harm")."""
        values = [row.own.after if quantity == "left" else row.harm for _, row in self.rows]
        return max(value or 0 for value in values)


def tags(rows: Sequence[tuple[Run, Row]]) -> list[str]:
    """What is wrong with a class, and in how many of the seeds."""
    labels = [row.tag for _, row in rows if row.tag]
    return [
        tag if labels.count(tag) == len(rows) else f"{tag} in {labels.count(tag)} of {len(rows)}"
        for tag in dict.fromkeys(labels)
    ]


def methods(runs: Iterable[Run]) -> list[Method]:
    """Runs by their labels, in the order of the first of each."""
    by_label: dict[str, list[Run]] = {}
    for run in runs:
        by_label.setdefault(run.label, []).append(run)
    return list(map(Method, by_label.values()))


def forgotten_classes(methods: Iterable[Method]) -> list[ForgottenClass]:
    """Every class once, the worst news first, whichever method they are of."""
    classes: dict[tuple[str, str], dict[tuple[str, str], tuple[Method, list]]] = {}
    for method in methods:
        for run in method.runs:
            for row in run.rows:
                requests = classes.setdefault((row.dataset, row.name), {})
                requests.setdefault((method.label, row.label), (method, []))[1].append((run, row))
    found = [ForgottenClass(*name, list(requests.values())) for name, requests in classes.items()]
    return sorted(found, key=lambda one: min(bad_news_first(row) for _, row in one.rows))


def bad_news_first(row: Row) -> tuple:
    """Classes that come back, then by what is left of them, then by harm."""
    return (not row.comes_back, -(row.own.after or 0), -(row.worst or 0), -(row.harm or 0))


def read_runs(folder: str | Path) -> list[Run]:
    """The results of a folder, or of every results folder below it, those with most audits first.
    Raises ProblemError if there are none, or files that cannot be read."""
    folder, runs = Path(folder), []
    for path in sorted(folder.rglob(LOGS)):
        logs = read_logs(path.parent)
        audits, outdated = current_audits(path.parent, logs)
        if rows := sorted(rows_of(logs, audits), key=bad_news_first):
            runs.append(Run(path.parent, logs, rows, outdated))
    if not runs:
        raise no_results(folder)
    runs = _labelled(folder, _by_seed(runs))
    return sorted(runs, key=lambda run: -sum(bool(row.audit) for row in run.rows))


def _by_seed(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ in their seed alone together, the others alone; in their order."""
    groups: dict[Path, list[Run]] = {}
    for run in runs:
        seed = run.folder.name.startswith(SEED)
        groups.setdefault(run.folder.parent / SEED if seed else run.folder, []).append(run)
    split = []
    for group in groups.values():
        try:
            same_kind([run.folder for run in group], [run.logs for run in group])
            split.append(group)
        except ProblemError:
            split += [[run] for run in group]
    return split


def _labelled(root: Path, groups: Sequence[list[Run]]) -> list[Run]:
    """The runs with the label of their method: its trainer, and its folder where that is not all
    that tells it apart."""
    names = [shared(group[0].settings.values(), "trainer") for group in groups]
    names = [WORDS.get(name, name.removeprefix("Forget").lower()) for name in names]
    labelled = []
    for group, name in zip(groups, names, strict=True):
        several = len(group) > 1
        path = os.path.relpath(group[0].folder.parent if several else group[0].folder, root)
        label = name if name and names.count(name) == 1 else f"{name} ({path})".strip()
        for run in group:
            seed = run.folder.name.replace(SEED, "seed ", 1) if several else ""
            labelled.append(replace(run, label=label, seed=seed))
    return labelled


def shared(sources: Iterable[dict[str, Any]], key: str) -> str:
    """The value of `key`, if all of `sources` that have one agree; else ""."""
    values = {str(source[key]) for source in sources if source.get(key) not in (None, "")}
    return values.pop() if len(values) == 1 else ""


def _key(row: Row) -> Key:
    return row.dataset, row.label, row.name


def _spread(values: Sequence[float | None]) -> Spread:
    known = [value for value in values if value is not None]
    return mean(known), statistics.stdev(known) if len(known) > 1 else None
