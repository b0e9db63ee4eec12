"""Complete forgetting as a trainer: the constrained form, solved exactly and proved."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import TRAINER_REGISTRY, UserError
from engine.config import paper_weights
from forgetting import Adapter
from forgetting.adapter import Part, recipe_tensors, with_recipe
from forgetting.constrained import Ridge, solve_constrained
from forgetting.exact import solve_exact, thresholds
from forgetting.spectrum import Spectrum
from forgetting.targets import specific_target
from trainers.base import ForgetTrainer, Solved
from trainers.forget_lora import paper_problem
from trainers.retained import GROUPS, Place, RetainSet, print_leaving
from trainers.texts import Request

POOR = 1e-6  # a gap or residual above this is no answer to rely on


@TRAINER_REGISTRY.register()
class ForgetExact(ForgetTrainer):
    """Least disturbance of everything that is retained, with the forgotten texts on their target.

    Retained are three weighted groups of names: the other classes of the set, the vocabulary, and
    the classes of the other sets. `OBJECTIVE paper` solves the paper's objective instead, with its
    own retain set (the vocabulary) and target.
    """

    name = "exact"
    default_target = "specific"

    @classmethod
    def target_kind(cls, cfg) -> str:
        """As the base has it; the paper's objective has the paper's target."""
        if cfg.TRAINER.FORGETEXACT.OBJECTIVE == "paper" and not cfg.FORGET.TARGET:
            return "empty"
        return super().target_kind(cfg)

    @classmethod
    def check_settings(cls, cfg) -> None:
        """The paper needs its weights, the constrained form something to retain."""
        node = cfg.TRAINER.FORGETEXACT
        if node.OBJECTIVE == "paper":
            paper_weights(cfg)
        specific = cls.target_kind(cfg) == "specific"
        if specific and node.OBJECTIVE == "paper":
            raise UserError(
                "FORGET.TARGET specific needs TRAINER.FORGETEXACT.OBJECTIVE constrained"
            )
        if not (node.OWN or node.VOCABULARY or node.OTHERS):
            raise UserError("TRAINER.FORGETEXACT: one of OWN, VOCABULARY, OTHERS must be above 0")

    def build_model(self) -> None:
        """The projection, and the statistics of everything retained, made once for all classes."""
        super().build_model()
        node = self.cfg.TRAINER.FORGETEXACT
        # The paper retains its vocabulary alone.
        groups = GROUPS if node.OBJECTIVE == "constrained" else ("vocabulary",)
        self.retain = RetainSet(
            self.bundle, self.others.values(), self.cfg.FORGET.SIMILARITY, groups, self.device
        )
        self.statistics = self.retain.statistics
        self.weights = {group: float(node[group.upper()]) for group in self.statistics.counts}
        if node.OBJECTIVE == "constrained":
            gram = self.statistics.weighted(self.weights).to(self.device)
            # Relative to the mean squared length of a retained text, so that one default serves
            # every backbone.
            total = sum(self.weights.values())
            self.ridge = Ridge(gram, node.MU * float(gram.trace()) / total)
            w = self.model.projection.double()
            self.lam = node.SHARED * float((gram @ w @ w.T).trace()) / total
        counts = ", ".join(
            f"{count} {group}"
            + (f" (weight {self.weights[group]:g})" if node.OBJECTIVE == "constrained" else "")
            for group, count in self.statistics.counts.items()
        )
        print(f"retained: {counts or 'nothing'}; exact solver in float64 on {self.device}")

    def solver_settings(self) -> dict[str, Any]:
        node = self.cfg.TRAINER.FORGETEXACT
        settings = {"objective": node.OBJECTIVE, **self.text_settings()}
        if node.OBJECTIVE == "paper":
            shape = {"rank": self.cfg.FORGET.RANK, "alpha": float(self.cfg.FORGET.ALPHA)}
            return settings | paper_weights(self.cfg) | shape
        return settings | {
            "weights": self.weights,
            "mu": float(node.MU),
            "shared": float(node.SHARED),
            "similarity": float(self.cfg.FORGET.SIMILARITY),
            "statistics": self.statistics.sha256,
        }

    def solve(self, classes: list[str], generator: torch.Generator) -> Solved:
        solved, lines = self.answer(classes, generator)
        for line in lines:
            print(f"  {line}")
        print_leaving(classes, solved.report["left_retain_set"])
        return solved

    def answer(self, classes: list[str], generator: torch.Generator) -> tuple[Solved, list[str]]:
        """The exact answer, and what to say about it."""
        request = self.request(classes)
        if self.cfg.TRAINER.FORGETEXACT.OBJECTIVE == "paper":
            return self._solve_paper(classes, request, generator)
        hidden, projection = request.hidden.double(), self.bundle.text_projection.double()
        leaving = [self.retain.leaving(request, index) for index in range(len(classes))]
        target, draws = self._targets(request, leaving, generator)
        displacement = target - hidden @ projection  # (k, d)
        # A name that leaves with two of the classes leaves once.
        places = sorted({place for group in leaving for place in group})
        rows, shares = self._rows(places, hidden)
        solution = solve_constrained(
            self.ridge,
            hidden.to(self.device),
            displacement.to(self.device),
            rows.to(self.device),
            shares.to(self.device),
        )
        self.parts = []
        for index, name in enumerate(classes):
            mine = [row for row, owner in enumerate(request.owner) if owner == index]
            rows, shares = self._rows(sorted(leaving[index]), hidden)
            tensors = recipe_tensors(self.ridge, hidden[mine], displacement[mine], rows, shares)
            self.parts.append(Part(self.plan.dataset, name, tensors))
        report = {
            "certificate": asdict(solution.certificate),
            "residual": solution.residual,
            "texts": request.texts,
            "left_retain_set": self.retain.named(places),
            "target_draws": draws,
            "mu": self.ridge.mu,
        }
        lines = [_proof(solution.certificate.gap)]
        if solution.residual > POOR:
            lines.append(
                f"warning: texts end {solution.residual:.1e} of their way beside their targets; "
                "texts that repeat each other have different ones"
            )
        return Solved(solution.left.float(), solution.right.float(), report), lines

    def with_recipe(self, adapter: Adapter) -> Adapter:
        """The constrained form composes from the adapter alone, the paper's objective together with
        the statistics of the vocabulary, which are kept beside the adapters."""
        shared = {"statistics": self.statistics.sha256}
        if self.cfg.TRAINER.FORGETEXACT.OBJECTIVE == "constrained":
            shared |= {"objective": "constrained", "weights": self.weights, "mu": self.ridge.mu}
        else:
            shape = {"rank": self.cfg.FORGET.RANK, "alpha": float(self.cfg.FORGET.ALPHA)}
            shared |= {"objective": "paper", "weights": None} | paper_weights(self.cfg) | shape
            name = f"statistics-{self.statistics.sha256[:12]}.safetensors"
            path = Path(self.cfg.OUTPUT_DIR) / self.plan.dataset / name
            if not path.exists():
                self.statistics.save(path)
                print(f"  statistics of the vocabulary, for composing: {path}")
        return with_recipe(adapter, shared, self.parts)

    def _rows(self, places: list[Place], like: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (n, w) at those places, and the share (n,) that each has in G."""
        places = [(group, row) for group, row in places if self.weights[group] > 0]
        shares = [self.statistics.share(group, self.weights) for group, _ in places]
        return self.retain.at(places).to(like), like.new_tensor(shares)

    def _targets(
        self, request: Request, leaving: list[set[Place]], generator: torch.Generator
    ) -> tuple[Tensor, int]:
        """`P` (k, d) float64 on the CPU, and the draws of noise.

        A class's own target does not depend on which others are forgotten with it, so that
        requests compose: only its own names are taken out of what it is compared with.
        """
        if self.target_kind(self.cfg) != "specific":
            target, draws = self.target(request, generator)
            return target.double(), draws
        hidden = request.hidden.double()
        target = hidden.new_empty(len(hidden), self.bundle.text_projection.shape[1])
        for index, places in enumerate(leaving):
            mine = [row for row, owner in enumerate(request.owner) if owner == index]
            rows, shares = (x.to(self.device) for x in self._rows(sorted(places), hidden))
            target[mine] = specific_target(
                hidden[mine].to(self.device),
                self.model.projection,
                self.ridge.gram - (rows.T * shares) @ rows,
                self.lam,
                self.cfg.FORGET.BETA,
            ).cpu()
        return target, 0

    def _solve_paper(
        self, classes: list[str], request: Request, generator: torch.Generator
    ) -> tuple[Solved, list[str]]:
        """The paper's objective at its exact optimum."""
        target, draws = self.target(request, generator)
        retain_hidden, dropped = self.retained(classes)
        weights, w = paper_weights(self.cfg), self.model.projection
        problem = paper_problem(self.cfg, weights, w, request, retain_hidden, target)
        displacement = problem.target.double() - request.hidden.to(w).double() @ w.double()
        self.parts = []
        for index, name in enumerate(classes):
            mine = [row for row, owner in enumerate(request.owner) if owner == index]
            left = set(self.retained([name])[1])
            rows = [i for i, other in enumerate(self.bundle.retain_names) if other in left]
            leaving = self.bundle.retain_hidden[rows]
            tensors = recipe_tensors(
                None, request.hidden[mine], displacement[mine], leaving, torch.ones(len(rows))
            )
            self.parts.append(Part(self.plan.dataset, name, tensors))
        spectrum = Spectrum(problem.retain_hidden)
        solution = solve_exact(problem, spectrum)
        limits = thresholds(problem, spectrum)
        line = (
            f"{solution.branch}: lamb_forget {problem.lamb_forget:.4g}, c* {limits.reach:.4g}, "
            f"{_proof(solution.certificate.gap)}"
        )
        report = {
            "certificate": asdict(solution.certificate),
            "branch": solution.branch,
            "mu": solution.mu,
            "rho": solution.rho,
            "lamb_forget": problem.lamb_forget,
            "thresholds": asdict(limits),
            "reduction": problem.reduction(solution.delta.to(w)),
            "texts": request.texts,
            "target_draws": draws,
            "retained": len(retain_hidden),
            "left_retain_set": dropped,
        }
        return Solved(solution.left.float(), solution.right.float(), report), [line]


def _proof(gap: float) -> str:
    """A certificate's relative gap in words."""
    if gap <= POOR:
        return f"proved optimal to a relative gap of {gap:.1e}"
    return f"warning: not proved optimal (relative gap {gap:.1e}): weights or ridge badly scaled"
