"""The results folders of a report as methods, and the classes that they forgot."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd

from evaluation.results import LOGS, SETTINGS, Logs, no_results, read_logs, same_kind
from evaluation.rows import Change, Row, current_audits, rows_of
from forgetting.errors import ProblemError

SEED = "seed_"  # the beginning of a folder's name
WORDS = {"ForgetLoRA": "paper", "ForgetOptimum": "paper, at its optimum", "ForgetExact": "exact"}
ABOUT = ("trainer", "objective", "target", "beta", "backbone", "seed")
QUANTITIES: dict[str, Callable[[Row], float | None]] = {  # in percent, changes in points
    "before": lambda row: Change(0, row.own.before).points,
    "after": lambda row: Change(0, row.own.after).points,
    "worst": lambda row: Change(0, row.worst).points,
    "rest": lambda row: row.rest.points,
    "others": lambda row: row.others_mean.points,
    "ms": lambda row: 1000 * row.solver["seconds"] if "seconds" in row.solver else None,
}


@dataclass(frozen=True)
class Run:
    """One results folder: its logs, its rows, the worst news first, and the labels whose audit is
    of an adapter that was replaced."""

    folder: Path
    logs: Logs
    rows: list[Row]
    outdated: list[str]

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Data set -> what all its results share."""
        return {dataset: entries.get(SETTINGS, {}) for dataset, entries in self.logs.items()}


@dataclass(frozen=True)
class Method:
    """Runs that differ in their seed alone, below `folder`; the label tells methods apart."""

    label: str
    folder: Path
    runs: list[Run]

    @property
    def rows(self) -> list[Row]:
        return [row for run in self.runs for row in run.rows]

    @property
    def about(self) -> str:
        """What all of its results share, in a line."""
        settings = [each for run in self.runs for each in run.settings.values()]
        settings += [row.solver.get(SETTINGS, {}) for row in self.rows]
        parts = [f"{key} {value}" for key in ABOUT if (value := shared(settings, key))]
        if len(self.runs) > 1:
            parts.append(f"mean of {len(self.runs)} seeds, ± is their standard deviation")
        return ", ".join([*parts, f"folder {self.folder}"])

    def values(self, quantity: str) -> list[float]:
        """A quantity of all classes of all seeds in which it was measured."""
        return [x for x in map(QUANTITIES[quantity], self.rows) if x is not None]

    def mean(self, quantity: str) -> tuple[float, float]:
        """A quantity, averaged over the classes of each seed, and over seeds with its deviation."""
        return spread(spread(map(QUANTITIES[quantity], run.rows))[0] for run in self.runs)


def forgotten_classes(methods: Iterable[Method]) -> dict[tuple[str, str], list[Method]]:
    """Data set and class -> for each request that forgot it, the method with its rows of this class
    alone, one for each seed; the class with the worst news first, whichever method it is of."""
    classes: dict[tuple[str, str], dict[tuple[str, str], Method]] = {}
    for method in methods:
        for run in method.runs:
            for row in run.rows:
                parts = classes.setdefault((row.dataset, row.name), {})
                part = parts.setdefault((method.label, row.label), replace(method, runs=[]))
                part.runs.append(replace(run, rows=[row]))
    found = [(name, [*parts.values()]) for name, parts in classes.items()]
    return dict(sorted(found, key=lambda x: min(bad_news_first(r) for m in x[1] for r in m.rows)))


def bad_news_first(row: Row) -> tuple:
    """Classes that come back, then by what is left of them, then by harm."""
    return (not row.comes_back, -(row.own.after or 0), -(row.worst or 0), -(row.harm or 0))


def read_methods(folder: str | Path, only: Collection[Path] = ()) -> list[Method]:
    """The results of a folder, or of every results folder below it, those with most audits first.
    `only`: the results folders that count; all of them if it is empty. Raises ProblemError: no
    results there, or files that cannot be read."""
    folder, runs = Path(folder), []
    for path in sorted(each.parent for each in folder.rglob(LOGS)):
        logs = read_logs(path)
        audits, outdated = current_audits(path, logs)
        rows = sorted(rows_of(logs, audits), key=bad_news_first)
        if rows and (not only or path.resolve() in only):
            runs.append(Run(path, logs, rows, outdated))
    if not runs:
        raise no_results(folder)
    groups = list(_by_seed(runs))
    trainers = [shared(group[0].settings.values(), "trainer") for group in groups]
    names = [WORDS.get(name, name.removeprefix("Forget").lower()) for name in trainers]
    methods = []
    for group, name in zip(groups, names, strict=True):
        path = group[0].folder.parent if len(group) > 1 else group[0].folder
        is_alone = name and names.count(name) == 1
        label = name if is_alone else f"{name} ({os.path.relpath(path, folder)})".strip()
        methods.append(Method(label, path, group))
    return sorted(methods, key=lambda method: -sum(bool(row.audit) for row in method.rows))


def _by_seed(runs: Iterable[Run]) -> Iterator[list[Run]]:
    """Runs that differ in their seed alone together, the others alone."""

    def parent(run: Run) -> Path:
        is_seed = run.folder.name.startswith(SEED)
        return run.folder.parent / SEED if is_seed else run.folder

    for _, group in groupby(sorted(runs, key=parent), parent):
        runs = list(group)
        try:
            same_kind([run.folder for run in runs], [run.logs for run in runs])
            yield runs
        except ProblemError:
            yield from ([run] for run in runs)


def shared(sources: Iterable[dict[str, Any]], key: str) -> str:
    """The value of `key`, if all of `sources` that have one agree; else ""."""
    values = {str(source[key]) for source in sources if source.get(key) not in (None, "")}
    return values.pop() if len(values) == 1 else ""


def spread(values: Iterable[float | None]) -> tuple[float, float]:
    """The mean and the standard deviation of what was measured; NaN where there is none."""
    known = pd.Series(list(values), dtype=float)
    return known.mean(), known.std()
