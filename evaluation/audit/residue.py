"""What stays in the images: probes on image embeddings, which the method never touches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from evaluation.audit.case import AuditData, Case
from evaluation.audit.statistics import accuracy, auc

FOLDS = 5
NEIGHBOURS = 5
RIDGE = 1.0  # added to the pooled covariance, in units of its mean eigenvalue
FLOOR = 1e-8  # the same where there is no spread at all; embeddings have norm 1
FEWEST = 2  # images of a class: one to learn from, one to find


def measure(case: Case) -> dict[str, Any]:
    """Whether the class's images are still found by somebody with a few labelled images.

    Both probes see image embeddings only, which forgetting does not change: each is computed once
    and written twice, before and after, to stand beside the zero-shot accuracy that did change.

    Returns:
        linear_probe: accuracy over the class's images in the problem of all classes, and `auc`
            of the class against all others, see `probe`; nearest_neighbours: the same accuracy,
            `k` neighbours; zero_shot: accuracy of the model itself; not_measured. None where a
            class has too few images.
    """
    images = int(case.own_images.sum())
    others = len(case.own_images) - images
    missing = []
    if images < FEWEST:
        missing.append(f"probes: {case.name} has {images} of at least {FEWEST} images")
    if images == 0:
        missing.append(f"zero-shot: no image of {case.name}")
    if others == 0:
        missing.append("probes: no image of another class to compare with")
    probes = case.data.once(Probes)
    probed = images >= FEWEST and others > 0
    chosen = case.own_images if probed else torch.zeros_like(case.own_images)
    linear, nearest = accuracy(probes.linear[chosen]), accuracy(probes.nearest[chosen])
    column = probes.scores[:, case.label]
    area = auc(column[case.own_images], column[~case.own_images]) if probed else None
    return {
        "linear_probe": {"before": linear, "after": dict(linear), "auc": area},
        "nearest_neighbours": {"k": probes.k, "before": nearest, "after": dict(nearest)},
        "zero_shot": case.sides(lambda model: model.accuracy(case.label)),
        "not_measured": missing,
    }


class Probes:
    """What both probes say of the images of a data set, whatever is forgotten.

    Attributes:
        scores: (N, C), see `probe`.
        linear, nearest: (N,) bool, the probe puts the image in its class.
        k: neighbours that vote.
    """

    def __init__(self, data: AuditData) -> None:
        x, labels = data.bundle.image_features, data.bundle.labels
        self.scores = probe(x, labels, len(data.bundle.classnames), data.seed)
        self.linear = self.scores.argmax(dim=1) == labels
        predicted, self.k = vote(x, labels)
        self.nearest = predicted == labels


def probe(x: Tensor, labels: Tensor, classes: int, seed: int) -> Tensor:
    """Cross-validated log-probabilities (N, C) of a linear classifier with a closed form.

    Linear discriminant analysis (Fisher, 1936) with a ridge on the pooled within-class covariance
    and equal weight for every class: one solve per fold. Ridge regression on one-hot targets costs
    the same, but finds fewer images of real cars (the tests compare them), and an audit must not
    understate what is left.

    Args:
        x: (N, d) image embeddings; labels: (N,).
        seed: of the folds, in which each class is spread evenly.

    Returns:
        In float64; -inf for a class without another image to learn from.
    """
    x = x.double()
    fold = _folds(labels, seed)
    scores = x.new_full((len(x), classes), -torch.inf)
    for number in range(FOLDS):
        test = fold == number
        if test.any() and not test.all():
            scores[test] = _discriminants(x[~test], labels[~test], classes, x[test])
    return scores


def vote(x: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """The class (N,) that an image's nearest other images vote for, and how many voted.

    Cross-validated by leaving out the image itself. A vote counts 1 + its cosine, so that the
    nearer ones decide between classes with equally many. -1 without another image.
    """
    k = min(NEIGHBOURS, len(x) - 1)
    if k < 1:
        return torch.full_like(labels, -1), 0
    classifier = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distances: 2 - distances
    )
    # None: every training image, by its neighbours without itself.
    return torch.from_numpy(classifier.fit(x.numpy(), labels.numpy()).predict(None)), k


def _folds(labels: Tensor, seed: int) -> Tensor:
    """The fold (N,) of every image: each class's images, shuffled, are dealt out in turn."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    order = order[labels[order].argsort(stable=True)]
    fold = torch.empty_like(labels)
    fold[order] = torch.arange(len(labels)) % FOLDS
    return fold


def _discriminants(x: Tensor, labels: Tensor, classes: int, new: Tensor) -> Tensor:
    """Log-probabilities (n, C) of `new` (n, d), learnt from x (m, d) and labels (m,)."""
    counts = torch.bincount(labels, minlength=classes)
    sums = x.new_zeros(classes, x.shape[1]).index_add_(0, labels, x)
    means = sums / counts.clamp(min=1)[:, None]  # (C, d)
    present = counts > 0
    spread = (x - means[labels]) / counts[labels, None].sqrt()  # (m, d): every class weighs 1
    covariance = spread.T @ spread / present.sum()  # (d, m) @ (m, d)
    ridge = RIDGE * float(covariance.diagonal().mean()) + FLOOR
    covariance.diagonal().add_(ridge)
    centred = means - means[present].mean(dim=0)
    directions = torch.linalg.solve(covariance, centred.T)  # (d, d) \ (d, C)
    offsets = (centred * directions.T).sum(dim=1) / 2  # (C,)
    scores = (new - means[present].mean(dim=0)) @ directions - offsets  # (n, d) @ (d, C)
    scores[:, ~present] = -torch.inf
    return scores.log_softmax(dim=1)
