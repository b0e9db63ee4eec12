"""The first few of many, without sorting them all."""

from __future__ import annotations

import torch
from torch import Tensor


def highest(values: Tensor, count: int) -> Tensor:
    """Places of the `count` highest of n values, or of all, highest first; equal ones in order.

    Args:
        values: (n,), no NaN among them.
    """
    if not len(values) or not count:
        return torch.arange(0)
    least = values.topk(min(count, len(values))).values[-1]
    some = (values >= least).nonzero()[:, 0]
    return some[values[some].argsort(descending=True, stable=True)[:count]]
