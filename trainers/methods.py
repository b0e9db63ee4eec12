"""The methods as trainers: the paper's descent, its objective at the proved optimum, and complete
forgetting, solved exactly and proved."""

import hashlib
import json
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from yacs.config import CfgNode

from clip.retain import GENERIC, GROUPS, PROTECT, exact_context
from engine.config import TERMS, paper_weights
from engine.determinism import one_thread
from engine.log import logger
from forgetting.compose import make_recipe
from forgetting.context import ExactSettings, ForgetContext, proof
from forgetting.errors import ProblemError
from forgetting.models.vocabulary import generic_names
from forgetting.problem import Batch, ForgetProblem, Request
from forgetting.retain import RetainSet
from forgetting.solvers.exact import solve_each
from forgetting.solvers.lora import LoraSettings, solve_lora_each
from forgetting.targets import takes
from trainers.base import ForgetTrainer, Solved, register
from trainers.inputs import read_target

SHOWN_EVERY = 200  # steps of a descent between two lines with its norms


class PaperTrainer(ForgetTrainer):
    """The paper's objective, with its retain set: the vocabulary, each name with weight 1."""

    defaults: ClassVar = {"FORGET.TARGET": "empty", "FORGET.SIMILARITY": 1.0}
    retains = ("vocabulary",)
    options = ("TERMS",)

    def check_settings(self, cfg: CfgNode) -> None:
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
        target = self.targets_without_bias(requests)
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
            {"retained": int((~row).sum()), "excluded": self.retain.named(row)} for row in excluded
        ]
        return problem, excluded, reports


@register
class ForgetLoRA(PaperTrainer):
    """Kravets and Namboodiri (TMLR 2025): Adam on LoRA factors of the three-term objective, many
    requests together, each with its own adapter, random numbers and retry."""

    settings_type = LoraSettings
    batch_size = 64

    def solve(self, requests: Batch) -> list[Solved]:
        problem, excluded, reports = self.problem(requests)
        settings, answers = self.settings, []
        generators = [torch.Generator().manual_seed(request.seed) for request in requests]
        solutions = solve_lora_each(
            problem, requests.of_text, excluded, generators, settings, self.show_step
        )
        fields = ("lamb_forget", "objective", "reduction")
        for solution, report in zip(solutions, reports, strict=True):
            trials, notes = solution.trials, []
            report |= {key: getattr(solution, key) for key in (*fields, "reached")}
            report["trials"] = [{k: getattr(one, k) for k in (*fields, "step")} for one in trials]
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
        """Show where a descent is, and now and then the means of its three norms (3, R)."""
        settings, count = self.settings, norms.shape[1]
        where = f"{count} at once, trial {trial + 1} of at most {settings.max_trials}, step {step}"
        self.bar.set_postfix_str(f"{where} of {settings.steps}")
        if step % SHOWN_EVERY == 0:
            means = zip(TERMS, norms.mean(dim=1).tolist(), strict=True)
            logger.info(f"  {where}: {', '.join(f'{term} norm {x:.4f}' for term, x in means)}")


@register
class ForgetOptimum(PaperTrainer):
    """The same objective at its exact optimum, with a proof: what the descent aims at."""

    batch_size = 256

    def solve(self, requests: Batch) -> list[Solved]:
        problem, excluded, reports = self.problem(requests)
        answers = []
        solved = solve_each(problem, requests.of_text, excluded)
        for i, (solution, report) in enumerate(zip(solved, reports, strict=True)):
            part = problem.part(requests.of_text == i, slice(0)).double
            report |= solution.report() | {"reduction": part.reduction(solution.delta)}
            note = (
                f"{solution.branch}: lamb_forget {solution.lamb_forget:.4g}, c* "
                f"{solution.thresholds.reach:.4g}, {proof(solution.certificate.gap)}"
            )
            answers.append(Solved(solution.left.float(), solution.right.float(), report, [note]))
        return answers


def exact_settings(cfg: CfgNode, d: int | None = None) -> ExactSettings:
    """The settings of ForgetExact in a run; `d`: the width of the embeddings, if it is known."""
    forget = cfg.FORGET
    return ExactSettings(
        target=read_target(forget.TARGET, d),
        beta=float(forget.BETA) if takes(forget.TARGET, "beta") else 0.0,
        noise_std=float(forget.NOISE_STD),
        similarity=float(forget.SIMILARITY),
        **{key.lower(): value for key, value in cfg.TRAINER.FORGETEXACT.items()},
    )


@register
class ForgetExact(ForgetTrainer):
    """The forgotten texts on their target, and the least disturbance of weighted groups of names:
    the other classes of the set, its vocabulary with a generic one beside it, if there is a model
    to encode that, and the classes of the other sets."""

    settings_type = ExactSettings
    # One default for every data set and backbone, found on real CLIP features (docs/method.md).
    defaults: ClassVar = {"FORGET.TARGET": "specific", "FORGET.BETA": 0.0}
    weighted = True
    retains = GROUPS
    options = ("PROTECT",)
    batch_size = 256

    def check_settings(self, cfg: CfgNode) -> None:
        settings = exact_settings(cfg).chosen(listed=True)
        if not settings.own + settings.vocabulary + settings.others:
            raise ProblemError("TRAINER.FORGETEXACT: OWN, VOCABULARY or OTHERS must be above 0")

    def method_settings(self) -> dict[str, Any]:
        chosen = {key.lower(): value for key, value in self.cfg.TRAINER.FORGETEXACT.items()}
        # Generic names are retained where there is a model to encode them.
        return chosen | {"objective": "constrained", "model": self.source is not None}

    @cached_property
    def context(self) -> ForgetContext:
        """What all requests are solved in."""
        settings = exact_settings(self.cfg, self.projection.shape[1])
        more = {}  # groups of names that the bundles do not hold
        if self.plan.protect:
            more[PROTECT] = self.protected(self.plan.protect)
        if self.encode is not None and settings.generic > 0:
            names = generic_names()
            more[GENERIC] = names, self.encode(names)
        others, text = list(self.others.values()), self.target_text(settings.target)
        with one_thread():
            return exact_context(settings, self.bundle, others, self.device, more, text)

    def retained_names(self) -> RetainSet:
        ridge = self.context.settings.ridge
        logger.info(f"ridge {ridge:.2g} of a hidden state's mean squared length")
        return self.context.retain

    def requests(self, block: list[list[str]]) -> list[Request]:
        _ = self.retain  # once for all requests, and not timed as a solve
        return self.with_paraphrases(super().requests(block))

    def solve(self, requests: Batch) -> list[Solved]:
        """Forget them completely; see `forgetting.context`."""
        keys = ("weights", "model", "precision", "template")  # what a hidden state depends on
        encoder = json.dumps([self.run_settings.get(key) for key in keys]).encode()
        encoder_sha256, solved = hashlib.sha256(encoder).hexdigest(), []
        for answer in self.context.forget(requests):
            recipe = make_recipe(self.context, answer, self.plan.dataset, encoder_sha256)
            report = answer.report() | {"weights": self.retain.weights}
            factors = answer.edit.left.float(), answer.edit.right.float()
            solved.append(Solved(*factors, report, answer.notes(), recipe=recipe))
        return solved
