"""The first names that the model gives to single pictures, before and after."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from evaluation.audit.case import Case, Model
from evaluation.audit.statistics import highest

PICTURES = 4  # of the forgotten class
NAMES = 5  # that a picture is given
HARMED = 2  # classes that lost most
PICTURES_OF_HARMED = 2  # of each of them


def measure(case: Case) -> dict[str, Any]:
    """The first names of a few pictures of the class, and of the classes that lost most by it.

    Pictures of the class are evenly spaced among its images, the same ones for every method. Those
    of a harmed class are the first that the model named rightly before and no longer does.

    Returns:
        classes: the class itself, then at most two retained ones that lost the largest share of
            their images, each with `name`, accuracy `before` and `after`, and `pictures`: the
            `row` of a picture in the split, and up to five names, most similar first, `before` and
            `after`.
        not_measured: what could not be measured, and why.
    """
    own = case.own_images.nonzero()[:, 0]
    spaced = own[[i * len(own) // PICTURES for i in range(min(PICTURES, len(own)))]]
    lost = (case.before.recognised - case.after.recognised) / case.data.counts.clamp_min(1)  # (C,)
    lost[~case.retained] = 0
    labels = case.bundle.labels
    misnamed = (case.before.predicted == labels) & (case.after.predicted != labels)  # (N,)
    chosen = [(case.label, spaced)]
    for column in highest(lost, int((lost > 0).sum()))[:HARMED].tolist():
        rows = (misnamed & (labels == column)).nonzero()[:PICTURES_OF_HARMED, 0]
        chosen.append((column, rows))
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
        return [  # a removed class has no score
            [
                case.bundle.classnames[column]
                for column in highest(scores, NAMES).tolist()
                if scores[column].isfinite()
            ]
            for scores in model.scores[rows]  # (n, C)
        ]

    named = zip(rows.tolist(), names(case.before), names(case.after), strict=True)
    return [{"row": row, "before": before, "after": after} for row, before, after in named]
