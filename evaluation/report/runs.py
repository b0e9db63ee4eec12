"""The results folders of a report as methods, and the classes that they forgot."""

import os
import shlex
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from evaluation.results import LOGS, SETTINGS, Logs, no_results, read_logs, same_kind
from evaluation.rows import Row, current_audits, rows_of
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
Spread = tuple[float, float]  # a mean, and the standard deviation over seeds; NaN if there is none


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

    @property
    def audit_command(self) -> str:
        return f"python -m evaluation.audit {shlex.quote(str(self.folder))}"


@dataclass(frozen=True)
class Method:
    """Folders that differ in their seed alone, or one folder; the label tells methods apart."""

    label: str
    runs: list[Run]

    @cached_property
    def rows(self) -> list[Row]:
        return [row for run in self.runs for row in run.rows]

    @cached_property
    def audited(self) -> list[Row]:
        return [row for row in self.rows if row.audit]

    @property
    def about(self) -> str:
        """What all of its results share, in a line."""
        settings = [each for run in self.runs for each in run.settings.values()]
        settings += [row.solver.get(SETTINGS, {}) for row in self.rows]
        parts = [f"{key} {value}" for key in ABOUT if (value := shared(settings, key))]
        if len(self.runs) > 1:
            parts.append(f"mean of {len(self.runs)} seeds, ± is their standard deviation")
        return ", ".join([*parts, f"folder {common_folder(self.runs)}"])

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row for every class of every seed: the seed's number, the class, and `QUANTITIES`."""
        lines = [
            {"seed": seed, "class": _key(row)} | {n: of(row) for n, of in QUANTITIES.items()}
            for seed, run in enumerate(self.runs)
            for row in run.rows
        ]
        return pd.DataFrame(lines).astype(dict.fromkeys(QUANTITIES, float))

    def mean(self, quantity: str) -> Spread:
        """A quantity, averaged over the classes of each seed and then over seeds."""
        means = self.table.groupby("seed")[quantity].mean()
        return means.mean(), means.std()

    def of_classes(self, quantity: str) -> pd.Series:
        """The mean over seeds of every class in which it was measured."""
        return self.table.groupby("class")[quantity].mean().dropna()

    def of_class(self, row: Row, quantity: str) -> Spread:
        """A quantity of one class, averaged over seeds."""
        values = self.table.loc[self.table["class"] == _key(row), quantity]
        return values.mean(), values.std()


@dataclass(frozen=True)
class ForgottenClass:
    """A class with its rows of every folder that forgot it, by method and request."""

    dataset: str
    name: str
    results: list[tuple[Method, list[tuple[Run, Row]]]]

    @property
    def rows(self) -> list[Row]:
        return [row for _, pairs in self.results for _, row in pairs]

    @property
    def comes_back(self) -> bool:
        return any(row.comes_back for row in self.rows)

    def most(self, quantity: str) -> float:
        """Of all methods the most that is left of it ("left"), or that all else lost ("harm")."""
        values = [row.own.after if quantity == "left" else row.harm for row in self.rows]
        return max(value or 0 for value in values)


def tags(pairs: Sequence[tuple[Run, Row]]) -> list[str]:
    """What is wrong with a class, and in how many of the seeds."""
    labels = [row.tag for _, row in pairs if row.tag]
    return [
        tag if labels.count(tag) == len(pairs) else f"{tag} in {labels.count(tag)} of {len(pairs)}"
        for tag in dict.fromkeys(labels)
    ]


def forgotten_classes(methods: Iterable[Method]) -> list[ForgottenClass]:
    """Every class once, the worst news first, whichever method they are of."""
    classes: dict[tuple[str, str], dict[tuple[str, str], tuple[Method, list]]] = {}
    for method in methods:
        for run in method.runs:
            for row in run.rows:
                requests = classes.setdefault((row.dataset, row.name), {})
                requests.setdefault((method.label, row.label), (method, []))[1].append((run, row))
    found = [ForgottenClass(*name, list(requests.values())) for name, requests in classes.items()]
    return sorted(found, key=lambda one: min(map(bad_news_first, one.rows)))


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
    groups = _by_seed(runs)
    names = [shared(group[0].settings.values(), "trainer") for group in groups]
    names = [WORDS.get(name, name.removeprefix("Forget").lower()) for name in names]
    methods = []
    for group, name in zip(groups, names, strict=True):
        path = os.path.relpath(common_folder(group), folder)
        is_alone = name and names.count(name) == 1
        methods.append(Method(name if is_alone else f"{name} ({path})".strip(), group))
    return sorted(methods, key=lambda method: -len(method.audited))


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


def common_folder(runs: Sequence[Run]) -> Path:
    return runs[0].folder.parent if len(runs) > 1 else runs[0].folder


def shared(sources: Iterable[dict[str, Any]], key: str) -> str:
    """The value of `key`, if all of `sources` that have one agree; else ""."""
    values = {str(source[key]) for source in sources if source.get(key) not in (None, "")}
    return values.pop() if len(values) == 1 else ""


def _key(row: Row) -> str:
    return repr((row.dataset, row.label, row.name))
