"""What one audit looks at: one forgotten class, the model before and the model after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from clip.bundle import FeatureBundle
from engine.determinism import seeded
from evaluation.audit.interval import Accuracy, share
from evaluation.audit.texts import Moved, Texts
from evaluation.zero_shot import Factors

T = TypeVar("T")


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
    def columns(self) -> dict[str, int]:
        """Class -> its column."""
        return {name: column for column, name in enumerate(self.bundle.classnames)}

    @cached_property
    def texts(self) -> Texts:
        """T texts: the evaluation prompts of the C classes, the names of the vocabulary, and the
        evaluation prompts of the other sets."""
        bundle, others = self.bundle, self.others.values()
        parts = bundle.class_hidden, bundle.retain_hidden, *(each.class_hidden for each in others)
        hidden = torch.cat(parts)
        return Texts(hidden, bundle.embed(hidden))  # (T, w), (T, d)

    @cached_property
    def products(self) -> Tensor:
        """Products (N, C) of every image with the evaluation prompt of every class."""
        count = len(self.bundle.classnames)
        return self.bundle.image_features @ self.texts.embedded[:count].T  # (N, d) @ (d, C)


class Block:
    """Models, and cases, that are audited together, so that one product serves all of them.

    It keeps none of them alive: what was audited is gone, and its scores with it.
    """

    SIZE = 128  # ranks of what is found together, and one more each; memory grows with it

    def __init__(self) -> None:
        self._sizes: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # member -> rank and one
        self._found: dict[Callable, WeakKeyDictionary[Any, Any]] = {}

    def add(self, member: object, rank: int) -> None:
        """Have a model or a case found together with the others."""
        self._sizes[member] = 1 + rank

    @property
    def full(self) -> bool:
        """Whether there is enough in it."""
        return sum(self._sizes.values()) >= 2 * self.SIZE  # models and cases

    def once(self, find: Callable[[list[Any]], list[T]], member: object) -> T:
        """What `find` finds for a member; it is asked for as many of its kind at once."""
        found = self._found.setdefault(find, WeakKeyDictionary())
        if member not in found:
            asked, size = [member], self._sizes[member]
            for other, more in self._sizes.items():
                new = type(other) is type(member) and other is not member and other not in found
                if new and size + more <= self.SIZE:
                    asked.append(other)
                    size += more
            found.update(zip(asked, find(asked), strict=True))
        return found[member]


@dataclass(frozen=True, eq=False)
class Model:
    """One text projection at work on a data set: the untouched one, or one with an adapter.

    Attributes:
        factors: left (w, r), right (r, d) of the change; None for the untouched model.
        removed: class names that the deployed list no longer holds (never predicted).
        block: what is audited with it.
    """

    common: Common
    factors: Factors | None = None
    removed: tuple[str, ...] = ()
    block: Block = field(default_factory=Block, repr=False)

    def __post_init__(self) -> None:
        self.block.add(self, self.rank)

    @property
    def bundle(self) -> FeatureBundle:
        return self.common.bundle

    @property
    def rank(self) -> int:
        """Of the change."""
        return len(self.change[1])

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

    @cached_property
    def size(self) -> float:
        """The norm of `W'`."""
        return float(torch.linalg.matrix_norm(self.projection))

    @property
    def moved(self) -> Moved:
        """Where the change sends all texts of the set."""
        return self.block.once(_moved, self)

    def embed(self, hidden: Tensor) -> Tensor:
        """Text embeddings (n, d) of hidden states (n, w), not normalised."""
        left, right = self.change
        return self.bundle.embed(hidden) + (hidden @ left) @ right  # (n, r) @ (r, d)

    @cached_property
    def texts(self) -> Tensor:
        """Embeddings (C, d) of the evaluation prompts, not normalised."""
        return self.moved.embedded(slice(len(self.bundle.classnames)))

    @cached_property
    def lengths(self) -> Tensor:
        """Norms (C,) of these texts."""
        return self.moved.lengths[: len(self.bundle.classnames)]

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
        images, moved, count = self.bundle.image_features, self.moved, len(self.lengths)
        pulls = images @ moved.right.T  # (N, d) @ (d, r)
        cosines = torch.addmm(self.common.products, pulls, moved.shares[:count].T)
        cosines /= self.lengths
        shrunk = moved.shrunk[moved.shrunk < count]
        if len(shrunk):
            cosines[:, shrunk] = images @ (moved.embedded(shrunk) / self.lengths[shrunk, None]).T
        return cosines

    @cached_property
    def scores(self) -> Tensor:
        """The same; -inf for a removed class."""
        if not self.removed:
            return self.cosines
        gone = [self.common.columns[name] for name in self.removed]
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


def _moved(models: list[Model]) -> list[Moved]:
    return models[0].common.texts.moved([model.change for model in models])


@dataclass(frozen=True, eq=False)
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

    def __post_init__(self) -> None:
        self.after.block.add(self, self.after.rank)

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
        return self.common.columns[self.name]

    @cached_property
    def mine(self) -> Tensor:
        """(N,) bool: the images of the class."""
        return self.bundle.labels == self.label

    @cached_property
    def retained(self) -> Tensor:
        """(C,) bool: the classes of the set that are not forgotten."""
        retained = torch.ones(len(self.bundle.classnames), dtype=torch.bool)
        retained[[self.common.columns[name] for name in self.forgotten]] = False
        return retained

    def together(self, find: Callable[[list[Case]], list[T]]) -> T:
        """What `find` finds for the case, which it is asked for all cases of the block at once."""
        return self.after.block.once(find, self)

    def generator(self, purpose: str) -> torch.Generator:
        """Random numbers of one purpose for the class."""
        return self.common.generator(self.name, purpose)

    def sides(self, find: Callable[[Model], T]) -> dict[str, T]:
        """What `find` finds of the model before and of the model after."""
        return {"before": find(self.before), "after": find(self.after)}
