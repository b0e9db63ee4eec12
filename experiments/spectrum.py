"""Where in a spectrum a change sits."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.solvers import Answer
from experiments.world import Task, World

PARTS = 10
SIDES = {
    "left": "left singular directions of W",
    "right": "right singular directions of W",
    "gram": "eigen-directions of G",
}
ALIKE = 1e-6  # singular values within this fraction of each other have no order


def deciles(basis: Tensor, delta: Tensor) -> list[float]:
    """Share of `||Delta||^2` in each tenth of a basis, first to last; they sum to 1.

    Args:
        basis: (w, w) orthonormal columns in order; delta: (w, d), not zero. Where w is no multiple
            of ten the tenths differ by one direction (see `random_shares`).
    """
    square = (basis.T @ delta).square().sum(dim=1)  # (w,)
    return [float(part.sum() / square.sum()) for part in square.tensor_split(PARTS)]


def random_shares(width: int) -> list[float]:
    """What a change of independent normal entries has in each tenth on average: its size."""
    return [len(part) / width for part in torch.arange(width).tensor_split(PARTS)]


def spectrum_cells(world: World, task: Task, answer: Answer) -> dict[str, float | None]:
    """Cells `left_1` to `left_10`, `right_*` and `gram_*` of a row.

    The left and right singular directions of W from the largest value down; the eigen-directions
    of the G that this solver retains by default (`H_r^T H_r`, weighted for the constrained form),
    from the largest down. None where nothing moved, and for W where all singular values are alike,
    so that its directions are arbitrary.
    """
    delta, (u, values, vh) = answer.delta, world.singular
    distinct = float(values[0] - values[-1]) > ALIKE * float(values[0])
    eigen = torch.linalg.eigh(world.gram(task)).eigenvectors.flip(1)
    sides = {
        "left": (u, delta) if distinct else None,
        "right": (vh.T, delta.T) if distinct else None,
        "gram": (eigen, delta),
    }
    cells: dict[str, float | None] = {}
    for name, side in sides.items():
        shares = deciles(*side) if side and delta.any() else [None] * PARTS
        cells |= {f"{name}_{number}": share for number, share in enumerate(shares, start=1)}
    return cells
