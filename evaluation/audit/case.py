"""What one audit looks at: one forgotten class, the model before and the model after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from clip.bundle import FeatureBundle
from engine.determinism import seeded
from evaluation.audit.interval import Accuracy, share
from evaluation.zero_shot import CANCELS, Factors

T = TypeVar("T")
SHORTEST = 1e-12  # norm of a text: nothing is divided by less


@dataclass(frozen=True)
class Prompt:
    """Other words for a class, as a text that CLIP has read.

    Attributes:
        kind: bare, evaluation, retained (a vocabulary name that means the same), template,
            synonym, hypernym, description, case, plural or misspelling.
        seen: the class was forgotten by this very text.
        hidden: (w,), its hidden state.
    """

    text: str
    kind: str
    seen: bool
    hidden: Tensor


@dataclass(frozen=True, eq=False)
class Common:
    """What all classes of a data set have in common in an audit, each thing computed once.

    Attributes:
        bundle: of the set; others: of the other sets, same backbone.
        seed: of everything random in the audit.
    """

    bundle: FeatureBundle
    others: dict[str, FeatureBundle] = field(default_factory=dict)
    seed: int = 0
    _found: dict[Callable[[Common], Any], Any] = field(default_factory=dict, init=False)

    def once(self, find: Callable[[Common], T]) -> T:
        """What `find` finds, which does not depend on the class; it is called the first time."""
        if find not in self._found:
            self._found[find] = find(self)
        return self._found[find]

    def generator(self, *purpose: str) -> torch.Generator:
        """Random numbers of one purpose: the same whatever else ran before."""
        return seeded(self.seed, self.bundle.dataset, *purpose)

    @cached_property
    def before(self) -> Model:
        """The untouched model."""
        return Model(self)

    @cached_property
    def images(self) -> Tensor:
        """How many images each class has, (C,)."""
        return torch.bincount(self.bundle.labels, minlength=len(self.bundle.classnames))

    @cached_property
    def texts(self) -> Tensor:
        """Embeddings (C, d) of the evaluation prompts in the untouched model, not normalised."""
        return self.bundle.class_hidden @ self.bundle.text_projection  # (C, w) @ (w, d)

    @cached_property
    def products(self) -> Tensor:
        """Products (N, C) of every image with every one of these texts."""
        return self.bundle.image_features @ self.texts.T  # (N, d) @ (d, C)


@dataclass(frozen=True, eq=False)
class Model:
    """One text projection at work on a data set: the untouched one, or one with an adapter.

    Attributes:
        factors: left (w, r), right (r, d) of the change; None for the untouched model.
        removed: class names that the deployed list no longer holds (never predicted).
    """

    common: Common
    factors: Factors | None = None
    removed: tuple[str, ...] = ()

    @property
    def bundle(self) -> FeatureBundle:
        return self.common.bundle

    @cached_property
    def change(self) -> Factors:
        """The factors; of rank 0 for the untouched model."""
        w, d = self.bundle.text_projection.shape
        return self.factors or (torch.zeros(w, 0), torch.zeros(0, d))

    @cached_property
    def projection(self) -> Tensor:
        """`W'`, (w, d) float32, as it would be published."""
        left, right = self.change
        return self.bundle.text_projection + left @ right  # (w, r) @ (r, d)

    def moves(self, hidden: Tensor) -> Tensor:
        """How far the change moves the embeddings of hidden states (n, w): (n, d)."""
        left, right = self.change
        return (hidden @ left) @ right  # (n, r) @ (r, d)

    def embed(self, hidden: Tensor) -> Tensor:
        """Text embeddings (n, d) of hidden states (n, w), not normalised."""
        return hidden @ self.bundle.text_projection + self.moves(hidden)

    @cached_property
    def texts(self) -> Tensor:
        """Embeddings (C, d) of the evaluation prompts, not normalised."""
        return self.common.texts + self.moves(self.bundle.class_hidden)

    @cached_property
    def lengths(self) -> Tensor:
        """Norms (C,) of these texts."""
        return self.texts.norm(dim=1).clamp_min(SHORTEST)

    @cached_property
    def classes(self) -> Tensor:
        """Unit-norm embeddings (C, d) of the evaluation prompts."""
        return self.texts / self.lengths[:, None]

    @cached_property
    def cosines(self) -> Tensor:
        """Cosines (N, C) of every image with every class, also with removed ones.

        A change of rank r moves the products of the untouched model by a matrix of rank r, so a
        class under audit costs N C r products and not N C d.
        """
        left, right = self.change
        images, hidden = self.bundle.image_features, self.bundle.class_hidden
        cosines = torch.addmm(self.common.products, images @ right.T, (hidden @ left).T)
        cosines /= self.lengths
        shrunk = self.lengths < CANCELS * self.common.texts.norm(dim=1)
        if shrunk.any():
            cosines[:, shrunk] = images @ self.classes[shrunk].T
        return cosines

    @cached_property
    def scores(self) -> Tensor:
        """The same; -inf for a removed class."""
        if not self.removed:
            return self.cosines
        gone = [self.bundle.classnames.index(name) for name in self.removed]
        return self.cosines.index_fill(1, torch.tensor(gone), -torch.inf)

    @cached_property
    def predicted(self) -> Tensor:
        """The zero-shot class of every image, (N,) int64."""
        return self.scores.argmax(dim=1)

    @cached_property
    def right(self) -> Tensor:
        """How many images of each class are recognised, (C,)."""
        labels = self.bundle.labels
        return torch.bincount(labels[self.predicted == labels], minlength=len(self.common.images))

    def accuracy(self, column: int) -> Accuracy:
        """Zero-shot accuracy over the images of one class."""
        return share(int(self.right[column]), int(self.common.images[column]))


@dataclass(frozen=True)
class Case:
    """One class under audit.

    Attributes:
        name: the class; forgotten: all classes that the adapter forgets, `name` among them.
        after: the changed model.
        prompts: other words for the class, see `Prompt`; unmeasured: a line for each kind of words
            that could not be had.
        stranger: an adapter of other classes of the same run, which it forgets by its factors, as
            somebody who collects published models would have it; None if there is none.
    """

    name: str
    forgotten: list[str]
    after: Model
    prompts: list[Prompt] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)
    stranger: tuple[list[str], Factors] | None = None

    @property
    def common(self) -> Common:
        return self.after.common

    @property
    def before(self) -> Model:
        return self.common.before

    @property
    def bundle(self) -> FeatureBundle:
        return self.common.bundle

    @cached_property
    def label(self) -> int:
        """Column of the class."""
        return self.bundle.classnames.index(self.name)

    @cached_property
    def mine(self) -> Tensor:
        """(N,) bool: the images of the class."""
        return self.bundle.labels == self.label

    @cached_property
    def retained(self) -> Tensor:
        """(C,) bool: the classes of the set that are not forgotten."""
        return torch.tensor([name not in self.forgotten for name in self.bundle.classnames])

    def generator(self, purpose: str) -> torch.Generator:
        """Random numbers of one purpose for the class."""
        return self.common.generator(self.name, purpose)

    def sides(self, find: Callable[[Model], T]) -> dict[str, T]:
        """What `find` finds of the model before and of the model after."""
        return {"before": find(self.before), "after": find(self.after)}
