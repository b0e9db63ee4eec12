"""Every class of a set forgotten alone, by ForgetExact itself, over bundles at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clip.bundle import FeatureBundle
from clip.retain import Retained, exact_names, leaving_alone, settled
from engine.config import settings
from forgetting import RetainSet, solve_constrained_each
from forgetting.requests import Requests
from trainers.base import AdaptedProjection, Solved
from trainers.exact import ForgetExact
from trainers.plan import Plan
from trainers.requests import Texts

Lever = Callable[[Retained, Tensor, Tensor], RetainSet]  # see experiments/levers.py


class Alone(ForgetExact):
    """The trainer, without folders: nothing is read and nothing is written.

    Attributes:
        requests: one a class, by its bare name; retained: what a run retains, and its ridges;
            leaving: (C, n), which of the names leave with each class.
    """

    def __init__(
        self,
        bundle: FeatureBundle,
        others: Sequence[FeatureBundle],
        opts: Sequence[str] = (),
        lever: Lever | None = None,
    ) -> None:
        """`opts`: KEY VALUE pairs of the run; `lever`: what it retains instead."""
        self.cfg = settings("ForgetExact", bundle.dataset, bundle.backbone, opts)
        self.bundle, self.others = bundle, {other.dataset: other for other in others}
        self.device = torch.device("cpu")
        classes = [[name] for name in bundle.classnames]
        self.plan = Plan(bundle.dataset, classes, list(self.others), {}, [])
        self.texts, self.model = Texts(bundle), AdaptedProjection(bundle.text_projection)
        self.requests = Requests(list(map(self.texts.request, classes)))
        kept = settled(self.cfg, bundle, exact_names(self.cfg, bundle, others), bool(others))
        if lever is not None:
            leaving = leaving_alone(bundle, kept.names)
            names = lever(kept, bundle.forget_hidden, leaving)
            kept = settled(self.cfg, bundle, names, bool(others))
        self.retained, self.retain = kept, kept.names
        self.leaving = self.texts.leaving(self.retain, self.requests)

    def answers(self) -> list[Solved]:
        """What a run finds for each class."""
        return self.solve(self.requests, [torch.Generator().manual_seed(0) for _ in self.requests])

    def left(self) -> Tensor:
        """(C, w) float64: by its bare name alone, Delta of class i is `left[i] (x) D_i`."""
        hidden, names = self.requests.hidden, self.retain
        solutions = solve_constrained_each(
            *(self.retained.ridge, hidden, torch.ones(len(hidden), 1), self.requests.of_text),
            *(names.rows, names.shares, self.leaving),
        )
        return torch.cat([solution.delta.T for solution in solutions])
