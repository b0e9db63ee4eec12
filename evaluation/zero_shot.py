"""Zero-shot classification of a bundle's images, before and after edits of the text projection.

An edit `left @ right` moves the embedding of a text with hidden state h by `(h left) right`. The
embeddings of all texts, and the products of images with them, follow from those of the untouched
model and r numbers per text, so that thousands of edits are evaluated by two matrix products.
Accuracies are computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip.bundle import FeatureBundle
from forgetting.errors import ProblemError, unknown

if TYPE_CHECKING:
    from forgetting.problem import LowRankEdit

Factors = tuple[Tensor, Tensor]  # left (w, r), right (r, d) of Delta = left @ right
BLOCK = 256  # images at once: their scores stay in the processor's cache
SHORTEST = 1e-12  # of an embedding; no text is divided by a smaller length


def class_embeddings(bundle: FeatureBundle) -> Tensor:
    """Unit-norm embeddings (C, d), float32, of the evaluation prompts in the untouched model."""
    return normalize(bundle.embed(bundle.class_hidden), dim=-1)


class EmbeddedTexts:
    """T texts in the untouched model.

    Attributes:
        hidden: (T, w), float64; embeddings: (T, d), float64, not normalised.
    """

    def __init__(self, bundle: FeatureBundle, hidden: Tensor) -> None:
        self.hidden = hidden.double()
        self.embeddings = bundle.embed(self.hidden)

    @cached_property
    def lengths(self) -> Tensor:
        """Lengths of the embeddings, (T,)."""
        return self.embeddings.norm(dim=1).clamp_min(SHORTEST)

    @property
    def unedited(self) -> EditedTexts:
        """The texts as they are: after an edit of rank 0."""
        (count, d) = self.embeddings.shape
        none = self.embeddings.new_zeros
        return EditedTexts(self, none(count, 0), none(0, d))

    def edited(self, edits: Sequence[LowRankEdit]) -> list[EditedTexts]:
        """The texts after each of several edits of the projection."""
        ranks = [len(edit.right) for edit in edits]
        lefts = [edit.left.detach().to(self.hidden) for edit in edits]  # (w, r) each
        ratios = self.hidden @ torch.cat(
            [self.hidden.new_zeros(self.hidden.shape[1], 0), *lefts], 1
        )
        return [
            EditedTexts(self, ratio.contiguous(), edit.right.detach().to(self.embeddings))
            for ratio, edit in zip(ratios.split(ranks, dim=1), edits, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class EditedTexts:
    """T texts after one edit of rank r.

    Attributes:
        texts: as they were; ratios: `H left`, (T, r), how far each text goes along each row of
            `right`, (r, d).
    """

    texts: EmbeddedTexts
    ratios: Tensor
    right: Tensor

    def embeddings(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Embeddings (n, d) of the texts `rows`, not normalised."""
        return torch.addmm(self.texts.embeddings[rows], self.ratios[rows], self.right)

    @cached_property
    def lengths(self) -> Tensor:
        """Lengths of the embeddings, (T,)."""
        return self.embeddings().norm(dim=1).clamp_min(SHORTEST)

    @cached_property
    def along(self) -> Tensor:
        """Products of the embeddings before the edit with the rows of `right`, (T, r)."""
        return self.texts.embeddings @ self.right.T

    @cached_property
    def cosines_with_before(self) -> Tensor:
        """Cosine of each text with itself before the edit, (T,)."""
        products = self.texts.lengths.square() + (self.ratios * self.along).sum(dim=1)
        return products / (self.texts.lengths * self.lengths)

    def cosines(
        self,
        before: Tensor,
        rows: Tensor | slice = slice(None),
        columns: Tensor | slice = slice(None),
    ) -> Tensor:
        """Cosines (n, m) of the texts `rows` with the texts `columns`.

        Args:
            before: (n, m), products of their embeddings in the untouched model.
        """
        # (e_i + s_i R)(e_j + s_j R)^T = e_i e_j^T + s_i b_j^T + b_i s_j^T with b = e R^T + s R R^T / 2
        moved = self.along + self.ratios @ (self.right @ self.right.T) / 2  # (T, r)
        mine = torch.cat([self.ratios[rows], moved[rows]], dim=1)  # (n, 2 r)
        theirs = torch.cat([moved[columns], self.ratios[columns]], dim=1)  # (m, 2 r)
        products = torch.addmm(before, mine, theirs.T)
        return products / self.lengths[rows, None] / self.lengths[columns]

    def image_cosines(self, products: Tensor, pulls: Tensor) -> Tensor:
        """Cosines (N, T) of N unit-norm images with the texts.

        Args:
            products: (N, T), of the images with the embeddings in the untouched model.
            pulls: (N, r), of the images with the rows of `right`.
        """
        inverse = self.lengths.reciprocal()
        return (products * inverse).addmm_(pulls, (self.ratios * inverse[:, None]).T)


class ZeroShot:
    """The images of one bundle, classified by the evaluation prompts, under any number of edits.

    Attributes:
        bundle; texts: the evaluation prompts of its C classes.
    """

    def __init__(self, bundle: FeatureBundle) -> None:
        self.bundle = bundle
        self.texts = EmbeddedTexts(bundle, bundle.class_hidden)

    @cached_property
    def images(self) -> Tensor:
        """Unit-norm embeddings (N, d), float64."""
        return self.bundle.image_features.double()

    @cached_property
    def correct_before(self) -> Tensor:
        """(N,) bool: whether the untouched model recognises each image."""
        return self._predict([self.texts.unedited], [()])[0] == self.bundle.labels

    def correct(
        self, edits: Sequence[LowRankEdit], removed: Sequence[Sequence[str]] | None = None
    ) -> Tensor:
        """Whether each image is recognised under each of R edits, (R, N) bool; see `predict`."""
        return self.predict(edits, removed) == self.bundle.labels

    def predict(
        self, edits: Sequence[LowRankEdit], removed: Sequence[Sequence[str]] | None = None
    ) -> Tensor:
        """The class of highest cosine similarity for every image under each of R edits, (R, N).

        Args:
            removed: for each edit, class names that are no longer on the list; no image is given
                one of them.

        Raises:
            ProblemError: a removed name is no class, or none is left.
        """
        return self._predict(self.texts.edited(edits), removed or [()] * len(edits))

    def _predict(self, edited: list[EditedTexts], removed: Sequence[Sequence[str]]) -> Tensor:
        off_list = [_columns(self.bundle, names) for names in removed]
        predicted = torch.empty(len(edited), len(self.bundle.labels), dtype=torch.int64)
        if not predicted.numel():
            return predicted
        rights, ranks = torch.cat([each.right for each in edited]), [len(e.right) for e in edited]
        for start in range(0, len(self.images), BLOCK):
            images = self.images[start : start + BLOCK]  # (b, d)
            products = images @ self.texts.embeddings.T  # (b, d) @ (d, C)
            pulls = (images @ rights.T).split(ranks, dim=1)  # R times (b, r)
            for row, (each, pull, columns) in enumerate(zip(edited, pulls, off_list, strict=True)):
                cosines = each.image_cosines(products, pull)  # (b, C)
                if columns:
                    cosines[:, columns] = -torch.inf
                # numpy's argmax takes half the time of torch's.
                nearest = torch.from_numpy(cosines.numpy().argmax(axis=1))
                predicted[row, start : start + BLOCK] = nearest
        return predicted


def own_accuracies(
    bundle: FeatureBundle, classes: Sequence[str], correct: Tensor
) -> dict[str, dict[str, float | None]]:
    """The paper's two accuracies on the set that classes are forgotten from.

    Args:
        correct: (N,) bool, whether each image is recognised.

    Returns:
        For each name in `classes`: `cls_acc_test`, the accuracy over its own images, and
        `no_cls_acc`, the accuracy over the images of all classes not in `classes`; both between 0
        and 1, None where there is no such image. `acc_train` is None, kept for the format.
    """
    own = {name: bundle.labels == bundle.classnames.index(name) for name in classes}
    rest = accuracy(correct, ~torch.stack(list(own.values())).any(dim=0))
    return {
        name: {"cls_acc_test": accuracy(correct, mine), "no_cls_acc": rest, "acc_train": None}
        for name, mine in own.items()
    }


def accuracy(correct: Tensor, chosen: Tensor | None = None) -> float | None:
    """The fraction of the (chosen) images that are recognised; None of no image."""
    count = len(correct) if chosen is None else int(chosen.sum())
    if not count:
        return None
    return int((correct if chosen is None else correct & chosen).sum()) / count


class Evaluator:
    """Accuracies for log entries: of the classes of one set, and of every other set as a whole."""

    def __init__(self, bundle: FeatureBundle, others: dict[str, FeatureBundle]) -> None:
        self.own = ZeroShot(bundle)
        self.others = {name: ZeroShot(other) for name, other in others.items()}

    def before(self, classes: list[str]) -> dict[str, Any]:
        """The accuracies of the untouched model, as `zero_shot` of a log entry."""
        bundle = self.own.bundle
        own = own_accuracies(bundle, classes, self.own.correct_before)
        return {bundle.dataset: own} | self._others_before

    @cached_property
    def _others_before(self) -> dict[str, Any]:
        return {name: _whole(other.correct_before) for name, other in self.others.items()}

    def after(
        self,
        requests: Sequence[list[str]],
        edits: Sequence[LowRankEdit],
        removed: Sequence[Sequence[str]] | None = None,
    ) -> list[dict[str, Any]]:
        """The accuracies after each request's edit, as `final_results` of a log entry."""
        bundle = self.own.bundle
        correct = self.own.correct(edits, removed)  # (R, N)
        entries = [
            {bundle.dataset: own_accuracies(bundle, classes, row)}
            for classes, row in zip(requests, correct, strict=True)
        ]
        for name, other in self.others.items():
            for entry, row in zip(entries, other.correct(edits), strict=True):
                entry[name] = _whole(row)
        return entries


def _whole(correct: Tensor) -> dict[str, dict[str, float | None]]:
    return {"all": {"all_ds": accuracy(correct)}}


def _columns(bundle: FeatureBundle, removed: Sequence[str]) -> list[int]:
    """The columns of classes that leave the list."""
    for name in removed:
        if name not in bundle.classnames:
            what = f"class to remove from the list of {bundle.dataset}"
            raise unknown(what, name, bundle.classnames)
    if set(bundle.classnames) <= set(removed):
        raise ProblemError(f"every class of {bundle.dataset} is removed: none is left to choose")
    return [bundle.classnames.index(name) for name in removed]
