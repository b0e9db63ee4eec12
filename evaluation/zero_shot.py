"""Zero-shot classification of a bundle's images, before and after edits of the text projection.

The products of images with edited texts follow from those with the untouched ones and r numbers per
text (`forgetting.edited_texts`), so that thousands of edits are evaluated by two matrix products.
Accuracies are computed in float64.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip.bundle import FeatureBundle
from forgetting.edited_texts import EmbeddedTexts
from forgetting.errors import ProblemError
from forgetting.problem import LowRankEdit

BLOCK = 256  # images at once: their scores stay in the processor's cache


def class_embeddings(bundle: FeatureBundle) -> Tensor:
    """Unit-norm embeddings (C, d), float32, of the evaluation prompts in the untouched model."""
    return normalize(bundle.embed(bundle.class_hidden), dim=-1)


def embedded_texts(bundle: FeatureBundle, hidden: Tensor) -> EmbeddedTexts:
    """Texts (T, w) in the untouched model of a bundle."""
    return EmbeddedTexts(hidden, bundle.embed(hidden.double()))


class ZeroShot:
    """The images of one bundle, classified by the evaluation prompts, under any number of edits."""

    def __init__(self, bundle: FeatureBundle) -> None:
        self.bundle = bundle
        self.texts = embedded_texts(bundle, bundle.class_hidden)

    @cached_property
    def correct_before(self) -> Tensor:
        """(N,) bool: whether the untouched model recognises each image."""
        return self.correct([LowRankEdit.none(self.bundle.text_projection)])[0]

    def correct(
        self, edits: Sequence[LowRankEdit], removed: Sequence[Sequence[str]] | None = None
    ) -> Tensor:
        """Whether each image is recognised under each of R edits, (R, N) bool; see `predict`."""
        return self.predict(edits, removed) == self.bundle.labels

    def predict(
        self, edits: Sequence[LowRankEdit], removed: Sequence[Sequence[str]] | None = None
    ) -> Tensor:
        """The class of highest cosine similarity for every image under each of R edits, (R, N).
        `removed`: for each edit, class names that no image is given; ProblemError if none is left.
        """
        edited, names = self.texts.edited(edits), self.bundle.classnames
        removed = removed or [()] * len(edits)
        if any(set(names) <= set(each) for each in removed):
            raise ProblemError(f"every class of {self.bundle.dataset} is removed: none is left")
        columns = [[names.index(name) for name in each] for each in removed]
        predicted = torch.empty(len(edited), len(self.bundle.labels), dtype=torch.int64)
        rights, ranks = torch.cat([each.right for each in edited]), [len(e.right) for e in edited]
        for start in range(0, len(self.bundle.labels), BLOCK):
            images = self.bundle.image_features[start : start + BLOCK].double()  # (b, d)
            products = images @ self.texts.embeddings.T  # (b, d) @ (d, C)
            pulls = (images @ rights.T).split(ranks, dim=1)  # R times (b, r)
            for row, (each, pull, gone) in enumerate(zip(edited, pulls, columns, strict=True)):
                cosines = each.image_cosines(products, pull)  # (b, C)
                cosines[:, gone] = -torch.inf
                # numpy's argmax takes half the time of torch's.
                nearest = torch.from_numpy(cosines.numpy().argmax(axis=1))
                predicted[row, start : start + BLOCK] = nearest
        return predicted


def accuracy(correct: Tensor, chosen: Tensor | None = None) -> float | None:
    """The fraction of the (chosen) images that are recognised; None of no image."""
    right = correct if chosen is None else correct[chosen]
    return int(right.sum()) / len(right) if len(right) else None


class Evaluator:
    """Accuracies for log entries: of the classes of one set, and of every other set as a whole."""

    def __init__(self, bundle: FeatureBundle, others: dict[str, FeatureBundle]) -> None:
        self.own = ZeroShot(bundle)
        self.others = {name: ZeroShot(other) for name, other in others.items()}

    def before(self, classes: list[str]) -> dict[str, Any]:
        """The accuracies of the untouched model, as `zero_shot` of a log entry."""
        others = {name: accuracy(other.correct_before) for name, other in self.others.items()}
        return self._entry(classes, self.own.correct_before, others)

    def after(
        self,
        requests: Sequence[list[str]],
        edits: Sequence[LowRankEdit],
        removed: Sequence[Sequence[str]] | None = None,
    ) -> list[dict[str, Any]]:
        """The accuracies after each request's edit, as `final_results` of a log entry."""
        own = self.own.correct(edits, removed)  # (R, N)
        others = {name: other.correct(edits) for name, other in self.others.items()}
        return [
            self._entry(classes, own[i], {name: accuracy(x[i]) for name, x in others.items()})
            for i, classes in enumerate(requests)
        ]

    def _entry(
        self, classes: list[str], correct: Tensor, others: dict[str, float | None]
    ) -> dict[str, Any]:
        """The paper's two accuracies: `cls_acc_test` over a class's own images, `no_cls_acc` over
        those of all that are not in `classes`; None where there is no such image. `acc_train` is
        None, kept for the format. `correct`: (N,) bool, whether each image is recognised."""
        bundle, found = self.own.bundle, {}
        own = {name: bundle.labels == bundle.classnames.index(name) for name in classes}
        rest = accuracy(correct, ~torch.stack(list(own.values())).any(dim=0))
        for name, mine in own.items():
            right = accuracy(correct, mine)
            found[name] = {"cls_acc_test": right, "no_cls_acc": rest, "acc_train": None}
        others = {name: {"all": {"all_ds": value}} for name, value in others.items()}
        return {bundle.dataset: found} | others
