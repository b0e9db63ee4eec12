"""The paper's method as a trainer: text-only LoRA descent with a retry."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from engine import TRAINER_REGISTRY
from engine.config import AUTO, paper_weights
from forgetting import ForgetProblem, LoraSettings, solve_lora
from forgetting.exact import auto_lamb_forget
from trainers.base import ForgetTrainer, Solved
from trainers.texts import Request

BAR_STEPS = 50  # the bar moves this often; every step would cost as much as the step


@TRAINER_REGISTRY.register()
class ForgetLoRA(ForgetTrainer):
    """Kravets and Namboodiri (TMLR 2025): Adam on LoRA factors of the three-term objective."""

    name = "lora"

    @classmethod
    def check_settings(cls, cfg) -> None:
        """Refuse weights that are missing or impossible."""
        paper_weights(cfg)

    def check_cfg(self, cfg) -> None:
        super().check_cfg(cfg)
        self.weights = paper_weights(cfg)
        self.settings = lora_settings(cfg)

    def solver_settings(self) -> dict[str, Any]:
        """The paper's constants of this run."""
        return {
            **self.weights,
            **self.text_settings(),
            "rank": self.cfg.FORGET.RANK,
            "alpha": float(self.cfg.FORGET.ALPHA),
            **asdict(self.settings),
        }

    def solve(self, classes: list[str], generator: torch.Generator) -> Solved:
        """The paper's problem for `classes`, descended; the report holds every trial."""
        retain_hidden, dropped = self.retained(classes)
        request = self.request(classes)
        target, draws = self.target(request, generator)
        problem = paper_problem(
            self.cfg, self.weights, self.model.projection, request, retain_hidden, target
        )
        with tqdm(unit="step", leave=False) as bar:

            def advance(trial: int, step: int) -> None:
                if step % BAR_STEPS == 0:
                    bar.set_description(f"trial {trial + 1}", refresh=False)
                    bar.update(BAR_STEPS)

            solution = solve_lora(problem, self.settings, generator, advance)
        if not solution.reached:
            print(
                f"  no trial of {len(solution.trials)} moved the texts by "
                f"{self.settings.reduction:.0%} of their way; the best, "
                f"{solution.reduction:.1%}, is kept"
            )
        report = {
            "lamb_forget": solution.lamb_forget,
            "objective": solution.objective,
            "reduction": solution.reduction,
            "reached": solution.reached,
            "trials": [
                {key: value for key, value in asdict(trial).items() if key != "history"}
                for trial in solution.trials
            ],
            "texts": request.texts,
            "target": self.target_kind(self.cfg),
            "target_draws": draws,
            "retained": len(retain_hidden),
            "left_retain_set": dropped,
        }
        return Solved(solution.left, solution.right, report)


def paper_problem(
    cfg,
    weights: dict[str, float | str],
    projection: Tensor,
    request: Request,
    retain_hidden: Tensor,
    target: Tensor,
) -> ForgetProblem:
    """The paper's problem on the projection's device; "auto" as lamb_forget goes just above c*."""
    numbers = {name: 1.0 if value == AUTO else float(value) for name, value in weights.items()}
    problem = ForgetProblem(
        projection=projection,
        forget_hidden=request.hidden.to(projection),
        retain_hidden=retain_hidden.to(projection),
        target=target.to(projection),
        rank=cfg.FORGET.RANK,
        alpha=float(cfg.FORGET.ALPHA),
        **numbers,
    )
    if AUTO in weights.values():
        problem = replace(problem, lamb_forget=auto_lamb_forget(problem))
    return problem


def lora_settings(cfg) -> LoraSettings:
    """The descent's constants."""
    return LoraSettings(**{key.lower(): value for key, value in cfg.TRAINER.FORGETLORA.items()})
