"""The exact solver beside LoRA and the closed forms of others: one input, one table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.workload import Workload, constants
from engine.config import settings
from evaluation.zero_shot import Factors, ZeroShot, own_accuracies
from forgetting import (
    Group,
    LoraSettings,
    RetainSet,
    opposite_target,
    solve_constrained_each,
    solve_lora_each,
    specific_target,
)
from forgetting.baselines import ALPHA_DAMPING, null_space, uce_each

COMPARED = 30  # classes at most: the null space takes an eigendecomposition for each
LORA_CLASSES = 3
LARGE_ERASE = 1e4  # so large that the forgotten text lands on its target
Answers = list[Factors]  # a class: left (w, 1), right (1, d), float64


@dataclass(frozen=True)
class LoraRuns:
    """One trial for each of a few classes: what it took (each by itself, then a class where all
    descend together), and what it found."""

    classes: list[int]
    seconds: list[float]
    together: float
    answers: Answers


def spread(work: Workload, count: int) -> list[int]:
    """`count` classes (all, if there are fewer), evenly over the set."""
    total = len(work.classes)
    count = min(count, total)
    return [index * total // count for index in range(count)]


def run_lora(work: Workload, lamb_forget: float) -> LoraRuns:
    """One trial of 2,000 steps for a few classes, in float32 as the trainer does."""
    chosen = spread(work, LORA_CLASSES)
    node = constants().TRAINER.FORGETLORA
    one_trial = LoraSettings(**{key.lower(): x for key, x in node.items()} | {"max_trials": 1})

    def descend(classes: list[int]) -> tuple[float, Answers]:
        problem, leaving = work.problem(lamb_forget, classes), work.leaving(classes)
        generators = [torch.Generator().manual_seed(0) for _ in classes]
        owner = torch.arange(len(classes))
        started = time.perf_counter()
        solutions = solve_lora_each(problem, owner, leaving, generators, one_trial)
        seconds = (time.perf_counter() - started) / len(classes)
        return seconds, [(found.left.double(), found.right.double()) for found in solutions]

    alone = [descend([index]) for index in chosen]
    together, _ = descend(chosen)
    seconds, answers = zip(*alone, strict=True)
    return LoraRuns(chosen, list(seconds), together, [answer for (answer,) in answers])


def closed_forms(work: Workload, lamb_forget: float, lora: LoraRuns) -> dict:
    """Every method on the same classes, each forgotten alone.

    Returns:
        `lamb_forget`, and `methods`: a row a method with the number of `classes`,
        `seconds_per_class` (everything from hidden states to answers, divided by the classes: what
        classes share is shared; exact and constrained with their proofs), the means of
        `objective_over_exact` (the paper's objective at the answer over its optimum), and of
        `forgotten_accuracy` and `rest_accuracy` (None without images).
    """
    chosen, few = spread(work, COMPARED), lora.classes
    d = work.target.double() - work.classes.double() @ work.projection.double()  # (C, d)
    methods: dict[str, tuple[list[int], Callable[[], Answers]]] = {
        "exact, paper's objective": (chosen, lambda: _exact(work, lamb_forget, chosen)),
        "constrained, specific": (chosen, lambda: _constrained(work, chosen, "specific")),
        "constrained, opposite": (chosen, lambda: _constrained(work, chosen, "opposite")),
        "UCE": (chosen, lambda: _uce(work, chosen, d, 1.0)),
        f"UCE, erase scale {LARGE_ERASE:g}": (chosen, lambda: _uce(work, chosen, d, LARGE_ERASE)),
        "null space": (chosen, lambda: _null_space(work, chosen, d, 0.0)),
        "AlphaEdit": (chosen, lambda: _null_space(work, chosen, d, ALPHA_DAMPING)),
        "exact, LoRA's classes": (few, lambda: _exact(work, lamb_forget, few)),
    }
    score = Score(work, lamb_forget)
    rows = [score.row("before (no change)", chosen, 0.0, _unchanged(work, chosen))]
    for name, (classes, method) in methods.items():
        started = time.perf_counter()
        answers = method()
        seconds = (time.perf_counter() - started) / len(classes)
        rows.append(score.row(name, classes, seconds, answers))
    rows.append(score.row("LoRA, one trial", few, statistics.median(lora.seconds), lora.answers))
    rows.append(score.row("LoRA, together", few, lora.together, lora.answers))
    return {"lamb_forget": lamb_forget, "methods": rows}


class Score:
    """Judges answers by the paper's objective, relative to the optimum, and by the images."""

    def __init__(self, work: Workload, lamb_forget: float) -> None:
        self.work, self.lamb_forget = work, lamb_forget
        self.images = ZeroShot(work.bundle) if work.bundle and len(work.bundle.labels) else None
        self.optimum = work.solve(lamb_forget).primal

    def ratio(self, index: int, answer: Factors) -> float:
        """The objective of a class's answer over its optimum, in float64."""
        left, right = answer
        objective = self.work.alone(index, self.lamb_forget).objective(left @ right)
        return float(objective / self.optimum[index])

    def accuracies(self, classes: list[int], answers: Answers) -> dict[str, float | None]:
        """Means of the accuracy on the forgotten class and on the rest; None without images."""
        columns: dict[str, list[float | None]] = {"cls_acc_test": [None], "no_cls_acc": [None]}
        if self.images:
            bundle = self.images.bundle
            correct = self.images.correct(
                [(left.float(), right.float()) for left, right in answers]
            )
            names = [bundle.classnames[index] for index in classes]
            found = [
                own_accuracies(bundle, [name], hits)[name]
                for name, hits in zip(names, correct, strict=True)
            ]
            columns = {key: [entry[key] for entry in found] for key in columns}
        forgotten, rest = (
            None if None in column else statistics.fmean(column) for column in columns.values()
        )
        return {"forgotten_accuracy": forgotten, "rest_accuracy": rest}

    def row(self, name: str, classes: list[int], seconds: float, answers: Answers) -> dict:
        """One row of `closed_forms`."""
        ratios = [self.ratio(*pair) for pair in zip(classes, answers, strict=True)]
        return {
            "method": name,
            "classes": len(classes),
            "seconds_per_class": seconds,
            "objective_over_exact": statistics.fmean(ratios),
            **self.accuracies(classes, answers),
        }


def _unchanged(work: Workload, chosen: list[int]) -> Answers:
    w, d = work.projection.shape
    zero = torch.zeros(w, 1, dtype=torch.float64), torch.zeros(1, d, dtype=torch.float64)
    return [zero] * len(chosen)


def _exact(work: Workload, lamb_forget: float, chosen: list[int]) -> Answers:
    solution = work.solve(lamb_forget, chosen)
    return list(zip(solution.left[:, :, None], solution.right[:, None], strict=True))


def _uce(work: Workload, chosen: list[int], d: Tensor, erase: float) -> Answers:
    retained = work.retained.double()
    left = uce_each(work.classes[chosen].double(), retained.T @ retained, erase)
    return [(left[:, i, None], d[index, None]) for i, index in enumerate(chosen)]


def _null_space(work: Workload, chosen: list[int], d: Tensor, damping: float) -> Answers:
    retained, answers = work.retained.double(), []
    gram = retained.T @ retained
    for index in chosen:
        h = retained[index, None]  # (1, w)
        left = null_space(h, gram - h.T @ h, len(retained) - 1, damping)
        answers.append((left, d[index, None]))
    return answers


def _constrained(work: Workload, chosen: list[int], kind: str) -> Answers:
    """The trainer ForgetExact with its defaults, other sets' names left out."""
    cfg = settings("ForgetExact")
    node, beta, w = cfg.TRAINER.FORGETEXACT, cfg.FORGET.BETA, work.projection.double()
    groups = {"own": (work.classes, node.OWN), "vocabulary": (work.vocabulary, node.VOCABULARY)}
    retain = RetainSet({g: Group([g] * len(rows), rows, x) for g, (rows, x) in groups.items()})
    names = (retain.rows, retain.shares, work.leaving(chosen))
    hidden = work.classes[chosen].double()
    if kind == "specific":
        lam = node.SHARED * float((retain.gram @ w @ w.T).trace()) / float(retain.shares.sum())
        target = specific_target(hidden, w, retain.gram, lam, beta, *names)
    else:
        target = opposite_target(hidden, w, beta)
    owner = torch.arange(len(chosen))
    solutions = solve_constrained_each(
        retain.ridge(node.MU), hidden, target - hidden @ w, owner, *names
    )
    return [(solution.left, solution.right) for solution in solutions]
