"""What studies work on: a data set, tasks that forget its classes in some setting, and answers.

    lora        the paper's objective by Adam on LoRA factors, with its retry
    optimum     the same objective at its exact optimum
    constrained the form of ForgetExact: texts land on their target at the least disturbance

`lora` and `optimum` solve the same problem, so the second shows what the first misses.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from clip.bundle import FeatureBundle
from clip.retain import exact_context, exact_retain_set
from engine.config import paper_weights, settings
from engine.determinism import seeded
from evaluation.results import join_label
from evaluation.rows import Change, Row, mean, rows_of
from evaluation.zero_shot import Evaluator
from forgetting.problem import AUTO, Batch, ForgetProblem, LowRankEdit, Request
from forgetting.retain import Group, RetainSet
from forgetting.solvers.constrained import Ridge, solve_constrained
from forgetting.solvers.exact import resolve_auto_weight, solve_exact, thresholds
from forgetting.solvers.lora import LoraSettings, solve_lora
from forgetting.targets import targets
from trainers.exact import exact_settings
from trainers.requests import Texts

DEFAULT_TARGETS = {"lora": "empty", "optimum": "empty", "constrained": "specific"}
SOLVERS = tuple(DEFAULT_TARGETS)
MAX_TRIALS = 3  # of the descent's retry: lamb_forget is raised above c* beforehand


@dataclass(frozen=True, eq=False)
class Task:
    """Classes forgotten at once, by one solver, in one setting of a study.

    Attributes:
        request: the classes and the texts that stand for them.
        position: of the setting on a numeric axis, NaN if on none.
        target, beta: where texts are sent; rank: of the descent and of the weight term.
        without: a loss term, or a retained group, that is switched off.
        pick: (n,) rows of the vocabulary that alone are retained; None: what the method retains.
    """

    request: Request
    solver: str
    setting: str
    target: str
    beta: float
    rank: int
    position: float = float("nan")
    without: str = ""
    pick: Tensor | None = None


@dataclass(frozen=True)
class StudyAnswer:
    """`Delta` of a task: an edit in float64.

    Attributes:
        displacement: `D` (k, d) float64, the way of the texts to their target.
        seconds: CPU seconds of the solve, on one thread.
        facts: further cells of its row: retained, objective, gap, and for the paper's objective
            lamb_forget, auto and trials.
    """

    edit: LowRankEdit
    displacement: Tensor
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def delta(self) -> Tensor:
        """(w, d) float64."""
        return self.edit.left.double() @ self.edit.right.double()


class StudyData:
    """One data set under one backbone, with everything that can be retained beside its classes.

    Attributes:
        bundle: the set that classes are forgotten from; others: the other sets.
        exact: config of a run of ForgetExact; paper: that of one of ForgetLoRA, for one class
            (False) and for several at once (True).
        context: what ForgetExact solves in; vocabulary: what the paper's objective retains.
    """

    def __init__(
        self,
        bundle: FeatureBundle,
        others: dict[str, FeatureBundle],
        seed: int = 0,
        opts: Sequence[str] = (),
    ) -> None:
        """Raises ProblemError: no loss weights for that backbone, or config keys (`opts`, KEY
        VALUE) that do not fit."""
        self.bundle, self.others, self.seed = bundle, others, seed
        names = bundle.dataset, bundle.backbone
        self.exact = settings("ForgetExact", *names, opts)
        self.paper = {
            several: settings("ForgetLoRA", *names, [*opts, "FORGET.MULTICLASS", str(several)])
            for several in (False, True)
        }
        for cfg in self.paper.values():
            paper_weights(cfg)  # refuses impossible ones
        descent = self.paper[False].TRAINER.FORGETLORA
        self.descent = LoraSettings(**{key.lower(): value for key, value in descent.items()})
        self.texts, self.evaluator = Texts(bundle, seed=seed), Evaluator(bundle, others)
        self.context = exact_context(exact_settings(self.exact), bundle, list(others.values()))
        self.vocabulary = self.names(self.paper[False].FORGET.SIMILARITY)

    def names(
        self, similarity: float, pick: Tensor | None = None, weight: float | None = None
    ) -> RetainSet:
        """The vocabulary (the rows `pick` of it) as a retain set."""
        names, rows = self.bundle.retain_names, self.bundle.retain_hidden
        if pick is not None:
            names, rows = [names[row] for row in pick.tolist()], rows[pick]
        return RetainSet({"vocabulary": Group(names, rows, weight)}, similarity)

    def pool(self, request: Request) -> Tensor:
        """(n,) rows of the vocabulary that may be picked: those that neither mean the class nor are
        more similar to it than the limit."""
        excluded = _excluded(self.names(self.exact.FORGET.SIMILARITY), Batch([request]))
        return torch.nonzero(~excluded[0])[:, 0]

    def generator(self, classes: Sequence[str], purpose: str = "") -> torch.Generator:
        """Random numbers of these classes; without a purpose those of a run of train.py."""
        return seeded(self.seed, self.bundle.dataset, join_label(list(classes)) + purpose)

    def task(self, solver: str, setting: str = "", **more: Any) -> Task:
        """A task with the method's defaults where `more` says nothing; `request` is needed."""
        defaults = {
            "target": DEFAULT_TARGETS[solver],
            "beta": self.exact.FORGET.BETA,
            "rank": self.paper[False].FORGET.RANK,
        }
        return Task(solver=solver, setting=setting, **defaults | more)

    def retained(self, task: Task) -> tuple[RetainSet, Tensor]:
        """What a task retains, and which names are excluded with each class, (C, n) bool."""
        constrained = task.solver == "constrained"
        if task.pick is not None:
            retain = self.names(1.0, task.pick, 1.0 if constrained else None)
        elif constrained and task.without:
            options = exact_settings(self.exact)
            others = list(self.others.values())
            retain = exact_retain_set(options, self.bundle, others, without=task.without)
        else:
            retain = self.context.retain if constrained else self.vocabulary
        return retain, _excluded(retain, Batch([task.request]))

    def target(self, task: Task, retain: RetainSet, excluded: Tensor) -> Tensor:
        """`P` (k, d) float64. `specific` compares with what the constrained form retains, whatever
        the solver, by the ridge of all groups together."""
        batch, inputs = Batch([task.request]), self.context.inputs
        if task.solver == "constrained":
            inputs = replace(inputs, retain=retain)
        else:
            excluded = _excluded(self.context.retain, batch)
        return targets(task.target, batch, inputs, task.beta, excluded)[0]

    def paper_problem(self, task: Task) -> ForgetProblem:
        """The problem of the trainer ForgetLoRA."""
        cfg, w = self.paper[len(task.request.classes) > 1], self.bundle.text_projection
        retain, excluded = self.retained(task)
        target = self.target(task, retain, excluded)
        if self.bundle.text_bias is not None:
            target = target - self.bundle.text_bias.double()  # D = P - (H W + b)
        return ForgetProblem(
            projection=w,
            forget_hidden=task.request.hidden,
            retain_hidden=retain.rows[~excluded.any(dim=0)],
            target=target.to(w),
            rank=task.rank,
            alpha=cfg.FORGET.ALPHA,
            **paper_weights(cfg) | ({f"lamb_{task.without}": 0.0} if task.without else {}),
        )

    def solve(self, task: Task) -> StudyAnswer:
        """The answer of a task."""
        if task.solver == "constrained":
            return self._constrained(task)
        problem, raised = above_threshold(self.paper_problem(task))
        facts = {"retained": len(problem.retain_hidden), "auto": raised}
        descent = replace(self.descent, max_trials=min(MAX_TRIALS, self.descent.max_trials))
        started = time.process_time()
        if task.solver == "optimum":
            edit = solve_exact(problem)
        else:
            edit = solve_lora(problem, descent, self.generator(task.request.classes))
            problem = replace(problem, lamb_forget=edit.lamb_forget)  # of the retry's trial
            facts["trials"] = len(edit.trials)
        seconds = time.process_time() - started
        optimum = edit if task.solver == "optimum" else solve_exact(problem)
        reached = float(problem.objective(edit.delta.double()))
        gap = max(0.0, reached - optimum.certificate.bound) / reached if reached > 0 else 0.0
        facts |= {"objective": reached, "gap": gap, "lamb_forget": problem.lamb_forget}
        return StudyAnswer(edit, problem.double.displacement, seconds, facts)

    def _constrained(self, task: Task) -> StudyAnswer:
        """With the beta that is given, and no other texts than those of the task; its objective is
        `tr Delta^T (G + mu I) Delta`."""
        batch = Batch([task.request])
        retain, excluded = self.retained(task)
        hidden = batch.hidden.double()
        displacement = self.target(task, retain, excluded) - self.context.embed(hidden)  # (k, d)
        any_class = excluded.any(dim=0, keepdim=True)
        started = time.process_time()
        ridge = Ridge(retain.rows, self.context.ridge.mu, retain.name_weights, retain.root)
        edit = solve_constrained(ridge, hidden, displacement, any_class[0])
        seconds, proof = time.process_time() - started, edit.certificate
        retained = int((~any_class).sum())
        facts = {"retained": retained, "objective": proof.primal, "gap": proof.gap}
        return StudyAnswer(edit, displacement, seconds, facts)

    def rows(self, requests: Sequence[list[str]], edits: Sequence[LowRankEdit]) -> list[list[Row]]:
        """The accuracies of each request's classes, before and after its edit."""
        judged = []
        after = self.evaluator.after(requests, edits)
        for classes, accuracies in zip(requests, after, strict=True):
            entry = {"zero_shot": self.evaluator.before(classes), "final_results": accuracies}
            judged.append(rows_of({self.bundle.dataset: {join_label(classes): entry}}))
        return judged

    def gram(self, task: Task) -> Tensor:
        """`G` (w, w) float64 of what the solver of a task retains by default."""
        retain, excluded = self.retained(replace(task, pick=None, without=""))
        stay = ~excluded.any(dim=0)
        rows = retain.rows[stay].double()
        return (rows.T * retain.name_weights[stay]) @ rows  # (w, m) @ (m, w) -> (w, w)

    @cached_property
    def singular(self) -> tuple[Tensor, Tensor, Tensor]:
        """The singular value decomposition of W in float64."""
        return torch.linalg.svd(self.bundle.text_projection.double())


def above_threshold(problem: ForgetProblem) -> tuple[ForgetProblem, bool]:
    """A problem whose `lamb_forget` is raised to just above c* where it lies below, as the paper's
    retry would, and whether it was. A target that no weight reaches keeps the weight."""
    reach = thresholds(problem).reach
    weight = problem.lamb_forget
    raised = weight == AUTO or 0 < weight <= reach < float("inf")
    if raised:
        problem = resolve_auto_weight(replace(problem, lamb_forget=AUTO))
    return problem, raised


def sides(rows: Sequence[Row]) -> dict[str, Change]:
    """Of one request: the forgotten classes (mean), the rest of their set, other sets (mean)."""
    own = (mean(getattr(row.own, side) for row in rows) for side in ("before", "after"))
    return {"forgotten": Change(*own), "rest": rows[0].rest, "others": rows[0].others_mean}


def _excluded(retain: RetainSet, batch: Batch) -> Tensor:
    return retain.excluded(batch.same, batch.hidden, batch.owner)
