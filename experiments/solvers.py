"""The three solvers that a study compares: the paper's descent, its optimum, the constrained form.

    lora        the paper's objective by Adam on LoRA factors, with its retry
    optimum     the same objective at its exact optimum
    constrained the default of ForgetExact: texts land on their target at the least disturbance

`lora` and `optimum` always solve the same problem, so that the second shows what the first misses.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from experiments.world import Task, World
from forgetting import (
    ForgetProblem,
    Ridge,
    Spectrum,
    auto_lamb_forget,
    solve_constrained,
    solve_exact,
    solve_lora,
    thresholds,
)

DEFAULT_TARGETS = {"lora": "empty", "optimum": "empty", "constrained": "specific"}


@dataclass(frozen=True)
class Answer:
    """`Delta = left @ right` of a task.

    Attributes:
        left: (w, r), right: (r, d), float64.
        displacement: `D` (k, d) float64, where the texts were to go.
        seconds: of this process's CPU (one thread), from rows to factors: a busy machine does not
            lengthen them.
        facts: further cells of its row: retained, objective, gap, and for the paper's objective
            lamb_forget, auto and trials.
    """

    left: Tensor
    right: Tensor
    displacement: Tensor
    seconds: float
    facts: dict[str, Any]


def paper_problem(world: World, task: Task) -> tuple[ForgetProblem, bool, torch.Generator]:
    """The paper's problem, whether its `lamb_forget` was raised, and the descent's random numbers.

    Where the config's weight lies below c* it is raised to just above it, as the paper's retry
    would; a target that no weight reaches keeps the config's.
    """
    constants, w = world.constants, world.bundle.text_projection
    generator = world.generator(task.labels)
    preserve, forget = constants.pair(len(task.labels))
    weights = {"preserve": preserve, "forget": forget, "weight": constants.lamb_weight}
    problem = ForgetProblem(
        projection=w,
        forget_hidden=task.texts,
        retain_hidden=world.plain(task),
        target=world.target(task, generator).to(w),
        rank=task.rank,
        alpha=constants.alpha,
        **{f"lamb_{k}": 0.0 if k == task.off else value for k, value in weights.items()},
    )
    spectrum = Spectrum(problem.retain_hidden)
    if problem.lamb_forget == 0:
        return problem, False, generator
    low = problem.lamb_forget <= thresholds(problem, spectrum).reach < float("inf")
    if low:
        problem = replace(problem, lamb_forget=auto_lamb_forget(problem, spectrum))
    return problem, low, generator


def by_lora(world: World, task: Task) -> Answer:
    """The paper's descent. `gap` is measured against the bound that the exact solver proves."""
    problem, raised, generator = paper_problem(world, task)
    started = time.process_time()
    solution = solve_lora(problem, world.constants.lora, generator)
    seconds = time.process_time() - started
    left, right = solution.left.double(), solution.right.double()
    problem = replace(problem, lamb_forget=solution.lamb_forget)
    reached, bound = _objective(problem, left @ right), solve_exact(problem).certificate.bound
    facts = {
        "retained": len(problem.retain_hidden),
        "objective": reached,
        "gap": max(0.0, reached - bound) / reached if reached > 0 else 0.0,
        "lamb_forget": solution.lamb_forget,
        "auto": raised,
        "trials": len(solution.trials),
    }
    return Answer(left, right, _displacement(problem), seconds, facts)


def by_optimum(world: World, task: Task) -> Answer:
    """The paper's objective at its optimum, with its certificate."""
    problem, raised, _ = paper_problem(world, task)
    started = time.process_time()
    solution = solve_exact(problem)
    seconds = time.process_time() - started
    facts = {
        "retained": len(problem.retain_hidden),
        "objective": solution.certificate.primal,
        "gap": solution.certificate.gap,
        "lamb_forget": problem.lamb_forget,
        "auto": raised,
    }
    return Answer(solution.left, solution.right, _displacement(problem), seconds, facts)


def by_constrained(world: World, task: Task) -> Answer:
    """The constrained form; its objective is `tr Delta^T (G + mu I) Delta`."""
    target = world.target(task, world.generator(task.labels))
    texts = task.texts.double()
    displacement = target.double() - texts @ world.bundle.text_projection.double()  # (k, d)
    rows, _ = world.weighted(task)
    started = time.process_time()
    solution = solve_constrained(Ridge(world.gram(task), world.mu), texts, displacement)
    seconds = time.process_time() - started
    proof = solution.certificate
    facts = {"retained": len(rows), "objective": proof.primal, "gap": proof.gap}
    return Answer(solution.left, solution.right, displacement, seconds, facts)


SOLVERS: dict[str, Callable[[World, Task], Answer]] = {
    "lora": by_lora,
    "optimum": by_optimum,
    "constrained": by_constrained,
}


def _displacement(problem: ForgetProblem) -> Tensor:
    return problem.target.double() - problem.forget_hidden.double() @ problem.projection.double()


def _objective(problem: ForgetProblem, delta: Tensor) -> float:
    """In float64: rounding in float32 exceeds the difference between good answers."""
    names = ("projection", "forget_hidden", "retain_hidden", "target")
    exact = replace(problem, **{name: getattr(problem, name).double() for name in names})
    return float(exact.objective(delta))
