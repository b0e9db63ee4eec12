"""The results folders of a report, the methods that they belong to, and the classes of all."""

from __future__ import annotations

import os
import re
import shlex
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from evaluation.results import ARGS, LOGS, SETTINGS, Logs, read_logs, same_kind
from evaluation.rows import Row, current_audits, mean, rows_of
from forgetting.errors import ProblemError, unknown

SEED = "seed_"  # the beginning of a folder's name
WORDS = {"ForgetLoRA": "paper", "ForgetOptimum": "paper, at its optimum", "ForgetExact": "exact"}
QUANTITIES: dict[str, Callable[[Row], float | None]] = {
    "before": lambda row: row.own.before,
    "after": lambda row: row.own.after,
    "worst": lambda row: row.worst,
    "rest": lambda row: row.rest.points,
    "others": lambda row: row.others_mean.points,
    "seconds": lambda row: row.solver.get("seconds"),
}
Spread = tuple[float | None, float | None]  # a mean, and the standard deviation over seeds


@dataclass(frozen=True)
class Run:
    """One results folder.

    Attributes:
        label: the method in a word or two; it tells methods apart. seed: such as "seed 0", where
            other folders differ from this one in their seed alone.
        settings: data set -> what all its results share; audited: the same of its audit.
        args: the text of args.txt, the command lines of the run.
        rows: the worst news first.
        outdated: labels whose audit is of an adapter that has been replaced.
    """

    folder: Path
    settings: dict[str, dict[str, Any]]
    audited: dict[str, dict[str, Any]]
    args: str
    rows: list[Row]
    outdated: list[str]
    label: str = ""
    seed: str = ""

    @property
    def title(self) -> str:
        return ", ".join(filter(None, [self.label, self.seed]))

    @cached_property
    def trainer(self) -> str:
        """The method in a word; "" if the results do not say."""
        name = shared(self.settings.values(), "trainer")
        return WORDS.get(name, name.removeprefix("Forget").lower())

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
    def about(self) -> str:
        """Trainer, target, backbone and seeds in a line, as far as the results agree."""
        settings = [each for run in self.runs for each in run.settings.values()]
        solvers = [row.solver.get(SETTINGS, {}) for run in self.runs for row in run.rows]
        parts = [shared(settings, "trainer"), shared(solvers, "objective")]
        parts += [shared(solvers, key, f"{key} ") for key in ("target", "beta")]
        parts += [shared(settings, "backbone"), shared(settings, "seed", "seed ")]
        folder = self.runs[0].folder
        if len(self.runs) > 1:
            parts.append(f"mean of {len(self.runs)} seeds, ± is their standard deviation")
            folder = folder.parent
        return f"{', '.join(filter(None, parts)) or 'method not recorded'}; folder {folder}"

    def mean(self, quantity: str) -> Spread:
        """A quantity, averaged over the classes of each seed and then over seeds."""
        value = QUANTITIES[quantity]
        return _spread([mean(map(value, run.rows)) for run in self.runs])

    def of_class(self, row: Row, quantity: str) -> Spread:
        """A quantity of one class, averaged over seeds."""
        same = [other for run in self.runs for other in run.rows if _key(other) == _key(row)]
        return _spread(list(map(QUANTITIES[quantity], same)))

    def of_classes(self, quantity: str) -> list[float]:
        """The mean over seeds of every class in which it was measured."""
        values: dict[tuple[str, str, str], list[float]] = {}
        for run in self.runs:
            for row in run.rows:
                if (value := QUANTITIES[quantity](row)) is not None:
                    values.setdefault(_key(row), []).append(value)
        return list(map(statistics.mean, values.values()))


@dataclass(frozen=True)
class ForgottenClass:
    """A class with its rows of every folder that forgot it, by method and request."""

    dataset: str
    name: str
    results: list[tuple[Method, list[tuple[Run, Row]]]] = field(default_factory=list)

    @property
    def rows(self) -> list[tuple[Run, Row]]:
        return [pair for _, rows in self.results for pair in rows]

    @property
    def comes_back(self) -> bool:
        return any(row.comes_back for _, row in self.rows)

    @property
    def left(self) -> float:
        """The most that a method leaves of it, for sorting."""
        return max(row.own.after or 0 for _, row in self.rows)

    @property
    def harm(self) -> float:
        """The most that all else loses by a method, for sorting."""
        return max(row.harm or 0 for _, row in self.rows)


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


def forgotten_classes(runs: list[Run]) -> list[ForgottenClass]:
    """Every class once, the worst news first, whichever method they are of."""
    classes: dict[tuple[str, str], ForgottenClass] = {}
    for method in methods(runs):
        requests: dict[tuple[str, str, str], list[tuple[Run, Row]]] = {}
        for run in method.runs:
            for row in run.rows:
                if _key(row) not in requests:
                    name = row.dataset, row.name
                    rows = requests[_key(row)] = []
                    classes.setdefault(name, ForgottenClass(*name)).results.append((method, rows))
                requests[_key(row)].append((run, row))
    return sorted(classes.values(), key=lambda one: min(bad_news_first(r) for _, r in one.rows))


def read_runs(folder: str | Path, primary: str | None = None) -> list[Run]:
    """The results of a folder, or of every results folder below it; the primary one first.

    Args:
        primary: the folder that comes first, as a path or below `folder`; None: the one with most
            audited classes.

    Raises:
        ProblemError: no results there, torn files, or no such primary folder.
    """
    folder = Path(folder)
    logs = {path: read_logs(path) for path in _results_folders(folder)}
    runs = [run for path, each in logs.items() if (run := _read_run(path, each)).rows]
    if not runs:
        raise ProblemError(f"the logs in {folder} hold no results; run forget_clip.sh")
    runs = _labelled(folder, _by_seed(runs, logs))
    if primary is None:
        return sorted(runs, key=lambda run: -sum(bool(row.audit) for row in run.rows))
    names = {str(run.folder.relative_to(folder)): run for run in runs}
    first = names.get(primary) or {str(run.folder): run for run in runs}.get(primary)
    if first is None:
        raise unknown(f"results folder below {folder}", primary, names)
    return sorted(runs, key=lambda run: run is not first)


def bad_news_first(row: Row) -> tuple:
    """Classes that come back, then by what is left of them, then by harm."""
    return (not row.comes_back, -(row.own.after or 0), -(row.worst or 0), -(row.harm or 0))


def shared(sources: Iterable[dict[str, Any]], key: str, before: str = "") -> str:
    """`before` and the value of `key`, if all of `sources` that have one agree; else ""."""
    values = {str(source[key]) for source in sources if source.get(key) not in (None, "")}
    return before + values.pop() if len(values) == 1 else ""


def _key(row: Row) -> tuple[str, str, str]:
    return row.dataset, row.label, row.name


def _spread(values: Sequence[float | None]) -> Spread:
    known = [value for value in values if value is not None]
    if not known:
        return None, None
    return statistics.mean(known), statistics.stdev(known) if len(known) > 1 else None


def _results_folders(folder: Path) -> list[Path]:
    if not folder.exists():
        raise ProblemError(f"no results in {folder}: there is no such folder")
    found = [Path(path) for path, _, files in os.walk(folder) if LOGS in files]
    if not found:
        raise ProblemError(f"no results in {folder}: no {LOGS} there or below; run forget_clip.sh")
    return sorted(found, key=lambda path: _natural(str(path.relative_to(folder))))


def _natural(text: str) -> list[tuple[int, int | str]]:
    """A key by which results2 comes before results10."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]


def _by_seed(runs: Sequence[Run], logs: dict[Path, Logs]) -> list[list[Run]]:
    """Runs that differ in their seed alone together, the others alone; in their order."""
    groups: dict[Path, list[Run]] = {}
    for run in runs:
        seed = run.folder.name.startswith(SEED)
        groups.setdefault(run.folder.parent / SEED if seed else run.folder, []).append(run)
    split = []
    for group in groups.values():
        try:
            same_kind([run.folder for run in group], [logs[run.folder] for run in group])
            split.append(group)
        except ProblemError:
            split += [[run] for run in group]
    return split


def _labelled(root: Path, groups: Sequence[list[Run]]) -> list[Run]:
    """Each run with its method's label: the trainer, and its folder where several have one
    trainer."""
    trainers = [group[0].trainer for group in groups]
    labelled = []
    for group, trainer in zip(groups, trainers, strict=True):
        several = len(group) > 1
        folder = group[0].folder.parent if several else group[0].folder
        path = str(folder.relative_to(root)) if folder.is_relative_to(root) else str(folder)
        label = trainer
        if trainers.count(trainer) > 1 or not trainer:
            label = f"{trainer} ({path})" if trainer else path
        for run in group:
            seed = run.folder.name.replace(SEED, "seed ", 1) if several else ""
            labelled.append(replace(run, label=label, seed=seed))
    return labelled


def _read_run(folder: Path, logs: Logs) -> Run:
    audits, outdated = current_audits(folder, logs)
    args = folder / ARGS
    return Run(
        folder=folder,
        settings={dataset: entries.get(SETTINGS, {}) for dataset, entries in logs.items()},
        audited={
            dataset: audit[SETTINGS]
            for dataset, labels in audits.items()
            for audit in labels.values()
        },
        args=args.read_text(encoding="utf-8", errors="replace") if args.is_file() else "",
        rows=sorted(rows_of(logs, audits), key=bad_news_first),
        outdated=outdated,
    )
