"""Zero-shot classification of a bundle's images, before and after the projection changed.

A change of low rank moves every class text h by `(h left) right`, so the products of images and
classes afterwards are those from before plus a product of rank k: thousands of changes are judged
without embedding or multiplying anything again (`ZeroShot`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip.bundle import FeatureBundle
from forgetting.errors import ProblemError, unknown

Factors = tuple[Tensor, Tensor]  # left (w, r), right (r, d) of Delta = left @ right
BLOCK = 1024  # images at once; always the same ones together, so that rounding is always the same
# Where a text keeps less than this of its length, the sum would be rounding: it is embedded anew.
CANCELS = 0.1
TIE = 5e-7  # where cosines are nearer than that, rounding decides: that of `predict`, always


def class_embeddings(bundle: FeatureBundle, factors: Factors | None = None) -> Tensor:
    """Unit-norm text embeddings (C, d) of the evaluation prompts.

    Args:
        bundle: hidden states (C, w) and projection (w, d).
        factors: the change of the projection; None for the untouched model.
    """
    embeddings = bundle.class_hidden @ bundle.text_projection  # (C, w) @ (w, d) -> (C, d)
    if factors is not None:
        left, right = factors
        embeddings = embeddings + (bundle.class_hidden @ left) @ right  # (C, r) @ (r, d)
    return normalize(embeddings, dim=-1)


class ZeroShot:
    """The images of one bundle, classified by its own classes, under any number of changes.

    Attributes:
        bundle; embeddings: (C, d) of the evaluation prompts, at their own lengths.
    """

    def __init__(self, bundle: FeatureBundle) -> None:
        self.bundle = bundle
        self.embeddings = bundle.class_hidden @ bundle.text_projection  # (C, w) @ (w, d)

    @cached_property
    def before(self) -> Tensor:
        """(N,) bool, whether each image is recognised by the untouched model."""
        return self.predict() == self.bundle.labels

    def predict(self, factors: Factors | None = None, removed: Sequence[str] = ()) -> Tensor:
        """The class of highest cosine similarity for every image, (N,) int64, in float32.

        Args:
            removed: class names that are on the list no longer: no image is given one of them.

        Raises:
            ProblemError: a removed name is no class, or none is left.
        """
        gone = _columns(self.bundle, removed)
        classes = class_embeddings(self.bundle, factors).T  # (d, C)
        found = torch.empty_like(self.bundle.labels)
        for rows in self._blocks:
            found[rows] = self._nearest(rows, classes, gone)
        return found

    def _nearest(self, rows: slice, classes: Tensor, gone: Sequence[int] = ()) -> Tensor:
        """The nearest class (b,) of each image of a block; `classes` (d, C), unit norm."""
        similarity = self.bundle.image_features[rows] @ classes  # (b, d) @ (d, C)
        similarity[:, gone] = -torch.inf
        return similarity.argmax(dim=1)

    @property
    def _blocks(self) -> list[slice]:
        count = len(self.bundle.labels)
        return [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]

    def correct(self, changes: Sequence[Factors]) -> Tensor:
        """Whether each image is recognised under each of R changes, (R, N) bool; see `predict`."""
        bundle = self.bundle
        images, labels = bundle.image_features, bundle.labels
        found = torch.empty(len(changes), len(labels), dtype=torch.bool)
        if not len(labels):
            return found
        shares, rights, lengths, anew = [], [], [], []
        own = self.embeddings.norm(dim=1)  # (C,)
        for number, (left, right) in enumerate(changes):
            share = bundle.class_hidden @ left  # (C, w) @ (w, r) -> (C, r)
            embedded = torch.addmm(self.embeddings, share, right)  # (C, d)
            length = embedded.norm(dim=1)
            low = (length < CANCELS * own).nonzero()[:, 0]
            anew += [(number, int(column), embedded[column]) for column in low]
            shares.append(share.T.contiguous())
            rights.append(right)
            lengths.append(length.clamp_min(1e-12).reciprocal())
        fresh = torch.stack([row for _, _, row in anew]).T if anew else None  # (d, n)
        rank = [len(right) for right in rights]
        every = torch.cat(rights).T  # (d, sum of ranks)
        scores = images.new_empty(min(BLOCK, len(labels)), len(own))
        for rows in self._blocks:
            block, truth = images[rows], labels[rows, None]
            products = block @ self.embeddings.T  # (b, d) @ (d, C)
            pulls = (block @ every).split(rank, dim=1)  # R times (b, r)
            special = block @ fresh if anew else None  # (b, n)
            out, place = scores[: len(block)], 0
            for number, (share, length) in enumerate(zip(shares, lengths, strict=True)):
                torch.addmm(products, pulls[number], share, out=out)
                while place < len(anew) and anew[place][0] == number:
                    out[:, anew[place][1]] = special[:, place]
                    place += 1
                mine = out.mul_(length).gather(1, truth)[:, 0]  # (b,)
                lead = mine - out.scatter_(1, truth, -torch.inf).amax(dim=1)
                if (lead.abs() < TIE).any():
                    classes = class_embeddings(bundle, changes[number]).T
                    found[number, rows] = self._nearest(rows, classes) == truth[:, 0]
                else:
                    found[number, rows] = lead > 0
        return found


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
    labels = {name: bundle.classnames.index(name) for name in classes}
    mine = {name: bundle.labels == label for name, label in labels.items()}
    others = ~torch.stack(list(mine.values())).any(dim=0)
    rest = accuracy(correct, others)
    return {
        name: {
            "cls_acc_test": accuracy(correct, chosen),
            "no_cls_acc": rest,
            "acc_train": None,
        }
        for name, chosen in mine.items()
    }


def evaluate_classes(
    bundle: FeatureBundle,
    classes: Sequence[str],
    factors: Factors | None = None,
    removed: Sequence[str] = (),
) -> dict[str, dict[str, float | None]]:
    """`own_accuracies` of one change; the images of `removed` classes stay, and count as not
    recognised."""
    return own_accuracies(
        bundle, classes, ZeroShot(bundle).predict(factors, removed) == bundle.labels
    )


def accuracy(correct: Tensor, chosen: Tensor | None = None) -> float | None:
    """The share of the (chosen) images that are recognised; None of no image."""
    count = len(correct) if chosen is None else int(chosen.sum())
    if not count:
        return None
    return int((correct if chosen is None else correct & chosen).sum()) / count


def _columns(bundle: FeatureBundle, removed: Sequence[str]) -> list[int]:
    """The columns of classes that leave the list."""
    for name in removed:
        if name not in bundle.classnames:
            raise unknown(
                f"class to remove from the list of {bundle.dataset}", name, bundle.classnames
            )
    if set(bundle.classnames) <= set(removed):
        raise ProblemError(f"every class of {bundle.dataset} is removed: none is left to choose")
    return [bundle.classnames.index(name) for name in removed]
