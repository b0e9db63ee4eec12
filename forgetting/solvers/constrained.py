"""Complete forgetting: exactly onto the target, at the least disturbance of what is retained.

With the weighted Gram matrix of the retained texts, `G = sum of weight h^T h`, and a fixed ridge,
`K = G + mu I`, the problem

    minimise tr Delta^T K Delta    subject to    H_f Delta = D        (D = P - H_f W)

has the solution `Delta = K^-1 H_f^T Z` with `(H_f K^-1 H_f^T) Z = D` (stationarity of the
Lagrangian). Unlike in the paper's objective K does not depend on what is forgotten. So thousands of
requests share one factorisation of `K_0`, of which each excludes a few rows by Woodbury's formula.
And solutions compose: from the rows of `K_0^-1` of each forgotten and each excluded text any union
is solved again without G (`solve_constraints`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from forgetting.errors import ProblemError, number
from forgetting.io import indices, mask, matrix, tensor, vector
from forgetting.problem import LowRankEdit, equal_sizes, pad_indices
from forgetting.solvers.certificate import Certificate, certify_constrained
from forgetting.solvers.spectrum import triangle

BATCH_NUMBERS = 2**22  # float64 numbers of one kind that a batch may hold
DEPENDENT = 1e-10  # of M's eigenvalues: texts that repeat each other share one constraint


class Ridge:
    """`K_0 = G + mu I` of everything that may be retained, factorised once.

    Args:
        rows: (n, w), hidden states of n names; weights: (n,), of each in G; None: 1.
        root: `R` (q, w) float64 with `R^T R = G`, where it is known (see `triangle`).

    Raises ProblemError: numbers that make no such matrix, or a ridge that is lost in its rounding.
    """

    def __init__(
        self, rows: Tensor, mu: float, weights: Tensor | None = None, root: Tensor | None = None
    ) -> None:
        self.rows, self.mu = matrix("rows", rows), number("the ridge mu", mu, above=0)
        n, w = self.rows.shape
        if w == 0:
            raise ProblemError("rows have at least one dimension")
        weights = torch.ones(n) if weights is None else weights
        self.weights = vector("weights", weights, n).to(self.rows.device)
        if root is None:
            root = triangle(self.weights.sqrt()[:, None] * self.rows.double())
        self.root, self.gram = root, root.T @ root  # (q, w), (w, w)
        self._cholesky, info = torch.linalg.cholesky_ex(self.gram + mu * torch.eye(w).to(root))
        if info:
            raise ProblemError(f"the ridge mu {mu:.1e} is too small: choose a larger one")

    @cached_property
    def base(self) -> Tensor:
        """`h K_0^-1` of all names, (n, w) float64."""
        return self.solve(self.rows)

    def solve(self, rows: Tensor) -> Tensor:
        """`rows K_0^-1`, (n, w) float64, for rows (n, w)."""
        return torch.cholesky_solve(rows.to(self.gram).T, self._cholesky).T


@dataclass(frozen=True)
class ConstrainedSolution(LowRankEdit):
    """The optimum, left (w, p), right (p, d), float64, p <= min(k, w), and its proof."""

    certificate: Certificate  # of `tr Delta^T K Delta`; see `certify_constrained`
    # `||H_f Delta - D|| / ||D||`. It is above rounding if texts that repeat each other were given
    # different targets, or there are more texts than dimensions: no change reaches those. Then the
    # nearest is reached, and nothing is proved.
    residual: float


def solve_constrained(
    ridge: Ridge, hidden: Tensor, displacement: Tensor, excluded: Tensor | None = None
) -> ConstrainedSolution:
    """Forget k texts at once. `hidden`: `H_f`, (k, w); `displacement`: `D = P - H_f W`, (k, d).
    `excluded`: (n,) bool, the names of `ridge` that are not retained: the forgotten ones themselves
    and their synonyms. None: none. Errors as in `solve_constrained_each`."""
    if excluded is None:
        excluded = torch.zeros(len(ridge.rows), dtype=torch.bool)
    excluded = tensor("excluded", excluded, (torch.bool,), (len(ridge.rows),))[None]
    owner = torch.zeros(len(matrix("hidden", hidden)), dtype=torch.int64)
    return solve_constrained_each(ridge, hidden, displacement, owner, excluded)[0]


def solve_constrained_each(
    ridge: Ridge, hidden: Tensor, displacement: Tensor, owner: Tensor, excluded: Tensor
) -> list[ConstrainedSolution]:
    """R requests, each forgotten alone from the same retain set. `hidden`: (K, w), the texts of
    all; `displacement`: (K, d); `owner`: (K,) int64, the request of each text, each of 0 .. R - 1
    has at least one; `excluded`: (R, n) bool, the names of `ridge` that are not retained in each.
    ProblemError: shapes that do not fit, or a ridge too small beside an excluded name."""
    h = matrix("hidden", hidden, len(ridge.gram)).to(ridge.gram)
    all_d = matrix("displacement", displacement, count=len(h)).to(h)
    excluded = mask("excluded", excluded, len(ridge.rows))
    owner = indices("owner", owner, len(h), len(excluded))
    solutions: dict[int, ConstrainedSolution] = {}
    norm = torch.linalg.matrix_norm
    for numbers, texts, columns, removed in request_batches(ridge, h, owner, excluded):
        h_f, d = h[texts], all_d[texts]
        left, right = solve_constraints(h_f, columns, d)
        listed = ridge.root, ridge.mu, removed.rows, removed.weights
        proofs = certify_constrained(*listed, h_f, d, left, right)
        missed, size = norm((h_f @ left) @ right - d), norm(d)  # (B,)
        residual = torch.where(size > 0, missed / size, 0.0).tolist()
        if left.shape[2] > left.shape[1]:  # k > w: w columns hold the same change
            left, rotation = torch.linalg.qr(left)
            right = rotation @ right
        answers = map(ConstrainedSolution, left, right, proofs, residual)
        solutions |= zip(numbers.tolist(), answers, strict=True)
    return [solutions[request] for request in range(len(solutions))]


class Excluded(NamedTuple):
    """n names that are not retained in each of B requests: their rows and those of `K_0^-1`, both
    (B, n, w), and their weights (B, n). Rows and weights are 0 where a list is padded."""

    rows: Tensor
    base: Tensor
    weights: Tensor

    @property
    def root(self) -> Tensor:
        """Cholesky root (B, n, n) of `C^-1 - R K_0^-1 R^T`, see `downdate`. Raises ProblemError:
        the ridge is lost in rounding beside the excluded rows."""
        diagonal = torch.where(self.weights > 0, 1 / self.weights, 1.0)
        inner = torch.diag_embed(diagonal) - self.rows @ self.base.mT  # (B, n, n)
        root, info = torch.linalg.cholesky_ex((inner + inner.mT) / 2)
        if info.any():
            raise ProblemError("the ridge is too small for what is excluded: choose a larger one")
        return root


def downdate(h: Tensor, base: Tensor, excluded: Excluded) -> Tensor:
    """`h K^-1`, (B, k, w), where rows are excluded, from h and `base = h K_0^-1`, both (B, k, w).

    Woodbury: with R the excluded rows and C their weights, `K = K_0 - R^T C R` and
    `K^-1 x = K_0^-1 x + K_0^-1 R^T (C^-1 - R K_0^-1 R^T)^-1 R K_0^-1 x`.
    """
    if not excluded.rows.shape[1]:
        return base
    return base + torch.cholesky_solve(excluded.base @ h.mT, excluded.root).mT @ excluded.base


def request_batches(
    ridge: Ridge, h: Tensor, owner: Tensor, excluded: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Excluded]]:
    """Batches of B requests with the same number of texts; h: (K, w) float64, the texts of all: the
    requests (B,); the indices of their texts (B, k); `columns`, (B, k, w), the texts' rows of
    `K^-1`; and the names that each excludes."""
    excluded, owner = excluded.to(ridge.weights.device), owner.to(ridge.weights.device)
    used = excluded.any(dim=0) & (ridge.weights > 0)
    rows, weights, excluded = ridge.rows[used].to(h), ridge.weights[used], excluded[:, used]
    base, base_rows = ridge.solve(h), ridge.solve(rows)  # (K, w), (n, w)
    for numbers, texts in equal_sizes(owner, excluded, BATCH_NUMBERS // h.shape[1]):
        index, weight = pad_indices(excluded[numbers], weights)  # (B, n')
        present = (weight > 0)[..., None]
        removed = Excluded(rows[index] * present, base_rows[index] * present, weight)
        yield numbers, texts, downdate(h[texts], base[texts], removed), removed


def pinv_psd(m: Tensor) -> Tensor:
    """Pseudo-inverse of M (B, k, k): texts that repeat each other share one constraint."""
    values, vectors = torch.linalg.eigh((m + m.mT) / 2)
    keep = values > DEPENDENT * values.amax(dim=1, keepdim=True)
    return (vectors * torch.where(keep, 1 / values, 0.0)[:, None]) @ vectors.mT


def solve_constraints(h: Tensor, columns: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The solutions' factors left (B, w, k), right (B, k, d), from the texts h and their rows of
    `K^-1`, both (B, k, w), and the displacements d (B, k, d)."""
    m = h @ columns.mT  # (B, k, k)
    inverse = pinv_psd(m)
    z = inverse @ d
    # One step of refinement: with nearly equal texts M is ill conditioned.
    return columns.mT, z + inverse @ (d - m @ z)
