"""Complete forgetting: land exactly on the target, at the least disturbance of what is retained.

With the retain statistics `G = sum over groups of (w_g / m_g) H_g^T H_g` and a fixed ridge,
`K = G + mu I`, the problem

    minimise tr Delta^T K Delta    subject to    H_f Delta = D        (D = P - H_f W)

has the solution `Delta = K^-1 H_f^T Z` with `(H_f K^-1 H_f^T) Z = D` (stationarity of the
Lagrangian). Unlike in the paper's objective K does not depend on what is forgotten, so solutions
compose: from the columns `K_0^-1 h` of each forgotten text, and of each retained text that left the
statistics with it, any union is solved again without G (`solve_from_base`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from forgetting.certificate import Certificate
from forgetting.problem import ProblemError

DEPENDENT = 1e-10  # of M's eigenvalues: texts that repeat each other share one constraint


@dataclass(frozen=True)
class Ridge:
    """`K_0 = G + mu I`, factorised once; the statistics of everything that may be retained.

    Attributes:
        gram: `G`, (w, w), positive semidefinite; mu: the ridge, > 0.
    """

    gram: Tensor
    mu: float

    def __post_init__(self) -> None:
        if not self.mu > 0:
            raise ProblemError(f"the ridge mu must be positive, got {self.mu}")
        gram = self.gram.double()
        matrix = gram + self.mu * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        root, info = torch.linalg.cholesky_ex(matrix)
        if info:
            raise ProblemError("the retain statistics are not positive semidefinite")
        object.__setattr__(self, "gram", gram)
        object.__setattr__(self, "_root", root)

    def solve(self, rows: Tensor) -> Tensor:
        """`K_0^-1 rows^T`, (w, n), for rows (n, w)."""
        return torch.cholesky_solve(rows.double().T, self._root)


@dataclass(frozen=True)
class ConstrainedSolution:
    """The optimum, `Delta = left @ right` with left (w, k), right (k, d), float64, and its proof.

    Attributes:
        certificate: of `tr Delta^T K Delta`; see `certify_constrained`.
        residual: `||H_f Delta - D|| / ||D||`; above rounding if texts that repeat each other were
            given different targets, which no change can serve (then the nearest is served).
    """

    left: Tensor
    right: Tensor
    certificate: Certificate
    residual: float

    @property
    def delta(self) -> Tensor:
        """(w, d) float64."""
        return self.left @ self.right


def solve_constrained(
    ridge: Ridge,
    forget_hidden: Tensor,
    displacement: Tensor,
    leaving: Tensor | None = None,
    shares: Tensor | None = None,
) -> ConstrainedSolution:
    """Forget k texts at once.

    Args:
        ridge: the statistics of all retained texts and the ridge.
        forget_hidden: `H_f`, (k, w); displacement: `D = P - H_f W`, (k, d).
        leaving: (n, w), texts that are part of the statistics and must not be retained: the
            forgotten names themselves and their synonyms; shares: (n,), the weight w_g / m_g that
            each has in `G`.

    Raises:
        ProblemError: shapes that do not fit, or a text leaves that was not part of the statistics.
    """
    h_f, d = forget_hidden.double(), displacement.double()
    leaving = h_f[:0] if leaving is None else leaving.double()
    shares = h_f.new_zeros(0) if shares is None else shares.double()
    if len(h_f) != len(d) or h_f.shape[1] != len(ridge.gram) or len(leaving) != len(shares):
        raise ProblemError(
            f"{tuple(h_f.shape)} hidden states, {tuple(d.shape)} displacements, {len(leaving)} "
            f"leaving texts with {len(shares)} shares and statistics of {len(ridge.gram)} "
            "dimensions do not fit together"
        )
    left, right = solve_from_base(h_f, ridge.solve(h_f), leaving, ridge.solve(leaving), shares, d)
    gram = ridge.gram - (leaving.T * shares) @ leaving
    proof = certify_constrained(gram, ridge.mu, h_f, d, left, right)
    size = torch.linalg.matrix_norm(d)
    missed = torch.linalg.matrix_norm((h_f @ left) @ right - d)
    return ConstrainedSolution(left, right, proof, float(missed / size) if size > 0 else 0.0)


def solve_from_base(
    h_f: Tensor, base_f: Tensor, leaving: Tensor, base_leaving: Tensor, shares: Tensor, d: Tensor
) -> tuple[Tensor, Tensor]:
    """The solution's factors left (w, k), right (k, d) from columns of `K_0^-1` alone.

    Woodbury: with R the leaving rows and C their shares, `K = K_0 - R^T C R` and
    `K^-1 x = K_0^-1 x + K_0^-1 R^T (C^-1 - R K_0^-1 R^T)^-1 R K_0^-1 x`.

    Args:
        h_f: (k, w), base_f: `K_0^-1 h_f^T` (w, k); leaving: (n, w), base_leaving:
            `K_0^-1 leaving^T` (w, n); shares: (n,); d: (k, d).
    """
    left = base_f
    if len(leaving):
        inner = torch.diag(1 / shares) - leaving @ base_leaving  # (n, n)
        inner = (inner + inner.T) / 2
        root, info = torch.linalg.cholesky_ex(inner)
        if info:
            raise ProblemError("a text leaves the retain statistics that was not part of them")
        left = left + base_leaving @ torch.cholesky_solve(leaving @ base_f, root)
    m = h_f @ left  # (k, k)
    values, vectors = torch.linalg.eigh((m + m.T) / 2)
    keep = values > DEPENDENT * values.max()
    vectors, values = vectors[:, keep], values[keep]

    def against(missing: Tensor) -> Tensor:
        return vectors @ ((vectors.T @ missing) / values[:, None])

    z = against(d)
    # One step of refinement: with nearly equal texts M is ill conditioned.
    return left, z + against(d - (h_f @ left) @ z)


def certify_constrained(
    gram: Tensor, mu: float, h_f: Tensor, d: Tensor, left: Tensor, right: Tensor
) -> Certificate:
    """Prove `Delta = left @ right` optimal without inverting anything.

    Weak duality: `2 <Y, D> - tr (H_f^T Y)^T K^-1 (H_f^T Y)` is a lower bound for any Y. With
    `E = H_f^T Y - K Delta` and `K >= mu I` the second term is at most
    `tr Delta^T K Delta + 2 <Delta, E> + ||E||^2 / mu`. Y is taken as `right`.

    Args:
        gram: (w, w), what is retained; h_f: (k, w); d: (k, d); left: (w, k); right: (k, d).
    """
    delta = left @ right  # (w, d)
    image = gram @ delta + mu * delta  # K Delta
    primal = float((delta * image).sum())
    e = h_f.T @ right - image
    bound = 2 * float((right * d).sum()) - primal - 2 * float((delta * e).sum())
    bound -= float(e.square().sum()) / mu
    # A Delta that misses its targets is no answer to the constrained problem, however small.
    missed = float(torch.linalg.matrix_norm(h_f @ delta - d))
    slack = 2 * missed * float(torch.linalg.matrix_norm(right))
    gap = max(0.0, primal + slack - bound) / primal if primal > 0 else float(missed > 0)
    if not all(map(math.isfinite, (primal, bound, missed))):  # NaN compares as false: no proof
        return Certificate(primal, 0.0, 1.0)
    return Certificate(primal, bound, gap)
