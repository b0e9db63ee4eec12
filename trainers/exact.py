"""Complete forgetting as a trainer: the constrained form, solved exactly and proved."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Any

from yacs.config import CfgNode

from clip.retain import GENERIC, GROUPS, PROTECT, exact_context
from engine.determinism import one_thread
from engine.log import logger
from forgetting.compose import make_recipe
from forgetting.context import ExactSettings, ForgetContext
from forgetting.errors import ProblemError
from forgetting.models.vocabulary import generic_names
from forgetting.problem import Batch, Request
from forgetting.retain import RetainSet
from forgetting.targets import WITH_BETA
from trainers.base import TARGETS, ForgetTrainer, Solved, register
from trainers.requests import read_target


def exact_settings(cfg: CfgNode, d: int | None = None) -> ExactSettings:
    """The settings of a run; `d`: the width of the embeddings, if it is known."""
    forget = cfg.FORGET
    return ExactSettings(
        target=read_target(forget.TARGET, d),
        beta=float(forget.BETA) if forget.TARGET in WITH_BETA else 0.0,
        noise_std=float(forget.NOISE_STD),
        similarity=float(forget.SIMILARITY),
        **{key.lower(): value for key, value in cfg.TRAINER.FORGETEXACT.items()},
    )


@register
class ForgetExact(ForgetTrainer):
    """The forgotten texts on their target, and the least disturbance of everything retained.

    Retained are weighted groups of names: the other classes of the set, its vocabulary with a
    generic one beside it, if there is a model to encode that, and the classes of the other sets.
    """

    settings_type = ExactSettings
    targets = ("specific", *TARGETS)
    retains = GROUPS
    options = ("PROTECT",)
    batch_size = 256

    @classmethod
    def check_settings(cls, cfg: CfgNode) -> None:
        settings = exact_settings(cfg)
        settings = settings.chosen(listed=settings.others > 0)
        if not settings.own + settings.vocabulary + settings.others:
            raise ProblemError(
                "TRAINER.FORGETEXACT: one of OWN, VOCABULARY, OTHERS must be above 0"
            )

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
            more[PROTECT] = self.texts.protected(self.plan.protect, self.others)
        if self.encode is not None and settings.generic > 0:
            names = generic_names()
            more[GENERIC] = names, self.encode(names)
        others, text = list(self.others.values()), self.texts.target_text(settings.target)
        with one_thread():
            return exact_context(settings, self.bundle, others, self.device, more, text)

    @property
    def encoder(self) -> str:
        """Digest of what a hidden state depends on beside its text."""
        keys = ("weights", "model", "precision", "template")
        parts = [self.run_settings.get(key) for key in keys]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def retained_names(self) -> RetainSet:
        ridge = self.context.settings.ridge
        logger.info(f"ridge {ridge:.2g} of a hidden state's mean squared length")
        return self.context.retain

    def requests(self, block: list[list[str]]) -> list[Request]:
        _ = self.retain  # once for all requests, and not timed as a solve
        return self.texts.with_paraphrases(super().requests(block))

    def solve(self, requests: Batch) -> list[Solved]:
        """Forget them completely; see `forgetting.context`."""
        solved = []
        for answer in self.context.forget(requests):
            factors = answer.edit.left.float(), answer.edit.right.float()
            recipe = make_recipe(self.context, answer, self.plan.dataset, self.encoder)
            report = answer.report() | {"weights": self.retain.weights}
            solved.append(Solved(*factors, report, answer.notes(), recipe=recipe))
        return solved
