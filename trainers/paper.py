"""The paper's objective as trainers: its own descent, and its proved optimum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.config import paper_weights
from engine.log import logger
from forgetting import ForgetProblem, LoraSettings, solve_lora_each, solve_requests
from forgetting.context import proof
from forgetting.problem import Batch
from trainers.base import TARGETS, ForgetTrainer, Solved, register

SHOWN_EVERY = 200  # steps of a descent between two lines with its norms


class PaperTrainer(ForgetTrainer):
    """The paper's objective, with its retain set: the vocabulary, each name with weight 1."""

    targets = TARGETS
    retains = ("vocabulary",)
    options = ("TERMS",)

    @classmethod
    def check_settings(cls, cfg) -> None:
        paper_weights(cfg)

    def build_model(self) -> None:
        super().build_model()
        if self.pending:
            weights = [f"{key} {value}" for key, value in paper_weights(self.cfg).items()]
            logger.info(f"loss weights: {', '.join(weights)}")

    def method_settings(self) -> dict[str, Any]:
        shape = {"rank": self.cfg.FORGET.RANK, "alpha": float(self.cfg.FORGET.ALPHA)}
        return paper_weights(self.cfg) | shape | super().method_settings()

    def problem(self, requests: Batch) -> tuple[ForgetProblem, Tensor, list[dict[str, Any]]]:
        """The problem of all requests together, the retained names that are excluded with each
        request, (R, n) bool, and what to report of each request beside its solution."""
        target, draws = self.targets_without_bias(requests)
        w = self.projection
        problem = ForgetProblem(
            projection=w,
            forget_hidden=requests.hidden.to(w),
            retain_hidden=self.retain.rows.to(w),
            target=target.to(w),
            rank=self.cfg.FORGET.RANK,
            alpha=float(self.cfg.FORGET.ALPHA),
            **paper_weights(self.cfg),
        )
        by_class = self.retain.excluded(requests.same, requests.hidden, requests.owner)
        excluded = requests.of_requests(by_class)
        reports = [
            {
                "target_draws": drawn,
                "retained": int((~row).sum()),
                "excluded": self.retain.named(row),
            }
            for drawn, row in zip(draws, excluded, strict=True)
        ]
        return problem, excluded, reports


@register
class ForgetLoRA(PaperTrainer):
    """Kravets and Namboodiri (TMLR 2025): Adam on LoRA factors of the three-term objective.

    Requests are descended together, each with its own adapter, random numbers and retry.
    """

    settings_type = LoraSettings
    batch_size = 64

    def solve(self, requests: Batch) -> list[Solved]:
        problem, excluded, reports = self.problem(requests)
        settings = self.settings
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        solutions = solve_lora_each(
            problem, requests.of_text, excluded, generators, settings, self.show_step
        )
        answers = []
        fields = ("lamb_forget", "objective", "reduction")
        for solution, report in zip(solutions, reports, strict=True):
            trials, notes = solution.trials, []
            report |= {key: getattr(solution, key) for key in (*fields, "reached")}
            report["trials"] = [
                {k: getattr(trial, k) for k in (*fields, "step")} for trial in trials
            ]
            report["target"] = self.cfg.FORGET.TARGET
            if not solution.reached:
                notes = [
                    f"no trial of {len(trials)} moved the texts by {settings.reduction:.0%} of "
                    f"their way; the best, {solution.reduction:.1%}, is kept"
                ]
            curves = {"objective": torch.cat([trial.history for trial in trials])}
            answers.append(Solved(solution.left, solution.right, report, notes, curves=curves))
        return answers

    def show_step(self, trial: int, step: int, norms: Tensor) -> None:
        """Show where a descent is, and now and then its three norms (3, R), the mean over
        requests."""
        settings, count = self.settings, norms.shape[1]
        where = f"{count} at once, trial {trial + 1} of at most {settings.max_trials}, step {step}"
        self.bar.set_postfix_str(f"{where} of {settings.steps}")
        if step % SHOWN_EVERY == 0:
            names = ("forget", "preserve", "weight")
            means = zip(names, norms.mean(dim=1).tolist(), strict=True)
            logger.info(f"  {where}: {', '.join(f'{name} norm {x:.4f}' for name, x in means)}")


@register
class ForgetOptimum(PaperTrainer):
    """The same objective at its exact optimum, with a proof: what the descent aims at."""

    batch_size = 256

    def solve(self, requests: Batch) -> list[Solved]:
        problem, excluded, reports = self.problem(requests)
        answers = []
        solved = solve_requests(problem, requests.of_text, excluded)
        for i, ((left, right, solution), report) in enumerate(zip(solved, reports, strict=True)):
            mine = requests.of_text == i
            way = problem.double.displacement[mine]  # (k, d)
            missed = way - (problem.double.forget_hidden[mine] @ left) @ right
            before, after = (float(torch.linalg.matrix_norm(x)) for x in (way, missed))
            reduction = abs(before - after) / before if before else 1.0
            note = (
                f"{solution['branch']}: lamb_forget {solution['lamb_forget']:.4g}, c* "
                f"{solution['thresholds']['reach']:.4g}, {proof(solution['certificate']['gap'])}"
            )
            report |= solution | {"reduction": reduction}
            answers.append(Solved(left.float(), right.float(), report, [note]))
        return answers
