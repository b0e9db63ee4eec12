"""The paper's objective for every class of a set, each forgotten alone, at once.

For one text all of `solve_exact` is scalar: with `u = (G + mu I)^-1 h` the change is
`Delta = u D / (h u)`, and only mu depends on what is retained. The names that a class excludes are
few rows L: `G_i = G - L^T L`, and by Woodbury's formula `(G_i + mu I)^-1 h = B (h + L^T c)` with
`B = (G + mu I)^-1` and `c = (I - L B L^T)^-1 L B h`. So one eigendecomposition of G serves all
classes, and the roots in mu are found for all of them together.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from forgetting.io import indices, mask
from forgetting.problem import AUTO, ForgetProblem, pad_rows, texts_per_request
from forgetting.solvers.certificate import certify_each
from forgetting.solvers.exact import (
    AUTO_MARGIN,
    GOOD_GAP,
    ExactSolution,
    Thresholds,
    auto_weight,
    solve_exact,
    thresholds,
)
from forgetting.solvers.spectrum import Spectrum, find_roots

# Of the largest mu that there can be. Below it hardly anything holds a class but what it excludes,
# and the downdate cancels.
NEAR_KERNEL = 1e-6
BATCH_NUMBERS = 2**17  # float64 numbers that a batch of classes may hold in the eigenbasis
TINY = 1e-300


class RequestOptimum(NamedTuple):
    """The optimum of one request: left (w, r), right (r, d), and a report in words and numbers:
    `certificate`, `branch`, `mu`, `rho`, `thresholds` and `lamb_forget`."""

    left: Tensor
    right: Tensor
    report: dict[str, Any]


@dataclass(frozen=True)
class EachSolution:
    """C independent optima: class i changes the projection by `left[i] (x) right[i]`.

    Attributes:
        left: (C, w), right: (C, d), float64; zero where nothing moves.
        mu: (C,); reach: (C,) c*, the `lamb_forget` above which the class moves.
        lamb_forget: (C,), the weight that each was solved with.
        primal, bound, gap: (C,), the certificates.
        fallbacks: number of classes that were solved one by one by `solve_exact`: those in the
            kernel branch or too near to it for the shared factorisation, and all where the preserve
            or the weight term is off.
    """

    left: Tensor
    right: Tensor
    mu: Tensor
    reach: Tensor
    lamb_forget: Tensor
    primal: Tensor
    bound: Tensor
    gap: Tensor
    fallbacks: int

    def branch(self, i: int) -> str:
        """How class i is solved: "generic", "kernel" (no retained text moves) or "none"."""
        if not self.left[i].any():
            return "none"
        return "generic" if self.mu[i] > 0 else "kernel"

    def optimum(self, i: int) -> RequestOptimum:
        """Class i as `solve_requests` gives it."""
        branch, reach = self.branch(i), float(self.reach[i])
        rank = int(branch != "none")
        proof = {name: float(getattr(self, name)[i]) for name in ("primal", "bound", "gap")}
        report = {
            "branch": branch,
            "mu": float(self.mu[i]),
            "rho": 0.0 if rank else math.inf,
            "lamb_forget": float(self.lamb_forget[i]),
            "certificate": proof | {"radius": math.inf},
            "thresholds": {"start": reach, "reach": reach},
        }
        return RequestOptimum(self.left[i, :, None][:, :rank], self.right[i][None][:rank], report)


def solve_each(problem: ForgetProblem, excluded: Tensor | None = None) -> EachSolution:
    """Forget each of the C texts of `problem` alone.

    Args:
        problem: `forget_hidden` (C, w) and `target` (C, d) hold the classes; `retain_hidden` (m, w)
            everything that may be retained, classes included. A `lamb_forget` of "auto" is each
            class's own.
        excluded: (C, m) bool, which rows of `retain_hidden` are not retained when class i is
            forgotten: its own text and what means the same. None: none.

    Raises:
        ProblemError: a mask of another shape, or "auto" for a target that cannot be reached.
    """
    count, m = len(problem.forget_hidden), len(problem.retain_hidden)
    if excluded is None:
        excluded = torch.zeros(count, m, dtype=torch.bool)
    device = problem.projection.device
    excluded = mask("excluded", excluded, m, count).to(device)
    exact = problem.part(slice(None), torch.zeros(m, dtype=torch.bool)).double
    left, right = torch.zeros_like(exact.forget_hidden), exact.displacement.clone()
    mu, reach, lamb_forget, primal, bound, gap = left.new_zeros(6, count)
    one_by_one = torch.arange(count, device=device)
    spectrum = Spectrum(problem.retain_hidden)
    if problem.lamb_preserve > 0 and problem.lw > 0 and len(spectrum.values):
        most = int(excluded.sum(dim=1).max())
        size = max(1, BATCH_NUMBERS // (3 * (1 + most) * len(spectrum.values)))
        parts = [
            _Downdated(problem, spectrum, exact.forget_hidden, texts, excluded[texts]).solve()
            for texts in one_by_one.split(size)
        ]
        direction, mu, y, u_scale, reach, lamb_forget = map(torch.cat, zip(*parts, strict=True))
        left = direction * (reach < lamb_forget)[:, None]
        primal, bound, gap = certify_each(
            problem, excluded, lamb_forget, left, y, u_scale, direction
        )
        one_by_one = one_by_one[~(gap <= GOOD_GAP)]
    for i in one_by_one.tolist():
        lamb_forget[i], limits, solution = _solve_alone(problem, torch.tensor([i]), excluded[i])
        left[i], right[i], reach[i] = 0.0, 0.0, limits.reach
        if solution.left.shape[1]:
            left[i], right[i] = solution.left[:, 0], solution.right[0]
        proof = solution.certificate
        mu[i], primal[i], bound[i], gap[i] = solution.mu, proof.primal, proof.bound, proof.gap
    return EachSolution(
        left, right, mu, reach, lamb_forget, primal, bound, gap, fallbacks=len(one_by_one)
    )


def solve_requests(problem: ForgetProblem, owner: Tensor, excluded: Tensor) -> list[RequestOptimum]:
    """The optimum of R requests of any number of texts, each from the original model.

    Args:
        problem: the texts of all requests, and everything that may be retained beside them.
        owner: (K,) int64, the request of each text; excluded: (R, m) bool, as in `solve_each`.

    Raises:
        ProblemError: an owner or a mask that does not fit; see also `solve_exact`.
    """
    excluded = mask("excluded", excluded, len(problem.retain_hidden))
    owner = indices("owner", owner, len(problem.forget_hidden), len(excluded))
    count, order = texts_per_request(owner, len(excluded)), owner.argsort(stable=True)
    single = (count == 1).nonzero()[:, 0]
    optima: dict[int, RequestOptimum] = {}
    if len(single):
        texts = order[(count.cumsum(0) - count)[single]]
        each = solve_each(problem.part(texts), excluded[single])
        optima = {request: each.optimum(i) for i, request in enumerate(single.tolist())}
    for request in (count > 1).nonzero()[:, 0].tolist():
        weight, limits, solution = _solve_alone(problem, owner == request, excluded[request])
        report = {
            **{name: getattr(solution, name) for name in ("branch", "mu", "rho")},
            "lamb_forget": weight,
            "certificate": asdict(solution.certificate),
            "thresholds": asdict(limits),
        }
        optima[request] = RequestOptimum(solution.left, solution.right, report)
    return [optima[request] for request in range(len(excluded))]


def _solve_alone(
    problem: ForgetProblem, texts: Tensor, excluded: Tensor
) -> tuple[float, Thresholds, ExactSolution]:
    """Some of the texts without the excluded names, (m,) bool, by `solve_exact`."""
    part = problem.part(texts, ~excluded)
    limits = thresholds(part)
    if part.lamb_forget == AUTO:
        part = replace(part, lamb_forget=auto_weight(limits.reach))
    return part.lamb_forget, limits, solve_exact(part)


class _Downdated:
    """`u = (G_i + mu I)^-1 h` of B classes, as a function of mu (B,), in the eigenbasis of G.

    Attributes:
        rows: (B, 1 + n, q), coordinates of the text h and of the rows L that its class excludes;
            kernels: (B, 1 + n, w), their parts outside the eigenbasis.
    """

    def __init__(
        self,
        problem: ForgetProblem,
        spectrum: Spectrum,
        forget: Tensor,
        texts: Tensor,
        excluded: Tensor,
    ) -> None:
        """Of the rows `texts` (B,) of `forget` (C, w) float64; excluded: (B, m) bool."""
        self.problem, self.spectrum = problem, spectrum
        self.lp, self.lw = problem.lamb_preserve, problem.lw
        self.e = spectrum.values.square()  # (q,)
        excluded_rows = pad_rows(excluded, problem.retain_hidden)[0]  # (B, n, w)
        h = torch.cat([forget[texts, None], excluded_rows.double()], dim=1)  # (B, 1 + n, w)
        self.rows, self.kernels = h @ spectrum.vectors, torch.zeros_like(h)
        if len(self.e) < h.shape[2]:
            kernel = h - self.rows @ spectrum.vectors.T
            kernel = kernel - (kernel @ spectrum.vectors) @ spectrum.vectors.T
            # What rounding leaves of a row inside the span is no kernel part.
            length = torch.linalg.vector_norm(forget, dim=1).max()
            noise = torch.linalg.vector_norm(kernel, dim=2) <= 8 * spectrum.noise * length
            self.kernels = kernel.masked_fill(noise[..., None], 0.0)
        self.kernel_sq = self.kernels[:, 0].square().sum(dim=1)  # (B,), of h

    def forms(self, mu: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`y = h + L^T c` as coefficients (B, 1 + n) of `rows`, and the forms `a = mu h u`,
        `b = ||mu u||^2` and `g = u G_i u`, (B,)."""
        rows, eye = self.rows, torch.eye(self.rows.shape[1] - 1).to(self.rows)
        once = rows * (self.e + mu[:, None]).reciprocal()[:, None]  # (B, 1 + n, q)
        s = once @ rows.mT  # (B, 1 + n, 1 + n)
        c = torch.linalg.solve_ex(eye - s[:, 1:, 1:], s[:, 1:, :1])[0][..., 0]  # (B, n)
        y = torch.cat([rows.new_ones(len(rows), 1), c], dim=1)
        u = (y[:, None] @ once)[:, 0]  # (B, q)
        a = mu * (s[:, 0] * y).sum(dim=1) + self.kernel_sq
        b = mu.square() * u.square().sum(dim=1) + self.kernel_sq
        image = (s[:, 1:] * y[:, None]).sum(dim=2)  # L u, (B, n)
        g = u.square() @ self.e - image.square().sum(dim=1)
        return y, a, b, g

    def slope(self, mu: Tensor) -> Tensor:
        """Sign and relative size of the objective's slope in mu, see `Reduced.slope`."""
        _, _, b, g = self.forms(mu)
        rise, fall = self.lp**2 * b, self.lw**2 * g
        return (rise - fall) / (rise + fall.abs()).clamp(min=TINY)

    def root(self) -> Tensor:
        """mu (B,) at the optimum; 0 where it is too near to the kernel for this factorisation."""
        high = (
            (2 * self.lw / self.lp) * self.spectrum.values.max() * torch.ones_like(self.kernel_sq)
        )
        low = NEAR_KERNEL * high
        mu = find_roots(lambda log_mu: self.slope(log_mu.exp()), low.log(), high.log()).exp()
        return mu.masked_fill(self.slope(low) >= 0, 0.0)

    def solve(self) -> tuple[Tensor, ...]:
        """direction (B, w) with `Delta = direction (x) D`, mu, `||Y||`, the factor that makes U of
        `H_r direction`, c* and lamb_forget, all (B,). Where mu is 0 they are not finite, and prove
        nothing."""
        mu = self.root()
        y, a, b, _ = self.forms(mu)
        reach = ((self.lp**2 * mu + self.lw**2) / a).sqrt()
        if self.problem.lamb_forget == AUTO:
            lamb_forget = (1 + AUTO_MARGIN) * reach
        else:
            lamb_forget = torch.full_like(reach, self.problem.lamb_forget)
        shrink = mu[:, None] / (self.e + mu[:, None])  # (B, q)
        inside, outside = ((y[:, None] @ x)[:, 0] for x in (self.rows, self.kernels))
        direction = ((inside * shrink) @ self.spectrum.vectors.T + outside) / a[:, None]
        y_norm = self.lw / b.sqrt()
        return direction, mu, y_norm, y_norm * a / mu, reach, lamb_forget
