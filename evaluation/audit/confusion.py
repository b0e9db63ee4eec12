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
        before, after: a list of counts per true class; columns are predicted classes in the same
            order, the last one counts all other predictions.
    """
    columns = list(dict.fromkeys([case.label, *nearest_classes(case), *destinations(case)]))
    columns = columns[: 1 + OTHERS]
    n = len(columns)
    index = torch.full((len(case.bundle.classnames),), n)
    index[columns] = torch.arange(n)
    true = index[case.bundle.labels]  # (N,)
    shown = true < n

    def counts(model: Model) -> list[list[int]]:
        """Counts (n, n + 1) of true class by predicted class."""
        pairs = true[shown] * (n + 1) + index[model.predicted[shown]]
        return torch.bincount(pairs, minlength=n * (n + 1)).reshape(n, n + 1).tolist()

    return {"names": [case.bundle.classnames[column] for column in columns]} | case.sides(counts)
