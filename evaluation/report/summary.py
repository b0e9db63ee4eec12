"""What a report says first: a table of methods, and findings, bad news first."""

from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd

from evaluation.audit.record import ATTACKERS
from evaluation.report.runs import QUANTITIES, Method, shared
from evaluation.rows import Row
from evaluation.rules import Fate, holds

NAMED = 3  # classes named in a finding; the list of classes has them all
PROVED = 1e-6  # a relative gap of the certificate above this proves nothing
FINDINGS: dict[str, Callable[[Row], Any]] = {  # what speaks against forgetting first
    "Not forgotten": lambda row: row.fate is Fate.STAYS,
    "Recognised again under other words": lambda row: row.back and row.fate is not Fate.STAYS,
    "Another class loses more than half of its images": lambda row: any(
        not holds(one["after"]["value"], one["before"]["value"]) for one in row.harmed
    ),
    "Other names are likely to be lost, by texts alone": lambda row: row.likely_misclassified,
    "Never recognised, before forgetting either": lambda row: row.fate is Fate.NEVER,
    "Not tried with other words": lambda row: row.worst is None,
    "Still found by a linear probe on images, which do not change": lambda row: holds(
        row.measured("residue", "linear_probe", "after", "value"), row.own.before
    ),
    "Learnt again from a few images": lambda row: any(
        way["needed"] is not None for way in (row.measured("relearning", "methods") or {}).values()
    ),
    **{
        f"Named first by an attacker who has {who}": lambda row, attack=attack: (
            row.measured("undo", "attacks", attack, "place") == 1
        )
        for attack, who in ATTACKERS.items()
    },
    "Not proved optimal": lambda row: row.gap is not None and row.gap > PROVED,
    "Proved optimal": lambda row: row.gap is not None and row.gap <= PROVED,
}


def percent(fraction: float | None) -> str:
    """A fraction in percent, one decimal; a dash for None and NaN."""
    return "–" if pd.isna(fraction) else f"{100 * fraction:.1f}"


def points(value: float | None) -> str:
    """Percentage points with their sign, one decimal; a dash for None and NaN."""
    if pd.isna(value):
        return "–"
    rounded = round(value, 1) + 0.0  # no minus before a zero
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


def within(deviation: float, scale: float = 1) -> str:
    """A standard deviation over seeds; "" for a single one."""
    return "" if pd.isna(deviation) else f"± {scale * deviation:.1f}"


def listed(names: Iterable[str], limit: int = NAMED) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def count(number: int, singular: str, plural: str) -> str:
    return f"{number:,} {singular if number == 1 else plural}"


def headline(methods: list[Method]) -> str:
    """What was done, in one sentence."""
    classes = {(row.dataset, row.name) for method in methods for row in method.rows}
    settings = [x for method in methods for run in method.runs for x in run.settings.values()]
    model = shared(settings, "backbone") or "A model"
    ways = f" by {len(methods)} methods" if len(methods) > 1 else ""
    return f"{model} was made to forget {count(len(classes), 'class', 'classes')}{ways}."


def line(method: Method) -> dict[str, tuple[str, str]]:
    """A line of the table: a value and a remark for each column, of all classes of all seeds."""
    rows = method.rows
    gone = [row for row in rows if row.fate is Fate.GONE]
    stay = sum(row.fate is Fate.STAYS for row in rows)
    tried = [row for row in gone if row.worst is not None]
    back = f"{sum(bool(row.back) for row in tried)} of {len(tried)}"
    before, (after, deviation) = method.mean("before")[0], method.mean("after")
    seconds = method.mean("seconds")[0]
    return {
        "Gone": (f"{len(gone)} of {len(rows)}", f"{stay} not forgotten" if stay else ""),
        "Come back under other words": (back, "") if tried else ("–", "not tried"),
        "Recognised, %": (f"{percent(before)} → {percent(after)}", within(deviation, 100)),
        "Rest of their set, points": _change(method, "rest"),
        "Other sets, points": _change(method, "others"),
        "Seconds": ("–" if pd.isna(seconds) else f"{seconds:.3f}", ""),
    }


def _change(method: Method, quantity: str) -> tuple[str, str]:
    """The mean change in points, and the class that cost most."""
    changes = [(QUANTITIES[quantity](row), row.name) for row in method.rows]
    known = [pair for pair in changes if pair[0] is not None]
    if not known:
        return "–", ""
    mean, deviation = method.mean(quantity)
    worst, name = min(known)
    remarks = [within(deviation), f"worst {points(worst)}, {name}"]
    return points(mean), "; ".join(filter(None, remarks))


def findings(method: Method) -> list[str]:
    """What a reader must know of a method: of how many classes, and which."""
    lines, everything = [], {row.name for row in method.rows}
    for title, applies in FINDINGS.items():
        if names := dict.fromkeys(row.name for row in method.rows if applies(row)):
            lines.append(f"{title} ({len(names)} of {len(everything)}): {listed(names)}.")
    return lines
