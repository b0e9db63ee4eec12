"""The three solvers that a study compares: the paper's descent, its optimum, the constrained form.

    lora        the paper's objective by Adam on LoRA factors, with its retry
    optimum     the same objective at its exact optimum
    constrained the form of ForgetExact: texts land on their target at the least disturbance; with
                the beta that is given, and no other wordings than those of the task

`lora` and `optimum` always solve the same problem, so that the second shows what the first misses.
Tasks of one setting are one computation (`together`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.config import paper_weights
from evaluation.zero_shot import Factors
from experiments.world import Task, World
from forgetting import (
    AUTO,
    ForgetProblem,
    Ridge,
    solve_constrained_each,
    solve_exact,
    solve_lora_each,
    solve_requests,
)
from forgetting.problem import Batch

DEFAULT_TARGETS = {"lora": "empty", "optimum": "empty", "constrained": "specific"}
MAX_TRIALS = 3  # of the descent's retry: a weight below c* is raised beforehand, so one is enough
FEW = 32  # names that leave: with more of them each optimum is found by itself
Optimum = tuple[Tensor, Tensor, dict[str, Any]]  # of `forgetting.solve_requests`


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


class Paper(NamedTuple):
    """The paper's problem for R tasks: of all their texts, the task of each text (K,), and which
    names leave with a task, (R, m)."""

    problem: ForgetProblem
    of_text: Tensor
    leaving: Tensor

    def alone(self, number: int) -> ForgetProblem:
        """The problem of one task by itself."""
        return self.problem.part(self.of_text == number, ~self.leaving[number])

    def answer(self, number: int, factors: Factors, seconds: float, **facts: Any) -> Answer:
        """The answer of one task, with facts about it."""
        problem = self.alone(number)
        facts = {"retained": len(problem.retain_hidden)} | facts
        return Answer(*factors, problem.double.displacement, seconds, facts)

    def of(self, numbers: Sequence[int], lamb_forget: float | str) -> Paper:
        """That of some of the tasks, in ascending order."""
        chosen = torch.tensor(numbers)
        mine = torch.isin(self.of_text, chosen)
        problem = replace(self.problem.part(mine), lamb_forget=lamb_forget)
        of_text = torch.searchsorted(chosen, self.of_text[mine])
        return Paper(problem, of_text, self.leaving[chosen])

    def optima(self) -> list[Optimum]:
        """The proved optimum of each task."""
        if int(self.leaving.sum(dim=1).max()) <= FEW:
            return solve_requests(*self)
        found = []
        for problem in map(self.alone, range(len(self.leaving))):
            nothing = torch.zeros(1, len(problem.retain_hidden), dtype=torch.bool)
            found += solve_requests(
                problem, torch.zeros(len(problem.target), dtype=torch.int64), nothing
            )
        return found

    def settled(self) -> tuple[list[Optimum], list[int]]:
        """The optima, and the tasks for which `lamb_forget` was raised.

        Where the config's weight lies below c* it is raised to just above it, as the paper's retry
        would; a target that no weight reaches keeps the config's.
        """
        found, weight = self.optima(), self.problem.lamb_forget
        if weight == AUTO:
            return found, list(range(len(found)))
        reach = [report["thresholds"]["reach"] for _, _, report in found]
        low = [i for i, each in enumerate(reach) if 0 < weight <= each < float("inf")]
        for i, optimum in zip(low, self.of(low, AUTO).optima() if low else [], strict=True):
            found[i] = optimum
        return found, low


def task(world: World, solver: str, setting: str = "", **more: Any) -> Task:
    """A task with the method's defaults where `more` says nothing; `request` must be said."""
    defaults = {
        "target": DEFAULT_TARGETS[solver],
        "beta": world.exact.FORGET.BETA,
        "rank": world.paper[False].FORGET.RANK,
    }
    return Task(solver=solver, setting=setting, **defaults | more)


def problem_of(world: World, classes: list[str]) -> ForgetProblem:
    """The problem of the trainer ForgetLoRA for `classes`, forgotten at once."""
    here = task(world, "lora", request=world.texts.request(classes))
    return paper_problem(world, [here]).alone(0)


def paper_problem(world: World, tasks: Sequence[Task]) -> Paper:
    """The paper's problem of tasks of one setting."""
    first, requests = tasks[0], Batch([task.request for task in tasks])
    cfg, w = world.paper[len(first.request.classes) > 1], world.bundle.text_projection
    retain, leaving = world.retained(tasks, requests)
    problem = ForgetProblem(
        projection=w,
        forget_hidden=requests.hidden,
        retain_hidden=retain.rows,
        target=world.target(first, requests, retain, leaving).to(w),
        rank=first.rank,
        alpha=cfg.FORGET.ALPHA,
        **paper_weights(cfg) | ({f"lamb_{first.off}": 0.0} if first.off else {}),
    )
    return Paper(problem, requests.of_text, requests.of_requests(leaving))


def by_lora(world: World, tasks: Sequence[Task]) -> list[Answer]:
    """The paper's descent. `gap` is measured against the bound that the exact solver proves."""
    draws = [world.generator(task.request.classes) for task in tasks]
    paper = paper_problem(world, tasks)
    found, raised = paper.settled()
    settings = replace(world.descent, max_trials=min(MAX_TRIALS, world.descent.max_trials))
    rest = [number for number in range(len(tasks)) if number not in raised]
    descents, started = {}, time.process_time()
    for numbers, lamb_forget in ((rest, paper.problem.lamb_forget), (raised, AUTO)):
        if numbers:
            part, mine = paper.of(numbers, lamb_forget), [draws[number] for number in numbers]
            descents |= zip(numbers, solve_lora_each(*part, mine, settings), strict=True)
    seconds = (time.process_time() - started) / len(tasks)
    answers = []
    for number, (_, _, report) in enumerate(found):
        descent, bound = descents[number], report["certificate"]["bound"]
        problem = replace(paper.alone(number), lamb_forget=descent.lamb_forget)
        left, right = descent.left.double(), descent.right.double()
        if descent.lamb_forget != report["lamb_forget"]:  # a later trial of the retry
            bound = solve_exact(problem).certificate.bound
        reached = float(problem.objective(left @ right))
        facts = {
            "objective": reached,
            "gap": max(0.0, reached - bound) / reached if reached > 0 else 0.0,
            "lamb_forget": descent.lamb_forget,
            "auto": number in raised,
            "trials": len(descent.trials),
        }
        answers.append(paper.answer(number, (left, right), seconds, **facts))
    return answers


def by_optimum(world: World, tasks: Sequence[Task]) -> list[Answer]:
    """The paper's objective at its optimum, with its certificate."""
    paper = paper_problem(world, tasks)
    started = time.process_time()
    found, raised = paper.settled()
    seconds = (time.process_time() - started) / len(tasks)
    answers = []
    for number, (left, right, report) in enumerate(found):
        proof = report["certificate"]
        facts = {"objective": proof["primal"], "gap": proof["gap"]}
        facts |= {"lamb_forget": report["lamb_forget"], "auto": number in raised}
        answers.append(paper.answer(number, (left, right), seconds, **facts))
    return answers


def by_constrained(world: World, tasks: Sequence[Task]) -> list[Answer]:
    """The constrained form; its objective is `tr Delta^T (G + mu I) Delta`."""
    requests = Batch([task.request for task in tasks])
    retain, leaving = world.retained(tasks, requests)
    target = world.target(tasks[0], requests, retain, leaving)
    hidden, gone = requests.hidden.double(), requests.of_requests(leaving)
    displacement = target.double() - world.bundle.embed(hidden)  # (K, d)
    started = time.process_time()
    solutions = solve_constrained_each(
        *(Ridge(retain.gram, world.mu), hidden, displacement, requests.of_text),
        *(retain.rows, retain.name_weights, gone),
    )
    seconds = (time.process_time() - started) / len(tasks)
    answers = []
    for number, (solution, left_out) in enumerate(zip(solutions, gone, strict=True)):
        proof = solution.certificate
        facts = {"retained": int((~left_out).sum()), "objective": proof.primal, "gap": proof.gap}
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
