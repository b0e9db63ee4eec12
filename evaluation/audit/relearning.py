"""How many images bring the class back.

The attacker holds k images of every class of the set: with images of the lost one alone, any method
could call every image by its name. He tunes nothing on the images that he is judged on.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from evaluation.audit.case import AuditData, Case
from evaluation.audit.undo import Attacker
from evaluation.rules import holds
from forgetting.solvers.constrained import solve_constrained

SHOTS = (1, 2, 4, 8, 16)
REPEATS = 5  # draws of the images, averaged
SHARPNESS = 5.5  # beta of Tip-Adapter, its published value


def measure(case: Case) -> dict[str, Any]:
    """Accuracy of the class's other images, among all classes of the set, from k images.

    Returns:
        shots: numbers of images; methods: of each the accuracies (means over `REPEATS` draws, None
        where no image is left to test)

        - forgotten: the class, learnt on top of the changed model;
        - no_text: the same on the untouched model without any text for the class: what images
          alone give. Whoever drops the changed text has as much, so where `forgotten` lies below it
          (a text sent to its opposite speaks against its class) that protects nobody;

        and `needed`, the least number that reaches half of what the class had before forgetting.
    """
    own = case.before.accuracy(case.label)["value"]
    methods = {}
    for name in METHODS:
        forgotten, no_text = (
            [_learnt(case, name, named, k) for k in SHOTS] for named in (True, False)
        )
        needed = _needed(forgotten, own)
        methods[name] = {"forgotten": forgotten, "no_text": no_text, "needed": needed}
    missing = []
    if len(case.images) == len(case.bundle.labels):
        missing.append("no image of another class to compare with")
    elif len(case.images) <= SHOTS[-1]:
        missing.append(f"from {SHOTS[-1]} images: {case.name!r} has {len(case.images)}")
    return {"shots": list(SHOTS), "methods": methods, "not_measured": missing}


# What the attacker has, the same for all classes of a data set


def places(data: AuditData) -> Tensor:
    """Draw by image, (REPEATS, N): the image's place among those of its class, in drawn order."""
    labels, generator = data.bundle.labels, data.generator("shots")
    found = torch.empty(REPEATS, len(labels), dtype=torch.int64)
    images = [(labels == label).nonzero()[:, 0] for label in range(len(data.counts))]
    for row in found:
        for own in images:
            row[own[torch.randperm(len(own), generator=generator)]] = torch.arange(len(own))
    return found


def held(data: AuditData, draw: int, k: int) -> tuple[Tensor, Tensor]:
    """Indices (m,) of k images of every class (all, if it has fewer), and their classes one-hot,
    (m, C). A larger k contains a smaller."""
    images = (data.once(places)[draw] < k).nonzero()[:, 0]
    return images, one_hot(data.bundle.labels[images], len(data.counts)).double()


def class_means(data: AuditData, draw: int, k: int) -> Tensor:
    """The mean of the held images of each class, (C, d); NaN for a class without."""
    images, classes = data.once(held, draw, k)
    return classes.T @ data.images[images] / classes.sum(dim=0)[:, None]


def displacement_ratios(data: AuditData, label: int) -> Tensor:
    """How far each class's text goes when the exact method moves the text of the class `label`, as
    a ratio to its displacement, (C, 1). The class's own name is not retained."""
    known, hidden = data.once(Attacker), data.bundle.class_hidden.double()
    own = torch.arange(len(known.ridge.rows)) == label
    edit = solve_constrained(known.ridge, hidden[[label]], hidden.new_ones(1, 1), own)
    return hidden @ edit.left @ edit.right  # (C, w) @ (w, 1) @ (1, 1)


# What he does with it. `named`: to the changed model; otherwise to the untouched one, as if it had
# no text for the class. Each gives the class (n,) of each of the images (n,).


def cache(case: Case, named: bool, draw: int, k: int, images: Tensor) -> Tensor:
    """Tip-Adapter (Zhang et al., ECCV 2022) without training.

    Logits `cos(x, text) + sum exp(-beta (1 - cos(x, s)))` over the k images s of a class, so that
    an image weighs as much as a text: with the published hundredth of that sixteen images do not
    outweigh a text that was sent away. A class without a text has the mean of the other classes'
    cosines: nothing for it and nothing against.
    """
    model, features = case.after if named else case.before, case.data.images
    known, classes = case.data.once(held, draw, k)
    affinity = (-SHARPNESS * (1 - features[images] @ features[known].T)).exp()  # (n, m)
    cosines = model.scores[images]  # (n, C), a copy
    if not named or case.label in model.removed:
        cosines[:, case.label] = torch.nan
        cosines[:, case.label] = cosines.masked_fill(cosines.isinf(), torch.nan).nanmean(dim=1)
    return (cosines + affinity @ classes).argmax(dim=1)


def refit(case: Case, named: bool, draw: int, k: int, images: Tensor) -> Tensor:
    """The projection solved once more: the class's text goes to its images, all else stays.

    CLIP's images lie apart from its texts: the mean of k images is nearer to every image than any
    text is. So the target is the mean text of the other classes, moved by how far the class's
    images lie from theirs, at the length that the class's text had. A class without a text gets
    that direction as its column.
    """
    model, label = case.after if named else case.before, case.label
    means = case.data.once(class_means, draw, k)
    others = means[:, 0].isfinite()
    others[label] = False
    classes = model.classes
    centre = classes[others].mean(dim=0) - means[others].mean(dim=0)
    target = normalize(centre + means[label], dim=0)  # (d,)
    if named:
        texts = model.embed(case.bundle.class_hidden)  # (C, d)
        length = case.before.embed(case.bundle.class_hidden[[label]]).norm()
        way = length * target - texts[label]  # (d,)
        classes = normalize(texts + case.data.once(displacement_ratios, label) * way, dim=1)
    else:
        classes = classes.clone()
        classes[label] = target
    scores = case.data.images[images] @ classes.T  # (n, d) @ (d, C)
    scores[:, [column for column in model.removed if column != label]] = -torch.inf
    return scores.argmax(dim=1)


METHODS: dict[str, Callable[..., Tensor]] = {"cache": cache, "refit": refit}


def _learnt(case: Case, name: str, named: bool, k: int) -> float | None:
    """Accuracy of the class's other images after k of them, over all draws; None if there are none,
    or no other class to compare with."""
    if not k < len(case.images) < len(case.bundle.labels):
        return None
    correct = []
    for draw, order in enumerate(case.data.once(places)):
        images = case.images[order[case.images] >= k]
        correct.append(METHODS[name](case, named, draw, k, images) == case.label)
    return float(torch.cat(correct).double().mean())


def _needed(curve: Sequence[float | None], own: float | None) -> int | None:
    """The least number of images with which the class is back; None if it is with none."""
    return next((k for k, v in zip(SHOTS, curve, strict=True) if holds(v, own)), None)
