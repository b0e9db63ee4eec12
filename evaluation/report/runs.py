"""Results folders as rows: one a forgotten class, with its numbers from the logs and its audit."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import UserError, unknown
from engine.files import inside, sha256_file
from evaluation.audit.record import read_audits
from evaluation.results import ARGS, LOGS, SETTINGS, read_logs

HALF = 0.5  # of the accuracy before forgetting: with more than that a class is not forgotten
EVALUATION = "evaluation"  # the kind of the prompt that the logs' accuracies were measured with


class Change(NamedTuple):
    """An accuracy before and after forgetting: fractions, None where nothing was measured."""

    before: float | None
    after: float | None

    @property
    def points(self) -> float | None:
        """After less before, in percentage points."""
        if self.before is None or self.after is None:
            return None
        return 100 * (self.after - self.before)


@dataclass(frozen=True)
class Row:
    """One forgotten class of one run.

    Attributes:
        label: what the logs call the request; together: how many classes it forgot at once.
        own: accuracy on the class; rest: on the other classes of its set; others: on other sets.
        solver: what the solver recorded; audit: what the audit measured. Empty if there is none.
    """

    dataset: str
    label: str
    name: str
    together: int
    own: Change
    rest: Change
    others: dict[str, Change]
    solver: dict[str, Any]
    audit: dict[str, Any]

    @property
    def others_mean(self) -> Change:
        """The mean over the other sets, of those measured before and after."""
        both = [change for change in self.others.values() if change.points is not None]
        if not both:
            return Change(None, mean([change.after for change in self.others.values()]))
        return Change(mean([c.before for c in both]), mean([c.after for c in both]))

    @property
    def harm(self) -> float | None:
        """Points lost on the rest of the set and (mean) on other sets; negative if gained."""
        losses = [c.points for c in (self.rest, self.others_mean) if c.points is not None]
        return -sum(losses) if losses else None

    @property
    def kept(self) -> bool:
        """More than half of its accuracy is left: the class was not forgotten."""
        before, after = self.own
        return bool(before) and after is not None and after > HALF * before

    @property
    def words(self) -> list[str]:
        """Other words by which the class comes back."""
        back = dig(self.audit, "paraphrase", "back")
        return [text for text in back if isinstance(text, str)] if isinstance(back, list) else []

    @property
    def comes_back(self) -> bool:
        return self.kept or bool(self.words)

    @property
    def worst(self) -> float | None:
        """The class's accuracy after forgetting, by the other words that bring back most."""
        return value_of(dig(self.audit, "paraphrase", "worst", "after"))

    @property
    def probe(self) -> float | None:
        """The accuracy that a linear probe on image embeddings still has on the class."""
        return value_of(dig(self.audit, "residue", "linear_probe", "after"))

    @property
    def verdict(self) -> list[str]:
        """Findings, bad news first; without an audit only what the logs say."""
        lines = self.audit.get("verdict")
        if isinstance(lines, list):
            return [line for line in lines if isinstance(line, str)]
        return ["not forgotten: more than half of its accuracy is left"] if self.kept else []

    def interval(self, side: str) -> tuple[float, float] | None:
        """The audit's 95 % interval of the class's accuracy, `side` is before or after.

        None unless it is about the accuracy of the logs: an audit of an earlier adapter is not.
        """
        value = getattr(self.own, side)
        prompts = dig(self.audit, "paraphrase", "prompts")
        found = [dig(self.audit, "residue", "zero_shot", side)]
        if isinstance(prompts, list):
            found += [dig(prompt, side) for prompt in prompts if dig(prompt, "kind") == EVALUATION]
        for entry in found:
            low, high = number(dig(entry, "low")), number(dig(entry, "high"))
            if value is not None and low is not None and high is not None:
                return (low, high) if low - 1e-9 <= value <= high + 1e-9 else None
        return None


@dataclass(frozen=True)
class Run:
    """One results folder.

    Attributes:
        name: the folder, short: what tells it from the others.
        settings: data set -> what all its results share; audited: data set -> the audit's settings.
        args: the text of args.txt, the command lines of the run.
        rows: the worst news first.
        strange: labels of the logs that hold no results; outdated: those whose audit is of another
            adapter than the one that is there now, and is not shown.
    """

    folder: Path
    name: str
    settings: dict[str, dict[str, Any]]
    audited: dict[str, dict[str, Any]]
    args: str
    rows: list[Row]
    strange: list[str] = field(default_factory=list)
    outdated: list[str] = field(default_factory=list)

    @cached_property
    def method(self) -> str:
        """Trainer, target and backbone in a line, as far as the folder's results agree."""
        solvers = [row.solver.get(SETTINGS) for row in self.rows]
        named = [("", "trainer", self.settings.values()), ("", "objective", solvers)]
        named += [(f"{key} ", key, solvers) for key in ("target", "beta")]
        named += [
            ("", "backbone", self.settings.values()),
            ("seed ", "seed", self.settings.values()),
        ]
        found = [(word, shared(sources, key)) for word, key, sources in named]
        return ", ".join(word + value for word, value in found if value)

    @property
    def audit_command(self) -> str:
        return f"python -m evaluation.audit {shlex.quote(str(self.folder))}"


def read_runs(folder: str | Path, primary: str | None = None) -> list[Run]:
    """The results of a folder, or of every results folder below it; the primary one first.

    Args:
        primary: name of the run that stands first; None: the one with most audited classes, of
            equal ones the first by name (numbers in names count as numbers).

    Raises:
        UserError: no results there, torn logs, a torn audit, or no run called `primary`.
    """
    folder = Path(folder)
    folders = _results_folders(folder)
    runs = [
        _read_run(path, name) for path, name in zip(folders, _names(folder, folders), strict=True)
    ]
    runs = [run for run in runs if run.rows]
    if not runs:
        raise UserError(f"the logs in {folder} hold no results; run forget_clip.sh")
    if primary is None:
        return sorted(runs, key=lambda run: -sum(bool(row.audit) for row in run.rows))
    names = [run.name for run in runs]
    if primary not in names:
        raise unknown(f"results folder below {folder}", primary, names)
    first = runs.pop(names.index(primary))
    return [first, *runs]


def dig(value: Any, *keys: str) -> Any:
    """`value[key][key]...`; None where a key is missing or there is nothing to look into."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def number(value: Any) -> float | None:
    """A finite number as a float, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def value_of(accuracy: Any) -> float | None:
    """The value of an accuracy that stands with its interval, or of a bare number."""
    return number(dig(accuracy, "value") if isinstance(accuracy, dict) else accuracy)


def mean(values: list[float | None]) -> float | None:
    """The mean of what was measured; None if nothing was."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def shared(sources: Any, key: str) -> str:
    """The value of `key` as text if all of `sources` that have it agree, else "" ."""
    values = {str(source[key]) for source in sources if dig(source, key) not in (None, "")}
    return values.pop() if len(values) == 1 else ""


def _results_folders(folder: Path) -> list[Path]:
    if not folder.exists():
        raise UserError(f"no results in {folder}: there is no such folder")
    if (folder / LOGS).is_file():
        return [folder]
    found = [path.parent for path in folder.rglob(LOGS) if path.is_file()]
    if not found:
        raise UserError(f"no results in {folder}: no {LOGS} there or below; run forget_clip.sh")
    return sorted(found, key=lambda path: _natural(str(path.relative_to(folder))))


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
    logs, audits = read_logs(folder), read_audits(folder)
    args = folder / ARGS
    run = Run(
        folder=folder,
        name=name,
        settings={dataset: _dictionary(logs[dataset], SETTINGS) for dataset in logs},
        audited={},
        args=args.read_text(encoding="utf-8", errors="replace") if args.is_file() else "",
        rows=[],
    )
    for dataset, entries in logs.items():
        for label, entry in entries.items():
            if label == SETTINGS:
                continue
            audit = _dictionary(audits, dataset, label)
            if audit and _is_outdated(folder, entry, audit):
                run.outdated.append(f"{dataset}: {label}")
                audit = {}
            if SETTINGS in audit:
                run.audited[dataset] = _dictionary(audit, SETTINGS)
            found = list(_rows(dataset, label, entry, audit))
            run.rows.extend(found)
            if not found:
                run.strange.append(f"{dataset}: {label}")
    run.rows.sort(key=_bad_news_first)
    return run


def _dictionary(value: Any, *keys: str) -> dict[str, Any]:
    """What `dig` finds if it is a dictionary, else an empty one."""
    found = dig(value, *keys)
    return found if isinstance(found, dict) else {}


def _is_outdated(folder: Path, entry: Any, audit: dict[str, Any]) -> bool:
    """Whether the adapter that the logs name is there and is not the one that was audited."""
    adapter, audited = dig(entry, "solver", "adapter"), audit.get("adapter_sha256")
    if not isinstance(adapter, str) or not isinstance(audited, str):
        return False
    path = inside(folder, adapter)
    return path.is_file() and sha256_file(path) != audited


def _bad_news_first(row: Row) -> tuple:
    """Classes that come back, then by what is left of them, then by harm."""
    return (not row.comes_back, -(row.own.after or 0), -(row.worst or 0), -(row.harm or 0))


def _rows(dataset: str, label: str, entry: Any, audit: Any) -> Iterator[Row]:
    """A row for every class of one request."""
    after, before = (_dictionary(entry, side) for side in ("final_results", "zero_shot"))
    own, rest = (
        [_by_class(dig(side, dataset), key) for side in (before, after)]
        for key in ("cls_acc_test", "no_cls_acc")
    )
    others = {
        other: Change(*(number(dig(side, other, "all", "all_ds")) for side in (before, after)))
        for other in after
        if other != dataset
    }
    for name in own[1]:
        yield Row(
            dataset=dataset,
            label=label,
            name=name,
            together=len(own[1]),
            own=Change(*(side.get(name) for side in own)),
            rest=Change(*(side.get(name) for side in rest)),
            others=others,
            solver=_dictionary(entry, "solver"),
            audit=_dictionary(audit, "classes", name),
        )


def _by_class(results: Any, key: str) -> dict[str, float | None]:
    """`key` of every class; logs may also hold one entry for several classes, with a dictionary
    for what differs between them and a number for what they share."""
    values = {}
    for entry, numbers in results.items() if isinstance(results, dict) else ():
        value = dig(numbers, key)
        parts = [part for part in numbers.values() if isinstance(part, dict)] if numbers else []
        for name in parts[0] if parts else [entry]:
            values[name] = number(dig(value, name) if isinstance(value, dict) else value)
    return values
