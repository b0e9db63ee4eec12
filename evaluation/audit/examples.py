"""The first names that the model gives to single pictures, before and after."""

from typing import Any

from evaluation.audit.case import Case, Model, highest

PICTURES = 4  # of the forgotten class
NAMES = 5  # that a picture is given
SCALE = 100  # of cosines in the softmax, as in CLIP
HARMED = 2  # classes that lost most
PICTURES_OF_HARMED = 2  # of each of them


def measure(case: Case) -> dict[str, Any]:
    """The first names of a few pictures of the class, and of the classes that lost most by it.

    Pictures of the class are evenly spaced among its images, the same ones for every method. Those
    of a harmed class are the first that the model named rightly before and no longer does.

    Returns:
        classes: the class itself, then at most two retained ones that lost the largest share of
        their images, each with `name`, accuracy `before` and `after`, and `pictures`: the `row` of
        a picture in the split, and the probabilities of up to five names, most similar first,
        `before` and `after`.
    """
    count = min(PICTURES, len(case.images))
    spaced = case.images[[i * len(case.images) // PICTURES for i in range(count)]]
    lost = (case.before.recognised - case.after.recognised) / case.data.counts.clamp_min(1)  # (C,)
    lost[~case.retained] = 0
    labels = case.bundle.labels
    misnamed = (case.before.predicted == labels) & (case.after.predicted != labels)  # (N,)
    chosen = {case.label: spaced}
    for column in highest(lost, int((lost > 0).sum()))[:HARMED].tolist():
        chosen[column] = (misnamed & (labels == column)).nonzero()[:PICTURES_OF_HARMED, 0]
    return {
        "classes": [
            case.change(column) | {"pictures": [_picture(case, row) for row in rows.tolist()]}
            for column, rows in chosen.items()
        ]
    }


def _picture(case: Case, row: int) -> dict[str, Any]:
    return {"row": row, **case.sides(lambda model: _names(model, row))}


def _names(model: Model, row: int) -> dict[str, float]:
    """What a picture is called, and how probably; a removed class has no score."""
    scores = model.scores[row]  # (C,)
    best = highest(scores, min(NAMES, int(scores.isfinite().sum())))
    shares = (SCALE * scores).softmax(dim=0).tolist()
    return {model.data.bundle.classnames[column]: shares[column] for column in best.tolist()}
