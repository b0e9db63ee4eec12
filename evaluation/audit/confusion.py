"""What is taken for what: counts among the forgotten class and the classes around it."""

from __future__ import annotations

from typing import Any

import torch

from evaluation.audit.case import Case, Model
from evaluation.audit.destinations import destinations
from evaluation.audit.neighbours import nearest_classes

OTHERS = 15  # classes beside the forgotten one


def measure(case: Case) -> dict[str, Any]:
    """Confusion counts before and after.

    Returns:
        names: the forgotten class, its ten nearest retained classes, then the classes that its
            images go to now, most frequent first: at most 15 beside the class.
        before, after: a list of counts a true class; columns are predicted classes in the same
            order, the last one counts all other predictions.
    """
    columns = [case.label, *nearest_classes(case)]
    columns += [column for column in destinations(case) if column not in columns]
    columns = columns[: 1 + OTHERS]
    return {
        "names": [case.bundle.classnames[column] for column in columns],
        "before": _counts(case.before, columns),
        "after": _counts(case.after, columns),
    }


def _counts(model: Model, columns: list[int]) -> list[list[int]]:
    """Counts (n, n + 1) of true class by predicted class."""
    n, classes = len(columns), len(model.bundle.classnames)
    place = torch.full((classes,), n)
    place[columns] = torch.arange(n)
    true, predicted = place[model.bundle.labels], place[model.predicted]  # (N,), (N,)
    shown = true < n
    pairs = true[shown] * (n + 1) + predicted[shown]
    return torch.bincount(pairs, minlength=n * (n + 1)).reshape(n, n + 1).tolist()
