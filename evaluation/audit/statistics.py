"""Accuracies with confidence intervals, areas under ROC curves, and the first few of many."""

from __future__ import annotations

from typing import Any

from scipy.special import betaincinv
from torch import Tensor

LEVEL = 0.95
Accuracy = dict[str, Any]  # {"value", "low", "high", "n"}: fractions, and the number of images


def accuracy(correct: Tensor) -> Accuracy:
    """The mean of (n,) booleans with its interval, see `proportion`."""
    return proportion(int(correct.sum()), correct.numel())


def proportion(right: int, n: int) -> Accuracy:
    """`right` of `n` with the exact 95 % interval (Clopper and Pearson, 1934).

    The interval covers the true proportion at least 95 % of the time for any n. For 0 of n it ends
    near 3.7 / n. Its ends are quantiles of beta distributions.

    Returns:
        value, low, high: None if n is 0; n.
    """
    if n == 0:
        return {"value": None, "low": None, "high": None, "n": 0}
    tail = (1 - LEVEL) / 2
    low = float(betaincinv(right, n - right + 1, tail)) if right > 0 else 0.0
    high = float(betaincinv(right + 1, n - right, 1 - tail)) if right < n else 1.0
    return {"value": right / n, "low": low, "high": high, "n": n}


def mean_value(accuracies: list[Accuracy]) -> float | None:
    """The mean of the values that were measured; None if none was."""
    values = [entry["value"] for entry in accuracies if entry["value"] is not None]
    return sum(values) / len(values) if values else None


def auc(positive: Tensor, negative: Tensor) -> float:
    """Area under the ROC curve: the share of pairs in which a score of `positive` (m,) exceeds one
    of `negative` (n,); ties count one half."""
    difference = positive[:, None] - negative  # (m, n)
    return float((difference > 0).double().mean() + (difference == 0).double().mean() / 2)


def highest(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest of `values` (n,), highest first; equal ones in order."""
    return values.argsort(descending=True, stable=True)[:count]
