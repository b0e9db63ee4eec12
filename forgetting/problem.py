"""The paper's problem: which texts to move where, which to leave, and at what price."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


class ProblemError(ValueError):
    """Input that no solver can work on; the message is one line."""


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
        rank, alpha: LoRA's r and alpha; they scale the weight term for every solver.

    Raises:
        ProblemError: a shape, dtype, device, weight or value that makes no problem.
    """

    projection: Tensor
    forget_hidden: Tensor
    retain_hidden: Tensor
    target: Tensor
    lamb_forget: float
    lamb_preserve: float
    lamb_weight: float = 1.0
    rank: int = 5
    alpha: float = 1.0

    def __post_init__(self) -> None:
        tensors = {
            name: getattr(self, name)
            for name in ("projection", "forget_hidden", "retain_hidden", "target")
        }
        for name, tensor in tensors.items():
            if tensor.ndim != 2:
                raise ProblemError(f"{name} must be a matrix, its shape is {tuple(tensor.shape)}")
            if not tensor.is_floating_point():
                raise ProblemError(f"{name} must hold floating point numbers, not {tensor.dtype}")
            if not torch.isfinite(tensor).all():
                raise ProblemError(f"{name} holds NaN or infinite values")
        w, d = self.projection.shape
        k = self.forget_hidden.shape[0]
        if k == 0:
            raise ProblemError("forget_hidden is empty: name at least one text to forget")
        expected = {
            "forget_hidden": (k, w),
            "retain_hidden": (self.retain_hidden.shape[0], w),
            "target": (k, d),
        }
        for name, shape in expected.items():
            if tuple(tensors[name].shape) != shape:
                raise ProblemError(
                    f"{name} has shape {tuple(tensors[name].shape)}, expected {shape} for a "
                    f"projection of shape {(w, d)} and {k} texts to forget"
                )
        if len({(t.dtype, t.device) for t in tensors.values()}) != 1:
            kinds = ", ".join(f"{n}: {t.dtype} on {t.device}" for n, t in tensors.items())
            raise ProblemError(f"all tensors must share one dtype and device, got {kinds}")
        for name in ("lamb_forget", "lamb_preserve", "lamb_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ProblemError(f"{name} must be finite and not negative, got {value}")
        if self.rank < 1:
            raise ProblemError(f"rank must be at least 1, got {self.rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ProblemError(f"alpha must be finite and positive, got {self.alpha}")

    @property
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
        """The paper's objective at `delta` (w, d), a scalar."""
        forget, preserve, weight = self.terms(delta)
        return self.lamb_forget * forget + self.lamb_preserve * preserve + self.lamb_weight * weight

    def reduction(self, delta: Tensor) -> float:
        """`|L0 - L1| / L0` with L0 and L1 the forget norm before and after: the retry rule.

        A text that starts on its target (L0 = 0) has nothing to reduce: 1 if it stays, else 0.
        """
        before = torch.linalg.matrix_norm(self.displacement)
        after = self.terms(delta)[0]
        if before == 0:
            return 1.0 if after == 0 else 0.0
        return float((before - after).abs() / before)
