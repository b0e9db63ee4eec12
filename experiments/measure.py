"""What a row says of an answer: accuracies before and after, carry-over, size."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from evaluation.zero_shot import Factors, evaluate_classes, evaluate_set
from experiments.solvers import Answer
from experiments.world import Task, World


class Judge:
    """Accuracies of one data set's changes; what held before is computed once."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._before: dict[tuple[int, ...], dict[str, float | None]] = {}
        self._others = self._of_others(None)

    def row(self, task: Task, answer: Answer) -> dict[str, Any]:
        """The measured cells of a row; None where there is no image to judge on.

        `forgotten_*` is the mean over the forgotten classes, `others_*` that over the other sets,
        and `others_worst` the change of the set that lost most; accuracies from 0 to 1.
        """
        if task.labels not in self._before:
            self._before[task.labels] = self._own(task.labels, None)
        factors = (answer.left.float(), answer.right.float())
        before, after = self._before[task.labels], self._own(task.labels, factors)
        others = self._of_others(factors)
        changes = [others[name] - accuracy for name, accuracy in self._others.items()]
        return {
            **{f"{key}_before": value for key, value in before.items()},
            **{f"{key}_after": value for key, value in after.items()},
            "others_before": _mean(self._others.values()),
            "others_after": _mean(others.values()),
            "others_worst": min(changes, default=None),
            "carry": carry_over(self.world, task, answer),
            "reduction": reduction(task, answer),
            "norm": float(answer.delta.norm()),
            "seconds": answer.seconds,
            "texts": len(task.texts),
            **answer.facts,
        }

    def _own(self, labels: tuple[int, ...], factors: Factors | None) -> dict[str, float | None]:
        bundle = self.world.bundle
        names = [bundle.classnames[label] for label in labels]
        found = list(evaluate_classes(bundle, names, factors).values())
        own = [entry["cls_acc_test"] for entry in found if entry["cls_acc_test"] is not None]
        return {"forgotten": _mean(own), "rest": found[0]["no_cls_acc"]}

    def _of_others(self, factors: Factors | None) -> dict[str, float]:
        found = {name: evaluate_set(b, factors) for name, b in self.world.others.items()}
        return {name: accuracy for name, accuracy in found.items() if accuracy is not None}


def carry_over(world: World, task: Task, answer: Answer) -> float | None:
    """s(h) of the evaluation prompts, the mean over the forgotten classes.

    The part of a class's displacement D (the mean of its texts') that its evaluation prompt h
    makes, `<h Delta, D> / <D, D>`; for one text and an exact answer `h K^-1 h_f / h_f K^-1 h_f`.
    """
    owner, shares = torch.tensor(task.owner), []
    for index, label in enumerate(task.labels):
        d = answer.displacement[owner == index].mean(dim=0)  # (d,)
        moved = world.bundle.class_hidden[label].double() @ answer.delta  # (w,) @ (w, d) -> (d,)
        if d.any():
            shares.append(float(moved @ d / (d @ d)))
    return _mean(shares)


def reduction(task: Task, answer: Answer) -> float:
    """By what fraction the distance of the forgotten texts from their target fell."""
    before = answer.displacement.norm()
    left = (answer.displacement - task.texts.double() @ answer.delta).norm()
    return float(1 - left / before) if before > 0 else 1.0


def _mean(values: Any) -> float | None:
    values = list(values)
    return statistics.fmean(values) if values else None
