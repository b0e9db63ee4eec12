"""The paper's objective for every class of a set, each forgotten alone, at once.

For one text all of `solve_exact` is scalar: with `u = (G + mu I)^-1 h` the change is
`Delta = u D / (h u)`, and what is retained beside it only shifts mu. Names that leave with a class
are few rows L: `G_i = G - L^T L`, and by Woodbury's formula `(G_i + mu I)^-1 h = B (h + L^T c)`
with `B = (G + mu I)^-1` and `c = (I - L B L^T)^-1 L B h`. So one eigendecomposition of G serves all
classes, and the roots in mu are found for all of them together.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

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

NEAR_KERNEL = 1e-6  # of the largest mu that there can be
BATCH_NUMBERS = 2**17  # float64 numbers that a batch of classes may hold in the eigenbasis


@dataclass(frozen=True)
class EachSolution:
    """C independent optima: class i changes the projection by `left[i] (x) right[i]`.

    Attributes:
        left: (C, w), right: (C, d), float64; zero where nothing moves.
        mu: (C,), reach: (C,) c*, the `lamb_forget` above which the class moves.
        lamb_forget: (C,), the weight that each was solved with.
        primal, bound, gap: (C,), the certificates.
        certify_seconds: how long the certificates took, for all classes together.
        alone: number of classes that were solved again by `solve_exact`, being too close to the
            kernel for the shared factorisation.
    """

    left: Tensor
    right: Tensor
    mu: Tensor
    reach: Tensor
    lamb_forget: Tensor
    primal: Tensor
    bound: Tensor
    gap: Tensor
    certify_seconds: float
    alone: int

    def branch(self, i: int) -> str:
        """How class i is solved: "generic", "kernel" (no retained text moves) or "none"."""
        if not self.left[i].any():
            return "none"
        return "generic" if self.mu[i] > 0 else "kernel"

    def one(self, i: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
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
        return self.left[i, :, None][:, :rank], self.right[i][None][:rank], report


def solve_each(problem: ForgetProblem, leaving: Tensor | None = None) -> EachSolution:
    """Forget each of the C texts of `problem` alone.

    Args:
        problem: `forget_hidden` (C, w) and `target` (C, d) hold the classes; `retain_hidden` (m, w)
            everything that is retained, classes included. A `lamb_forget` of "auto" is each
            class's own.
        leaving: (C, m) bool, which rows of `retain_hidden` leave when class i is forgotten: its own
            text and what means the same. None: none.

    Raises:
        ProblemError: a mask of another shape, or "auto" for a target that cannot be reached.
    """
    count, m = len(problem.forget_hidden), len(problem.retain_hidden)
    exact = problem.part(torch.arange(count), torch.zeros(m, dtype=torch.bool)).double
    device = exact.projection.device
    if leaving is None:
        leaving = torch.zeros(count, m, dtype=torch.bool)
    leaving = mask("leaving", leaving, m, count).to(device)
    d = exact.displacement  # (C, d)
    left, right = torch.zeros_like(exact.forget_hidden), d.clone()
    mu, reach, primal, bound, gap = (left.new_zeros(count) for _ in range(5))
    lamb_forget = left.new_zeros(count)
    certifying = 0.0
    if problem.lamb_preserve == 0 or problem.lw == 0 or m == 0:
        poor = torch.arange(count)  # a shared factorisation saves nothing, or a weight is zero
    else:
        spectrum = Spectrum(problem.retain_hidden)
        most = max(torch.bincount(leaving.nonzero()[:, 0], minlength=1).tolist())
        size = max(1, BATCH_NUMBERS // (3 * (1 + most) * max(1, len(spectrum.values))))
        parts = [
            _roots(problem, spectrum, texts, leaving[texts])
            for texts in torch.arange(count, device=device).split(size)
        ]
        direction, mu, y, u_scale, reach, lamb_forget = map(torch.cat, zip(*parts, strict=True))
        left = direction * (reach < lamb_forget)[:, None]
        started = time.perf_counter()
        primal, bound, gap = certify_each(
            problem, leaving, lamb_forget, left, y, u_scale, direction
        )
        certifying = time.perf_counter() - started
        # Where almost nothing holds a class but what leaves with it, the downdate cancels.
        low = NEAR_KERNEL * problem.lw / problem.lamb_preserve * spectrum.values.max()
        poor = torch.nonzero(~(gap <= GOOD_GAP) | (leaving.any(dim=1) & (mu < low)))[:, 0]
    for i in poor.tolist():
        lamb_forget[i], limits, solution = _alone(problem, torch.tensor([i]), leaving[i])
        left[i], right[i], reach[i] = 0.0, 0.0, limits.reach
        if solution.left.shape[1]:
            left[i], right[i] = solution.left[:, 0], solution.right[0]
        proof = solution.certificate
        mu[i], primal[i], bound[i], gap[i] = solution.mu, proof.primal, proof.bound, proof.gap
    numbers = mu, reach, lamb_forget, primal, bound, gap
    return EachSolution(left, right, *numbers, certifying, len(poor))


def solve_requests(
    problem: ForgetProblem, owner: Tensor, leaving: Tensor
) -> list[tuple[Tensor, Tensor, dict[str, Any]]]:
    """The optimum of R requests of any number of texts, each from the original model.

    Args:
        problem: the texts of all requests, and everything that may be retained beside them.
        owner: (K,) int64, the request of each text; leaving: (R, m) bool, as in `solve_each`.

    Returns:
        For each left (w, r), right (r, d), and a report: certificate, branch, mu, rho, thresholds
        and `lamb_forget`, in words and numbers.

    Raises:
        ProblemError: an owner or a mask that does not fit; see also `solve_exact`.
    """
    leaving = mask("leaving", leaving, len(problem.retain_hidden))
    owner = indices("owner", owner, len(problem.forget_hidden), len(leaving))
    count, order = texts_per_request(owner, len(leaving)), owner.argsort(stable=True)
    single = (count == 1).nonzero()[:, 0]
    texts = order[(count.cumsum(0) - count)[single]]
    each = solve_each(problem.part(texts), leaving[single]) if len(single) else None
    place = {request: i for i, request in enumerate(single.tolist())}
    found = []
    for request in range(len(leaving)):
        if request in place:
            found.append(each.one(place[request]))
            continue
        weight, limits, solution = _alone(problem, owner == request, leaving[request])
        report = {
            **{name: getattr(solution, name) for name in ("branch", "mu", "rho")},
            "lamb_forget": weight,
            "certificate": asdict(solution.certificate),
            "thresholds": asdict(limits),
        }
        found.append((solution.left, solution.right, report))
    return found


def _alone(
    problem: ForgetProblem, texts: Tensor, gone: Tensor
) -> tuple[float, Thresholds, ExactSolution]:
    """Some of the texts without the names that leave, (m,) bool, by `solve_exact`."""
    part = problem.part(texts, ~gone)
    limits = thresholds(part)
    if part.lamb_forget == AUTO:
        part = replace(part, lamb_forget=auto_weight(limits.reach))
    return part.lamb_forget, limits, solve_exact(part)


def _roots(
    problem: ForgetProblem, spectrum: Spectrum, texts: Tensor, leaving: Tensor
) -> tuple[Tensor, ...]:
    """mu of a batch of B classes, and what follows from it.

    Args:
        texts: (B,), rows of `forget_hidden`; leaving: (B, m).

    Returns:
        direction (B, w) with `Delta = direction (x) D`, mu, `||Y||`, the factor that makes U of
        `H_r direction`, c* and lamb_forget, all (B,).
    """
    # Not problem.double: of what is retained only the rows that leave are needed here.
    forget, lp, lw = problem.forget_hidden.double(), problem.lamb_preserve, problem.lw
    e = spectrum.values.square()  # (q,)
    length = torch.linalg.vector_norm(forget, dim=1).max()

    def split(h: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates (..., q) of rows (..., w) in the eigenbasis, and their part outside it."""
        x = h @ spectrum.vectors
        if len(spectrum.values) == h.shape[-1]:  # nothing is outside
            return x, torch.zeros_like(h)
        kernel = h - x @ spectrum.vectors.T
        kernel = kernel - (kernel @ spectrum.vectors) @ spectrum.vectors.T
        noise = torch.linalg.vector_norm(kernel, dim=-1) <= 8 * spectrum.noise * length
        return x, kernel.masked_fill(noise[..., None], 0.0)

    gone, there = pad_rows(leaving, problem.retain_hidden)  # (B, n, w)
    # The text h itself, and the rows L that leave with it: (B, 1 + n, q), (B, 1 + n, w)
    rows, kernels = split(torch.cat([forget[texts, None], gone.double()], dim=1))
    x, kernel2 = rows[:, 0], kernels[:, 0].square().sum(dim=1)  # (B, q), (B,)
    eye = torch.eye(gone.shape[1], dtype=rows.dtype, device=rows.device)
    leaves = there.any(dim=1)[:, 0]

    def parts(mu: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`y = h + L^T c` as coefficients (B, 1 + n) of `rows`, and the forms a, b, g of
        `u = (G_i + mu)^-1 h`: `mu h u`, `||mu u||^2`, and `u G_i u`."""
        inverse = (e + mu[:, None]).reciprocal()[:, None]  # (B, 1, q)
        once = rows * inverse
        s = once @ rows.mT  # (B, 1 + n, 1 + n)
        c = torch.linalg.solve_ex(eye - s[:, 1:, 1:], s[:, 1:, :1])[0][..., 0]  # (B, n)
        y = torch.cat([x.new_ones(len(x), 1), c], dim=1)
        u = (y[:, None] @ once)[:, 0]  # (B, q)
        a = mu * (s[:, 0] * y).sum(dim=1) + kernel2
        b = mu.square() * u.square().sum(dim=1) + kernel2
        lost = (s[:, 1:] * y[:, None]).sum(dim=2)  # L u, (B, n)
        g = u.square() @ e - lost.square().sum(dim=1)
        return y, a, b, g

    def slope(mu: Tensor) -> Tensor:
        _, _, b, g = parts(mu)
        rise, fall = lp**2 * b, lw**2 * g
        return (rise - fall) / (rise + fall.abs()).clamp(min=1e-300)

    zeros = torch.zeros_like(kernel2)
    log_high = ((2 * lw / lp) * spectrum.values.max() * torch.ones_like(zeros)).log()
    log_low = log_high - 12.0
    if bool((slope(log_low.exp()) > 0).any()):  # a class near the kernel: look much lower
        log_low = log_high - 60.0
    mu = find_roots(lambda log_mu: slope(log_mu.exp()), log_low, log_high).exp()
    # A retained text has no part in the kernel but what the factorisation takes for zero.
    mu = torch.where((kernel2 > 0) & ~leaves & (slope(zeros) >= 0), zeros, mu)

    y, a, b, _ = parts(mu)
    reach = ((lp**2 * mu + lw**2) / a).sqrt()
    if problem.lamb_forget == AUTO:
        auto_weight(float(reach.max()))  # refuses an infinite one
        lamb_forget = (1 + AUTO_MARGIN) * reach
    else:
        lamb_forget = torch.full_like(reach, problem.lamb_forget)
    shrink = torch.where(mu[:, None] > 0, mu[:, None] / (e + mu[:, None]), 0.0)  # (B, q)
    mixed, kernel = ((y[:, None] @ part)[:, 0] for part in (rows, kernels))  # (B, q), (B, w)
    direction = ((mixed * shrink) @ spectrum.vectors.T + kernel) / a[:, None]
    length = torch.where(reach < lamb_forget, lw / b.sqrt(), lamb_forget)
    u_scale = torch.where(mu > 0, length * a / mu.clamp(min=1e-300), 0.0)
    return direction, mu, length, u_scale, reach, lamb_forget
