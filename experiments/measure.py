"""What a row says of an answer: accuracies, carry-over, size, and where in a spectrum it sits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from evaluation.results import join_label
from evaluation.rows import Change, Row, mean, rows_of
from experiments.solvers import Answer
from experiments.world import Task, World
from forgetting.problem import LowRankEdit

PARTS = 10
SIDES = {
    "left": "left singular directions of W",
    "right": "right singular directions of W",
    "gram": "eigen-directions of G",
}
ALIKE = 1e-6  # singular values within this fraction of each other have no order


def judged(
    world: World, requests: Sequence[list[str]], edits: Sequence[LowRankEdit]
) -> Iterator[list[Row]]:
    """The accuracies of each request's classes, before and after its change."""
    after = world.evaluator.after(requests, edits)
    for classes, accuracies in zip(requests, after, strict=True):
        entry = {"zero_shot": world.evaluator.before(classes), "final_results": accuracies}
        yield rows_of({world.bundle.dataset: {join_label(classes): entry}})


def sides(rows: Sequence[Row]) -> dict[str, Change]:
    """Of one request: the forgotten classes (mean), the rest of their set, other sets (mean)."""
    own = (mean(getattr(row.own, side) for row in rows) for side in ("before", "after"))
    return {"forgotten": Change(*own), "rest": rows[0].rest, "others": rows[0].others_mean}


def cells(world: World, tasks: Sequence[Task], answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The measured cells of rows; None where there is no image to judge on.

    Accuracies are from 0 to 1; `others_worst` is the change of the set that lost most.
    """
    requests = [task.request.classes for task in tasks]
    found = []
    for task, answer, rows in zip(tasks, answers, judged(world, requests, answers), strict=True):
        accuracies = sides(rows)
        losses = [x.points for x in rows[0].others.values() if x.points is not None]
        found.append(
            {
                **{f"{name}_before": change.before for name, change in accuracies.items()},
                **{f"{name}_after": change.after for name, change in accuracies.items()},
                "others_worst": min(losses) / 100 if losses else None,
                "carry": carry_over(world, task, answer),
                "reduction": reduction(task, answer),
                "norm": float(answer.delta.norm()),
                "seconds": answer.seconds,
                "texts": len(task.request.texts),
                **answer.facts,
            }
        )
    return found


def carry_over(world: World, task: Task, answer: Answer) -> float | None:
    """s(h) of the evaluation prompts, the mean over the forgotten classes.

    The part of a class's displacement D (the mean of its texts') that its evaluation prompt h
    makes, `<h Delta, D> / <D, D>`; for one text and an exact answer `h K^-1 h_f / h_f K^-1 h_f`.
    """
    owner, shares = torch.tensor(task.request.owner), []
    for index, name in enumerate(task.request.classes):
        d = answer.displacement[owner == index].mean(dim=0)  # (d,)
        prompt = world.bundle.class_hidden[world.texts.label[name]].double()  # (w,)
        moved = prompt @ answer.delta  # (w,) @ (w, d) -> (d,)
        if d.any():
            shares.append(float(moved @ d / (d @ d)))
    return mean(shares)


def reduction(task: Task, answer: Answer) -> float:
    """By what fraction the distance of the forgotten texts from their target fell."""
    before = answer.displacement.norm()
    left = (answer.displacement - task.request.hidden.double() @ answer.delta).norm()
    return float(1 - left / before) if before > 0 else 1.0


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
