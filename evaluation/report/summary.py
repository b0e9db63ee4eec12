"""The rows of a report in one sentence, a few more, and means, bad news first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from engine.schema import MEASURES
from evaluation.report.runs import Method, Run, methods, shared
from evaluation.rows import Change, Row, mean
from evaluation.rules import Fate

NAMED = 3  # classes named in a sentence; the table has them all
PROVED = 1e-6  # a relative gap of the certificate above this proves nothing
FATES = {  # of one class, of several
    Fate.GONE: ("is gone", "are gone"),
    Fate.STAYS: ("is still recognised", "are still recognised"),
    Fate.NEVER: ("was never recognised to begin with", "were never recognised to begin with"),
    Fate.UNMEASURED: ("has no images to tell by", "have no images to tell by"),
}
ATTACKS = {  # what somebody has who looks for the class in the weights
    "original_known": "the changed weights and the original ones",
    "two_adapters": "two changed models",
    "alone": "the changed weights alone",
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


def span(values: Iterable[float], text: Callable[[float], str] = "{:,}".format) -> str:
    """The least and the greatest of some values, or the one that all are: "3", "3 to 5"."""
    values = sorted(values)
    return " to ".join(dict.fromkeys([text(values[0]), text(values[-1])]))


def sentence(runs: list[Run]) -> str:
    """What was done and how it went, in one sentence, over all runs: ranges where runs of the same
    classes differ, sums where the classes do; of seeds the range of counts, the mean of losses."""
    told = methods(runs)
    rows = [row for run in runs for row in run.rows]
    classes = len({(row.dataset, row.name) for row in rows})
    times = sum(max(len(run.rows) for run in method.runs) for method in told)
    same = len({frozenset((row.dataset, row.name) for row in run.rows) for run in runs}) == 1
    model = shared((s for run in runs for s in run.settings.values()), "backbone") or "A model"
    seeds = [len(method.runs) for method in told]
    many, named = len(told) > 1, len({run.trainer for run in runs}) == len(told)
    ways = f" by {len(told)} methods" if named else f" in {len(told)} runs"
    ways = ways * many + f" with {span(seeds)} seeds{' each' * many}" * (max(seeds) > 1)
    ways += f", {times:,} times in all" * (not same and times > classes)
    summaries = [list(map(Summary.of, method.runs)) for method in told]
    each = [one for seeds in summaries for one in seeds]
    parts = []
    for fate, words in FATES.items():
        counts = _together([[one.fates[fate] for one in seeds] for seeds in summaries], same)
        if max(counts) or (fate is Fate.GONE and any(one.left for one in each)):
            parts.append(f"{span(counts)} {words[span(counts) != '1']}")
        if fate is Fate.GONE and max(counts):
            parts.append(_returning(summaries, same))
    made = f"{model} was made to forget {count(classes, 'class', 'classes')}{ways}"
    lost = _lost(told, "rest", [one.rest.worst for one in each], "the rest of their sets")
    lost = lost or "what the rest of their sets lost was not measured"
    others = _lost(told, "others", [one.others.worst for one in each], "other sets")
    return f"{made}: {', '.join(parts)}; {lost}{others and f', and {others}'}."


def _together(counts: list[list[int]], same: bool) -> list[int]:
    """What is told of counts by method and seed: all, or if their classes differ the least and the
    greatest of each method together."""
    if same:
        return [one for seeds in counts for one in seeds]
    return [sum(map(pick, counts)) for pick in (min, max)]


def _lost(told: list[Method], key: str, worst: list[float | None], whose: str) -> str:
    """What others lost in points, on average and at worst; "" if that was not measured."""
    found = [method.means for method in told if method.means[key] is not None]
    if not found:
        return ""
    losses = [max(0.0, -one[key]) for one in found]
    spread = [one[f"std_{key}"] for one in found if one[f"std_{key}"] is not None]
    most = "at most " if len(told) > 1 else ""
    between = f" ({most}± {max(spread):.1f} between seeds)" if spread else ""
    average = f"{span(losses, '{:.1f}'.format)} points on average{between}"
    greatest = max(0.0, *(-value for value in worst if value is not None))
    return f"{whose} lost {average}, {greatest:.1f} at worst"


def _returning(summaries: list[list[Summary]], same: bool) -> str:
    """How many of the classes that are gone come back under other words."""
    asked = [[one.returning for one in seeds if one.tried] for seeds in summaries]
    asked = [seeds for seeds in asked if seeds]
    if not asked:
        return "whether they come back under other words was not tried"
    counts = _together(asked, same)
    verb = "comes" if span(counts) == "1" else "come"
    return f"{span(counts)} of them {verb} back under other words"


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
        fates: how many classes are gone, stay, were never recognised, or have no images.
        back: classes that come back or never went; returning: those of them that are gone when
            asked for by their own name.
        seconds: the mean time of a solve.
    """

    own: Spread
    rest: Spread
    others: Spread
    harm: float | None
    left: Row | None
    tried: list[int]
    fates: dict[Fate, int]
    back: int
    returning: int
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
            fates={kind: sum(row.fate is kind for row in run.rows) for kind in Fate},
            back=sum(row.comes_back for row in run.rows),
            returning=sum(bool(row.back) and row.fate is Fate.GONE for row in run.rows),
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
    falls = [
        (o["before"]["value"] - o["after"]["value"], o, row) for row in run.rows for o in row.harmed
    ]
    if falls:
        _, other, row = max(falls, key=lambda fall: fall[0])
        before, after = (percent(other[side]["value"]) for side in ("before", "after"))
        fell = f"from {before} to {after}\u00a0%, once {row.name} is forgotten"
        lines.append(f"Hit hardest: {other['name']}, {fell}.")
    twins = [f"{', '.join(row.falling)} (with {row.name})" for row in run.rows if row.falling]
    if twins:
        lines.append(f"So alike by name that they are likely to fall with it: {listed(twins)}.")
    behind = [f"“{row.behind[0]}” of {row.name}" for row in run.rows if row.behind]
    if behind:
        lines.append(f"Other words that hardly follow their class: {listed(behind)}.")
    gaps = [(row.gap, row.name) for row in run.rows if row.gap is not None]
    unproved = [name for found, name in gaps if found > PROVED]
    if unproved:
        lines.append(f"Not proved the best possible: {listed(unproved)}.")
    lines += _attacks(run.rows)
    left = summary.left
    if left is not None and left.own.after == 0:
        lines.append("Asked for by its own prompt, no forgotten class is recognised in any image.")
    elif left is not None and left.fate is not Fate.STAYS:
        lines.append(f"At most {percent(left.own.after)}\u00a0% of a class is left ({left.name}).")
    if gaps and not unproved:
        many = count(len(gaps), "change is", "changes are")
        lines.append(f"{many} proved the best possible, to {max(gaps)[0]:.0e} of the optimum.")
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
            "Forgetting does not touch what the model makes of images: a simple classifier trained "
            f"on them still finds {percent(mean(probed))}\u00a0% of a forgotten class’s images."
        )
    taught = [found for row in rows if (found := row.found("relearning", "methods"))]
    if taught:
        back = sum(any(way["needed"] is not None for way in found.values()) for found in taught)
        lines.append(
            f"Shown a few images, the model learns {back} of {len(taught)} classes at least half "
            "back, as it would learn a class that it never knew."
        )
    named = []
    for attack, who in ATTACKS.items():
        places = [row.found("undo", "attacks", attack, "place") for row in rows]
        tried = [place for place in places if place is not None]
        if tried:
            named.append(f"with {who} {tried.count(1)} of {len(tried)}")
    if named:
        lines.append(
            "Whoever has the weights can guess which class was forgotten; right at the first "
            f"guess: {', '.join(named)}."
        )
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
