"""An adapter for a projection of any shape."""

from __future__ import annotations

import torch
from torch import Tensor

from forgetting import Adapter, projection_sha256


def make_adapter(projection: Tensor, seed: int = 5, rank: int = 2) -> Adapter:
    """A change of (w, d) about a third as large as the projection."""
    generator = torch.Generator().manual_seed(seed)
    w, d = projection.shape
    left, right = (torch.randn(*shape, generator=generator) for shape in ((w, rank), (rank, d)))
    scale = 0.3 * projection.float().norm() / (left @ right).norm()
    return Adapter(
        left=left * scale,
        right=right,
        projection_sha256=projection_sha256(projection),
        backbone="tiny",
        weights="random",
        dataset="Set",
        classes=["cat"],
        trainer="ForgetExact",
    )
