"""The paper's problem, requests to forget classes, and the low-rank edit that answers them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from forgetting.errors import ProblemError, number
from forgetting.io import matrices

AUTO = "auto"  # as lamb_forget: just above the threshold at which the texts reach their target
TENSORS = ("projection", "forget_hidden", "retain_hidden", "target")


@dataclass(frozen=True)
class LowRankEdit:
    """A low-rank change of a text projection: `Delta = left @ right`, left (w, r), right (r, d)."""

    left: Tensor
    right: Tensor

    @property
    def delta(self) -> Tensor:
        """(w, d)."""
        return self.left @ self.right

    @classmethod
    def none(cls, projection: Tensor) -> LowRankEdit:
        """No change of a projection (w, d), of rank 0."""
        return cls(projection[:, :0], projection[:0])


@dataclass(frozen=True)
class ForgetProblem:
    """Change a text projection `W` so that k texts reach given targets and m texts stay.

    The objective (Kravets and Namboodiri, TMLR 2025; the norms are not squared) is

        lamb_forget   * || P - H_f (W + Delta) ||_F
      + lamb_preserve * || H_r Delta ||_F
      + lamb_weight   * || B A ||_F                with Delta = (alpha / r) (B A)^T

    so that the weight term is `lamb_weight * (rank / alpha) * || Delta ||_F`. A weight of zero
    switches its term off (the paper's ablation).

    Raises ProblemError: a shape, dtype, device, weight or value that makes no problem.
    """

    projection: Tensor  # `W`, (w, d), the text projection of the untouched model
    forget_hidden: Tensor  # `H_f`, (k, w), hidden states of the texts to forget, k >= 1
    retain_hidden: Tensor  # `H_r`, (m, w), hidden states of the texts to retain, m >= 0
    target: Tensor  # `P`, (k, d), where the forgotten texts are sent
    lamb_forget: float | str  # "auto": just above c*, where the paper's retry loop ends
    lamb_preserve: float
    lamb_weight: float = 1.0
    rank: int = 5  # LoRA's r and alpha scale the weight term for every solver
    alpha: float = 1.0

    def __post_init__(self) -> None:
        tensors = matrices(**{name: getattr(self, name) for name in TENSORS})
        for name, tensor in zip(TENSORS, tensors, strict=True):
            object.__setattr__(self, name, tensor)
        (w, d), k = self.projection.shape, len(self.forget_hidden)
        if k == 0:
            raise ProblemError("forget_hidden is empty: name at least one text to forget")
        if w == 0 or d == 0:
            raise ProblemError(f"a projection of shape {(w, d)} has nothing to change")
        shapes = ((k, w), (len(self.retain_hidden), w), (k, d))
        for name, shape in zip(TENSORS[1:], shapes, strict=True):
            if getattr(self, name).shape != shape:
                raise ProblemError(
                    f"{name} has shape {tuple(getattr(self, name).shape)}, expected {shape} for a "
                    f"projection of shape {(w, d)} and {k} texts to forget"
                )
        if self.lamb_forget != AUTO:
            number("lamb_forget", self.lamb_forget, low=0)
        number("lamb_preserve", self.lamb_preserve, low=0)
        number("lamb_weight", self.lamb_weight, low=0)
        number("rank", self.rank, low=1, whole=True)
        number("alpha", self.alpha, above=0)

    @cached_property
    def double(self) -> ForgetProblem:
        """The same problem in float64, in which the exact solvers and all proofs work."""
        return replace(self, **{name: getattr(self, name).double() for name in TENSORS})

    @property
    def lw(self) -> float:
        """The weight of `||Delta||`: `lamb_weight * rank / alpha`."""
        return self.lamb_weight * self.rank / self.alpha

    @cached_property
    def displacement(self) -> Tensor:
        """`D = P - H_f W`, (k, d): how far every forgotten text is from its target."""
        return self.target - self.forget_hidden @ self.projection  # (k, w) @ (w, d) -> (k, d)

    def terms(self, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three norms at `delta` (w, d), unweighted: forget, preserve and weight term."""
        return (
            torch.linalg.matrix_norm(self.displacement - self.forget_hidden @ delta),
            torch.linalg.matrix_norm(self.retain_hidden @ delta),
            torch.linalg.matrix_norm(delta) * (self.rank / self.alpha),
        )

    def objective(self, delta: Tensor) -> Tensor:
        """The paper's objective at `delta` (w, d), a scalar.

        A `delta` in float64 is judged in float64, whatever the problem's own dtype: the rounding of
        float32 exceeds the difference between good answers.
        """
        if delta.dtype == torch.float64 != self.projection.dtype:
            return self.double.objective(delta)
        forget, preserve, weight = self.terms(delta)
        return self.lamb_forget * forget + self.lamb_preserve * preserve + self.lamb_weight * weight

    def part(self, texts: Tensor | slice, staying: Tensor | slice = slice(None)) -> ForgetProblem:
        """The problem of some of the texts, with some of the names retained: index, mask or slice
        of the rows of `forget_hidden`, and of `retain_hidden`."""
        return replace(
            self,
            forget_hidden=self.forget_hidden[texts],
            target=self.target[texts],
            retain_hidden=self.retain_hidden[staying],
        )

    def reduction(self, delta: Tensor) -> float:
        """`|L0 - L1| / L0` with L0 and L1 the forget norm before and after: the retry rule.

        A text that starts on its target (L0 = 0) has nothing to reduce: 1 if it stays, else 0.
        """
        before = torch.linalg.matrix_norm(self.displacement)
        after = self.terms(delta)[0]
        if before == 0:
            return 1.0 if after == 0 else 0.0
        return float((before - after).abs() / before)


class Paraphrases(NamedTuple):
    """Other texts that mean a class, and their hidden states (n, w)."""

    texts: list[str]
    hidden: Tensor


@dataclass(frozen=True)
class Request:
    """Classes to forget at once, and all that a solve needs to know of them."""

    classes: list[str]  # C names
    texts: list[str]  # k texts by which they are forgotten
    hidden: Tensor  # (k, w), their hidden states
    owner: list[int]  # k indices into `classes`, the class of each text
    # Of each class the names, in small letters, that mean the same: not retained beside it.
    same: Sequence[Collection[str]] = ()
    # Of each class other texts that mean it; empty if there are none to check.
    paraphrases: Sequence[Paraphrases] = field(default=(), repr=False)
    seed: int = 0  # of the noise that a target may draw
    added: int = 0  # how many of the texts, the last, are paraphrases that were added

    def with_texts(self, more: Sequence[tuple[int, str, Tensor]]) -> Request:
        """The request with more texts: for each its class (an index), text and hidden state."""
        owners, texts, rows = zip(*more, strict=True)
        return replace(
            self,
            texts=[*self.texts, *texts],
            hidden=torch.cat([self.hidden, torch.stack(rows)]),
            owner=[*self.owner, *owners],
            added=self.added + len(texts),
        )


class Batch(Sequence[Request]):
    """Requests that are solved together, each from the original model, their tensors stacked."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = list(requests)
        self.classes = [name for request in requests for name in request.classes]  # C of them
        self.same = [names for request in requests for names in request.same]  # of each class
        self.hidden = torch.cat([request.hidden for request in requests])  # (K, w), of all texts
        sizes = torch.tensor([len(request.classes) for request in requests])
        first = sizes.cumsum(0) - sizes
        number = torch.arange(len(requests))
        self.of_class = number.repeat_interleave(sizes)  # (C,), the request of each class
        self.sizes = [len(request.texts) for request in requests]
        self.of_text = number.repeat_interleave(torch.tensor(self.sizes))  # (K,), that of each text
        owner = [index for request in requests for index in request.owner]
        self.owner = torch.tensor(owner) + first[self.of_text]  # (K,), the class of each text

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, index: int) -> Request:
        return self._requests[index]

    def of_requests(self, of_classes: Tensor) -> Tensor:
        """From masks of the classes (C, n) those of the requests (R, n): the union of each."""
        masks = of_classes.new_zeros(len(self), of_classes.shape[1])
        for row, request in zip(of_classes, self.of_class.tolist(), strict=True):
            masks[request] |= row
        return masks


def equal_sizes(owner: Tensor, excluded: Tensor, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of requests with the same number of texts, of at most about `most` rows: requests
    (B,), by how many names they exclude (less padding), and the rows (B, k) of their texts, from
    the request of each text, `owner` (K,), and what each excludes, (R, n) bool. ProblemError: a
    request without a text."""
    count = torch.bincount(owner, minlength=len(excluded))
    if not count.all():
        raise ProblemError("each request needs at least one text")
    order = owner.argsort(stable=True)  # the texts, request by request
    first, names = count.cumsum(0) - count, excluded.sum(dim=1)
    for k in count.unique().tolist():
        requests = torch.nonzero(count == k)[:, 0]
        requests = requests[names[requests].argsort(stable=True)]
        size = max(1, most // (int(names[requests].max()) + k))
        for batch in requests.split(size):
            yield batch, order[first[batch, None] + torch.arange(k, device=owner.device)]


def pad_indices(mask: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The columns that each row of a mask (B, n) marks, as lists of equal length (B, n'), and their
    weights, of `weights` (n,), which are 0 where a list is padded."""
    row, column = mask.nonzero(as_tuple=True)  # row by row
    count = torch.bincount(row, minlength=len(mask))  # (B,)
    slot = torch.arange(len(column), device=column.device) - (count.cumsum(0) - count)[row]
    indices = column.new_zeros(len(mask), int(count.max()) if len(count) else 0)
    padded = weights.new_zeros(indices.shape)
    indices[row, slot], padded[row, slot] = column, weights[column]
    return indices, padded


def pad_rows(mask: Tensor, rows: Tensor) -> Tensor:
    """The rows (B, n', w) of (n, w) that each row of a mask (B, n) marks, padded with zeros."""
    indices, present = pad_indices(mask, rows.new_ones(len(rows)))
    return rows[indices] * present[..., None]
