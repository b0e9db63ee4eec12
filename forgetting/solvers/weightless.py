"""The paper's objective without a weight term: what is partly outside the retained span moves free.

The rows of `H_f` are rotated once more: `held` combinations lie in the span of the retained texts
and move at a price, the `free` ones reach their target through the kernel alone. mu = 0 throughout,
and with `A = H G^+ H^T` of the held rows F2 = (lf^2 rho + lp^2) <D, (A + rho I)^-1 D>.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from forgetting.solvers.spectrum import DEPENDENT, Reduced, best_r


class NoWeightTerm:
    """A reduced problem, held and free combinations apart."""

    def __init__(self, reduced: Reduced) -> None:
        self.reduced, vectors = reduced, reduced.spectrum.vectors
        u, s, vh = torch.linalg.svd(reduced.kernel, full_matrices=True)
        rank = int((s > DEPENDENT * s.max()).sum()) if s.numel() and s.max() > 0 else 0
        self.held, self.free = u[:, rank:], u[:, :rank]  # (p, p - t), (p, t)
        inside = self.held.T @ reduced.inside  # (p - t, q)
        self.left = vectors @ (inside / reduced.e).T  # (w, p - t)
        self.d = self.held.T @ reduced.d  # (p - t, d)
        self.length = (float(self.d.square().sum()) + reduced.unreachable_sq) ** 0.5
        self.a, self.basis = torch.linalg.eigh((inside / reduced.e) @ inside.T)
        self.c = (self.basis.T @ self.d).square().sum(dim=1)
        # Delta through the kernel that takes the free combinations to their target; what the small
        # singular values magnify of the retained span is taken out again.
        away = vh[:rank].T - vectors @ (vectors.T @ vh[:rank].T)  # (w, t)
        self.free_left = away / s[:rank]

    @property
    def start(self) -> float:
        """The `lamb_forget` at which texts start to move."""
        strength = float((self.a * self.c).sum())
        if len(self.free.T):
            return 0.0
        return self.reduced.lp * self.length / strength**0.5 if strength > 0 else math.inf

    @property
    def reach(self) -> float:
        """The `lamb_forget` at which they reach their target."""
        if self.reduced.unreachable_sq > 0:
            return math.inf
        q = float((self.c / self.a).sum()) if len(self.d) else 0.0
        rise = float((self.c / self.a.square()).sum())
        return self.reduced.lp * (rise / q) ** 0.5 if q > 0 else 0.0

    def solve(self, lf: float, h_r: Tensor) -> tuple[str, float, tuple[Tensor, ...]]:
        """An answer, not the only one but of least rank, for retained texts `h_r` (q, w).

        Returns:
            branch, rho, and left (w, p), right (p, d), Y (k, d), and U as `h_r` times a basis
            (w, p - t) times (p - t, d).
        """
        reduced, vectors = self.reduced, self.reduced.spectrum.vectors
        if len(self.d):
            rho = best_r(self.a, self.c, reduced.unreachable_sq, reduced.lp**2, lf)
        else:
            rho = 0.0 if reduced.unreachable_sq == 0 else math.inf
        moved = rho < math.inf and len(self.d) > 0
        z = torch.zeros_like(self.d)  # (p - t, d)
        if moved:
            z = self.basis @ ((self.basis.T @ self.d) / (self.a + rho)[:, None])
            pull = float(torch.linalg.matrix_norm(h_r @ self.left @ z))
            y = reduced.multiplier(self.held @ z, rho) * (reduced.lp / pull if pull > 0 else 0.0)
        else:  # what is left stays where it is
            y = reduced.multiplier(self.held @ self.d, 1.0) * (
                lf / self.length if self.length else 0.0
            )
        shift = self.free.T @ reduced.inside @ (vectors.T @ self.left) @ z  # (t, d)
        left = torch.cat([self.left, self.free_left], dim=1)  # (w, p)
        right = torch.cat([z, self.free.T @ reduced.d - shift])  # (p, d)
        # H_f^T Y - H_r^T U has to vanish here; one step of refinement takes it from the rounding of
        # G's inverse to that of its own terms.
        basis = self.left
        if reduced.lp > 0:
            rest = self.held.T @ reduced.rows - (h_r @ basis).T @ h_r  # (p - t, w)
            basis = basis + vectors @ ((rest @ vectors) / reduced.e).T
        u_right = self.held.T @ reduced.rotation.T @ y  # (p - t, d)
        branch = "generic" if moved else ("kernel" if len(self.free.T) else "none")
        return branch, rho, (left, right, y, basis, u_right)
