"""What a row says of an answer: accuracies before and after, carry-over, size."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from experiments.solvers import Answer
from experiments.world import Task, World


def cells(world: World, tasks: Sequence[Task], answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The measured cells of rows; None where there is no image to judge on.

    `forgotten_*` is the mean over the forgotten classes, `others_*` that over the other sets, and
    `others_worst` the change of the set that lost most; accuracies from 0 to 1.
    """
    requests = [task.request.classes for task in tasks]
    changes = [(answer.left.float(), answer.right.float()) for answer in answers]
    found = world.judge.after(requests, changes, [()] * len(changes))
    return [_row(world, *each) for each in zip(tasks, answers, found, strict=True)]


def _row(world: World, task: Task, answer: Answer, found: dict[str, Any]) -> dict[str, Any]:
    before = world.judge.before(task.request.classes)
    own = {"before": before.pop(world.bundle.dataset), "after": found.pop(world.bundle.dataset)}
    others = {
        side: {name: sets["all"]["all_ds"] for name, sets in accuracies.items()}
        for side, accuracies in (("before", before), ("after", found))
    }
    known = [name for name, accuracy in others["before"].items() if accuracy is not None]
    changes = [others["after"][name] - others["before"][name] for name in known]
    row: dict[str, Any] = {}
    for side, classes in own.items():
        row[f"forgotten_{side}"] = _mean(entry["cls_acc_test"] for entry in classes.values())
        row[f"rest_{side}"] = next(iter(classes.values()))["no_cls_acc"]
    for side, accuracies in others.items():
        row[f"others_{side}"] = _mean(accuracies.values())
    return {
        **row,
        "others_worst": min(changes, default=None),
        "carry": carry_over(world, task, answer),
        "reduction": reduction(task, answer),
        "norm": float(answer.delta.norm()),
        "seconds": answer.seconds,
        "texts": len(task.request.texts),
        **answer.facts,
    }


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
    return _mean(shares)


def reduction(task: Task, answer: Answer) -> float:
    """By what fraction the distance of the forgotten texts from their target fell."""
    before = answer.displacement.norm()
    left = (answer.displacement - task.request.hidden.double() @ answer.delta).norm()
    return float(1 - left / before) if before > 0 else 1.0


def _mean(values: Iterable[float | None]) -> float | None:
    values = [value for value in values if value is not None]
    return statistics.fmean(values) if values else None
