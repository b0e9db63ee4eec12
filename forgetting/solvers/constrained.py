"""Complete forgetting: land exactly on the target, at the least disturbance of what is retained.

With the retain statistics `G = sum over groups of (w_g / m_g) H_g^T H_g` and a fixed ridge,
`K = G + mu I`, the problem

    minimise tr Delta^T K Delta    subject to    H_f Delta = D        (D = P - H_f W)

has the solution `Delta = K^-1 H_f^T Z` with `(H_f K^-1 H_f^T) Z = D` (stationarity of the
Lagrangian). Unlike in the paper's objective K does not depend on what is forgotten, so solutions
compose: from the columns `K_0^-1 h` of each forgotten text, and of each retained text that left the
statistics with it, any union is solved again without G (`solve_constraints`). For the same reason thousands of
requests share one factorisation and are solved in batches (`solve_constrained_each`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from forgetting.errors import ProblemError, number
from forgetting.io import indices, mask, matrix, vector
from forgetting.problem import LowRankEdit, pad_indices, texts_per_request
from forgetting.solvers.certificate import Certificate, certify_constrained

BATCH_NUMBERS = 2**22  # float64 numbers of one kind that a batch may hold
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
        number("the ridge mu", self.mu, above=0)
        gram = matrix("the retain statistics", self.gram).double()
        if gram.shape[0] != gram.shape[1] or not len(gram):
            raise ProblemError(f"the retain statistics must be square, not {tuple(gram.shape)}")
        ridged = gram + self.mu * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        root, info = torch.linalg.cholesky_ex(ridged)
        if info:
            raise ProblemError("the retain statistics are not positive semidefinite")
        object.__setattr__(self, "gram", gram)
        object.__setattr__(self, "_root", root)

    def solve(self, rows: Tensor) -> Tensor:
        """`rows K_0^-1`, (n, w) float64, for rows (n, w)."""
        rows = matrix("rows", rows, len(self.gram)).to(self.gram)
        return torch.cholesky_solve(rows.T, self._root).T


@dataclass(frozen=True)
class ConstrainedSolution(LowRankEdit):
    """The optimum, left (w, k), right (k, d), float64, and its proof.

    Attributes:
        certificate: of `tr Delta^T K Delta`; see `certify_constrained`.
        residual: `||H_f Delta - D|| / ||D||`; above rounding if texts that repeat each other were
            given different targets, which no change can serve (then the nearest is served).
    """

    certificate: Certificate
    residual: float


def solve_constrained(
    ridge: Ridge,
    forget_hidden: Tensor,
    displacement: Tensor,
    leaving: Tensor | None = None,
    shares: Tensor | None = None,
) -> ConstrainedSolution:
    """Forget k texts at once.

    Args:
        forget_hidden: `H_f`, (k, w); displacement: `D = P - H_f W`, (k, d).
        leaving: (n, w), texts that are part of the statistics and must not be retained: the
            forgotten names themselves and their synonyms; shares: (n,), the weight w_g / m_g that
            each has in `G`. Errors as in `solve_constrained_each`.
    """
    h = matrix("forget_hidden", forget_hidden)
    rows = h[:0] if leaving is None else matrix("leaving", leaving)
    shares = h.new_zeros(0) if shares is None else shares
    owner = torch.zeros(len(h), dtype=torch.int64)
    everything = torch.ones(1, len(rows), dtype=torch.bool)
    return solve_constrained_each(ridge, h, displacement, owner, rows, shares, everything)[0]


def solve_constrained_each(
    ridge: Ridge,
    hidden: Tensor,
    displacement: Tensor,
    owner: Tensor,
    rows: Tensor,
    shares: Tensor,
    leaving: Tensor,
) -> list[ConstrainedSolution]:
    """R requests, each forgotten alone from the same statistics: one factorisation, batches.

    Args:
        ridge, owner, rows, shares, leaving: see `requests`.
        hidden: (K, w), the texts of all requests; displacement: (K, d), `D = P - H W` of each.

    Raises:
        ProblemError: shapes that do not fit, or a text leaves that was not part of the statistics.
    """
    h = matrix("hidden", hidden, len(ridge.gram)).to(ridge.gram)
    all_d = matrix("displacement", displacement, count=len(h)).to(h)
    found: dict[int, ConstrainedSolution] = {}
    for numbers, texts, base, gone in request_batches(ridge, h, owner, rows, shares, leaving):
        h_f, d = h[texts], all_d[texts]
        left, right = solve_constraints(h_f, base, *gone, d)
        proofs = certify_constrained(ridge.gram, ridge.mu, gone[0], gone[2], h_f, d, left, right)
        missed, size = (torch.linalg.matrix_norm(x) for x in ((h_f @ left) @ right - d, d))  # (B,)
        residual = torch.where(size > 0, missed / size, 0.0).tolist()
        answers = map(ConstrainedSolution, left, right, proofs, residual)
        found |= zip(numbers.tolist(), answers, strict=True)
    return [found[request] for request in range(len(found))]


def request_batches(
    ridge: Ridge, h: Tensor, owner: Tensor, rows: Tensor, shares: Tensor, leaving: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]]:
    """R requests over the same statistics, in batches, with what `downdate` needs of each.

    Args:
        ridge: the statistics of all retained texts and the ridge.
        h: (K, w), the texts of all requests; owner: (K,) int64, the request that a text belongs
            to; each of 0 .. R - 1 has at least one.
        rows: (n, w), retained texts; shares: (n,), the weight of each in G (0: it is no part).
        leaving: (R, n) bool, which of them leave the statistics with a request.

    Yields:
        The requests (B,), the numbers of their texts (B, k), `base` (B, k, w), and what leaves:
        `leaving` (B, n', w), `base_leaving` and `shares` (B, n'), the latter 0 where only zeros
        fill up.
    """
    rows = matrix("rows", rows, h.shape[1]).to(h)
    shares = vector("shares", shares, len(rows)).to(h)
    leaving = mask("leaving", leaving, len(rows)).to(h.device)
    owner = indices("owner", owner, len(h), len(leaving)).to(h.device)
    part = leaving.any(dim=0) & (shares > 0)
    rows, shares, leaving = rows[part], shares[part], leaving[:, part]
    base, base_rows = ridge.solve(h), ridge.solve(rows)  # (K, w), (n, w)
    for numbers, texts in _equal_sizes(owner, leaving, h.shape[1]):
        places, weights = pad_indices(leaving[numbers], shares)  # (B, n')
        there = (weights > 0)[..., None]
        yield (
            numbers,
            texts,
            base[texts],
            (rows[places] * there, base_rows[places] * there, weights),
        )


def _equal_sizes(owner: Tensor, leaving: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of requests with the same number of texts, sorted by how many names they exclude.

    Args:
        owner: (K,), the request of each text; leaving: (R, n) bool; width: w.

    Yields:
        The requests (B,), and the rows (B, k) of their texts.
    """
    count = texts_per_request(owner, len(leaving))
    order = owner.argsort(stable=True)  # the texts, request by request
    first = count.cumsum(0) - count
    many = leaving.sum(dim=1)
    for k in count.unique().tolist():
        requests = torch.nonzero(count == k)[:, 0]
        requests = requests[many[requests].argsort(stable=True)]
        size = max(1, BATCH_NUMBERS // (width * (int(many[requests].max()) + k)))
        for batch in requests.split(size):
            yield batch, order[first[batch, None] + torch.arange(k, device=owner.device)]


def downdate(
    h: Tensor, base: Tensor, leaving: Tensor, base_leaving: Tensor, shares: Tensor
) -> Tensor:
    """`h K^-1`, (B, k, w), where rows have left the statistics, from rows of `K_0^-1` alone.

    Woodbury: with R the leaving rows and C their shares, `K = K_0 - R^T C R` and
    `K^-1 x = K_0^-1 x + K_0^-1 R^T (C^-1 - R K_0^-1 R^T)^-1 R K_0^-1 x`.

    Args:
        h: (B, k, w), base: `h K_0^-1`; leaving: (B, n, w), base_leaving: `leaving K_0^-1`;
            shares: (B, n), 0 for rows (of zeros) that only fill up.

    Raises:
        ProblemError: a row leaves that was not part of the statistics.
    """
    if not leaving.shape[1]:
        return base
    root = woodbury_cholesky(leaving, base_leaving, shares)
    return base + (torch.cholesky_solve(base_leaving @ h.mT, root)).mT @ base_leaving


def woodbury_cholesky(leaving: Tensor, base_leaving: Tensor, shares: Tensor) -> Tensor:
    """Cholesky root (B, n, n) of `C^-1 - R K_0^-1 R^T`; arguments and errors as in `downdate`."""
    diagonal = torch.where(shares > 0, 1 / shares, 1.0)
    inner = torch.diag_embed(diagonal) - leaving @ base_leaving.mT  # (B, n, n)
    root, info = torch.linalg.cholesky_ex((inner + inner.mT) / 2)
    if info.any():
        raise ProblemError("a text leaves the retain statistics that was not part of them")
    return root


def pinv_psd(m: Tensor) -> Tensor:
    """Pseudo-inverse of M (B, k, k): texts that repeat each other share one constraint."""
    values, vectors = torch.linalg.eigh((m + m.mT) / 2)
    keep = values > DEPENDENT * values.amax(dim=1, keepdim=True)
    return (vectors * torch.where(keep, 1 / values, 0.0)[:, None]) @ vectors.mT


def solve_constraints(
    h: Tensor, base: Tensor, leaving: Tensor, base_leaving: Tensor, shares: Tensor, d: Tensor
) -> tuple[Tensor, Tensor]:
    """The solutions' factors left (B, w, k), right (B, k, d) from rows of `K_0^-1` alone.

    Args:
        h: (B, k, w), base: `h K_0^-1`; leaving, base_leaving, shares: see `downdate`; d: (B, k, d).
    """
    rows = downdate(h, base, leaving, base_leaving, shares)  # (B, k, w)
    m = h @ rows.mT  # (B, k, k)
    against = pinv_psd(m)
    z = against @ d
    # One step of refinement: with nearly equal texts M is ill conditioned.
    return rows.mT, z + against @ (d - m @ z)
