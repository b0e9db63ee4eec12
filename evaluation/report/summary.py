"""What a report says first: a table of methods, two sentences, and findings, bad news first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from evaluation.audit.names import ATTACKERS, MEASURES
from evaluation.report.runs import Method, Run, Spread, shared
from evaluation.rows import Change, Row, mean
from evaluation.rules import Fate

NAMED = 3  # classes named in a sentence; the table has them all
PROVED = 1e-6  # a relative gap of the certificate above this proves nothing
COLUMNS = (
    *("Method", "Gone", "Come back under other words", "Recognised, %"),
    *("Rest of their set, points", "Other sets, points", "Seconds"),
)


class Cell(NamedTuple):
    """A number of the table, and a remark below it."""

    value: str
    note: str = ""


def percent(fraction: float | None) -> str:
    """A fraction in percent, one decimal; a dash for None."""
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def points(value: float | None) -> str:
    """Percentage points with their sign, one decimal; a dash for None."""
    if value is None:
        return "–"
    rounded = round(value, 1) + 0.0  # no minus before a zero
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


def within(deviation: float | None, scale: float = 1) -> str:
    """A standard deviation over seeds; "" for a single one."""
    return "" if deviation is None else f"± {scale * deviation:.1f}"


def listed(names: Iterable[str], limit: int = NAMED) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def count(number: int, singular: str, plural: str) -> str:
    return f"{number:,} {singular if number == 1 else plural}"


def headline(runs: list[Run], methods: list[Method]) -> str:
    """What was done, in one sentence."""
    classes = {(row.dataset, row.name) for run in runs for row in run.rows}
    model = shared((s for run in runs for s in run.settings.values()), "backbone") or "A model"
    ways = f" by {len(methods)} methods" if len(methods) > 1 else ""
    return f"{model} was made to forget {count(len(classes), 'class', 'classes')}{ways}."


def line(method: Method) -> list[Cell]:
    """A line of the table, a cell for each of `COLUMNS` but the first. Counts are of all classes of
    all seeds."""
    rows = [row for run in method.runs for row in run.rows]
    gone = [row for row in rows if row.fate is Fate.GONE]
    stay = sum(row.fate is Fate.STAYS for row in rows)
    never = sum(row.fate is Fate.NEVER for row in rows)
    notes = [f"{stay} still recognised" if stay else "", f"{never} never were" if never else ""]
    tried = [row for row in gone if row.worst is not None]
    back = sum(bool(row.back) for row in tried)
    texts = sorted(len(row.other_words) for row in tried)
    before, (after, deviation) = method.mean("before")[0], method.mean("after")
    left = max((row for row in rows if row.own.after), key=lambda r: r.own.after, default=None)
    most = f"most: {percent(left.own.after)}, {left.name}" if left else ""
    seconds = method.mean("seconds")[0]
    return [
        Cell(f"{len(gone)} of {len(rows)}", ", ".join(filter(None, notes))),
        Cell(f"{back} of {len(tried)}", _texts(texts)) if tried else Cell("–", "not tried"),
        Cell(f"{percent(before)} → {percent(after)}", _joined(within(deviation, 100), most)),
        _change(method.mean("rest"), rows, lambda row: row.rest),
        _change(method.mean("others"), rows, lambda row: row.others_mean),
        Cell("–" if seconds is None else f"{seconds:.3f}"),
    ]


def _texts(counts: list[int]) -> str:
    low, high = counts[0], counts[-1]
    return f"{count(high, 'text', 'texts')} each" if low == high else f"{low} to {high} texts each"


def _joined(*parts: str) -> str:
    return "; ".join(filter(None, parts))


def _change(average: Spread, rows: list[Row], change: Callable[[Row], Change]) -> Cell:
    measured = [(change(row).points, row.name) for row in rows if change(row).points is not None]
    if not measured:
        return Cell("–")
    worst, name = min(measured)
    return Cell(points(average[0]), _joined(within(average[1]), f"worst {points(worst)}, {name}"))


def findings(run: Run) -> list[str]:
    """What a reader must know of a run, in sentences: what speaks against forgetting first."""
    rows = run.rows
    fates = {kind: [row for row in rows if row.fate is kind] for kind in Fate}
    lines = []
    if stay := fates[Fate.STAYS]:
        half = "half or more of their accuracy is left"
        lines.append(f"Not forgotten ({half}): {listed(row.name for row in stay)}.")
    if back := [row for row in rows if row.back and row.fate is not Fate.STAYS]:
        texts = [
            f"{row.name} (“{row.measured('paraphrase', 'worst', 'text')}”: "
            f"{percent(row.worst)}\u00a0%)"
            for row in back
        ]
        lines.append(f"Recognised again under other words: {listed(texts)}.")
    if never := fates[Fate.NEVER]:
        lines.append(
            f"Never recognised, before forgetting either: {listed(r.name for r in never)}."
        )
    tried = [row for row in rows if row.worst is not None]
    if tried and len(tried) < len(rows):
        number = count(len(rows) - len(tried), "class was", "classes were")
        lines.append(f"{number} not tried with other words: whether they come back is not known.")
    falls = [
        (o["before"]["value"] - o["after"]["value"], o, row) for row in rows for o in row.harmed
    ]
    if falls:
        _, other, row = max(falls, key=lambda fall: fall[0])
        change = " → ".join(percent(other[side]["value"]) for side in ("before", "after"))
        lines.append(f"Hit hardest: {other['name']}, {change}\u00a0% with {row.name} forgotten.")
    if affected := [
        f"{', '.join(row.likely_misclassified)} (with {row.name})"
        for row in rows
        if row.likely_misclassified
    ]:
        lines.append(f"Likely to be recognised less, by their names alone: {listed(affected)}.")
    if lagging := [f"“{row.lagging[0]}” ({row.name})" for row in rows if row.lagging]:
        lines.append(f"Paraphrases that the change hardly reaches: {listed(lagging)}.")
    lines += _attacks(rows)
    gaps = [(row.gap, row.name) for row in rows if row.gap is not None]
    if unproved := [name for gap, name in gaps if gap > PROVED]:
        lines.append(f"Not proved optimal: {listed(unproved)}.")
    elif gaps:
        changes = count(len(gaps), "change is", "changes are")
        lines.append(f"{changes} proved optimal, to a relative gap of {max(gaps)[0]:.0e}.")
    return lines


def _attacks(rows: list[Row]) -> list[str]:
    """How far somebody gets who has images or weights."""
    lines = []
    probed = [row.probe for row in rows if row.probe is not None]
    if probed:
        lines.append(
            "Image embeddings do not change: a linear probe trained on images still finds "
            f"{percent(mean(probed))}\u00a0% of a forgotten class’s images."
        )
    taught = [found for row in rows if (found := row.measured("relearning", "methods"))]
    if taught:
        back = sum(any(way["needed"] is not None for way in found.values()) for found in taught)
        lines.append(
            f"A few images teach the model {back} of {len(taught)} classes again, at least half."
        )
    guesses = []
    for attack, who in ATTACKERS.items():
        places = [row.measured("undo", "attacks", attack, "place") for row in rows]
        known = [place for place in places if place is not None]
        if known:
            guesses.append(f"{known.count(1)} of {len(known)} by who has {who}")
    if guesses:
        lines.append(f"The forgotten name is guessed from the weights: {', '.join(guesses)}.")
    return lines


def not_measured(run: Run) -> list[tuple[str, list[str]]]:
    """Why something was not measured, and for which classes; most classes first."""
    names: dict[str, list[str]] = {}
    for row in run.rows:
        reasons = [f"No audit. To make it: {run.audit_command}"]
        if row.audit:
            reasons = [f"{m}: left out of the audit" for m in MEASURES if m not in row.audit]
            for measure in MEASURES:
                reasons += [
                    f"{measure}: {why}" for why in row.measured(measure, "not_measured") or []
                ]
        if row.own.before is None:
            reasons.append("Accuracy before forgetting: not in the logs")
        for reason in reasons:
            names.setdefault(reason, []).append(row.name)
    if run.outdated:
        reason = f"The audit is of an adapter that was replaced. To repeat it: {run.audit_command}"
        names[reason] = run.outdated
    return sorted(names.items(), key=lambda pair: -len(pair[1]))
