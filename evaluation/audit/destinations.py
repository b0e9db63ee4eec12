"""Where the images of a forgotten class go now, and whether their scores give them away."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.stats import entropy
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from evaluation.audit.case import Case, Model
from evaluation.audit.statistics import auc

LISTED = 10  # classes written out
COMPARED = 5  # new classes that the class is compared with
FOLDS = 5
CONSTANT = 1e-9  # the standard deviation of a score below which it says nothing
FEWEST = 4  # images of either class: with fewer an AUC has hardly any values to take


def measure(case: Case) -> dict[str, Any]:
    """The zero-shot classes of the class's images, and the leak in their scores.

    The distributions count the class itself where it is still (before: rightly) predicted, so that
    shares add up to 1 over all classes. The leak: images that all go to one other class are hidden
    among that class's own only if their scores look the same, see `separation`. As many scores as
    the embeddings are wide hold all that the image embedding holds, whatever was forgotten.

    Returns:
        images; before, after: the ten most frequent classes; entropy_bits_before and _after of
        the whole distributions; leak: for each of the at most five most frequent classes after,
        the class itself aside, `images` of its own and the AUC before and after; worst_auc: the
        highest AUC after, of up to five noisy ones; not_measured.
    """
    images = int(case.own_images.sum())
    report: dict[str, Any] = {"images": images}
    for when, model in (("before", case.before), ("after", case.after)):
        ranking = ranked(case, model)
        report[when] = [
            {"name": case.bundle.classnames[column], "count": count, "share": count / images}
            for column, count in ranking[:LISTED]
        ]
        counts = [count for _, count in ranking]
        report[f"entropy_bits_{when}"] = float(entropy(counts, base=2)) if counts else None
    leak, missing = _leak(case)
    worst = max((entry["auc_after"] for entry in leak), default=None)
    return report | {"leak": leak, "worst_auc": worst, "not_measured": missing}


def ranked(case: Case, model: Model) -> list[tuple[int, int]]:
    """Columns predicted for the class's images and how often, most frequent first."""
    columns, counts = model.predicted[case.own_images].unique(return_counts=True)
    counts, order = counts.sort(descending=True, stable=True)
    return list(zip(columns[order].tolist(), counts.tolist(), strict=True))


def destinations(case: Case) -> list[int]:
    """Columns of the classes other than its own that the class's images go to after forgetting,
    most frequent first."""
    return [column for column, _ in ranked(case, case.after) if column != case.label]


def separation(scores: Tensor, first: int, seed: int) -> float:
    """How well a model's scores tell two groups of images apart: an AUC.

    A logistic regression on standardised scores, cross-validated in stratified folds. The AUC is
    the mean over folds: decision values of different folds are not comparable, and pooling them
    would pull the AUC of groups that look the same below one half.

    Args:
        scores: (n, C), the images of the first group first; a score that all images share says
            nothing.
        first: images of the first group; at least two, and as many in the second.
        seed: of the folds.
    """
    truth = np.arange(len(scores)) < first
    folds = min(FOLDS, first, len(truth) - first)
    areas = []
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(truth, truth):
        spread, mean = torch.std_mean(scores[train], dim=0, correction=0)
        x = ((scores - mean) / torch.where(spread > CONSTANT, spread, 1)).numpy()
        fit = LogisticRegression(max_iter=1000, tol=1e-6).fit(x[train], truth[train])
        decided = torch.from_numpy(fit.decision_function(x[test]))
        areas.append(auc(decided[truth[test]], decided[~truth[test]]))
    return sum(areas) / len(areas)


def _leak(case: Case) -> tuple[list[dict[str, Any]], list[str]]:
    """The entries of "leak", and what could not be measured."""
    own, columns = case.own_images.nonzero()[:, 0], destinations(case)[:COMPARED]
    if not len(own):
        return [], [f"destinations: no image of {case.name}"]
    if not columns:
        return [], ["leak: no image goes to another class"]
    if len(own) < FEWEST:
        return [], [f"leak: {case.name} has {len(own)} of at least {FEWEST} images"]
    seed = int(torch.randint(2**31 - 1, (), generator=case.generator("destinations")))
    leak, missing = [], []
    for column in columns:
        name = case.bundle.classnames[column]
        other = (case.bundle.labels == column).nonzero()[:, 0]
        if len(other) < FEWEST:
            missing.append(f"leak: {name} has {len(other)} of at least {FEWEST} images")
            continue
        images = torch.cat([own, other])
        areas = [  # a removed class has no score: none at all is one that all images share
            separation(model.scores[images].nan_to_num(neginf=0.0), len(own), seed)
            for model in (case.before, case.after)
        ]
        entry = dict(zip(("auc_before", "auc_after"), areas, strict=True))
        leak.append({"name": name, "images": len(other), **entry})
    return leak, missing
