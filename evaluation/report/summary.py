"""The rows of a report in a few sentences and means, bad news first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from evaluation.report.runs import Change, Row, Run, dig, mean, number, value_of

NAMED = 3  # classes named in a sentence; the table has them all
PROVED = 1e-6  # a relative gap of the certificate above this proves nothing
ATTACKS = {
    "original_known": "the original projection",
    "two_adapters": "two changed projections",
    "alone": "the changed projection alone",
}
MEASURES = (
    "paraphrase",
    "neighbours",
    "destinations",
    "confusion",
    "residue",
    "retrieval",
    "relearning",
    "undo",
)


def percent(fraction: float | None) -> str:
    """A fraction in percent, one decimal, without the sign; a dash for None."""
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def points(value: float | None) -> str:
    """Percentage points with their sign, one decimal; a dash for None."""
    if value is None:
        return "–"
    rounded = round(value, 1) + 0.0  # no minus before a zero
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


def listed(names: Iterable[str], limit: int = NAMED) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def count(number: int, singular: str, plural: str) -> str:
    return f"{number:,} {singular if number == 1 else plural}"


@dataclass(frozen=True)
class Spread:
    """One quantity over the classes of a run: means before and after, the worst change, whose."""

    before: float | None
    after: float | None
    points: float | None
    worst: float | None
    worst_name: str

    @classmethod
    def of(cls, rows: list[Row], change: Callable[[Row], Change]) -> Spread:
        """Over the rows where something was measured; the worst is what fell most."""
        found = [(row, change(row)) for row in rows]
        moved = [(one.points, row.name) for row, one in found if one.points is not None]
        worst, name = min(moved, default=(None, ""))
        return cls(
            mean([one.before for _, one in found]),
            mean([one.after for _, one in found]),
            mean([moved_by for moved_by, _ in moved]),
            worst,
            name,
        )


@dataclass(frozen=True)
class Summary:
    """One run in numbers: a line of the comparison of methods.

    Attributes:
        left: the forgotten class with the highest accuracy left, None if nothing was measured.
        tried: for every class with other words measured, how many texts forgetting did not see.
        back: classes that come back.
        seconds: the mean time of a solve.
    """

    own: Spread
    rest: Spread
    others: Spread
    harm: float | None
    left: Row | None
    tried: list[int]
    back: int
    seconds: float | None

    @property
    def texts(self) -> str:
        """How many texts were tried on a class, in words."""
        low, high = self.tried[0], self.tried[-1]
        return f"{count(high, 'text', 'texts')} each" if low == high else f"{low} to {high} texts"

    @classmethod
    def of(cls, run: Run) -> Summary:
        measured = [row for row in run.rows if row.own.after is not None]
        return cls(
            own=Spread.of(run.rows, lambda row: row.own),
            rest=Spread.of(run.rows, lambda row: row.rest),
            others=Spread.of(run.rows, lambda row: row.others_mean),
            harm=mean([row.harm for row in run.rows]),
            left=max(measured, key=lambda row: row.own.after, default=None),
            tried=sorted(texts for row in run.rows if (texts := unseen(row))),
            back=sum(row.comes_back for row in run.rows),
            seconds=mean([number(row.solver.get("seconds")) for row in run.rows]),
        )


def findings(run: Run) -> list[str]:
    """What a reader must know of a run, in sentences: what speaks against forgetting first."""
    summary = Summary.of(run)
    lines = _back(run.rows)
    unknown = len(run.rows) - len(summary.tried)
    if summary.tried and unknown:
        many = count(unknown, "class was", "classes were")
        lines.append(f"{many} not tried with other words: whether they come back is not known.")
    for spread, what in ((summary.rest, "the rest of its set"), (summary.others, "the other sets")):
        if spread.worst is not None and points(spread.worst).startswith("−"):
            cost = points(-spread.worst).lstrip("+")
            lines.append(f"At worst, forgetting {spread.worst_name} costs {what} {cost} points.")
    gaps = [(gap(row), row.name) for row in run.rows if gap(row) is not None]
    unproved = [name for found, name in gaps if found > PROVED]
    if unproved:
        lines.append(f"Not proved optimal: {listed(unproved)}.")
    lines += _attacks(run.rows)
    left = summary.left
    if left is not None and left.own.after == 0:
        lines.append("Asked for by its own prompt, no forgotten class is recognised in any image.")
    elif left is not None and not left.kept:
        lines.append(f"At most {percent(left.own.after)}\u00a0% of a class is left ({left.name}).")
    if gaps and not unproved:
        many = count(len(gaps), "solution is", "solutions are")
        lines.append(f"{many} proved optimal to a relative gap of {max(gaps)[0]:.0e}.")
    return lines


def _back(rows: list[Row]) -> list[str]:
    """Classes that were not forgotten or come back by other words."""
    kept = [row.name for row in rows if row.kept]
    words = [_by_words(row) for row in rows if row.words and not row.kept]
    lines = []
    if kept:
        many = count(len(kept), "class is", "classes are")
        lines.append(f"{many} not forgotten, more than half is left: {listed(kept)}.")
    if words:
        many = count(len(words), "class comes", "classes come")
        lines.append(f"{many} back when asked for by other words: {listed(words)}.")
    return lines


def _attacks(rows: list[Row]) -> list[str]:
    """How far somebody gets who has images or weights."""
    lines = []
    probed = [row.probe for row in rows if row.probe is not None]
    if probed:
        lines.append(
            "A linear probe on the image embeddings, which forgetting does not touch, still finds "
            f"{percent(mean(probed))}\u00a0% of the images of a forgotten class."
        )
    taught = [found for row in rows if (found := dig(row.audit, "relearning", "methods"))]
    if taught:
        back = sum(
            any(number(dig(found, method, "needed")) is not None for method in found)
            for found in taught
        )
        lines.append(
            f"Given a few images, {back} of {len(taught)} classes are half back, as any class "
            "that a model never knew would be."
        )
    named = []
    for attack, who in ATTACKS.items():
        places = [number(dig(row.audit, "undo", "attacks", attack, "place")) for row in rows]
        tried = [place for place in places if place is not None]
        if tried:
            named.append(f"with {who} {tried.count(1)} of {len(tried)}")
    if named:
        lines.append(f"Classes named from the weights at the first guess: {', '.join(named)}.")
    return lines


def unseen(row: Row) -> int:
    """Texts that forgetting did not see and the audit tried."""
    prompts = dig(row.audit, "paraphrase", "prompts")
    if not isinstance(prompts, list):
        return 0
    return sum(
        not dig(prompt, "seen") and value_of(dig(prompt, "after")) is not None for prompt in prompts
    )


def _by_words(row: Row) -> str:
    """A class that comes back, and the words that bring back most of it."""
    text = dig(row.audit, "paraphrase", "worst", "text")
    return f"{row.name} (“{text}”: {percent(row.worst)}\u00a0%)" if text else row.name


def gap(row: Row) -> float | None:
    """The relative gap of the solution's certificate."""
    return number(dig(row.solver, "certificate", "gap"))


def not_measured(run: Run) -> list[tuple[str, list[str]]]:
    """Why something was not measured, and for which classes; most classes first."""
    reasons: dict[str, list[str]] = {}

    def add(reason: str, name: str) -> None:
        reasons.setdefault(reason, []).append(name)

    for row in run.rows:
        if not row.audit:
            add(f"No audit. To make it: {run.audit_command}", row.name)
            continue
        for measure in MEASURES:
            found: Any = row.audit.get(measure)
            if not isinstance(found, dict):
                add(f"{measure}: left out of the audit", row.name)
                continue
            told = found.get("not_measured")
            for reason in told if isinstance(told, list) else []:
                add(f"{measure}: {reason}", row.name)
    for row in run.rows:
        if row.own.before is None:
            add("Accuracy before forgetting: not in the logs", row.name)
    for label in run.strange:
        add("No results in the logs' entry", label)
    for label in run.outdated:
        add(
            f"The audit is of an earlier adapter and not shown; again: {run.audit_command}",
            label,
        )
    return sorted(reasons.items(), key=lambda pair: -len(pair[1]))
