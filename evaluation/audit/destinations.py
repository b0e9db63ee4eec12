"""Where the images of a forgotten class go now, and whether the place gives them away."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from evaluation.audit.case import Case, Model

LISTED = 10  # classes written out
COMPARED = 5  # new classes that the class is told apart from
FOLDS = 5
FEWEST = 4  # images of either class: with fewer an AUC has hardly any values to take


def measure(case: Case) -> dict[str, Any]:
    """The zero-shot classes of the class's images, and the leak in their logits.

    The distributions count the class itself where it is still (before: rightly) predicted, so that
    shares add up to 1 over all classes. The leak: images that all land on one other class are
    hidden among that class's own only if their logits look alike, see `separation`. As many logits
    as the embeddings are wide hold all that the image embedding holds, whatever was forgotten.

    Returns:
        images; before, after: the ten most frequent classes; entropy_bits_before and _after of
        the whole distributions; leak: for each of the at most five most frequent classes after,
        the class itself aside, `images` of its own and the AUC before and after; worst_auc: the
        highest AUC after, of up to five noisy ones; not_measured.
    """
    images = int(case.mine.sum())
    report: dict[str, Any] = {"images": images}
    for when, model in (("before", case.before), ("after", case.after)):
        ranking = ranked(case, model)
        report[when] = [
            {"name": case.bundle.classnames[column], "count": count, "share": count / images}
            for column, count in ranking[:LISTED]
        ]
        report[f"entropy_bits_{when}"] = _entropy([count for _, count in ranking])
    leak, missing = _leak(case)
    report["leak"] = leak
    report["worst_auc"] = max((entry["auc_after"] for entry in leak), default=None)
    report["not_measured"] = missing
    return report


def held(model: Model) -> list[int]:
    """Columns of the classes that the deployed list still holds."""
    gone = set(model.removed)
    return [i for i, name in enumerate(model.bundle.classnames) if name not in gone]


def ranked(case: Case, model: Model) -> list[tuple[int, int]]:
    """Columns predicted for the class's images and how often, most frequent first."""
    counts = torch.bincount(model.predicted[case.mine], minlength=len(case.bundle.classnames))
    order = counts.argsort(descending=True, stable=True).tolist()
    return [(column, int(counts[column])) for column in order if counts[column] > 0]


def destinations(case: Case) -> list[int]:
    """Columns of the classes other than its own that the class's images go to after forgetting,
    most frequent first."""
    return [column for column, _ in ranked(case, case.after) if column != case.label]


def separation(model: Model, first: Tensor, second: Tensor, seed: int) -> float:
    """How well the logits of a model tell two groups of images apart, as an AUC.

    A logistic regression on the logits over the classes that the list holds (standardised, so
    CLIP's factor of 100 on the cosines drops out), cross-validated in stratified folds. The AUC is
    the mean over folds: scores of different folds are not comparable, and pooling them would pull
    the AUC of groups that are alike below one half.

    Args:
        first, second: (N,) bool, disjoint, at least two images each.
        seed: of the folds; the same for two models means the same folds.
    """
    chosen = torch.cat([first.nonzero()[:, 0], second.nonzero()[:, 0]])
    logits = model.scores[chosen][:, held(model)].double().numpy()  # (n, C) without -inf columns
    truth = np.repeat([1, 0], [int(first.sum()), int(second.sum())])
    folds = StratifiedKFold(min(FOLDS, *np.bincount(truth)), shuffle=True, random_state=seed)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    found = []
    for train, test in folds.split(logits, truth):
        classifier.fit(logits[train], truth[train])
        found.append(roc_auc_score(truth[test], classifier.decision_function(logits[test])))
    return float(np.mean(found))


def _leak(case: Case) -> tuple[list[dict[str, Any]], list[str]]:
    """The entries of "leak", and what could not be measured."""
    images, columns = int(case.mine.sum()), destinations(case)[:COMPARED]
    if images == 0:
        return [], [f"destinations: no image of {case.name}"]
    if not columns:
        return [], ["leak: no image goes to another class"]
    if images < FEWEST:
        return [], [f"leak: {case.name} has {images} of at least {FEWEST} images"]
    # One seed for both models: the same folds before and after.
    seed = int(torch.randint(2**31 - 1, (), generator=case.generator("destinations")))
    leak, missing = [], []
    for column in columns:
        name, theirs = case.bundle.classnames[column], case.bundle.labels == column
        count = int(theirs.sum())
        if count < FEWEST:
            missing.append(f"leak: {name} has {count} of at least {FEWEST} images")
            continue
        before, after = (
            separation(model, case.mine, theirs, seed) for model in (case.before, case.after)
        )
        leak.append({"name": name, "images": count, "auc_before": before, "auc_after": after})
    return leak, missing


def _entropy(counts: list[int]) -> float | None:
    """Entropy in bits of a distribution given by positive counts; None without any."""
    if not counts:
        return None
    shares = np.array(counts) / sum(counts)
    return float(max(0.0, -(shares * np.log2(shares)).sum()))
