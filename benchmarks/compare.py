"""The exact solver beside LoRA and the closed forms of others: one input, one table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.workload import Workload
from engine.config import settings
from evaluation.zero_shot import Factors, evaluate_classes
from forgetting import LoraSettings, solve_lora
from forgetting.baselines import ALPHA_DAMPING, null_space, uce_each
from forgetting.constrained import Ridge, solve_constrained
from forgetting.each import solve_each
from forgetting.retain import RetainStatistics
from forgetting.targets import opposite_target, specific_target

COMPARED = 30  # classes at most: the null space takes an eigendecomposition for each
LORA_CLASSES = 3
LARGE_ERASE = 1e4  # so large that the forgotten text lands on its target
Answers = list[Factors]  # a class: left (w, 1), right (1, d), float64


@dataclass(frozen=True)
class LoraRuns:
    """One trial for each of a few classes: what it took, and what it found."""

    classes: list[int]
    seconds: list[float]
    answers: Answers


def spread(work: Workload, count: int) -> list[int]:
    """`count` classes (all, if there are fewer), evenly over the set."""
    total = len(work.classes)
    count = min(count, total)
    return [index * total // count for index in range(count)]


def run_lora(work: Workload, lamb_forget: float) -> LoraRuns:
    """One trial of 2,000 steps for a few classes, in float32 as the trainer does."""
    chosen, seconds, answers = spread(work, LORA_CLASSES), [], []
    for index in chosen:
        problem = work.alone(index, lamb_forget, torch.float32)
        started = time.perf_counter()
        solution = solve_lora(problem, LoraSettings(max_trials=1))
        seconds.append(time.perf_counter() - started)
        answers.append((solution.left.double(), solution.right.double()))
    return LoraRuns(chosen, seconds, answers)


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
    return {"lamb_forget": lamb_forget, "methods": rows}


class Score:
    """Judges answers by the paper's objective, relative to the optimum, and by the images."""

    def __init__(self, work: Workload, lamb_forget: float) -> None:
        self.work, self.lamb_forget = work, lamb_forget
        everything = torch.arange(len(work.classes))
        self.optimum = solve_each(work.problem(lamb_forget), everything).primal

    def ratio(self, index: int, answer: Factors) -> float:
        """The objective of a class's answer over its optimum, in float64."""
        left, right = answer
        objective = self.work.alone(index, self.lamb_forget).objective(left @ right)
        return float(objective / self.optimum[index])

    def accuracies(self, index: int, answer: Factors) -> tuple[float | None, float | None]:
        """Accuracy on the forgotten class and on the rest; None without such images."""
        bundle = self.work.bundle
        if bundle is None:
            return None, None
        name = bundle.classnames[index]
        left, right = answer
        after = evaluate_classes(bundle, [name], (left.float(), right.float()))[name]
        return after["cls_acc_test"], after["no_cls_acc"]

    def row(self, name: str, classes: list[int], seconds: float, answers: Answers) -> dict:
        """One row of `closed_forms`."""
        pairs = list(zip(classes, answers, strict=True))
        columns = zip(*(self.accuracies(*pair) for pair in pairs), strict=True)
        forgotten, rest = (
            None if None in column else statistics.fmean(column) for column in columns
        )
        return {
            "method": name,
            "classes": len(classes),
            "seconds_per_class": seconds,
            "objective_over_exact": statistics.fmean(self.ratio(*pair) for pair in pairs),
            "forgotten_accuracy": forgotten,
            "rest_accuracy": rest,
        }


def _unchanged(work: Workload, chosen: list[int]) -> Answers:
    w, d = work.projection.shape
    zero = torch.zeros(w, 1, dtype=torch.float64), torch.zeros(1, d, dtype=torch.float64)
    return [zero] * len(chosen)


def _exact(work: Workload, lamb_forget: float, chosen: list[int]) -> Answers:
    own = torch.tensor(chosen)
    solution = solve_each(work.problem(lamb_forget, own), own)
    return [(solution.left[i, :, None], solution.right[i, None]) for i in range(len(chosen))]


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
    node, beta = cfg.TRAINER.FORGETEXACT, cfg.FORGET.BETA
    names = RetainStatistics(work.projection.shape[0])
    names.update("own", work.classes)
    names.update("vocabulary", work.vocabulary)
    known = {"own": node.OWN, "vocabulary": node.VOCABULARY}
    weights = {group: known[group] for group in names.counts}
    gram, w = names.weighted(weights), work.projection.double()
    total = sum(weights.values())
    ridge = Ridge(gram, node.MU * float(gram.trace()) / total)
    lam = node.SHARED * float((gram @ w @ w.T).trace()) / total
    share = torch.tensor([names.share("own", weights)], dtype=torch.float64)
    answers = []
    for index in chosen:
        h = work.classes[index, None].double()  # (1, w)
        if kind == "specific":
            target = specific_target(h, w, gram - share * h.T @ h, lam, beta)
        else:
            target = opposite_target(h, w, beta)
        solution = solve_constrained(ridge, h, target - h @ w, h, share)
        answers.append((solution.left, solution.right))
    return answers
