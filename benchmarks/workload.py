"""What the solver's benchmark works on: the classes of a bundle, or random ones of that size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import normalize
from yacs.config import CfgNode

from clip.bundle import FeatureBundle
from engine.config import paper_weights, settings
from evaluation.zero_shot import class_embeddings
from forgetting import AUTO, ForgetProblem, empty_target, solve_each
from forgetting.each import EachSolution


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

    def leaving(self, chosen: Sequence[int]) -> Tensor:
        """(n, C + M) bool: the own row of each chosen class."""
        mask = torch.zeros(len(chosen), len(self.classes) + len(self.vocabulary), dtype=torch.bool)
        mask[torch.arange(len(chosen)), torch.tensor(chosen)] = True
        return mask

    def problem(self, lamb_forget: float | str, chosen: Sequence[int]) -> ForgetProblem:
        """The chosen classes' texts for `solve_each`, with everything that may be retained."""
        forget = constants().FORGET
        return ForgetProblem(
            projection=self.projection,
            forget_hidden=self.classes[chosen],
            retain_hidden=self.retained,
            target=self.target[chosen],
            rank=forget.RANK,
            alpha=forget.ALPHA,
            **paper_weights(constants()) | {"lamb_forget": lamb_forget},
        )

    def alone(self, index: int, lamb_forget: float | str) -> ForgetProblem:
        """One class's own problem, without its row among the retained."""
        first = torch.tensor([0])
        return self.problem(lamb_forget, [index]).part(first, ~self.leaving([index])[0])

    def solve(self, lamb_forget: float | str, chosen: Sequence[int] | None = None) -> EachSolution:
        """The chosen classes (all of them), each forgotten alone, by the exact solver."""
        chosen = range(len(self.classes)) if chosen is None else chosen
        return solve_each(self.problem(lamb_forget, chosen), self.leaving(chosen))

    def auto_lamb_forget(self) -> float:
        """Just above the largest c* of all classes, so that every class moves."""
        return float(self.solve(AUTO).lamb_forget.max())


@cache
def constants() -> CfgNode:
    """The settings of a run of the paper's method on a data set that has no file of its own."""
    return settings("ForgetLoRA", backbone="ViT-B/16")


def from_bundle(path: str) -> Workload:
    """The classes of a bundle; its vocabulary less the names that are classes is retained too."""
    bundle = FeatureBundle.load(path)
    known = {name.casefold() for name in bundle.classnames}
    free = [i for i, name in enumerate(bundle.retain_names) if name.casefold() not in known]
    embeddings = class_embeddings(bundle)
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
