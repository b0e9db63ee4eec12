"""Results folders of a report: each with its rows, the worst news first, and its settings."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.errors import UserError, unknown
from engine.log import warn
from evaluation.results import ARGS, LOGS, SETTINGS, read_logs
from evaluation.rows import Row, current_audits, rows_of

WORDS = {"ForgetLoRA": "paper", "ForgetOptimum": "paper, at its optimum", "ForgetExact": "exact"}


@dataclass(frozen=True)
class Run:
    """One results folder.

    Attributes:
        name: the folder, short: what tells it from the others; label: the method in a word or
            two, with the folder where other folders are of the same method.
        settings: data set -> what all its results share; audited: data set -> the audit's settings.
        args: the text of args.txt, the command lines of the run.
        rows: the worst news first.
        outdated: labels whose audit is of another adapter than the one that is there now, and is
            not shown.
    """

    folder: Path
    name: str
    settings: dict[str, dict[str, Any]]
    audited: dict[str, dict[str, Any]]
    args: str
    rows: list[Row]
    outdated: list[str]
    label: str = ""

    @cached_property
    def trainer(self) -> str:
        """What the method is called, in a word; "" if the results do not say."""
        name = shared(self.settings.values(), "trainer")
        return WORDS.get(name, name.removeprefix("Forget").lower())

    @cached_property
    def method(self) -> str:
        """Trainer, target and backbone in a line, as far as the folder's results agree."""
        runs = self.settings.values()
        solvers = [row.solver.get(SETTINGS, {}) for row in self.rows]
        found = [shared(runs, "trainer"), shared(solvers, "objective")]
        found += [shared(solvers, key, f"{key} ") for key in ("target", "beta")]
        found += [shared(runs, "backbone"), shared(runs, "seed", "seed ")]
        return ", ".join(filter(None, found))

    @property
    def audit_command(self) -> str:
        return f"python -m evaluation.audit {shlex.quote(str(self.folder))}"


def read_runs(folder: str | Path, primary: str | None = None) -> list[Run]:
    """The results of a folder, or of every results folder below it; the primary one first.

    Args:
        primary: name of the run that stands first; None: the one with most audited classes, of
            equal ones the first by name (numbers in names count as numbers).

    Raises:
        UserError: no results there, torn logs, a torn audit, either of another shape, or no run
            called `primary`.
    """
    folder = Path(folder)
    folders = _results_folders(folder)
    runs = list(map(_read_run, folders, _names(folder, folders)))
    runs = [run for run in runs if run.rows]
    if not runs:
        raise UserError(f"the logs in {folder} hold no results; run forget_clip.sh")
    trainers = [run.trainer for run in runs]
    runs = [replace(run, label=_called(run, trainers.count(run.trainer) == 1)) for run in runs]
    if primary is None:
        return sorted(runs, key=lambda run: -sum(bool(row.audit) for row in run.rows))
    names = [run.name for run in runs]
    if primary not in names:
        raise unknown(f"results folder below {folder}", primary, names)
    return sorted(runs, key=lambda run: run.name != primary)


def shared(sources: Iterable[dict[str, Any]], key: str, before: str = "") -> str:
    """`before` and the value of `key`, if all of `sources` that have one agree; else ""."""
    values = {str(source[key]) for source in sources if source.get(key) not in (None, "")}
    return before + values.pop() if len(values) == 1 else ""


def _called(run: Run, alone: bool) -> str:
    if not run.trainer:
        return run.name
    return run.trainer if alone else f"{run.trainer} ({run.name})"


def _results_folders(folder: Path) -> list[Path]:
    if not folder.exists():
        raise UserError(f"no results in {folder}: there is no such folder")
    if (folder / LOGS).is_file():
        return [folder]
    found = [Path(place) for place, _, files in os.walk(folder, onerror=_closed) if LOGS in files]
    if not found:
        raise UserError(f"no results in {folder}: no {LOGS} there or below; run forget_clip.sh")
    return sorted(found, key=lambda path: _natural(str(path.relative_to(folder))))


def _closed(error: OSError) -> None:
    warn(f"report: {error.filename} is left out: {error.strerror}")


def _natural(text: str) -> list[tuple[int, int | str]]:
    """A key by which results2 comes before results10."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]


def _names(root: Path, folders: list[Path]) -> list[str]:
    """Paths below the root; a last part that all share (seed_0) is left out."""
    if folders == [root]:
        parts = root.resolve().parts[-2 if root.resolve().name.startswith("seed_") else -1 :]
        return ["/".join(parts)]
    parts = [path.relative_to(root).parts for path in folders]
    if len({part[-1] for part in parts}) == 1 and all(len(part) > 1 for part in parts):
        parts = [part[:-1] for part in parts]
    return ["/".join(part) for part in parts]


def _read_run(folder: Path, name: str) -> Run:
    logs = read_logs(folder)
    audits, outdated = current_audits(folder, logs)
    args = folder / ARGS
    return Run(
        folder=folder,
        name=name,
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
