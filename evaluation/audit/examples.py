"""What the model says to single pictures: the names it gives them first, before and after."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from evaluation.audit.case import Case, Model
from evaluation.audit.order import highest

SHOWN = 4  # pictures of the forgotten class
NAMES = 5  # names that a picture is given
HARMED = 2  # classes that lost most
OF_HARMED = 2  # pictures of each of them


def measure(case: Case) -> dict[str, Any]:
    """The first names of a few pictures of the class, and of the classes that lost most by it.

    Pictures of the class are evenly spaced among its own, the same ones for every method; those of
    a class that lost are the first that the model named rightly before and no longer does.

    Returns:
        classes: the class itself, then the at most two retained ones that lost the largest share
            of their images, each with `name`, accuracy `before` and `after`, and `pictures`: the
            `row` of a picture among all of the split, and up to five names, most similar first,
            `before` and `after`.
        not_measured: what could not be measured, and why.
    """
    own = case.mine.nonzero()[:, 0]
    spaced = own[[i * len(own) // SHOWN for i in range(min(SHOWN, len(own)))]]
    lost = (case.before.right - case.after.right) / case.common.images.clamp_min(1)  # (C,)
    lost[~case.retained] = 0
    some = (lost > 0).nonzero()[:, 0]
    worst = some[highest(lost[some], HARMED)]
    labels = case.bundle.labels
    turned = (case.before.predicted == labels) & (case.after.predicted != labels)  # (N,)
    chosen = [(case.label, spaced)]
    for column in worst.tolist():
        chosen.append((column, (turned & (labels == column)).nonzero()[:OF_HARMED, 0]))
    return {
        "classes": [
            {
                "name": case.bundle.classnames[column],
                **case.sides(lambda model, column=column: model.accuracy(column)),
                "pictures": _pictures(case, rows),
            }
            for column, rows in chosen
        ],
        "not_measured": [] if len(own) else [f"no image of {case.name!r}"],
    }


def _pictures(case: Case, rows: Tensor) -> list[dict[str, Any]]:
    """The entry of each of the pictures `rows` (n,)."""

    def names(model: Model) -> list[list[str]]:
        return [  # a name that was taken off the list has no score
            [
                case.bundle.classnames[column]
                for column in highest(scores, NAMES).tolist()
                if scores[column].isfinite()
            ]
            for scores in model.scores[rows]  # (n, C)
        ]

    named = zip(rows.tolist(), names(case.before), names(case.after), strict=True)
    return [{"row": row, "before": before, "after": after} for row, before, after in named]
