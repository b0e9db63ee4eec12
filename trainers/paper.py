"""The paper's objective as trainers: its own descent, and its proved optimum."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import TRAINER_REGISTRY
from engine.config import paper_weights
from engine.log import logger
from evaluation.results import place
from forgetting import (
    ForgetProblem,
    LoraSettings,
    solve_lora_each,
    solve_requests,
)
from forgetting.adapter import Part, recipe_parts
from forgetting.context import proof
from forgetting.problem import Batch
from trainers.base import ForgetTrainer, Solved

SHOWN_STEPS = 50  # steps of a descent between two lines of its norms


class PaperTrainer(ForgetTrainer):
    """The paper's objective, with its retain set: the vocabulary, every name alike."""

    terms = True

    @classmethod
    def check_settings(cls, cfg) -> None:
        paper_weights(cfg)

    def group_weights(self) -> dict[str, float | None]:
        return {"vocabulary": None}

    def constants(self) -> dict[str, Any]:
        shape = {"rank": self.cfg.FORGET.RANK, "alpha": float(self.cfg.FORGET.ALPHA)}
        return paper_weights(self.cfg) | shape | super().constants()

    def problem(
        self, requests: Batch, generators: Sequence[torch.Generator]
    ) -> tuple[ForgetProblem, Tensor, list[dict[str, Any]]]:
        """The problem of all requests together, which names leave with each class, (C, n) bool, and
        what to report of each request beside its solution."""
        target, draws = self.targets(requests, generators)
        w = self.model.projection
        problem = ForgetProblem(
            projection=w,
            forget_hidden=requests.hidden.to(w),
            retain_hidden=self.retain.rows.to(w),
            target=target.to(w),
            rank=self.cfg.FORGET.RANK,
            alpha=float(self.cfg.FORGET.ALPHA),
            **paper_weights(self.cfg),
        )
        leaving = self.texts.leaving(self.retain, requests)
        gone = requests.of_requests(leaving)
        reports = [
            {
                "texts": request.texts,
                "target_draws": drawn,
                "retained": len(left) - int(left.sum()),
                "excluded": self.retain.named(left),
            }
            for request, drawn, left in zip(requests, draws, gone, strict=True)
        ]
        return problem, leaving, reports


@TRAINER_REGISTRY.register()
class ForgetLoRA(PaperTrainer):
    """Kravets and Namboodiri (TMLR 2025): Adam on LoRA factors of the three-term objective.

    Requests are descended together, each with its own adapter, random numbers and retry.
    """

    name = "lora"
    block = 64

    def solve(self, requests: Batch, generators: Sequence[torch.Generator]) -> list[Solved]:
        problem, leaving, reports = self.problem(requests, generators)
        node = self.cfg.TRAINER.FORGETLORA
        settings = LoraSettings(**{key.lower(): value for key, value in node.items()})
        together = f"{len(requests)} at once, " if len(requests) > 1 else ""

        def advance(trial: int, step: int, norms: Tensor) -> None:
            if step % SHOWN_STEPS:
                return
            trials = f"trial {trial + 1} of at most {settings.max_trials}"
            forget, preserve, weight = norms.mean(dim=1).tolist()
            self.bar.set_postfix_str(
                f"{together}{trials}, step {step} of {settings.steps}, forget {forget:.3g}, "
                f"preserve {preserve:.3g}, weight {weight:.3g}"
            )

        solutions = solve_lora_each(
            problem, requests.of_text, requests.of_requests(leaving), generators, settings, advance
        )
        answers = []
        for solution, report in zip(solutions, reports, strict=True):
            best = (
                f"no trial of {len(solution.trials)} moved the texts by {settings.reduction:.0%} "
                f"of their way; the best, {solution.reduction:.1%}, is kept"
            )
            fields = ("lamb_forget", "objective", "reduction")
            report |= {key: getattr(solution, key) for key in (*fields, "reached")}
            report["trials"] = [
                {key: getattr(trial, key) for key in (*fields, "step")} for trial in solution.trials
            ]
            report["target"] = self.cfg.FORGET.TARGET
            notes = [] if solution.reached else [best]
            descent = [trial.history for trial in solution.trials]
            curves = {"objective": torch.cat(descent)} if self.cfg.LOG else {}
            answers.append(Solved(solution.left, solution.right, report, notes, curves=curves))
        return answers


@TRAINER_REGISTRY.register()
class ForgetOptimum(PaperTrainer):
    """The same objective at its exact optimum, with a proof: what the descent aims at."""

    name = "optimum"
    block = 256

    def solve(self, requests: Batch, generators: Sequence[torch.Generator]) -> list[Solved]:
        problem, leaving, reports = self.problem(requests, generators)
        parts = self.parts(requests, problem.double.displacement, leaving)
        recipe = {"objective": "paper", "statistics": self.retain.statistics.sha256}
        recipe |= {"weights": None} | self.constants()
        answers = []
        solved = solve_requests(problem, requests.of_text, requests.of_requests(leaving))
        for i, ((left, right, found), report) in enumerate(zip(solved, reports, strict=True)):
            hidden = requests.hidden[requests.of_text == i].double().to(left)
            d = problem.double.displacement[requests.of_text == i]
            size = torch.linalg.matrix_norm(d)
            missed = torch.linalg.matrix_norm(d - (hidden @ left) @ right)
            found["reduction"] = float((size - missed).abs() / size) if size > 0 else 1.0
            note = (
                f"{found['branch']}: lamb_forget {found['lamb_forget']:.4g}, c* "
                f"{found['thresholds']['reach']:.4g}, {proof(found['certificate']['gap'])}"
            )
            factors = left.float(), right.float()
            answers.append(Solved(*factors, found | report, [note], recipe=recipe, parts=parts[i]))
        return answers

    def parts(self, requests: Batch, displacement: Tensor, leaving: Tensor) -> list[list[Part]]:
        """What composing needs of each request's classes, see `recipe_parts`."""
        names = [(self.plan.dataset, name) for name in requests.classes]
        texts, retain = (requests.hidden, displacement, requests.owner), self.retain
        each = iter(recipe_parts(None, *texts, names, retain.rows, retain.shares, leaving))
        return [list(islice(each, len(request.classes))) for request in requests]

    def write_shared(self, folder: Path) -> None:
        """The statistics of the vocabulary, without which adapters of this objective do not
        compose."""
        name = f"statistics-{self.retain.statistics.sha256[:12]}.safetensors"
        path = folder / place(self.plan.dataset) / name
        if not path.exists():
            self.retain.statistics.save(path)
            logger.info(f"statistics of the vocabulary, for composing: {path}")
