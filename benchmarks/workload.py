"""What the solver's benchmark works on: the classes of a bundle, or random ones of that size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip.bundle import FeatureBundle
from forgetting import ForgetProblem, empty_target
from forgetting.each import solve_each
from forgetting.exact import AUTO_MARGIN

LAMB_PRESERVE, LAMB_WEIGHT, RANK = 0.3, 1.0, 5


@dataclass(frozen=True)
class Workload:
    """C classes, each to be forgotten alone while everything else is retained.

    Attributes:
        projection: (w, d); classes: (C, w), hidden states of their names; vocabulary: (M, w), of
            retained names that are no class; target: (C, d); bundle: None for random texts.
    """

    name: str
    projection: Tensor
    classes: Tensor
    vocabulary: Tensor
    target: Tensor
    bundle: FeatureBundle | None = None

    @property
    def retained(self) -> Tensor:
        """(C + M, w), the classes first; a class's own row leaves when it is forgotten."""
        return torch.cat([self.classes, self.vocabulary])

    def problem(self, lamb_forget: float, chosen: Tensor | None = None) -> ForgetProblem:
        """The chosen classes (all of them) for `solve_each`, whose `own` is `chosen`."""
        chosen = torch.arange(len(self.classes)) if chosen is None else chosen
        return ForgetProblem(
            projection=self.projection,
            forget_hidden=self.classes[chosen],
            retain_hidden=self.retained,
            target=self.target[chosen],
            lamb_forget=lamb_forget,
            lamb_preserve=LAMB_PRESERVE,
            lamb_weight=LAMB_WEIGHT,
            rank=RANK,
        )

    def alone(self, index: int, lamb_forget: float, dtype=torch.float64) -> ForgetProblem:
        """One class's own problem, without its row among the retained."""
        retained = self.retained
        return ForgetProblem(
            projection=self.projection.to(dtype),
            forget_hidden=self.classes[index : index + 1].to(dtype),
            retain_hidden=torch.cat([retained[:index], retained[index + 1 :]]).to(dtype),
            target=self.target[index : index + 1].to(dtype),
            lamb_forget=lamb_forget,
            lamb_preserve=LAMB_PRESERVE,
            lamb_weight=LAMB_WEIGHT,
            rank=RANK,
        )

    def auto_lamb_forget(self) -> float:
        """Just above the largest c* of all classes, so that every class moves."""
        reach = solve_each(self.problem(1.0), torch.arange(len(self.classes))).reach
        return (1 + AUTO_MARGIN) * float(reach.max())


def from_bundle(path: str) -> Workload:
    """The classes of a bundle; its vocabulary less the names that are classes is retained too."""
    bundle = FeatureBundle.load(path)
    known = {name.casefold() for name in bundle.classnames}
    free = [i for i, name in enumerate(bundle.retain_names) if name.casefold() not in known]
    embeddings = bundle.class_hidden @ bundle.text_projection  # (C, d)
    generator = torch.Generator().manual_seed(0)
    targets = [
        empty_target(bundle.neutral_hidden, bundle.text_projection, embeddings, [i], generator)[0]
        for i in range(len(bundle.classnames))
    ]
    return Workload(
        f"{bundle.dataset}, {bundle.backbone}",
        bundle.text_projection,
        bundle.forget_hidden,
        bundle.retain_hidden[free],
        torch.cat(targets),
        bundle,
    )


def random_workload(classes: int = 1000, width: int = 512) -> Workload:
    """Random texts of CLIP's kind: a common part of a third and variances that fall as 1/rank.

    The projection is (w, w); the target is the unit-norm embedding of the common part.
    """
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, width + 1).rsqrt()  # (w,)
    common = normalize(torch.randn(1, width, generator=generator), dim=1)  # (1, w)
    common = common * (scale.square().sum() / 2).sqrt()
    hidden = common + scale * torch.randn(classes, width, generator=generator)  # (C, w)
    projection = torch.randn(width, width, generator=generator) / width**0.5
    target = normalize(common @ projection, dim=1).expand(classes, -1).clone()  # (C, w)
    hidden = 10 * normalize(hidden, dim=1)
    return Workload(f"random texts, w = d = {width}", projection, hidden, hidden[:0], target)
