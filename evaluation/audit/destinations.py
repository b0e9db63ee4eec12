"""Where the images of a forgotten class go now, and whether their scores give them away."""

from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from evaluation.audit.case import Case, Model, highest

COMPARED = 5  # new classes that the class is compared with
FOLDS = 5
CONSTANT = 1e-9  # the standard deviation of a score below which it says nothing
FEWEST = 4  # images of either class: with fewer an AUC has hardly any values to take


def measure(case: Case) -> dict[str, Any]:
    """The zero-shot classes of the class's images, and the leak in their scores: images that all go
    to one other class are hidden among its own only if their scores look the same.

    Returns:
        before, after: the ten most frequent classes and their share of the images; leak: the AUC
        before and after for each of the at most five most frequent classes after, the class itself
        aside; worst_auc: the highest AUC after, of up to five noisy ones.
    """
    columns = case.sides(lambda model: _ranked(case, model))
    new = [column for column, _ in columns["after"] if column != case.label][:COMPARED]
    images = case.data.counts.tolist()
    enough = [c for c in new if min(images[c], images[case.label]) >= FEWEST]
    missing = f"leak: fewer than {FEWEST} images of {case.name!r} or of a class that they go to"
    leak = [_leak(case, column) for column in enough]
    return {
        side: [{"name": case.bundle.classnames[c], "share": share} for c, share in ranked[:10]]
        for side, ranked in columns.items()
    } | {
        "leak": leak,
        "worst_auc": max((entry["auc_after"] for entry in leak), default=None),
        "not_measured": [] if enough == new else [missing],
    }


def separation(scores: Tensor, first: int, seed: int) -> float:
    """How well scores (n, C) tell the `first` images (at least two, and as many others) from those
    behind them: an AUC. `seed`: of the folds.

    A logistic regression on standardised scores, cross-validated in stratified folds. The AUC is
    the mean over folds: decision values of different folds are not comparable, and pooling them
    would pull the AUC of groups that look the same below one half.
    """
    truth = np.arange(len(scores)) < first
    folds = StratifiedKFold(min(FOLDS, first, len(truth) - first), shuffle=True, random_state=seed)
    areas = []
    for train, test in folds.split(truth, truth):
        spread, mean = torch.std_mean(scores[train], dim=0, correction=0)
        x = ((scores - mean) / spread.where(spread > CONSTANT, 1)).numpy()
        fit = LogisticRegression(max_iter=1000, tol=1e-6).fit(x[train], truth[train])
        decided, own = fit.decision_function(x[test]), truth[test]
        ahead = decided[own][:, None] - decided[~own]  # pairs (m, n)
        areas.append((ahead > 0).mean() + (ahead == 0).mean() / 2)
    return float(np.mean(areas))


def _leak(case: Case, column: int) -> dict[str, Any]:
    """How far scores tell the class's images from those of another class."""
    generator = case.data.generator(case.name, "destinations")
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    images = torch.cat([case.images, (case.bundle.labels == column).nonzero()[:, 0]])
    areas = {  # a removed class has no score: none at all is one that all images share
        f"auc_{side}": separation(scores[images].nan_to_num(neginf=0.0), len(case.images), seed)
        for side, scores in case.sides(lambda model: model.scores).items()
    }
    return {"name": case.bundle.classnames[column], **areas}


def _ranked(case: Case, model: Model) -> list[tuple[int, float]]:
    """Columns predicted for the class's images with their share, most frequent first."""
    counts = torch.bincount(model.predicted[case.images], minlength=len(case.bundle.classnames))
    columns = highest(counts, int((counts > 0).sum()))
    shares = counts[columns].double() / len(case.images)
    return list(zip(columns.tolist(), shares.tolist(), strict=True))
