"""Texts before and after edits of the text projection.

An edit `left @ right` moves the embedding of a text with hidden state h by `(h left) right`.
Lengths, cosines and products with images follow from those before and from r numbers per text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from forgetting.problem import LowRankEdit

SHORTEST = 1e-12  # of an embedding; no text is divided by a smaller length
ALL = slice(None)
Rows = Tensor | slice


class EmbeddedTexts:
    """T texts in the untouched model, in float64."""

    def __init__(self, hidden: Tensor, embeddings: Tensor) -> None:
        self.hidden = hidden.double()  # (T, w)
        self.embeddings = embeddings.double()  # (T, d), h W + b, not normalised
        self.lengths = self.embeddings.norm(dim=1).clamp_min(SHORTEST)  # (T,)

    def edited(self, edits: Sequence[LowRankEdit]) -> list[EditedTexts]:
        """The texts after each of several edits of the projection."""
        if not edits:
            return []
        lefts = [edit.left.detach().to(self.hidden) for edit in edits]  # (w, r) each
        ratios = (self.hidden @ torch.cat(lefts, dim=1)).split([x.shape[1] for x in lefts], dim=1)
        return [
            EditedTexts(self, ratio.contiguous(), edit.right.detach().to(self.embeddings))
            for ratio, edit in zip(ratios, edits, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class EditedTexts:
    """T texts after one edit of rank r."""

    texts: EmbeddedTexts  # as they were
    ratios: Tensor  # (T, r), H left: how far each text goes along each row of `right`
    right: Tensor  # (r, d)

    def embeddings(self, rows: Rows = ALL) -> Tensor:
        """Embeddings (n, d) of the texts `rows`, not normalised."""
        return torch.addmm(self.texts.embeddings[rows], self.ratios[rows], self.right)

    @cached_property
    def lengths(self) -> Tensor:
        """Lengths of the embeddings, (T,)."""
        return self.embeddings().norm(dim=1).clamp_min(SHORTEST)

    @property
    def distances(self) -> Tensor:
        """How far each embedding moves, (T,)."""
        return (self.ratios @ self.right).norm(dim=1)

    @cached_property
    def along(self) -> Tensor:
        """Products of the embeddings before the edit with the rows of `right`, (T, r)."""
        return self.texts.embeddings @ self.right.T

    @cached_property
    def cosines_with_before(self) -> Tensor:
        """Cosine of each text with itself before the edit, (T,)."""
        products = self.texts.lengths.square() + (self.ratios * self.along).sum(dim=1)
        return products / (self.texts.lengths * self.lengths)

    def cosines(self, before: Tensor, rows: Rows = ALL, columns: Rows = ALL) -> Tensor:
        """Cosines (n, m) of the texts `rows` with the texts `columns`; before: (n, m), products of
        their embeddings in the untouched model."""
        # (e_i + s_i R)(e_j + s_j R)^T = e_i e_j^T + s_i b_j^T + b_i s_j^T
        # with b = e R^T + s R R^T / 2
        moved = self.along + self.ratios @ (self.right @ self.right.T) / 2  # (T, r)
        mine = torch.cat([self.ratios[rows], moved[rows]], dim=1)  # (n, 2 r)
        theirs = torch.cat([moved[columns], self.ratios[columns]], dim=1)  # (m, 2 r)
        products = torch.addmm(before, mine, theirs.T)
        return products / self.lengths[rows, None] / self.lengths[columns]

    def image_cosines(self, products: Tensor, pulls: Tensor) -> Tensor:
        """Cosines (N, T) of N unit-norm images with the texts; products: (N, T), of the images with
        the embeddings before; pulls: (N, r), with the rows of `right`."""
        inverse = self.lengths.reciprocal()
        return (products * inverse).addmm_(pulls, (self.ratios * inverse[:, None]).T)
