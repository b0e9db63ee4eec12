"""The three solvers that a study compares: the paper's descent, its optimum, the constrained form.

    lora        the paper's objective by Adam on LoRA factors, with its retry
    optimum     the same objective at its exact optimum
    constrained the default of ForgetExact: texts land on their target at the least disturbance

`lora` and `optimum` always solve the same problem, so that the second shows what the first misses.
Tasks of one setting are one computation (`together`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from engine.config import paper_weights
from experiments.world import Task, World
from forgetting import (
    AUTO,
    ForgetProblem,
    Ridge,
    Spectrum,
    settle,
    solve_constrained_each,
    solve_each,
    solve_exact,
    solve_lora_each,
    thresholds,
)
from trainers.requests import Requests

DEFAULT_TARGETS = {"lora": "empty", "optimum": "empty", "constrained": "specific"}
MAX_TRIALS = 3  # of the descent's retry: a weight below c* is raised beforehand, so one is enough
FEW = 32  # names that leave: with more of them each task is solved by itself


@dataclass(frozen=True)
class Answer:
    """`Delta = left @ right` of a task.

    Attributes:
        left: (w, r), right: (r, d), float64.
        displacement: `D` (k, d) float64, where the texts were to go.
        seconds: the task's part of this process's CPU (one thread), from rows to factors: a busy
            machine does not lengthen them.
        facts: further cells of its row: retained, objective, gap, and for the paper's objective
            lamb_forget, auto and trials.
    """

    left: Tensor
    right: Tensor
    displacement: Tensor
    seconds: float
    facts: dict[str, Any]

    @cached_property
    def delta(self) -> Tensor:
        """(w, d) float64."""
        return self.left @ self.right


@dataclass(frozen=True)
class Optimum:
    """The proved optimum of one task: its factors, certificate, c* and weight."""

    left: Tensor
    right: Tensor
    primal: float
    bound: float
    gap: float
    reach: float
    lamb_forget: float


@dataclass(frozen=True)
class Paper:
    """The paper's problem for the tasks of one setting; see `solve_lora_each`."""

    problem: ForgetProblem
    owner: Tensor
    leaving: Tensor

    def of(self, numbers: Sequence[int]) -> Paper:
        """That of some of the tasks, in ascending order."""
        chosen = torch.tensor(numbers)
        mine = torch.isin(self.owner, chosen)
        owner = torch.searchsorted(chosen, self.owner[mine])
        return Paper(self.problem.part(mine), owner, self.leaving[chosen])

    def alone(self, number: int) -> ForgetProblem:
        """The problem of one task by itself."""
        return self.problem.part(self.owner == number, ~self.leaving[number])

    def weighing(self, lamb_forget: float | str) -> Paper:
        """The same with another `lamb_forget`."""
        return replace(self, problem=replace(self.problem, lamb_forget=lamb_forget))

    def optima(self) -> list[Optimum]:
        """The optimum of each task."""
        single = len(self.owner) == len(self.leaving)
        if not single or int(self.leaving.sum(dim=1).max()) > FEW:
            return [_optimum(self.alone(number)) for number in range(len(self.leaving))]
        each = solve_each(self.problem.part(self.owner.argsort()), self.leaving)
        columns = (each.primal, each.bound, each.gap, each.reach, each.lamb_forget)
        numbers = torch.stack(columns, dim=1).tolist()
        factors = zip(each.left[:, :, None], each.right[:, None], strict=True)
        return [Optimum(*pair, *rest) for pair, rest in zip(factors, numbers, strict=True)]


def paper_problem(
    world: World, tasks: Sequence[Task], generators: Sequence[torch.Generator]
) -> Paper:
    """The paper's problem; what targets draw comes from the generators, one a task."""
    first, requests = tasks[0], Requests([task.request for task in tasks])
    cfg, w = world.paper[len(first.request.classes) > 1], world.bundle.text_projection
    retain, leaving = world.retained(tasks, requests)
    weights = paper_weights(cfg) | ({f"lamb_{first.off}": 0.0} if first.off else {})
    problem = ForgetProblem(
        projection=w,
        forget_hidden=requests.hidden,
        retain_hidden=retain.rows,
        target=world.target(first, requests, generators, retain, leaving).to(w),
        rank=first.rank,
        alpha=cfg.FORGET.ALPHA,
        **weights,
    )
    return Paper(problem, requests.of_text, requests.any_of(leaving))


def settled(paper: Paper) -> tuple[list[Optimum], list[int]]:
    """The optima, and the tasks for which `lamb_forget` was raised.

    Where the config's weight lies below c* it is raised to just above it, as the paper's retry
    would; a target that no weight reaches keeps the config's.
    """
    found, weight = paper.optima(), paper.problem.lamb_forget
    if weight == AUTO:
        return found, list(range(len(found)))
    low = [i for i, each in enumerate(found) if 0 < weight <= each.reach < float("inf")]
    if low:
        for number, optimum in zip(low, paper.of(low).weighing(AUTO).optima(), strict=True):
            found[number] = optimum
    return found, low


def generators_of(world: World, tasks: Sequence[Task]) -> list[torch.Generator]:
    """The random numbers that a run of train.py has for the classes of each task."""
    return [world.generator(task.request.classes) for task in tasks]


def by_lora(world: World, tasks: Sequence[Task]) -> list[Answer]:
    """The paper's descent. `gap` is measured against the bound that the exact solver proves."""
    generators = generators_of(world, tasks)
    paper = paper_problem(world, tasks, generators)
    optima, raised = settled(paper)
    settings = replace(world.descent, max_trials=min(MAX_TRIALS, world.descent.max_trials))
    rest = [number for number in range(len(tasks)) if number not in raised]
    found, started = {}, time.process_time()
    for numbers, part in ((rest, paper), (raised, paper.weighing(AUTO))):
        if numbers:
            part, draws = part.of(numbers), [generators[number] for number in numbers]
            solved = solve_lora_each(part.problem, part.owner, part.leaving, draws, settings)
            found |= dict(zip(numbers, solved, strict=True))
    seconds = (time.process_time() - started) / len(tasks)
    answers = []
    for number, optimum in enumerate(optima):
        solution, problem = found[number], paper.alone(number)
        problem = replace(problem, lamb_forget=solution.lamb_forget)
        left, right = solution.left.double(), solution.right.double()
        reached, bound = float(problem.objective(left @ right)), optimum.bound
        if solution.lamb_forget != optimum.lamb_forget:  # a later trial of the retry
            bound = solve_exact(problem).certificate.bound
        facts = {
            "retained": len(problem.retain_hidden),
            "objective": reached,
            "gap": max(0.0, reached - bound) / reached if reached > 0 else 0.0,
            "lamb_forget": solution.lamb_forget,
            "auto": number in raised,
            "trials": len(solution.trials),
        }
        answers.append(Answer(left, right, problem.double.displacement, seconds, facts))
    return answers


def by_optimum(world: World, tasks: Sequence[Task]) -> list[Answer]:
    """The paper's objective at its optimum, with its certificate."""
    paper = paper_problem(world, tasks, generators_of(world, tasks))
    started = time.process_time()
    optima, raised = settled(paper)
    seconds = (time.process_time() - started) / len(tasks)
    answers = []
    for number, optimum in enumerate(optima):
        problem = paper.alone(number)
        facts = {
            "retained": len(problem.retain_hidden),
            "objective": optimum.primal,
            "gap": optimum.gap,
            "lamb_forget": optimum.lamb_forget,
            "auto": number in raised,
        }
        displacement = problem.double.displacement
        answers.append(Answer(optimum.left, optimum.right, displacement, seconds, facts))
    return answers


def by_constrained(world: World, tasks: Sequence[Task]) -> list[Answer]:
    """The constrained form; its objective is `tr Delta^T (G + mu I) Delta`."""
    requests = Requests([task.request for task in tasks])
    retain, leaving = world.retained(tasks, requests)
    target = world.target(tasks[0], requests, generators_of(world, tasks), retain, leaving)
    w, gone = world.bundle.text_projection.double(), requests.any_of(leaving)
    displacement = target.double() - requests.hidden.double() @ w  # (K, d)
    started = time.process_time()
    solutions = solve_constrained_each(
        *(Ridge(retain.gram, world.mu), requests.hidden, displacement, requests.of_text),
        *(retain.rows, retain.shares, gone),
    )
    seconds = (time.process_time() - started) / len(tasks)
    answers = []
    for number, solution in enumerate(solutions):
        proof = solution.certificate
        facts = {
            "retained": int((~gone[number]).sum()),
            "objective": proof.primal,
            "gap": proof.gap,
        }
        mine = displacement[requests.of_text == number]
        answers.append(Answer(solution.left, solution.right, mine, seconds, facts))
    return answers


SOLVERS: dict[str, Callable[[World, Sequence[Task]], list[Answer]]] = {
    "lora": by_lora,
    "optimum": by_optimum,
    "constrained": by_constrained,
}


def together(tasks: Iterable[Task]) -> list[list[Task]]:
    """Tasks in groups that are one computation: those of one solver in one setting.

    Descents of one setting share the names that any of them retains; the exact solvers have
    nothing to share where names are picked.
    """
    groups: dict[tuple, list[Task]] = {}
    for number, task in enumerate(tasks):
        alone = task.pick is not None and task.solver != "lora"
        several = len(task.request.classes) > 1
        key = (task.solver, task.setting, several, number if alone else None)
        groups.setdefault(key, []).append(task)
    return list(groups.values())


def _optimum(problem: ForgetProblem) -> Optimum:
    spectrum = Spectrum(problem.retain_hidden)
    reach, problem = thresholds(problem, spectrum).reach, settle(problem, spectrum)
    solution = solve_exact(problem, spectrum)
    proof = solution.certificate
    factors = (solution.left, solution.right)
    return Optimum(*factors, proof.primal, proof.bound, proof.gap, reach, problem.lamb_forget)
