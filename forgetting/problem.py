"""The paper's problem: which texts to move where, which to leave, and at what price."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from forgetting.checks import POSITIVE, WEIGHT, check, either, matrices, whole
from forgetting.errors import ProblemError

AUTO = "auto"  # as lamb_forget: just above the threshold at which the texts reach their target
NUMBERS = {
    "lamb_forget": either(AUTO, WEIGHT),
    "lamb_preserve": WEIGHT,
    "lamb_weight": WEIGHT,
    "rank": whole(1),
    "alpha": POSITIVE,
}
TENSORS = ("projection", "forget_hidden", "retain_hidden", "target")


@dataclass(frozen=True)
class Change:
    """An answer of low rank: `Delta = left @ right` with left (w, r), right (r, d)."""

    left: Tensor
    right: Tensor

    @property
    def delta(self) -> Tensor:
        """(w, d)."""
        return self.left @ self.right


@dataclass(frozen=True)
class ForgetProblem:
    """Change a text projection `W` so that k texts land on given targets and m texts stay.

    The objective (Kravets and Namboodiri, TMLR 2025; the norms are not squared) is

        lamb_forget   * || P - H_f (W + Delta) ||_F
      + lamb_preserve * || H_r Delta ||_F
      + lamb_weight   * || B A ||_F                with Delta = (alpha / r) (B A)^T

    so that the weight term is `lamb_weight * (rank / alpha) * || Delta ||_F`. A weight of zero
    switches its term off (the paper's ablation).

    Attributes:
        projection: `W`, (w, d), the text projection of the untouched model.
        forget_hidden: `H_f`, (k, w), hidden states of the texts to forget, k >= 1.
        retain_hidden: `H_r`, (m, w), hidden states of the texts to retain, m >= 0.
        target: `P`, (k, d), where the forgotten texts are sent.
        lamb_forget, lamb_preserve, lamb_weight: weights of the three terms, finite and >= 0.
            `lamb_forget` may be "auto": each solver then takes a value just above the threshold c*
            (`forgetting.solvers.exact.settle`), which is where the paper's retry loop ends.
        rank, alpha: LoRA's r and alpha; they scale the weight term for every solver.

    Raises:
        ProblemError: a shape, dtype, device, weight or value that makes no problem.
    """

    projection: Tensor
    forget_hidden: Tensor
    retain_hidden: Tensor
    target: Tensor
    lamb_forget: float | str
    lamb_preserve: float
    lamb_weight: float = 1.0
    rank: int = 5
    alpha: float = 1.0

    def __post_init__(self) -> None:
        found = matrices(**{name: getattr(self, name) for name in TENSORS})
        for name, tensor in zip(TENSORS, found, strict=True):
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
        for name, rule in NUMBERS.items():
            check(getattr(self, name), rule, name)

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

    def part(self, texts: Tensor | slice, staying: Tensor | None = None) -> ForgetProblem:
        """The problem of some of the texts, with some of the names retained.

        Args:
            texts: (k,) index, mask or slice of rows of `forget_hidden`.
            staying: (m,) mask of rows of `retain_hidden`; None: all stay.
        """
        return replace(
            self,
            forget_hidden=self.forget_hidden[texts],
            target=self.target[texts],
            retain_hidden=self.retain_hidden if staying is None else self.retain_hidden[staying],
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
