"""Results folders of a report: each with its rows, the worst news first, and its settings; and
methods, which are folders that differ in their seed alone."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from engine.log import logger
from evaluation.results import ARGS, LOGS, SETTINGS, Logs, read_logs, same_kind
from evaluation.rows import Row, current_audits, rows_of
from evaluation.tables import over_folders
from forgetting.errors import ProblemError, unknown

SEED = "seed_"  # the beginning of a folder's name
QUANTITIES: dict[str, Callable[[Row], float | None]] = {  # of a class, that seeds have means of
    "before": lambda row: row.own.before,
    "after": lambda row: row.own.after,
    "worst": lambda row: row.worst,
    "rest": lambda row: row.rest.points,
    "others": lambda row: row.others_mean.points,
    "seconds": lambda row: row.solver.get("seconds"),
}
WORDS = {"ForgetLoRA": "paper", "ForgetOptimum": "paper, at its optimum", "ForgetExact": "exact"}


@dataclass(frozen=True)
class Run:
    """One results folder.

    Attributes:
        name: the folder, short: what tells it from the others; label: the method in a word or
            two, with what else tells its folders from others of the same method; seed: such as
            "seed 0", where other folders differ from this one in their seed alone.
        settings: data set -> what all its results share; audited: data set -> the audit's settings.
        args: the text of args.txt, the command lines of the run.
        rows: the worst news first.
        outdated: labels whose audit is of another adapter than the one that is there now, and is
            not shown.
    """

    folder: Path
    settings: dict[str, dict[str, Any]]
    audited: dict[str, dict[str, Any]]
    args: str
    rows: list[Row]
    outdated: list[str]
    name: str = ""
    label: str = ""
    seed: str = ""

    @property
    def title(self) -> str:
        """Method and seed."""
        return ", ".join(filter(None, [self.label, self.seed]))

    @cached_property
    def trainer(self) -> str:
        """What the method is called, in a word; "" if the results do not say."""
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

    @cached_property
    def about(self) -> str:
        """Trainer, target, backbone and seeds in a line, as far as the results agree."""
        settings = [each for run in self.runs for each in run.settings.values()]
        solvers = [row.solver.get(SETTINGS, {}) for run in self.runs for row in run.rows]
        found = [shared(settings, "trainer"), shared(solvers, "objective")]
        found += [shared(solvers, key, f"{key} ") for key in ("target", "beta")]
        found += [shared(settings, "backbone"), shared(settings, "seed", "seed ")]
        place = self.runs[0].name
        if len(self.runs) > 1:
            found.append(f"mean of {len(self.runs)} seeds, ± is their standard deviation")
            place = str(self.runs[0].folder.parent)
        return f"{', '.join(filter(None, found)) or 'method not recorded'}; folder {place}"

    @cached_property
    def places(self) -> dict[tuple[str, str, str], int]:
        """Of every class by data set, label and name: names may hold what no pandas index can."""
        rows = [row for run in self.runs for row in run.rows]
        return {key: place for place, key in enumerate(dict.fromkeys(map(_key, rows)))}

    @cached_property
    def classes(self) -> pd.DataFrame:
        """The QUANTITIES of every class: means over seeds and `std_*`, by its place."""
        return over_folders(self._frames, ["place"]).set_index("place")

    @cached_property
    def means(self) -> dict[str, float | None]:
        """The QUANTITIES, means over classes, then over seeds, and `std_*` of the seeds."""
        lines = [frame.mean().to_frame().T.assign(place=0) for frame in self._frames]
        (line,) = over_folders(lines, ["place"]).to_dict("records")
        return _measured(line)

    def of(self, row: Row) -> dict[str, float | None]:
        """The means over seeds of the class of a row, and `std_*`."""
        return _measured(self.classes.loc[self.places[_key(row)]].to_dict())

    @cached_property
    def _frames(self) -> list[pd.DataFrame]:
        """The QUANTITIES of every class by seed."""
        return [
            pd.DataFrame(
                {key: list(map(value, run.rows)) for key, value in QUANTITIES.items()}, dtype=float
            ).assign(place=[self.places[_key(row)] for row in run.rows])
            for run in self.runs
        ]


def _key(row: Row) -> tuple[str, str, str]:
    return row.dataset, row.label, row.name


def _measured(line: dict[str, Any]) -> dict[str, float | None]:
    return {key: None if value != value else value for key, value in line.items()}  # NaN


def methods(runs: Iterable[Run]) -> list[Method]:
    """Runs by their labels, in the order of the first of each."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.label, []).append(run)
    return list(map(Method, found.values()))


def read_runs(folder: str | Path, primary: str | None = None) -> list[Run]:
    """The results of a folder, or of every results folder below it; the primary one first.

    Folders `seed_*` of one folder whose settings differ in the seed alone get one label.

    Args:
        primary: name of the run that stands first; None: the one with most audited classes, of
            equal ones the first by name (numbers in names count as numbers).

    Raises:
        ProblemError: no results there, torn logs, a torn audit, either of another shape, or no run
            called `primary`.
    """
    folder = Path(folder)
    logs = {path: read_logs(path) for path in _results_folders(folder)}
    runs = [_read_run(path, each) for path, each in logs.items()]
    runs = [run for run in runs if run.rows]
    if not runs:
        raise ProblemError(f"the logs in {folder} hold no results; run forget_clip.sh")
    groups = _by_seed(runs, logs)
    places = [group[0].folder.parent if len(group) > 1 else group[0].folder for group in groups]
    folders = [run.folder for run in runs]
    names = dict(zip(folders, _names(folder, folders), strict=True))
    runs = [
        replace(run, name=names[run.folder], label=label, seed=_seed(run) * (len(group) > 1))
        for group, label in zip(groups, _labels(folder, groups, places), strict=True)
        for run in group
    ]
    if primary is None:
        return sorted(runs, key=lambda run: -sum(bool(row.audit) for row in run.rows))
    names = [run.name for run in runs]
    if primary not in names:
        raise unknown(f"results folder below {folder}", primary, names)
    return sorted(runs, key=lambda run: run.name != primary)


def _by_seed(runs: Sequence[Run], logs: Mapping[Path, Logs]) -> list[list[Run]]:
    """Runs that differ in their seed alone together, the others alone; in their order."""
    found: dict[tuple[bool, Path], list[Run]] = {}
    for run in runs:
        seed = run.folder.name.startswith(SEED)
        found.setdefault((seed, run.folder.parent if seed else run.folder), []).append(run)
    groups = []
    for group in found.values():
        folders = [run.folder for run in group]
        try:
            same_kind(folders, [logs[path] for path in folders])
            groups.append(group)
        except ProblemError:
            groups += [[run] for run in group]
    return groups


def shared(sources: Iterable[dict[str, Any]], key: str, before: str = "") -> str:
    """`before` and the value of `key`, if all of `sources` that have one agree; else ""."""
    values = {str(source[key]) for source in sources if source.get(key) not in (None, "")}
    return before + values.pop() if len(values) == 1 else ""


def _results_folders(folder: Path) -> list[Path]:
    if not folder.exists():
        raise ProblemError(f"no results in {folder}: there is no such folder")
    if (folder / LOGS).is_file():
        return [folder]
    found = [Path(place) for place, _, files in os.walk(folder, onerror=_closed) if LOGS in files]
    if not found:
        raise ProblemError(f"no results in {folder}: no {LOGS} there or below; run forget_clip.sh")
    return sorted(found, key=lambda path: _natural(str(path.relative_to(folder))))


def _closed(error: OSError) -> None:
    logger.warning(f"report: {error.filename} is left out: {error.strerror}")


def _natural(text: str) -> list[tuple[int, int | str]]:
    """A key by which results2 comes before results10."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]


def _labels(root: Path, groups: Sequence[list[Run]], places: Sequence[Path]) -> list[str]:
    """What each group of runs is called: the method, and where several are of one, what tells its
    folder from theirs. No two are called the same."""
    trainers = [group[0].trainer for group in groups]
    labels = trainers[:]
    for trainer in dict.fromkeys(trainers):
        own = [number for number, other in enumerate(trainers) if other == trainer]
        if len(own) == 1 and trainer:
            continue
        names = _names(root, [places[n] for n in own], ", ")
        for number, name in zip(own, names, strict=True):
            labels[number] = f"{trainer} ({name})" if trainer else name
    return [
        label if labels.count(label) == 1 else f"{label} ({place})"
        for label, place in zip(labels, places, strict=True)
    ]


def _names(root: Path, folders: Sequence[Path], between: str = "/") -> list[str]:
    """Paths below the root, without the parts that all share, as far as the rest tells them
    apart."""
    if len(folders) == 1:
        parts = folders[0].resolve().parts
        return [between.join(parts[-2 if parts[-1].startswith(SEED) else -1 :])]
    paths = [path.relative_to(root).parts for path in folders]
    common = set.intersection(*map(set, paths))
    short = [tuple(part for part in path if part not in common) for path in paths]
    if () in short or len({*short}) < len(short):
        short = [path or (root.resolve().name,) for path in paths]
    return [between.join(path) for path in short]


def _seed(run: Run) -> str:
    return run.folder.name.replace(SEED, "seed ", 1)


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


def bad_news_first(row: Row) -> tuple:
    """Classes that come back, then by what is left of them, then by harm."""
    return (not row.comes_back, -(row.own.after or 0), -(row.worst or 0), -(row.harm or 0))
