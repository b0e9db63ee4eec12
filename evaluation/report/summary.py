"""What a report says first: tables of methods and classes, and findings, bad news first."""

from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd

from evaluation.audit.record import ATTACKERS
from evaluation.report.runs import Method, shared
from evaluation.rows import Change, Row, mean
from evaluation.rules import Fate, holds

NAMED = 3  # classes named in a finding; the list of classes has them all
PROVED = 1e-6  # a relative gap of the certificate above this proves nothing
CHANGES = {"rest": lambda row: row.rest, "others": lambda row: row.others_mean}  # in points
COLUMNS = {
    "before": "Recognised before, %",
    "after": "Recognised after, %",
    "worst": "After, by other words, %",
    "rest": "Rest of its set, points",
    "others": "Other sets, points",
    "ms": "Solved in ms",
}
FINDINGS: dict[str, Callable[[Row], Any]] = {  # what speaks against forgetting first
    "Not forgotten": lambda row: row.fate is Fate.STAYS,
    "Found by other words": lambda row: row.back,
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


def number(value: float | None, sign: str = "-") -> str:
    """One decimal; no sign before a zero, a dash for None and NaN. `sign`: "+" for a change."""
    text = "–" if pd.isna(value) else f"{round(value, 1) + 0.0:{sign}.1f}"
    return "0.0" if text == "+0.0" else text.replace("-", "−")


def percent(fraction: float | None) -> str:
    return number(Change(0, fraction).points)


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def headline(methods: list[Method]) -> str:
    """What was done, in one sentence."""
    classes = {(row.dataset, row.name) for method in methods for row in method.rows}
    settings = [x for method in methods for run in method.runs for x in run.settings.values()]
    model = shared(settings, "backbone") or "A model"
    count = f"{len(classes):,} {'classes' if len(classes) > 1 else 'class'}"
    ways = f" by {len(methods)} methods" if len(methods) > 1 else ""
    return f"{model} was made to forget {count}{ways}."


def cell(method: Method, quantity: str) -> list[str]:
    """The mean of a quantity; then its deviation over seeds, and the accuracies of a change."""
    average, deviation = method.mean(quantity)
    remarks = [] if pd.isna(deviation) else [f"± {deviation:.1f}"]
    if quantity not in CHANGES:
        return [number(average), *remarks]
    sides = zip(*map(CHANGES[quantity], method.rows), strict=True)
    return [number(average, "+"), *remarks, " → ".join(percent(mean(side)) for side in sides)]


def cells(method: Method) -> dict[str, list[str]]:
    """The line of a method, or of a method narrowed to a class: by title a value and remarks."""
    gone = sum(row.fate is Fate.GONE for row in method.rows)
    tried = [row for row in method.rows if row.worst is not None]
    found = f"{sum(bool(row.back) for row in tried)} of {len(tried)}"
    return {
        "Below half": [f"{gone} of {len(method.rows)}"],
        "Found by other words": [found if tried else "–"],
        **{title: cell(method, quantity) for quantity, title in COLUMNS.items()},
    }


def findings(method: Method) -> list[str]:
    """What a reader must know of a method: of how many classes, and which."""
    lines, everything = [], {row.name for row in method.rows}
    for title, applies in FINDINGS.items():
        if names := dict.fromkeys(row.name for row in method.rows if applies(row)):
            lines.append(f"{title} ({len(names)} of {len(everything)}): {listed(names)}.")
    return lines
