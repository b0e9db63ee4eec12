"""Confidence intervals of accuracies: the bootstrap over images, without its random numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import beta, binom
from torch import Tensor

LEVEL = 0.95
Accuracy = dict[str, Any]  # {"value", "low", "high", "n"}: fractions, and the number of images


def accuracy(correct: Tensor) -> Accuracy:
    """The mean of (n,) booleans with the 95 % percentile bootstrap interval over images.

    Drawing n images with replacement from k right ones among n makes the number of right ones
    Binomial(n, k / n), so the bootstrap's distribution is known and nothing needs to be drawn.
    Where all images agree the bootstrap sees no spread at all; there the exact (Clopper-Pearson)
    interval stands instead, which for 0 of n ends near 3.7 / n.

    Returns:
        value, low, high: None without an image; n.
    """
    n, k = int(correct.numel()), int(correct.sum())
    if n == 0:
        return {"value": None, "low": None, "high": None, "n": 0}
    tail = (1 - LEVEL) / 2
    if 0 < k < n:
        low, high = (float(binom.ppf(q, n, k / n)) / n for q in (tail, 1 - tail))
    else:
        low = 0.0 if k == 0 else float(beta.ppf(tail, n, 1))
        high = 1.0 if k == n else float(beta.ppf(1 - tail, 1, n))
    return {"value": k / n, "low": low, "high": high, "n": n}


def mean_value(accuracies: list[Accuracy]) -> float | None:
    """The plain mean of the values that were measured; None if none was."""
    values = [entry["value"] for entry in accuracies if entry["value"] is not None]
    return float(np.mean(values)) if values else None
