"""What one audit looks at: one forgotten class, the model before and the model after."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip.bundle import FeatureBundle
from engine.determinism import seeded
from evaluation.zero_shot import Factors, class_embeddings


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


@dataclass(frozen=True)
class Model:
    """One text projection at work on a bundle: the untouched one, or one with an adapter.

    Attributes:
        factors: left (w, r), right (r, d) of the change; None for the untouched model.
        removed: class names that the deployed list no longer holds (never predicted).
    """

    bundle: FeatureBundle
    factors: Factors | None = None
    removed: tuple[str, ...] = ()

    @cached_property
    def projection(self) -> Tensor:
        """`W'`, (w, d) float32."""
        if self.factors is None:
            return self.bundle.text_projection
        left, right = self.factors
        return self.bundle.text_projection + left @ right  # (w, r) @ (r, d)

    def embed(self, hidden: Tensor) -> Tensor:
        """Unit-norm text embeddings (n, d) of hidden states (n, w)."""
        return normalize(hidden @ self.projection, dim=-1)

    @cached_property
    def classes(self) -> Tensor:
        """Unit-norm embeddings (C, d) of the evaluation prompts."""
        return class_embeddings(self.bundle, self.factors)

    @cached_property
    def scores(self) -> Tensor:
        """Cosines (N, C) of every image with every class; -inf for a removed class."""
        scores = self.bundle.image_features @ self.classes.T  # (N, d) @ (d, C)
        gone = [self.bundle.classnames.index(name) for name in self.removed]
        scores[:, gone] = -torch.inf
        return scores

    @cached_property
    def predicted(self) -> Tensor:
        """The zero-shot class of every image, (N,) int64."""
        return self.scores.argmax(dim=1)


@dataclass(frozen=True)
class Case:
    """One class under audit.

    Attributes:
        name: the class; forgotten: all classes that the adapter forgets, `name` among them.
        before, after: the untouched model and the changed one, on the class's own bundle.
        others: bundles of the other sets, same backbone.
        prompts: other words for the class, see `Prompt`; unmeasured: a line for each kind of words
            that could not be had.
        strangers: factors of adapters of other classes of the same run, label -> factors, as
            somebody who collects published models would have them.
        seed: of everything random in the audit.
    """

    name: str
    forgotten: list[str]
    before: Model
    after: Model
    others: dict[str, FeatureBundle] = field(default_factory=dict)
    prompts: list[Prompt] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)
    strangers: dict[str, Factors] = field(default_factory=dict)
    seed: int = 0

    @property
    def bundle(self) -> FeatureBundle:
        return self.before.bundle

    @cached_property
    def label(self) -> int:
        """Column of the class."""
        return self.bundle.classnames.index(self.name)

    @cached_property
    def mine(self) -> Tensor:
        """(N,) bool: the images of the class."""
        return self.bundle.labels == self.label

    @cached_property
    def retained(self) -> list[int]:
        """Columns of the classes of the set that are not forgotten."""
        gone = set(self.forgotten)
        return [i for i, name in enumerate(self.bundle.classnames) if name not in gone]

    def generator(self, purpose: str) -> torch.Generator:
        """Random numbers of one purpose: the same whatever else ran before."""
        return seeded(self.seed, self.bundle.dataset, self.name, purpose)
