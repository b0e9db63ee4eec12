"""Complete forgetting as a trainer: the constrained form, solved exactly and proved."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import datasets
from clip.retain import GENERIC, GROUPS, PROTECT, Names, Retained, exact_weights, retained
from engine.determinism import one_thread
from engine.log import logger
from forgetting import RetainSet, opposite_target
from forgetting.context import ExactSettings, SpecificTargets, World, forget_completely
from forgetting.displacement import Watch
from forgetting.errors import ProblemError
from forgetting.models.vocabulary import generic_names
from forgetting.problem import Batch
from forgetting.targets import FURTHER
from trainers.base import TARGETS, ForgetTrainer, Solved, register


@register
class ForgetExact(ForgetTrainer):
    """Least disturbance of everything that is retained, with the forgotten texts on their target.

    Retained are weighted groups of names: the other classes of the set, its vocabulary with a
    generic one beside it, if there is a model to encode that, and the classes of the other sets.
    """

    name = "exact"
    settings_type = ExactSettings
    targets = ("specific", *TARGETS)
    retains = GROUPS
    options = ("PROTECT",)
    batch_size = 256

    @classmethod
    def check_settings(cls, cfg) -> None:
        node = cfg.TRAINER.FORGETEXACT
        if not any(exact_weights(cfg, bool(node.OTHERS)).values()):
            raise ProblemError(
                "TRAINER.FORGETEXACT: one of OWN, VOCABULARY, OTHERS must be above 0"
            )

    def method_settings(self) -> dict[str, Any]:
        chosen = {key.lower(): value for key, value in self.cfg.TRAINER.FORGETEXACT.items()}
        # Generic names are retained where there is a model to encode them.
        return chosen | {"objective": "constrained", "model": self.source is not None}

    @cached_property
    def more(self) -> dict[str, Names]:
        """Groups of names that the bundles do not hold."""
        more = {}
        if self.plan.protect:
            more[PROTECT] = self.texts.held(self.plan.protect, self.others)
        weights = exact_weights(self.cfg, bool(self.others), [GENERIC])
        if self.texts.encode is not None and weights[GENERIC] > 0:
            names = generic_names()
            more[GENERIC] = names, self.texts.encode(names)
        return more

    @cached_property
    def retained(self) -> Retained:
        """What is retained, factorised once for all requests."""
        others = list(self.others.values())
        with one_thread():
            return retained(self.cfg, self.bundle, others, self.device, self.more)

    def retained_names(self) -> RetainSet:
        logger.info(f"ridge {self.retained.mu:.2g} of a hidden state's mean squared length")
        return self.retained.names

    def read(self, requests: Batch) -> None:
        self.texts.wordings(requests.classes)

    def solve(self, requests: Batch, generators: Sequence[torch.Generator]) -> list[Solved]:
        """Forget them completely; see `forgetting.context`."""
        forget, world = self.cfg.FORGET, self.world(generators)
        beta = float(forget.BETA) if forget.TARGET in FURTHER else 0.0
        wordings = self.texts.wordings(requests.classes)
        return [
            Solved(
                answer.solution.left.float(),
                answer.solution.right.float(),
                answer.report() | {"weights": self.retain.weights},
                answer.notes([datasets.clean_name(name) for name in answer.request.classes]),
                recipe=answer.recipe,
                parts=answer.parts,
            )
            for answer in forget_completely(world, requests, wordings, beta)
        ]

    def world(self, generators: Sequence[torch.Generator]) -> World:
        """What requests are solved in; a generator for the noise of each."""
        node, retain = self.cfg.TRAINER.FORGETEXACT, self.retain

        def send(
            requests: Batch, leaving: Tensor, numbers: Sequence[int], betas: Tensor
        ) -> tuple[Tensor, list[int]]:
            noise = [generators[number] for number in numbers]
            for generator in noise:  # one that is solved again meets its noise again
                generator.manual_seed(generator.initial_seed())
            return self._targets(requests, leaving, noise, betas)

        return World(
            retain,
            self.retained.ridge,
            self.model.projection,
            self.watch,
            self.texts.label,
            leaving=lambda requests: self.texts.leaving(retain, requests),
            send=send,
            dataset=self.plan.dataset,
            follow=node.MIN_DISPLACEMENT,
            margin=node.MIN_MARGIN,
            further=self.cfg.FORGET.TARGET in FURTHER,
            option="FORGET.PROTECT",
            bias=self.model.bias,
            solved=self.retained.solved,
        )

    @cached_property
    def watch(self) -> Watch:
        """The evaluation prompts of the set, then those of the other sets that are listed."""
        listed = self.cfg.TRAINER.FORGETEXACT.OTHERS > 0
        bundles = [self.bundle, *(self.others.values() if listed else ())]
        names = [datasets.clean_name(name) for bundle in bundles for name in bundle.classnames]
        hidden = torch.cat([bundle.class_hidden for bundle in bundles])
        rivals = len(self.bundle.classnames)
        return Watch(names, hidden.to(self.device), self.model.projection, rivals, self.model.bias)

    def _targets(
        self,
        requests: Batch,
        leaving: Tensor,
        generators: Sequence[torch.Generator],
        betas: Tensor,
    ) -> tuple[Tensor, list[int]]:
        """`P` (K, d), and the draws of noise for each request; `betas`: (K,)."""
        if self.cfg.FORGET.TARGET not in FURTHER:
            return self.embedded_targets(requests, generators)
        if self.cfg.FORGET.TARGET == "opposite":
            embedded = self.bundle.embed(requests.hidden.double()).to(self.device)  # (K, d)
            target = opposite_target(embedded, torch.eye(embedded.shape[1]).to(embedded), betas)
        else:
            target = self.specific_targets(requests, leaving, betas)
        return target, [0] * len(requests)

    @cached_property
    def specific_targets(self) -> SpecificTargets:
        return SpecificTargets(
            self.model.projection, self.retain, self.retained.lam, self.model.bias
        )
