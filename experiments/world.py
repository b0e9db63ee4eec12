"""A data set, the sets beside it, and which names are retained when classes are forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from clip.bundle import FeatureBundle
from clip.retain import exact_context, exact_retain_set
from engine.config import paper_weights, settings
from engine.determinism import seeded
from evaluation.results import join_label
from evaluation.zero_shot import Evaluator
from forgetting import Group, LoraSettings, RetainSet
from forgetting.problem import Batch, Request
from forgetting.targets import specific_target, targets
from trainers.exact import exact_settings
from trainers.requests import Texts, read_target


@dataclass(frozen=True, eq=False)
class Task:
    """One row to make: classes forgotten at once, by one solver, in one setting of a study.

    Attributes:
        request: the classes and the texts that stand for them.
        solver, setting: names; place: where the setting lies on a numeric axis, NaN if on none.
        target, beta: where texts are sent; rank: of the descent and of the weight term.
        off: a loss term, or a retained group, that is switched off.
        pick: (n,) rows of the vocabulary that alone are retained; None: what the method retains.
    """

    request: Request
    solver: str
    setting: str
    target: str
    beta: float
    rank: int
    place: float = float("nan")
    off: str = ""
    pick: Tensor | None = None


class World:
    """One data set under one backbone, with everything that can be retained beside its classes.

    Attributes:
        bundle: the set that classes are forgotten from; others: the other sets.
        exact: config of a run of ForgetExact; paper: that of one of ForgetLoRA, for one class
            (False) and for several at once (True).
        descent: the constants of the paper's descent.
        texts: of the classes; evaluator: of the images of all sets.
        retain: what ForgetExact retains; vocabulary: what the paper's objective retains.
        mu: ridge of the constrained form; lam: that of the target specific. Both come from all
            groups together, so that they do not move with what a study retains.
    """

    def __init__(
        self,
        bundle: FeatureBundle,
        others: dict[str, FeatureBundle],
        seed: int = 0,
        opts: Sequence[str] = (),
    ) -> None:
        """Raises ProblemError: no loss weights for that backbone, or config keys (`opts`, KEY VALUE)
        that do not fit."""
        self.bundle, self.others, self.seed = bundle, others, seed
        names = bundle.dataset, bundle.backbone
        self.exact = settings("ForgetExact", *names, opts)
        self.paper = {
            several: settings("ForgetLoRA", *names, [*opts, "FORGET.MULTICLASS", str(several)])
            for several in (False, True)
        }
        for cfg in self.paper.values():
            paper_weights(cfg)  # refuses missing ones
        descent = self.paper[False].TRAINER.FORGETLORA
        self.descent = LoraSettings(**{key.lower(): value for key, value in descent.items()})
        self.texts, self.evaluator = Texts(bundle, seed=seed), Evaluator(bundle, others)
        self.context = exact_context(exact_settings(self.exact), bundle, list(others.values()))
        self.retain, self.mu = self.context.retain, self.context.ridge.mu
        self.lam = self.context.inputs.specific_lam
        self.vocabulary = self.names_alone(self.paper[False].FORGET.SIMILARITY)

    def names_alone(
        self, similarity: float, pick: Tensor | None = None, weight: float | None = None
    ) -> RetainSet:
        """The vocabulary (the rows `pick` of it) as a retain set."""
        names, rows = self.bundle.retain_names, self.bundle.retain_hidden
        if pick is not None:
            names, rows = [names[row] for row in pick.tolist()], rows[pick]
        return RetainSet({"vocabulary": Group(names, rows, weight)}, similarity)

    def generator(self, classes: Sequence[str], purpose: str = "") -> torch.Generator:
        """Random numbers of these classes; without a purpose those of a run of train.py."""
        return seeded(self.seed, self.bundle.dataset, join_label(list(classes)) + purpose)

    def pool(self, request: Request) -> Tensor:
        """(n,) rows of the vocabulary that a study of retained names may pick from: those that
        neither mean the class nor are more similar to it than the limit."""
        names = self.names_alone(self.exact.FORGET.SIMILARITY)
        excluded = names.excluded(request.same, request.hidden, torch.tensor(request.owner))
        return torch.nonzero(~excluded[0])[:, 0]

    def retained(self, tasks: Sequence[Task], requests: Batch) -> tuple[RetainSet, Tensor]:
        """What tasks of one setting retain, and which names leave with each class, (C, n) bool.

        Tasks that pick their names retain all that any of them picks; from each of them the others
        leave.
        """
        first = tasks[0]
        constrained = first.solver == "constrained"
        if first.pick is not None:
            pick = torch.cat([task.pick for task in tasks]).unique()
            retain = self.names_alone(1.0, pick, 1.0 if constrained else None)
            return retain, torch.stack([~torch.isin(pick, task.pick) for task in tasks])
        retain = self.retain if constrained else self.vocabulary
        if constrained and first.off:
            others = list(self.others.values())
            settings = exact_settings(self.exact)
            retain = exact_retain_set(settings, self.bundle, others, without=first.off)
        return retain, retain.excluded(requests.same, requests.hidden, requests.owner)

    def target(
        self,
        first: Task,
        requests: Batch,
        retain: RetainSet,
        excluded: Tensor,
    ) -> Tensor:
        """`P` (K, d) of requests of one setting; `specific` removes what the names that the
        constrained form retains do not explain, whatever the solver."""
        inputs = self.context.inputs
        if first.target != "specific":
            kind = read_target(first.target, inputs.projection.shape[1])
            inputs = replace(inputs, text=self.texts.target_text(kind))
            return targets(kind, requests, inputs, first.beta)[0]
        if first.solver != "constrained":
            retain = self.retain
            excluded = retain.excluded(requests.same, requests.hidden, requests.owner)
        return specific_target(
            inputs.embed(requests.hidden),
            retain.embedding_gram(inputs.projection, inputs.bias),
            self.lam,
            first.beta,
            inputs.embed(retain.rows),
            retain.name_weights,
            excluded[requests.owner],
        )

    def gram(self, task: Task) -> Tensor:
        """`G` (w, w) float64 of what the solver of a task retains by default."""
        requests = Batch([task.request])
        retain, leaving = self.retained([replace(task, pick=None, off="")], requests)
        stay = ~requests.of_requests(leaving)[0]
        rows = retain.rows[stay].double()
        return (rows.T * retain.name_weights[stay]) @ rows  # (w, m) @ (m, w) -> (w, w)

    @cached_property
    def singular(self) -> tuple[Tensor, Tensor, Tensor]:
        """The singular value decomposition of W in float64."""
        return torch.linalg.svd(self.bundle.text_projection.double())
