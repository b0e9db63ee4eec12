"""The subject of an audit: one forgotten class of a data set, the model before and after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from scipy.special import betaincinv
from torch import Tensor
from torch.nn.functional import normalize

from clip.bundle import FeatureBundle
from engine.determinism import seeded
from evaluation.zero_shot import embedded_texts
from forgetting.problem import LowRankEdit

T = TypeVar("T")
Encode = Callable[[list[str]], Tensor]  # n texts -> hidden states (n, w)
Accuracy = dict[str, Any]  # {"value", "low", "high", "n"}: fractions, and the number of images


def accuracy(right: int, n: int) -> Accuracy:
    """`right` of `n` with the exact 95 % interval (Clopper and Pearson, 1934), which covers the
    true proportion at least 95 % of the time for any n. None where n is 0."""
    if n == 0:
        return {"value": None, "low": None, "high": None, "n": 0}
    tail = (1 - 0.95) / 2  # the ends are quantiles of beta distributions
    low = float(betaincinv(right, n - right + 1, tail)) if right > 0 else 0.0
    high = float(betaincinv(right + 1, n - right, 1 - tail)) if right < n else 1.0
    return {"value": right / n, "low": low, "high": high, "n": n}


def highest(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest of `values` (n,), highest first; equal ones in order."""
    return values.argsort(descending=True, stable=True)[:count]


@dataclass(frozen=True)
class Prompt:
    """A text that stands for a class."""

    text: str
    # bare, evaluation, retained (a vocabulary name that means the same), template, synonym,
    # hypernym, description, case, plural or misspelling
    kind: str
    seen: bool  # the class was forgotten by this text
    hidden: Tensor  # (w,), its hidden state


@dataclass(eq=False)
class AuditData:
    """What all classes of a data set share in an audit. Everything is computed once, in float64."""

    bundle: FeatureBundle
    others: dict[str, FeatureBundle] = field(default_factory=dict)  # other sets, same backbone
    seed: int = 0  # of everything random in the audit
    encode: Encode | None = None  # encodes further texts; None where there is no model
    _results: dict[Any, Any] = field(default_factory=dict, init=False)

    @cached_property
    def images(self) -> Tensor:  # (N, d)
        return self.bundle.image_features.double()

    def once(self, function: Callable[..., T], *arguments: Any) -> T:
        """`function(self, *arguments)`, called the first time only."""
        if (function, arguments) not in self._results:
            self._results[function, arguments] = function(self, *arguments)
        return self._results[function, arguments]

    def generator(self, *purpose: str) -> torch.Generator:
        """Random numbers for one purpose, independent of what ran before."""
        return seeded(self.seed, self.bundle.dataset, *purpose)

    @cached_property
    def before(self) -> Model:
        """The untouched model."""
        return Model(self, LowRankEdit.none(self.bundle.text_projection))

    @cached_property
    def counts(self) -> Tensor:
        """Images of each class, (C,)."""
        return torch.bincount(self.bundle.labels, minlength=len(self.bundle.classnames))


@dataclass(frozen=True, eq=False)
class Model:
    """A changed text projection on a data set."""

    data: AuditData
    edit: LowRankEdit  # of rank 0 for the untouched model
    removed: tuple[int, ...] = ()  # columns of classes off the list, which are never predicted

    @cached_property
    def projection(self) -> Tensor:
        """`W'`, (w, d), as it would be published: rounded once to float32."""
        delta = self.edit.left.double() @ self.edit.right.double()
        return (self.data.bundle.text_projection.double() + delta).float()

    def embed(self, hidden: Tensor) -> Tensor:
        """Embeddings (n, d) of hidden states (n, w), not normalised."""
        return embedded_texts(self.data.bundle, hidden).edited([self.edit])[0].embeddings()

    @cached_property
    def classes(self) -> Tensor:
        """Unit-norm embeddings (C, d) of the evaluation prompts."""
        return normalize(self.embed(self.data.bundle.class_hidden), dim=1)

    @cached_property
    def cosines(self) -> Tensor:
        """Cosines (N, C) of every image with every class, removed ones too."""
        return self.data.images @ self.classes.T

    @cached_property
    def scores(self) -> Tensor:
        """`cosines` with -inf for a removed class."""
        return self.cosines.index_fill(1, torch.tensor(self.removed).long(), -torch.inf)

    @cached_property
    def predicted(self) -> Tensor:
        """The zero-shot class of every image, (N,) int64."""
        return self.scores.argmax(dim=1)

    @cached_property
    def recognised(self) -> Tensor:
        """How many images of each class are recognised, (C,)."""
        labels = self.data.bundle.labels
        return torch.bincount(labels[self.predicted == labels], minlength=len(self.data.counts))

    def accuracy(self, column: int) -> Accuracy:
        """Zero-shot accuracy over the images of one class."""
        return accuracy(int(self.recognised[column]), int(self.data.counts[column]))


@dataclass(frozen=True, eq=False)
class Case:
    """One class under audit."""

    name: str
    forgotten: list[str]  # all classes that the adapter forgets, `name` among them
    after: Model
    prompts: list[Prompt] = field(default_factory=list)

    @property
    def data(self) -> AuditData:
        return self.after.data

    @property
    def before(self) -> Model:
        return self.data.before

    @property
    def bundle(self) -> FeatureBundle:
        return self.data.bundle

    @cached_property
    def label(self) -> int:
        """Column of the class."""
        return self.bundle.classnames.index(self.name)

    @cached_property
    def images(self) -> Tensor:
        """Indices (n,) of the images of the class."""
        return (self.bundle.labels == self.label).nonzero()[:, 0]

    @cached_property
    def retained(self) -> Tensor:
        """(C,) bool: the classes of the set that are not forgotten."""
        return torch.tensor([name not in self.forgotten for name in self.bundle.classnames])

    def change(self, column: int) -> dict[str, Any]:
        """A class's name, and the accuracies over its images before and after."""
        sides = self.sides(lambda model: model.accuracy(column))
        return {"name": self.bundle.classnames[column], **sides}

    def sides(self, function: Callable[[Model], T]) -> dict[str, T]:
        """`function` of the model before and of the model after."""
        return {"before": function(self.before), "after": function(self.after)}
