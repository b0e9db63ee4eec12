"""The objective without a weight term, where texts outside the retained span move for free."""

from __future__ import annotations

import torch
from torch import Tensor

from forgetting.reduction import DEPENDENT, Reduced, best_ridge


class Weightless:
    """The problem without a weight term: texts with a part outside the retained span move for free.

    The rows of `H_f` are rotated once more: `held` combinations lie in the span and move at a
    price, the others reach their target through the kernel alone. mu = 0 throughout, and with
    `A = H G^+ H^T` of the held rows F2 = (lf^2 rho + lp^2) <D, (A + rho I)^-1 D>.
    """

    def __init__(self, reduced: Reduced) -> None:
        u, s, vh = torch.linalg.svd(reduced.kernel, full_matrices=True)
        rank = int((s > DEPENDENT * s.max()).sum()) if s.numel() and s.max() > 0 else 0
        self.held, free = u[:, rank:], u[:, :rank]  # (p, p - t), (p, t)
        inside = self.held.T @ reduced.inside  # (p - t, q)
        self.left = reduced.spectrum.vectors @ (inside / reduced.e).T  # (w, p - t)
        self.d = self.held.T @ reduced.d  # (p - t, d)
        self.length = (float(self.d.square().sum()) + reduced.spread) ** 0.5
        self.a, rotation = torch.linalg.eigh((inside / reduced.e) @ inside.T)
        self.basis = rotation
        self.c = (rotation.T @ self.d).square().sum(dim=1)
        self.price = reduced.lp**2
        self.spread = reduced.spread
        # Delta through the kernel that takes the free combinations to their target; what the small
        # singular values magnify of the retained span is taken out again.
        vectors = reduced.spectrum.vectors
        away = vh[:rank].T - vectors @ (vectors.T @ vh[:rank].T)  # (w, t)
        self.free_left = away / s[:rank]
        self.free = free
        self.reduced = reduced

    def ridge(self, lf: float) -> float:
        if not len(self.d):
            return 0.0 if self.spread == 0 else float("inf")
        return best_ridge(self.a, self.c, self.spread, self.price, lf)

    def z(self, rho: float) -> Tensor:
        """(p - t, d)."""
        return self.basis @ ((self.basis.T @ self.d) / (self.a + rho)[:, None])

    @property
    def start(self) -> float:
        if len(self.free.T):
            return 0.0
        strength = float((self.a * self.c).sum())
        return (self.price / strength) ** 0.5 * self.length if strength > 0 else float("inf")

    @property
    def reach(self) -> float:
        if self.spread > 0:
            return float("inf")
        q = float((self.c / self.a).sum()) if len(self.d) else 0.0
        return (self.price * float((self.c / self.a.square()).sum()) / q) ** 0.5 if q > 0 else 0.0
