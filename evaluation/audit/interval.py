"""Confidence intervals of accuracies."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import betaincinv
from torch import Tensor

LEVEL = 0.95
Accuracy = dict[str, Any]  # {"value", "low", "high", "n"}: fractions, and the number of images


def accuracy(correct: Tensor) -> Accuracy:
    """The mean of (n,) booleans, as `share` has it."""
    return share(int(correct.sum()), correct.numel())


def share(right: int, n: int) -> Accuracy:
    """How many of n are right, with the exact (Clopper-Pearson) 95 % interval.

    It holds the true share at least so often however few images there are, and is not a point where
    all of them agree: for 0 of n it ends near 3.7 / n. Its ends are quantiles of beta
    distributions, the same that `scipy.stats.binomtest(right, n).proportion_ci()` searches for.

    Returns:
        value, low, high: None without an image; n.
    """
    if n == 0:
        return {"value": None, "low": None, "high": None, "n": 0}
    tail = (1 - LEVEL) / 2
    low = float(betaincinv(right, n - right + 1, tail)) if right > 0 else 0.0
    high = float(betaincinv(right + 1, n - right, 1 - tail)) if right < n else 1.0
    return {"value": right / n, "low": low, "high": high, "n": n}


def mean_value(accuracies: list[Accuracy]) -> float | None:
    """The plain mean of the values that were measured; None if none was."""
    values = [entry["value"] for entry in accuracies if entry["value"] is not None]
    return float(np.mean(values)) if values else None
