"""Three ways to teach a class again from a few images of it.

The attacker holds k images of every class of the set, not of the lost one alone: with nothing to
compare it with, any of the three could call every image by the class's name. He knows which class
he wants and tunes nothing on the images that he is judged on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
import torch
from sklearn.linear_model import Ridge as RidgeRegression
from torch import Tensor
from torch.nn.functional import normalize

from clip.bundle import FeatureBundle
from evaluation.audit.attacker import attacker
from evaluation.audit.case import Common, Model
from forgetting.solvers.constrained import downdate

SHOTS = (1, 2, 4, 8, 16)
REPEATS = 5  # draws of the images, averaged
SCALE = 100.0  # CLIP's logit scale
SHARPNESS = 5.5  # beta of Tip-Adapter, its published value
# Of the probe, beside centred embeddings of squared length about 0.4. From 0.1 to 1 it matters by
# two or three points on photographs.
PROBE_RIDGE = 0.3


@dataclass(frozen=True)
class Shots:
    """The images that the attacker holds: k of every class (all, if it has fewer), drawn anew
    `REPEATS` times, the larger k containing the smaller.

    Attributes:
        orders: draw -> class -> its images, (n,) indices in drawn order.
    """

    bundle: FeatureBundle
    orders: list[list[Tensor]]

    @cached_property
    def held(self) -> dict[tuple[int, int], Tensor]:
        """(draw, k) -> indices (m,) of the images that the attacker has."""
        pairs = product(enumerate(self.orders), SHOTS)
        return {(d, k): torch.cat([order[:k] for order in orders]) for (d, orders), k in pairs}

    def rest(self, draw: int, k: int, label: int) -> Tensor:
        """Indices (n,) of the other images of a class."""
        return self.orders[draw][label][k:]

    def sums(self, rows: Tensor, held: Tensor) -> Tensor:
        """Sums over classes, (C, x), of rows (m, x) that belong to the images `held` (m,)."""
        total = rows.new_zeros(len(self.bundle.classnames), rows.shape[1])
        return total.index_add_(0, self.bundle.labels[held], rows)

    @cached_property
    def means(self) -> dict[tuple[int, int], Tensor]:
        """(draw, k) -> mean (C, d) of the images of each class; NaN for a class without."""
        x, ones = self.bundle.image_features, self.bundle.image_features.new_ones
        return {
            key: self.sums(x[held], held) / self.sums(ones(len(held), 1), held)
            for key, held in self.held.items()
        }

    @cached_property
    def probed(self) -> dict[tuple[int, int], Tensor]:
        """(draw, k) -> the class (N,) that a linear probe learnt from k images of every class
        sees in each image: ridge regression on one-hot targets, which has a closed form."""
        found = {}
        images = self.bundle.image_features.numpy()
        one_hot = np.eye(len(self.bundle.classnames), dtype=np.float32)[
            self.bundle.labels
        ]  # (N, C)
        for key, held in self.held.items():
            fit = RidgeRegression(alpha=PROBE_RIDGE).fit(images[held], one_hot[held])
            scores = fit.predict(images)  # (N, d) -> (N, C)
            found[key] = torch.from_numpy(scores.argmax(axis=1))
        return found


def shots_of(common: Common) -> Shots:
    """The draws of a data set, the same for all of its classes."""
    bundle, generator = common.bundle, common.generator("shots")
    images = [(bundle.labels == label).nonzero()[:, 0] for label in range(len(bundle.classnames))]
    orders = [
        [mine[torch.randperm(len(mine), generator=generator)] for mine in images]
        for _ in range(REPEATS)
    ]
    return Shots(bundle, orders)


@dataclass(frozen=True)
class Start:
    """What the attacker starts from: a model and the class that he wants it to know.

    Attributes:
        label: column of the class; named: the model has a text for it. Otherwise it never knew it.
    """

    model: Model
    label: int
    named: bool = True

    @cached_property
    def away(self) -> list[int]:
        """Columns of other classes that the deployed list no longer holds."""
        columns = self.model.common.columns
        return [columns[name] for name in self.model.removed if name != self.name]

    @property
    def name(self) -> str:
        return self.model.bundle.classnames[self.label]

    @property
    def shots(self) -> Shots:
        return self.model.common.once(shots_of)

    @cached_property
    def pulls(self) -> Tensor:
        """How far each class's text goes when the class's own is moved by the exact change, as a
        share of its way, (C, 1); the class's own name has left what is retained."""
        bundle, known = self.model.bundle, self.model.common.once(attacker)
        texts = bundle.class_hidden[[self.label]], bundle.forget_hidden[[self.label]]
        text, own = (rows.double() for rows in texts)  # (1, w) each
        solved = [(x[None], known.ridge.solve(x)[None]) for x in (text, own)]
        row = downdate(*solved[0], *solved[1], text.new_full((1, 1), known.own_share))
        pulls = bundle.class_hidden.double() @ row[0].T  # (C, w) @ (w, 1)
        return (pulls / pulls[self.label]).float()


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
    features, held = start.model.bundle.image_features, start.shots.held[draw, k]
    similarity = features[images] @ features[held].T  # (n, d) @ (d, m)
    affinity = (-SHARPNESS * (1 - similarity)).exp()
    cosines = start.model.scores[images]  # (n, C), a copy
    if not start.named or start.name in start.model.removed:
        others = cosines.isfinite()
        others[:, start.label] = False
        total = cosines.masked_fill(~others, 0).sum(dim=1)
        cosines[:, start.label] = total / others.sum(dim=1)
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
    bundle, label, means = start.model.bundle, start.label, start.shots.means[draw, k]
    others = means[:, 0].isfinite()
    others[label] = False
    texts = start.model.classes.clone()
    target = normalize(
        texts[others].mean(dim=0) + means[label] - means[others].mean(dim=0), dim=0
    )  # (d,)
    if start.named:
        length = bundle.embed(bundle.class_hidden[label]).norm()
        way = length * target - start.model.texts[label]  # (d,)
        texts = normalize(start.model.texts + start.pulls * way, dim=1)  # (C, d)
    else:
        texts[label] = target
    scores = bundle.image_features[images] @ texts.T  # (n, d) @ (d, C)
    scores[:, start.away] = -torch.inf
    return scores.argmax(dim=1)
