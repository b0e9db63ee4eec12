"""The rows of a report in a few sentences and means, bad news first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from engine.schema import MEASURES
from evaluation.report.runs import Run
from evaluation.rows import Change, Row, mean
from evaluation.rules import Fate

NAMED = 3  # classes named in a sentence; the table has them all
PROVED = 1e-6  # a relative gap of the certificate above this proves nothing
ATTACKS = {
    "original_known": "the original projection",
    "two_adapters": "two changed projections",
    "alone": "the changed projection alone",
}


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
        tried: for every class that was asked for in other words, by how many.
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
            tried=sorted(len(row.other_words) for row in run.rows if row.worst is not None),
            back=sum(row.comes_back for row in run.rows),
            seconds=mean(row.solver.get("seconds") for row in run.rows),
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
    twins = [f"{', '.join(row.falling)} (with {row.name})" for row in run.rows if row.falling]
    if twins:
        lines.append(f"By text alone, likely to fall with a forgotten class: {listed(twins)}.")
    behind = [f"“{row.behind[0]}” of {row.name}" for row in run.rows if row.behind]
    if behind:
        lines.append(f"Wordings that hardly follow their class: {listed(behind)}.")
    gaps = [(row.gap, row.name) for row in run.rows if row.gap is not None]
    unproved = [name for found, name in gaps if found > PROVED]
    if unproved:
        lines.append(f"Not proved optimal: {listed(unproved)}.")
    lines += _attacks(run.rows)
    left = summary.left
    if left is not None and left.own.after == 0:
        lines.append("Asked for by its own prompt, no forgotten class is recognised in any image.")
    elif left is not None and left.fate is not Fate.STAYS:
        lines.append(f"At most {percent(left.own.after)}\u00a0% of a class is left ({left.name}).")
    if gaps and not unproved:
        many = count(len(gaps), "solution is", "solutions are")
        lines.append(f"{many} proved optimal to a relative gap of {max(gaps)[0]:.0e}.")
    return lines


def _back(rows: list[Row]) -> list[str]:
    """Classes that were not forgotten or come back by other words, and those that could not be."""
    fates = {kind: [row.name for row in rows if row.fate is kind] for kind in Fate}
    words = [
        f"{row.name} (“{row.found('paraphrase', 'worst', 'text')}”: {percent(row.worst)}\u00a0%)"
        for row in rows
        if row.back and row.fate is not Fate.STAYS
    ]
    groups = (
        (fates[Fate.STAYS], "class is", "classes are", "not forgotten, half or more is left"),
        (words, "class comes", "classes come", "back when asked for by other words"),
        (
            fates[Fate.NEVER],
            "class was",
            "classes were",
            "never recognised, before forgetting either",
        ),
    )
    return [
        f"{count(len(names), one, many)} {what}: {listed(names)}."
        for names, one, many, what in groups
        if names
    ]


def _attacks(rows: list[Row]) -> list[str]:
    """How far somebody gets who has images or weights."""
    lines = []
    probed = [row.probe for row in rows if row.probe is not None]
    if probed:
        lines.append(
            "A linear probe on the image embeddings, which forgetting does not touch, still finds "
            f"{percent(mean(probed))}\u00a0% of the images of a forgotten class."
        )
    taught = [found for row in rows if (found := row.found("relearning", "methods"))]
    if taught:
        back = sum(any(way["needed"] is not None for way in found.values()) for found in taught)
        lines.append(
            f"Given a few images, {back} of {len(taught)} classes are half back, as any class "
            "that a model never knew would be."
        )
    named = []
    for attack, who in ATTACKS.items():
        places = [row.found("undo", "attacks", attack, "place") for row in rows]
        tried = [place for place in places if place is not None]
        if tried:
            named.append(f"with {who} {tried.count(1)} of {len(tried)}")
    if named:
        lines.append(f"Classes named from the weights at the first guess: {', '.join(named)}.")
    return lines


def not_measured(run: Run) -> list[tuple[str, list[str]]]:
    """Why something was not measured, and for which classes; most classes first."""
    found = []
    for row in run.rows:
        reasons = [f"No audit. To make it: {run.audit_command}"]
        if row.audit:
            reasons = [f"{m}: left out of the audit" for m in MEASURES if m not in row.audit]
            for measure in MEASURES:
                why = row.found(measure, "not_measured") or []
                reasons += [f"{measure}: {reason}" for reason in why]
        if row.own.before is None:
            reasons.append("Accuracy before forgetting: not in the logs")
        found += [(reason, row.name) for reason in reasons]
    outdated = f"The audit is of an earlier adapter and not shown; again: {run.audit_command}"
    found += [(outdated, label) for label in run.outdated]
    names: dict[str, list[str]] = {}
    for reason, name in found:
        names.setdefault(reason, []).append(name)
    return sorted(names.items(), key=lambda pair: -len(pair[1]))
