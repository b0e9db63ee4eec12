"""The subject of an audit: one forgotten class of a data set, the model before and after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from clip.bundle import FeatureBundle
from engine.determinism import seeded
from evaluation.audit.statistics import Accuracy, proportion
from evaluation.zero_shot import EditedTexts, EmbeddedTexts, embedded_texts
from forgetting.problem import LowRankEdit

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """A text that stands for a class.

    Attributes:
        kind: bare, evaluation, retained (a vocabulary name that means the same), template,
            synonym, hypernym, description, case, plural or misspelling.
        seen: the class was forgotten by this text.
        hidden: (w,), its hidden state.
    """

    text: str
    kind: str
    seen: bool
    hidden: Tensor


@dataclass(frozen=True, eq=False)
class AuditData:
    """What all classes of a data set share in an audit. Everything is computed once, in float64.

    Attributes:
        bundle: of the set; others: of the other sets, same backbone.
        seed: of everything random in the audit.
    """

    bundle: FeatureBundle
    others: dict[str, FeatureBundle] = field(default_factory=dict)
    seed: int = 0
    _results: dict[Any, Any] = field(default_factory=dict, init=False)

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
        w, d = self.bundle.text_projection.shape
        return Model(self, LowRankEdit(torch.zeros(w, 0), torch.zeros(0, d)))

    @cached_property
    def counts(self) -> Tensor:
        """Images of each class, (C,)."""
        return torch.bincount(self.bundle.labels, minlength=len(self.bundle.classnames))

    @cached_property
    def columns(self) -> dict[str, int]:
        """Class -> its column."""
        return {name: column for column, name in enumerate(self.bundle.classnames)}

    @cached_property
    def images(self) -> Tensor:
        """(N, d)."""
        return self.bundle.image_features.double()

    @cached_property
    def class_texts(self) -> EmbeddedTexts:
        """The evaluation prompts of the C classes."""
        return embedded_texts(self.bundle, self.bundle.class_hidden)

    @cached_property
    def texts(self) -> EmbeddedTexts:
        """T texts: the evaluation prompts of the classes, the vocabulary, and the evaluation
        prompts of the other sets."""
        others = [other.class_hidden for other in self.others.values()]
        hidden = torch.cat([self.bundle.class_hidden, self.bundle.retain_hidden, *others])
        return embedded_texts(self.bundle, hidden)

    @cached_property
    def products(self) -> Tensor:
        """Inner products (N, C) of the images with the embeddings of the classes."""
        return self.images @ self.class_texts.embeddings.T


@dataclass(frozen=True, eq=False)
class Model:
    """A changed text projection on a data set.

    Attributes:
        edit: the change; of rank 0 for the untouched model.
        removed: classes that the deployed list no longer holds; they are never predicted.
    """

    data: AuditData
    edit: LowRankEdit
    removed: tuple[str, ...] = ()

    @property
    def bundle(self) -> FeatureBundle:
        return self.data.bundle

    @cached_property
    def projection(self) -> Tensor:
        """`W'`, (w, d), as it would be published: rounded once to float32."""
        delta = self.edit.left.double() @ self.edit.right.double()
        return (self.bundle.text_projection.double() + delta).float()

    def embed(self, hidden: Tensor) -> Tensor:
        """Embeddings (n, d) of hidden states (n, w), not normalised."""
        return embedded_texts(self.bundle, hidden).edited([self.edit])[0].embeddings()

    @cached_property
    def texts(self) -> EditedTexts:
        """`AuditData.texts` after the change."""
        return self.data.texts.edited([self.edit])[0]

    @cached_property
    def class_texts(self) -> EditedTexts:
        """The evaluation prompts after the change."""
        return self.data.class_texts.edited([self.edit])[0]

    @cached_property
    def classes(self) -> Tensor:
        """Unit-norm embeddings (C, d) of the evaluation prompts."""
        return self.class_texts.embeddings() / self.class_texts.lengths[:, None]

    def image_cosines(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Cosines (n, P) of images (n, d) with texts of hidden states (P, w)."""
        texts = embedded_texts(self.bundle, hidden)
        edited = texts.edited([self.edit])[0]
        return edited.image_cosines(images @ texts.embeddings.T, images @ edited.right.T)

    @cached_property
    def cosines(self) -> Tensor:
        """Cosines (N, C) of every image with every class, removed ones too."""
        pulls = self.data.images @ self.class_texts.right.T  # (N, d) @ (d, r)
        return self.class_texts.image_cosines(self.data.products, pulls)

    @property
    def removed_columns(self) -> list[int]:
        return [self.data.columns[name] for name in self.removed]

    @cached_property
    def scores(self) -> Tensor:
        """`cosines` with -inf for a removed class."""
        return self.cosines.index_fill(1, torch.tensor(self.removed_columns).long(), -torch.inf)

    @cached_property
    def predicted(self) -> Tensor:
        """The zero-shot class of every image, (N,) int64."""
        return self.scores.argmax(dim=1)

    @cached_property
    def recognised(self) -> Tensor:
        """How many images of each class are recognised, (C,)."""
        labels = self.bundle.labels
        return torch.bincount(labels[self.predicted == labels], minlength=len(self.data.counts))

    def accuracy(self, column: int) -> Accuracy:
        """Zero-shot accuracy over the images of one class."""
        return proportion(int(self.recognised[column]), int(self.data.counts[column]))


@dataclass(frozen=True, eq=False)
class Case:
    """One class under audit.

    Attributes:
        name: the class; forgotten: all classes that the adapter forgets, `name` among them.
        after: the changed model.
        prompts: texts that stand for the class; missing: a line for each kind of text that is not
            available.
        stranger: an adapter of other classes of the same run, as somebody who collects published
            models would have it: its classes and its change. None if there is none.
    """

    name: str
    forgotten: list[str]
    after: Model
    prompts: list[Prompt] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    stranger: tuple[list[str], LowRankEdit] | None = None

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
        return self.data.columns[self.name]

    @cached_property
    def own_images(self) -> Tensor:
        """(N,) bool: the images of the class."""
        return self.bundle.labels == self.label

    @cached_property
    def retained(self) -> Tensor:
        """(C,) bool: the classes of the set that are not forgotten."""
        retained = torch.ones(len(self.bundle.classnames), dtype=torch.bool)
        retained[[self.data.columns[name] for name in self.forgotten]] = False
        return retained

    def generator(self, purpose: str) -> torch.Generator:
        """Random numbers for one purpose and this class."""
        return self.data.generator(self.name, purpose)

    def sides(self, function: Callable[[Model], T]) -> dict[str, T]:
        """`function` of the model before and of the model after."""
        return {"before": function(self.before), "after": function(self.after)}
