"""Three ways to teach a class again from a few images of it.

The attacker holds k images of every class of the set, not of the lost one alone: with nothing to
compare it with, any of the three could call every image by the class's name. He knows which class
he wants and tunes nothing on the images that he is judged on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from sklearn.linear_model import Ridge as RidgeRegression
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from evaluation.audit.attacker import Attacker
from evaluation.audit.case import AuditData, Model
from forgetting import solve_constrained

SHOTS = (1, 2, 4, 8, 16)
REPEATS = 5  # draws of the images, averaged
SCALE = 100.0  # CLIP's logit scale
SHARPNESS = 5.5  # beta of Tip-Adapter, its published value
# Of the probe, beside centred embeddings of squared length about 0.4. From 0.1 to 1 it matters by
# two or three points on photographs.
PROBE_RIDGE = 0.3


class Shots:
    """The images that the attacker holds: k of every class (all, if it has fewer), drawn anew
    `REPEATS` times, the larger k containing the smaller. The same for all classes of a data set.

    Attributes:
        images: (N, d) of the set; labels: (N,); classes: how many there are.
        orders: draw -> class -> its images, (n,) indices in drawn order.
    """

    def __init__(self, data: AuditData) -> None:
        self.images, self.labels = data.images, data.bundle.labels
        self.classes, generator = len(data.bundle.classnames), data.generator("shots")
        images = [(self.labels == label).nonzero()[:, 0] for label in range(self.classes)]
        self.orders = [
            [own[torch.randperm(len(own), generator=generator)] for own in images]
            for _ in range(REPEATS)
        ]

    @cached_property
    def held(self) -> dict[tuple[int, int], Tensor]:
        """(draw, k) -> indices (m,) of the images that the attacker has."""
        pairs = product(enumerate(self.orders), SHOTS)
        return {(d, k): torch.cat([order[:k] for order in orders]) for (d, orders), k in pairs}

    def rest(self, draw: int, k: int, label: int) -> Tensor:
        """Indices (n,) of the other images of a class."""
        return self.orders[draw][label][k:]

    def sums(self, rows: Tensor, held: Tensor) -> Tensor:
        """Sums per class, (C, x), of rows (m, x) that belong to the images `held` (m,)."""
        return rows.new_zeros(self.classes, rows.shape[1]).index_add_(0, self.labels[held], rows)

    @cached_property
    def means(self) -> dict[tuple[int, int], Tensor]:
        """(draw, k) -> mean (C, d) of the images of each class; NaN for a class without."""
        ones = self.images.new_ones(len(self.images), 1)
        return {
            key: self.sums(self.images[held], held) / self.sums(ones[held], held)
            for key, held in self.held.items()
        }

    @cached_property
    def probed(self) -> dict[tuple[int, int], Tensor]:
        """(draw, k) -> the class (N,) that a linear probe learnt from k images of every class
        sees in each image: ridge regression on one-hot targets, which has a closed form."""
        images, targets = self.images.float(), one_hot(self.labels, self.classes).float()
        predicted = {}
        for key, held in self.held.items():
            fit = RidgeRegression(alpha=PROBE_RIDGE)
            fit.fit(images[held].numpy(), targets[held].numpy())  # (m, d), (m, C)
            scores = torch.from_numpy(fit.predict(images.numpy())).reshape(len(images), -1)
            predicted[key] = scores.argmax(dim=1)
        return predicted


def displacement_ratios(data: AuditData, label: int) -> Tensor:
    """How far each class's text goes when the exact method moves the text of the class `label`, as
    a ratio to its displacement, (C, 1). The class's own name is not retained."""
    known, hidden = data.once(Attacker), data.bundle.class_hidden.double()
    own = torch.arange(len(known.ridge.rows)) == label
    edit = solve_constrained(known.ridge, hidden[[label]], hidden.new_ones(1, 1), own)
    return hidden @ edit.left @ edit.right  # (C, w) @ (w, 1) @ (1, 1)


@dataclass(frozen=True)
class Start:
    """What the attacker starts from: a model and the class that he wants it to know.

    Attributes:
        label: column of the class.
        named: whether the model has a text for it; otherwise it never knew the class.
    """

    model: Model
    label: int
    named: bool = True

    @property
    def shots(self) -> Shots:
        return self.model.data.once(Shots)


Method = Callable[[Start, int, int, Tensor], Tensor]


def cache(start: Start, draw: int, k: int, images: Tensor) -> Tensor:
    """Tip-Adapter (Zhang et al., ECCV 2022) without training: the class (n,) of each image.

    Logits `100 cos(x, text) + alpha sum exp(-beta (1 - cos(x, s)))` over the k images s of a class.
    alpha is 100, CLIP's logit scale, so that an image weighs as much as a text. With the published
    alpha of 1 images only decide between texts that are nearly level, and sixteen of them do not
    outweigh a text that was sent away; with a larger one the rest of the set loses. A class
    without a text has the mean of the other classes' cosines: nothing for it and nothing against.

    Args:
        images: indices (n,).
    """
    features, held = start.model.data.images, start.shots.held[draw, k]
    similarity = features[images] @ features[held].T  # (n, d) @ (d, m)
    affinity = (-SHARPNESS * (1 - similarity)).exp()
    cosines = start.model.scores[images]  # (n, C), a copy
    if not start.named or start.label in start.model.removed_columns:
        cosines[:, start.label] = torch.nan
        cosines[:, start.label] = cosines.masked_fill(cosines.isinf(), torch.nan).nanmean(dim=1)
    return (SCALE * (cosines + start.shots.sums(affinity.T, held).T)).argmax(dim=1)


def probe(start: Start, draw: int, k: int, images: Tensor) -> Tensor:
    """A linear probe on image embeddings; no text has a part in it, so neither has forgetting."""
    return start.shots.probed[draw, k][images]


def refit(start: Start, draw: int, k: int, images: Tensor) -> Tensor:
    """The projection solved once more: the class's text goes to its images, all else stays.

    CLIP's images lie apart from its texts: the mean of k images as it stands is nearer to every
    image than any text is, and all of them would get the class's name. So the target is the mean
    text of the other classes, moved by how far the class's images lie from theirs, at the length
    that the class's text had originally. A class without a text gets that direction as its column.

    Args:
        images: indices (n,).
    """
    model, label, means = start.model, start.label, start.shots.means[draw, k]
    others = means[:, 0].isfinite()
    others[label] = False
    classes = model.classes
    target = normalize(
        classes[others].mean(dim=0) + means[label] - means[others].mean(dim=0), dim=0
    )  # (d,)
    if start.named:
        texts = model.class_texts.embeddings()  # (C, d)
        way = model.data.class_texts.lengths[label] * target - texts[label]  # (d,)
        classes = normalize(
            texts + model.data.once(displacement_ratios, label) * way, dim=1
        )  # (C, d)
    else:
        classes = classes.clone()
        classes[label] = target
    scores = model.data.images[images] @ classes.T  # (n, d) @ (d, C)
    scores[:, [column for column in model.removed_columns if column != label]] = -torch.inf
    return scores.argmax(dim=1)


METHODS: dict[str, Method] = {"cache": cache, "probe": probe, "refit": refit}
