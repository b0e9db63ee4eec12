"""The paper's objective, solved exactly: two scalar roots in the eigenbasis of the retained texts.

With `lf`, `lp` the weights of the forget and preserve term, `lw = lamb_weight r / alpha`,
`D = P - H_f W` and `G = H_r^T H_r`, write every norm as

    ||x|| = min over e > 0 of (e + ||x||^2 / e) / 2

and minimise over `Delta` first. What is left depends on the three `e` through two ratios only,

    mu = (lw / lp) ||H_r Delta|| / ||Delta||    and    r = (lw / lf) ||D - H_f Delta|| / ||Delta||,

and is the square root of

    F2(mu, r) = (lf^2 r + lp^2 mu + lw^2) * <D, (A(mu) + r I)^-1 D>,
    A(mu) = H_f (I + G / mu)^-1 H_f^T           (mu = 0: H_f N N^T H_f^T, N the kernel of G).

A jointly convex function minimised over some of its arguments stays convex in the others, so F2 is
quasi-convex in each ratio, and its minimum is found by one root inside another. There

    Delta = (I + G / mu)^-1 H_f^T Z,    (A + r I) Z = D,    Y = (lw / ||Delta||) Z.

`r = 0`: the texts reach P. `mu = 0` (the kernel branch): no retained text moves. `r` infinite:
nothing moves. docs/method.md has the derivation.

Requests that share what is retained are solved together. What one of them excludes are few rows L:
`G_i = G - L^T L`, and by Woodbury's formula `H (G_i + mu I)^-1 = (H + C L) B` with
`B = (G + mu I)^-1` and `C = H B L^T (I - L B L^T)^-1`.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from forgetting.errors import ProblemError
from forgetting.io import indices, mask
from forgetting.problem import AUTO, ForgetProblem, LowRankEdit, equal_sizes, pad_rows
from forgetting.solvers.certificate import Certificate, certify
from forgetting.solvers.spectrum import EPS, Spectrum, find_roots

GOOD_GAP = 1e-10  # a request with a larger one is solved alone, with a factorisation of its own
AUTO_MARGIN = 1e-3  # "auto" goes this fraction above c*
DEPENDENT = 1e-10  # forgotten rows whose singular value is below this fraction count as dependent
# Of the largest mu that there can be. Below it hardly anything holds a text but what its request
# excludes, and the downdate cancels.
NEAR_KERNEL = 1e-6
NO_WEIGHT = 1e-13  # of the preserve term's largest slope: stands for lamb_weight = 0
BATCH_NUMBERS = 2**17  # float64 numbers that a batch of requests may hold in the eigenbasis
TINY = 1e-280


@dataclass(frozen=True)
class Thresholds:
    """Where `lamb_forget` changes the answer. Below `start` nothing moves, above `reach` (c*) the
    texts reach their target, between the two they stop on the way. For one text the two are equal.
    `reach` is infinite if the target cannot be reached at all."""

    start: float
    reach: float


@dataclass(frozen=True)
class ExactSolution(LowRankEdit):
    """The optimum, left (w, p), right (p, d), float64, p <= min(k, w), with its proof."""

    branch: str  # "generic", "kernel" (no retained text moves) or "none" (nothing moves)
    mu: float  # the ratio above
    # `r / mu`, so that `(H_f (G + mu I)^-1 H_f^T + rho I) Z' = D` for
    # `Delta = (G + mu I)^-1 H_f^T Z'`; 0 where the texts reach P.
    rho: float
    lamb_forget: float  # that it was solved with
    thresholds: Thresholds
    certificate: Certificate

    def report(self) -> dict[str, Any]:
        """Everything but the factors, in JSON values."""
        return {name: x for name, x in asdict(self).items() if name not in ("left", "right")}


def solve_exact(problem: ForgetProblem) -> ExactSolution:
    """The minimum of the paper's objective over all changes of the projection, and its proof, in
    float64 on the problem's device.

    For weights within a factor 1e4 of each other and hidden states whose singular values span up to
    four decades the gap is at most 1e-9 (and rounding), on CLIP's features about 2e-13. Beyond
    that, and where there is no weight term, the answer carries its true gap.

    Raises ProblemError: `lamb_forget` is "auto" and the target cannot be reached.
    """
    spectrum = Spectrum(problem.retain_hidden[: None if problem.lamb_preserve else 0])
    device = problem.projection.device
    texts = torch.arange(len(problem.forget_hidden), device=device)[None]
    nothing = torch.zeros(1, len(spectrum.rows), dtype=torch.bool, device=device)
    (solution,) = _solve(problem, spectrum, spectrum.rows, texts, nothing)
    if not solution.certificate.gap <= GOOD_GAP:
        (still,) = _solve(problem, spectrum, spectrum.rows, texts, nothing, move=False)
        if not solution.certificate.primal <= still.certificate.primal:
            return still
    return solution


def thresholds(problem: ForgetProblem) -> Thresholds:
    """The values of `lamb_forget` at which texts start to move and at which they reach `P`. The
    `lamb_forget` of the problem itself plays no part."""
    return solve_exact(replace(problem, lamb_forget=0.0)).thresholds


def solve_each(problem: ForgetProblem, owner: Tensor, excluded: Tensor) -> list[ExactSolution]:
    """The optimum of R requests of any number of texts, each from the original model.

    Args:
        problem: the texts of all requests, and everything that may be retained beside them. A
            `lamb_forget` of "auto" is each request's own.
        owner: (K,) int64, the request of each text; each of 0 .. R - 1 has at least one.
        excluded: (R, m) bool, which rows of `retain_hidden` are not retained in a request.

    Raises ProblemError: an owner or a mask that does not fit; see also `solve_exact`.
    """
    device = problem.projection.device
    excluded = mask("excluded", excluded, len(problem.retain_hidden)).to(device)
    owner = indices("owner", owner, len(problem.forget_hidden), len(excluded)).to(device)
    used = slice(None if problem.lamb_preserve else 0)
    spectrum, rows = Spectrum(problem.retain_hidden[used]), problem.retain_hidden[used].double()
    solutions = {}
    per_row = 3 * max(1, len(spectrum.values))
    for requests, texts in equal_sizes(owner, excluded, BATCH_NUMBERS // per_row):
        answers = _solve(problem, spectrum, rows, texts, excluded[requests][:, used])
        solutions |= zip(requests.tolist(), answers, strict=True)
    for request, solution in solutions.items():
        good = solution.certificate.gap <= GOOD_GAP and solution.thresholds.reach >= 0  # not NaN
        if not good or problem.lw == 0:
            solutions[request] = solve_exact(problem.part(owner == request, ~excluded[request]))
    return [solutions[request] for request in range(len(excluded))]


def _solve(
    problem: ForgetProblem,
    spectrum: Spectrum,
    rows: Tensor,
    texts: Tensor,
    excluded: Tensor,
    move: bool = True,
) -> list[ExactSolution]:
    """The optima of B requests of k texts each; without `move` no change at all, with its proof.
    `rows`: (m, w) float64, what is retained; `spectrum`: of them. `texts`: (B, k), rows of
    `problem.forget_hidden`; `excluded`: (B, m) bool."""
    part = problem.part(texts.flatten(), slice(0)).double
    reduced = _Reduced(part, spectrum, pad_rows(excluded, rows))
    mu_start, start = reduced.start()
    reach = start if texts.shape[1] == 1 else torch.maximum(start, reduced.reach())
    if problem.lamb_forget != AUTO:
        lf = torch.full_like(start, problem.lamb_forget)
    elif (reach == math.inf).any():
        raise ProblemError(
            "no lamb_forget takes the texts to their target: texts that repeat each other have "
            "different targets, or there are more texts than dimensions; choose lamb_forget"
        )
    else:  # just above c*: the paper's retry loop in one step
        lf = (1 + AUTO_MARGIN) * reach

    mu = mu_start
    if texts.shape[1] > 1:  # one text alone reaches P, or does not move, at the same mu

        def slope(mu: Tensor) -> Tensor:
            columns, r, z = reduced.best(mu, lf)
            # Where moving does not pay F2 is flat; its minimum lies towards mu_start.
            towards = torch.where(mu > mu_start, 1.0, -1.0).to(mu)
            return torch.where(r == math.inf, towards, reduced.slope(mu, columns, z))

        mu = reduced.minimise(slope)
    columns, r, z = reduced.best(mu, lf)
    left = reduced.left(mu, columns)
    size = torch.linalg.matrix_norm(left @ z)
    moves = (lf > start) & (r < math.inf) & (size > 0) & move
    mu, r = torch.where(moves, mu, mu_start), torch.where(moves, r, math.inf)
    columns, _ = reduced.columns(mu)
    pulled = torch.where(moves[:, None, None], z, reduced.d)  # without a change Y is along D
    beyond = reduced.unreachable / torch.where(moves & (r > 0), r, 1.0)[:, None, None]
    scale = torch.where(moves, reduced.lw / size, lf / reduced.length).nan_to_num(0.0, 0.0)
    y = scale[:, None, None] * (reduced.rotation @ pulled + beyond)  # (B, k, j)
    u_left, u_right = (columns @ spectrum.vectors.T).mT, reduced.rotation.mT @ y
    z = torch.where(moves[:, None, None], z, 0.0)
    free = reduced.free.any(dim=1) & (lf > 0) & move
    if free.any():
        left, z = reduced.with_free(left, z)
    right = z @ reduced.basis
    multipliers = y @ reduced.basis, u_left, u_right @ reduced.basis
    proofs = certify(part, rows, excluded, lf, left, right, *multipliers)
    rho = torch.where(mu > 0, r / mu, r)
    solutions = []
    for i, moved in enumerate(moves.tolist()):
        branch = "generic" if moved and (mu[i] > 0 or problem.lamb_preserve == 0) else "kernel"
        branch, rank = (branch, left.shape[2]) if moved or free[i] else ("none", 0)
        numbers = float(mu[i]) if problem.lw else 0.0, float(rho[i]), float(lf[i])
        limits = Thresholds(float(start[i]), float(reach[i]))
        factors = left[i, :, :rank], right[i, :rank]
        solutions.append(ExactSolution(*factors, branch, *numbers, limits, proofs[i]))
    return solutions


class _Reduced:
    """B problems of k texts in coordinates in which only k x k matrices are left.

    The rows of `H_f` and D are rotated together, so that dependent rows vanish: p of them are left,
    some of them zero. What of D no change can reach is kept apart.
    """

    def __init__(self, problem: ForgetProblem, spectrum: Spectrum, excluded: Tensor) -> None:
        """Of the texts of `problem`, float64, k for each of the B entries of `excluded`, (B, n, w),
        rows that are retained otherwise."""
        batch = len(excluded), -1
        h_f, d = problem.forget_hidden.unflatten(0, batch), problem.displacement.unflatten(0, batch)
        basis, d = torch.linalg.qr(d.mT)
        self.basis, d = basis.mT, d.mT  # (B, j, d) orthonormal, and D in it, (B, k, j)
        u, s, vh = torch.linalg.svd(h_f, full_matrices=False)
        keep = s > DEPENDENT * s.amax(dim=1, keepdim=True)  # (B, p)
        rows = (s * keep)[..., None] * vh  # (B, p, w)
        self.rotation = u * keep[:, None]  # (B, k, p)
        self.d = self.rotation.mT @ d  # (B, p, j)
        unreachable = d - self.rotation @ self.d
        unreachable = unreachable - self.rotation @ (self.rotation.mT @ unreachable)  # to rounding
        norm = torch.linalg.matrix_norm
        reached = norm(unreachable) <= 1e-13 * norm(d)
        self.unreachable = unreachable.masked_fill(reached[:, None, None], 0.0)
        self.unreachable_sq = self.unreachable.square().sum(dim=(1, 2))
        self.spectrum, self.e = spectrum, spectrum.values.square()
        # The rows in the eigenbasis of G, (B, p, q), and outside it, (B, p, w).
        self.inside, self.kernel = rows @ spectrum.vectors, spectrum.outside(rows)
        self.removed = excluded @ spectrum.vectors  # (B, n, q)
        self.lp, self.lw = problem.lamb_preserve, problem.lw
        self.free = torch.zeros_like(keep)  # (B, p), combinations of texts that move for free
        if self.lw == 0:
            self.lw = NO_WEIGHT * (self.lp * float(spectrum.values[:1].sum()) or 1.0)
            self._set_free_aside()
        self.length = (self.d.square().sum(dim=(1, 2)) + self.unreachable_sq).sqrt()  # of D

    def _set_free_aside(self) -> None:
        """Without a weight term what lies outside the retained span moves for free. The texts are
        rotated once more; combinations with a part there reach their target through it alone."""
        u, s, vh = torch.linalg.svd(self.kernel, full_matrices=False)  # (B, p, p), (B, p), ..
        self.free = s > DEPENDENT * s.amax(dim=1, keepdim=True)
        free = self.free[..., None]
        self.rotation, self.inside, self.d = self.rotation @ u, u.mT @ self.inside, u.mT @ self.d
        self.free_left = (self.spectrum.outside(vh) / s[..., None]).masked_fill(~free, 0.0).mT
        self.free_inside, self.free_d = self.inside * free, self.d * free
        self.inside, self.d = self.inside.masked_fill(free, 0.0), self.d.masked_fill(free, 0.0)
        self.kernel = torch.zeros_like(self.kernel)

    def with_free(self, left: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the change `left @ z` and of what moves for free beside it."""
        shift = self.free_inside @ (self.spectrum.vectors.T @ left) @ z
        return left + self.free_left, z + self.free_d - shift

    def cost(self, mu: Tensor) -> Tensor:
        """The part of F2's first factor that r leaves alone."""
        return self.lp**2 * mu + self.lw**2

    def columns(self, mu: Tensor) -> tuple[Tensor, Tensor]:
        """`H_f (G_i + mu I)^-1` in the eigenbasis of G, (B, p, q), and A(mu), (B, p, p)."""
        inverse = (self.e + mu[:, None]).reciprocal()[:, None]  # (B, 1, q)
        columns = self.inside * inverse
        if self.removed.shape[1]:
            seen = self.removed * inverse  # (B, n, q)
            inner = torch.eye(seen.shape[1]).to(seen) - seen @ self.removed.mT
            weights = torch.linalg.solve_ex(inner, columns @ self.removed.mT, left=False)[0]
            columns = columns + weights @ seen
        a = mu[:, None, None] * (columns @ self.inside.mT) + self.kernel @ self.kernel.mT
        return columns, ((a + a.mT) / 2).nan_to_num(0.0, 0.0, 0.0)

    def left(self, mu: Tensor, columns: Tensor) -> Tensor:
        """Left factor (B, w, p) of `Delta = (I + G_i / mu)^-1 H_f^T Z`."""
        return (mu[:, None, None] * columns @ self.spectrum.vectors.T + self.kernel).mT

    def slope(self, mu: Tensor, columns: Tensor, z: Tensor) -> Tensor:
        """Sign and relative size of F2's slope in mu where `Delta` is made of Z (B, p, j).

        At the best r for mu the slope has the sign of

            lp^2 ||Delta||^2 - lw^2 ||H_r Delta||^2 / mu^2,

        a difference without the large common terms of F2's own derivative.
        """
        direction = z.mT @ columns  # (B, j, q)
        square = direction.square().sum(dim=1)  # (B, q)
        outside = (z.mT @ self.kernel).square().sum(dim=(1, 2))
        excluded = (direction @ self.removed.mT).square().sum(dim=(1, 2))
        rise = self.lp**2 * (mu.square() * square.sum(dim=1) + outside)
        fall = self.lw**2 * (square @ self.e - excluded)
        return (rise - fall) / (rise + fall.abs()).clamp(min=TINY)

    def best(self, mu: Tensor, lf: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """At one mu its `columns`, the best r (B,), and Z (B, p, j), 0 where r is infinite."""
        columns, a = self.columns(mu)
        values, rotation, d = self.turned(a)
        r = best_r(values, d.square().sum(dim=2), self.unreachable_sq, self.cost(mu), lf)
        return columns, r, rotation @ torch.where(d == 0, 0.0, d / (values + r[:, None])[..., None])

    def turned(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues (B, p) and eigenvectors of A (B, p, p), and D in them, (B, p, j)."""
        values, rotation = torch.linalg.eigh(a)
        d = rotation.mT @ self.d
        rounded = torch.linalg.vector_norm(d, dim=2) <= EPS * self.length[:, None]
        return values.clamp(min=0), rotation, d.masked_fill(rounded[..., None], 0.0)

    def start(self) -> tuple[Tensor, Tensor]:
        """The mu at which the texts would start, and the `lamb_forget` below which nothing moves.

        At large r, F2 = lf^2 |D|^2 + (c |D|^2 - lf^2 <D, A D>) / r with c = lp^2 mu + lw^2: moving
        pays once lf^2 exceeds the minimum over mu of c |D|^2 / <D, A D>.
        """
        mu = self.minimise(lambda mu: self.slope(mu, self.columns(mu)[0], self.d))
        strength = (self.d * (self.columns(mu)[1] @ self.d)).sum(dim=(1, 2))
        start = (self.cost(mu) / strength.clamp(min=0)).sqrt() * self.length
        return mu, start.masked_fill((self.length == 0) | self.free.any(dim=1), 0.0)

    def reach(self) -> Tensor:
        """c*: the length of Y at r = 0, where the texts reach P; infinite if they cannot."""

        def on_target(mu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """`columns`, Z (B, p, j) at r = 0, and whether A is singular and P out of reach."""
            columns, a = self.columns(mu)
            values, rotation, d = self.turned(a)
            none = values <= values.shape[1] * EPS * values[:, -1:]
            z = rotation @ (d / values.masked_fill(none, math.inf)[..., None])
            return columns, z, (none & (d != 0).any(dim=2)).any(dim=1)

        def slope(mu: Tensor) -> Tensor:
            columns, z, singular = on_target(mu)
            return torch.where(singular, -1.0, self.slope(mu, columns, z))

        mu = self.minimise(slope)
        _, z, singular = on_target(mu)
        length_sq = z.square().sum(dim=(1, 2)) / (z * self.d).sum(dim=(1, 2))
        reach = (self.cost(mu) * length_sq).sqrt().masked_fill(self.length == 0, 0.0)
        reach = reach.masked_fill(singular | (self.unreachable_sq > 0), math.inf)
        return reach.masked_fill(mu.isnan(), math.nan)

    def minimise(self, slope: Callable[[Tensor], Tensor]) -> Tensor:
        """The mu (B,) at which a quasi-convex function of mu is lowest, given its slope's sign.
        0 if the slope is not negative there, NaN if that is too near to the kernel to downdate."""
        nothing = torch.zeros_like(self.length)
        if not len(self.e):  # without retained texts mu means nothing
            return nothing
        # mu = lw / lp * ||H_r Delta|| / ||Delta||, within the range of the singular values.
        high = nothing + 2 * self.lw / self.lp * float(self.spectrum.values[0])
        least = NEAR_KERNEL * high if self.removed.shape[1] else nothing
        none = slope(least) >= 0
        low = torch.where(none, high, torch.maximum(least, 1e-24 * high))
        root = find_roots(lambda log_mu: slope(log_mu.exp()), low.log(), high.log()).exp()
        return root.masked_fill(none, math.nan if self.removed.shape[1] else 0.0)


def best_r(a: Tensor, c: Tensor, unreachable_sq: Tensor, cost: Tensor, lf: Tensor) -> Tensor:
    """The r (B,) >= 0 that minimises `(lf^2 r + cost) (sum c_i / (a_i + r) + unreachable_sq / r)`,
    for a, c (B, p).

    Its derivative is `sum c_i (lf^2 a_i - cost) / (a_i + r)^2 - cost unreachable_sq / r^2`, which
    changes sign once. 0 or infinity if the minimum is at an end.
    """
    top = a.amax(dim=1).clamp(min=TINY)
    gain = c * (lf.square()[:, None] * a - cost[:, None])  # (B, p)

    def slope(log_r: Tensor) -> Tensor:
        r = log_r.exp()
        value = (gain * ((r + top)[:, None] / (a + r[:, None])).square()).sum(dim=1)
        return value - cost * unreachable_sq * ((r + top) / r).square()

    low, high = (top * 1e-18).log(), (top * 1e18).log()
    lands, stays = slope(low) >= 0, slope(high) <= 0
    if (lands | stays).all():
        r = top
    else:
        r = find_roots(slope, low, torch.where(lands | stays, low, high)).exp()
    return r.masked_fill(lands, 0.0).masked_fill(stays, math.inf)
