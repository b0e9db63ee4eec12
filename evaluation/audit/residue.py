"""What stays in the images: a probe on image embeddings, which the method never touches."""

from typing import Any

import numpy as np
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from evaluation.audit.case import AuditData, Case, accuracy

FOLDS = 5
SHRINKAGE = 0.5  # of the covariance within classes: as much of it as of its mean eigenvalue


def measure(case: Case) -> dict[str, Any]:
    """Whether the class's images are still found by somebody with a few labelled images.

    The probe sees image embeddings only, which forgetting does not change: before is after.

    Returns:
        linear_probe: accuracy over the class's images in the problem of all classes, see `probe`;
        None where the class has a single image, or no other class has any; zero_shot: accuracy of
        the model itself.
    """
    images, linear = case.images, accuracy(0, 0)
    missing = ["the probe needs two images of it and one of another class"]
    probed = 1 < len(images) < len(case.bundle.labels)
    if probed:
        linear = accuracy(int((case.data.once(_seen)[images] == case.label).sum()), len(images))
    return {
        "linear_probe": {"before": linear, "after": linear},
        "zero_shot": case.sides(lambda model: model.accuracy(case.label)),
        "not_measured": [] if probed else missing,
    }


def probe(x: Tensor, labels: Tensor, seed: int) -> Tensor:
    """The class (N,) that a linear classifier learnt from other images sees in each image, by
    embeddings x (N, d); -1 where there are too few other images to learn from. `seed`: of the
    folds, in which each class is spread evenly.

    Linear discriminant analysis (Fisher, 1936) with equal weight for every class. Ridge regression
    on one-hot targets finds fewer images of real cars, and an audit must not understate.
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    order = order[labels[order].argsort(stable=True)]
    predicted = torch.full_like(labels, -1)
    for number in range(FOLDS):
        test = order[number::FOLDS]  # each class's images, shuffled, are dealt out in turn
        train = torch.ones(len(labels), dtype=torch.bool).index_fill(0, test, False)
        classes = len(labels[train].unique())
        if len(test) and 1 < classes < train.sum():
            learnt = LinearDiscriminantAnalysis(
                "lsqr", shrinkage=SHRINKAGE, priors=np.full(classes, 1 / classes)
            ).fit(x[train].double().numpy(), labels[train].numpy())
            predicted[test] = torch.from_numpy(learnt.predict(x[test].double().numpy()))
    return predicted


def _seen(data: AuditData) -> Tensor:
    """What the probe sees in the images, (N,): the same, whatever is forgotten."""
    return probe(data.bundle.image_features, data.bundle.labels, data.seed)
