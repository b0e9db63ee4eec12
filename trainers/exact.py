"""Complete forgetting as a trainer: the constrained form, solved exactly and proved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from clip.retain import GROUPS
from engine import TRAINER_REGISTRY, UserError
from forgetting import Ridge, solve_constrained_each
from trainers.base import ForgetTrainer, Solved
from trainers.paper import POOR, proof
from trainers.requests import Requests, specific_targets, squared_length


@TRAINER_REGISTRY.register()
class ForgetExact(ForgetTrainer):
    """Least disturbance of everything that is retained, with the forgotten texts on their target.

    Retained are three weighted groups of names: the other classes of the set, the vocabulary, and
    the classes of the other sets.
    """

    name = "exact"
    block = 256
    specific = True

    @classmethod
    def check_settings(cls, cfg) -> None:
        node = cfg.TRAINER.FORGETEXACT
        if not any(node[group.upper()] for group in GROUPS):
            raise UserError("TRAINER.FORGETEXACT: one of OWN, VOCABULARY, OTHERS must be above 0")

    def group_weights(self) -> dict[str, float | None]:
        node = self.cfg.TRAINER.FORGETEXACT
        return {group: float(node[group.upper()]) for group in GROUPS}

    def constants(self) -> dict[str, Any]:
        node = self.cfg.TRAINER.FORGETEXACT
        mine = {"weights": self.retain.weights, "mu": float(node.MU), "shared": float(node.SHARED)}
        return {"objective": "constrained"} | mine

    @cached_property
    def ridge(self) -> Ridge:
        """`K_0`, factorised once for all requests."""
        return self.retain.ridge(float(self.cfg.TRAINER.FORGETEXACT.MU))

    def solve(self, requests: Requests, generators: Sequence[torch.Generator]) -> list[Solved]:
        retain, ridge = self.retain, self.ridge
        leaving = self.texts.leaving(retain, requests)  # (C, n)
        target, draws = self._targets(requests, leaving, generators)
        hidden = requests.hidden.double().to(self.device)
        displacement = self.displacement(hidden, target)
        # A name that leaves with two classes of one request leaves once.
        gone = requests.any_of(leaving)
        solutions = solve_constrained_each(
            ridge, hidden, displacement, requests.of_text, retain.rows, retain.shares, gone
        )
        parts = self.parts(requests, displacement, leaving, ridge)
        recipe = {
            "objective": "constrained",
            "statistics": retain.statistics.sha256,
            "weights": retain.weights,
            "mu": ridge.mu,
        }
        answers = []
        for i, (request, solution) in enumerate(zip(requests, solutions, strict=True)):
            names = retain.named(gone[i])
            notes = [proof(solution.certificate.gap), *self.left_notes(request.classes, names)]
            if solution.residual > POOR:
                notes.append(
                    f"warning: texts end {solution.residual:.1e} of their way beside their "
                    "targets; texts that repeat each other have different ones"
                )
            report = {
                "certificate": asdict(solution.certificate),
                "residual": solution.residual,
                "texts": request.texts,
                "left_retain_set": names,
                "target_draws": draws[i],
                "mu": ridge.mu,
            }
            left, right = solution.left.float(), solution.right.float()
            answers.append(Solved(left, right, report, notes, recipe=recipe, parts=parts[i]))
        return answers

    def _targets(
        self, requests: Requests, leaving: Tensor, generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, list[int]]:
        """`P` (K, d), and the draws of noise for each request."""
        if self.cfg.FORGET.TARGET != "specific":
            return self.targets(requests, generators)
        w, beta = self.model.projection, float(self.cfg.FORGET.BETA)
        lam = self.cfg.TRAINER.FORGETEXACT.SHARED * squared_length(self.retain, w)
        target = specific_targets(requests, w, self.retain, leaving, lam, beta)
        return target, [0] * len(requests)
