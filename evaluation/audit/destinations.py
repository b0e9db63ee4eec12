"""Where the images of a forgotten class go now, and whether the place gives them away."""

from __future__ import annotations

from typing import Any

import torch
from scipy.stats import entropy
from sklearn.model_selection import StratifiedKFold
from torch import Tensor
from torch.nn.functional import pad, softplus

from evaluation.audit.case import Case, Model

LISTED = 10  # classes written out
COMPARED = 5  # new classes that the class is told apart from
FOLDS = 5
FEWEST = 4  # images of either class: with fewer an AUC has hardly any values to take
CONSTANT = 1e-9  # the standard deviation of a logit below which it says nothing
JITTER = 1e-10  # of its mean diagonal, so that a singular Gram matrix has a Cholesky factor
STEPS = 100  # of Newton's method at most; it needs about ten
CONVERGED = 1e-6  # the last step of a coefficient; the next one would be about its square
TIE = 1e-7  # decision values nearer to one another than this are equal: images that are copies


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
        counts = [count for _, count in ranking]
        report[f"entropy_bits_{when}"] = float(entropy(counts, base=2)) if counts else None
    leak, missing = _leak(case)
    worst = max((entry["auc_after"] for entry in leak), default=None)
    return report | {"leak": leak, "worst_auc": worst, "not_measured": missing}


def ranked(case: Case, model: Model) -> list[tuple[int, int]]:
    """Columns predicted for the class's images and how often, most frequent first."""
    columns, counts = model.predicted[case.mine].unique(return_counts=True)
    counts, order = counts.sort(descending=True, stable=True)
    return list(zip(columns[order].tolist(), counts.tolist(), strict=True))


def destinations(case: Case) -> list[int]:
    """Columns of the classes other than its own that the class's images go to after forgetting,
    most frequent first."""
    return [column for column, _ in ranked(case, case.after) if column != case.label]


def separation(logits: Tensor, first: int, seed: int) -> list[float]:
    """How well the logits of each of B models tell two groups of images apart, as AUCs.

    A logistic regression on the logits (standardised, so CLIP's factor of 100 on the cosines drops
    out), cross-validated in stratified folds. The AUC is the mean over folds: scores of different
    folds are not comparable, and pooling them would pull the AUC of groups that are alike below one
    half.

    Args:
        logits: (B, n, C), the images of the first group first; a logit that all images share says
            nothing.
        first: images of the first group; at least two, and as many in the second.
        seed: of the folds, the same for all models.
    """
    truth = torch.arange(logits.shape[1]) < first  # (n,)
    folds = StratifiedKFold(min(FOLDS, first, len(truth) - first), shuffle=True, random_state=seed)
    test = torch.zeros(folds.n_splits, len(truth), dtype=torch.bool)  # (F, n)
    for row, (_, places) in zip(test, folds.split(truth, truth), strict=True):
        row[places] = True
    share = (~test) / (~test).sum(dim=1, keepdim=True).double()  # (F, n) of the mean
    logits = logits.double()
    x = logits[:, None] - (share @ logits)[:, :, None]  # (B, F, n, C)
    spread = torch.einsum("fn,bfnc->bfc", share, x.square()).sqrt()[:, :, None]
    scores = _decide(x / torch.where(spread > CONSTANT, spread, 1), truth.double(), ~test)
    ahead = scores[..., :first, None] - scores[..., None, first:]  # (B, F, pairs of images)
    won = (ahead > TIE).double() + 0.5 * (ahead.abs() <= TIE)
    pairs = (test[:, :first, None] & test[:, None, first:]).double()
    return ((won * pairs).sum(dim=(2, 3)) / pairs.sum(dim=(1, 2))).mean(dim=1).tolist()


def _decide(x: Tensor, truth: Tensor, train: Tensor) -> Tensor:
    """Decision values (B, F, n) of logistic regressions: the sum of the losses plus half of the
    squared norm of the coefficients, as scikit-learn's is, all of them at once by Newton's method.

    Args:
        x: (B, F, n, C); truth: (n,) 0 or 1; train: (F, n), the rows that F of them learn from.
    """
    n, count = x.shape[2:]
    if count > n:  # rows with the same products, but no longer than they are many
        gram = x @ x.transpose(2, 3)  # (B, F, n, n)
        mean = gram.diagonal(dim1=2, dim2=3).mean(dim=2).clamp_min(CONSTANT)
        x = torch.linalg.cholesky(gram + JITTER * mean[..., None, None] * torch.eye(n))
    x = pad(x, (0, 1), value=1.0)  # (B, F, n, q + 1): the intercept, which has no penalty
    penalty = torch.ones(x.shape[3], 1, dtype=torch.float64)
    penalty[-1] = 0
    weights, sign = train[..., None].double(), 1 - 2 * truth[:, None]

    def loss(beta: Tensor) -> Tensor:
        losses = (weights * softplus(sign * (x @ beta))).sum(dim=(2, 3))
        return losses + (penalty * beta.square()).sum(dim=(2, 3)) / 2

    beta = x.new_zeros(*x.shape[:2], x.shape[3], 1)
    before = loss(beta)
    for _ in range(STEPS):
        chance = (x @ beta).sigmoid()  # (B, F, n, 1)
        slope = x.transpose(2, 3) @ (weights * (chance - truth[:, None])) + penalty * beta
        curve = x.transpose(2, 3) @ (weights * (chance * (1 - chance)) * x)
        step = torch.linalg.solve(curve + torch.diag(penalty[:, 0] + JITTER), slope)
        while (worse := (after := loss(beta - step)) > before + CONVERGED).any():
            step = torch.where(worse[..., None, None], step / 2, step)
        beta, before = beta - step, after
        if step.abs().max() < CONVERGED:
            break
    return (x @ beta)[..., 0]


def _leak(case: Case) -> tuple[list[dict[str, Any]], list[str]]:
    """The entries of "leak", and what could not be measured."""
    mine, columns = int(case.mine.sum()), destinations(case)[:COMPARED]
    if mine == 0:
        return [], [f"destinations: no image of {case.name}"]
    if not columns:
        return [], ["leak: no image goes to another class"]
    if mine < FEWEST:
        return [], [f"leak: {case.name} has {mine} of at least {FEWEST} images"]
    seed = int(torch.randint(2**31 - 1, (), generator=case.generator("destinations")))
    leak, missing = [], []
    for column in columns:
        name, theirs = case.bundle.classnames[column], case.bundle.labels == column
        count = int(theirs.sum())
        if count < FEWEST:
            missing.append(f"leak: {name} has {count} of at least {FEWEST} images")
            continue
        images = torch.cat([case.mine.nonzero()[:, 0], theirs.nonzero()[:, 0]])
        # A removed name has no logit: none at all is one that all images share.
        logits = [m.scores[images].nan_to_num(neginf=0.0) for m in (case.before, case.after)]
        before, after = separation(torch.stack(logits), mine, seed)
        leak.append({"name": name, "images": count, "auc_before": before, "auc_after": after})
    return leak, missing
