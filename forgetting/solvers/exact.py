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
nothing moves. docs/exact.md has the derivation.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from forgetting.errors import ProblemError
from forgetting.problem import AUTO, ForgetProblem, LowRankEdit
from forgetting.solvers.certificate import Certificate, certify
from forgetting.solvers.spectrum import DEPENDENT, Reduced, Spectrum, best_r

GOOD_GAP = 1e-10  # a larger one from the fast factorisation asks for the precise one
WARN_GAP = 1e-6
AUTO_MARGIN = 1e-3  # "auto" goes this fraction above c*


@dataclass(frozen=True)
class ExactSolution(LowRankEdit):
    """The optimum of a `ForgetProblem`, `Delta = left @ right`, with its proof.

    Attributes:
        left: (w, p), right: (p, d), float64, p <= min(k, rank of H_f).
        branch: "generic", "kernel" (no retained text moves) or "none" (nothing moves).
        mu: the ratio above; rho: `r / mu`, so that `(H_f (G + mu I)^-1 H_f^T + rho I) Z' = D` for
            `Delta = (G + mu I)^-1 H_f^T Z'`; 0 where the texts reach P.
        certificate: primal value, lower bound and relative gap.
        y: (k, d), the multiplier; u_left (q, p) and u_right (p, d): the other one's factors.
        problem: in float64, as it was solved. Its `retain_hidden` (q, w) are the retained texts or,
            if they are many more than their dimensions, their triangle (`Spectrum.rows`). With the
            fields above it is all that `certify` needs.
    """

    branch: str
    mu: float
    rho: float
    certificate: Certificate
    y: Tensor
    u_left: Tensor
    u_right: Tensor
    problem: ForgetProblem


@dataclass(frozen=True)
class Thresholds:
    """Where `lamb_forget` changes the answer. Below `start` nothing moves, above `reach` (c*) the
    texts reach their target, between the two they stop on the way. For one text the two are equal.
    `reach` is infinite if the target cannot be reached at all."""

    start: float
    reach: float


def thresholds(problem: ForgetProblem, spectrum: Spectrum | None = None) -> Thresholds:
    """The values of `lamb_forget` at which texts start to move and at which they reach `P`.

    Each is one scalar root. The `lamb_forget` of the problem itself plays no part.
    """
    reduced = _reduced(problem, spectrum)
    if reduced.length == 0:
        return Thresholds(0.0, 0.0)
    start, _ = _start(reduced)
    return Thresholds(start, max(start, _reach(reduced)))


def solve_exact(problem: ForgetProblem, spectrum: Spectrum | None = None) -> ExactSolution:
    """The minimum of the paper's objective over all changes of the projection, and its proof.

    Args:
        problem: any k, m, w, d; the arithmetic is float64 on the problem's device.
        spectrum: of `problem.retain_hidden`, to share it between problems; None computes it.

    Returns:
        The solution with its certificate, never worse than no change at all. For weights within a
        factor 1e4 of each other and hidden states whose singular values span up to four decades the
        gap is at most 1e-9 (and rounding), on CLIP's features about 2e-13. Beyond that, and where
        there is no weight term, the answer carries its true gap, with a warning above 1e-6.

    Raises:
        ProblemError: `lamb_forget` is "auto" and the target cannot be reached.
    """
    reduced = _reduced(problem, spectrum)
    dtype, problem = problem.projection.dtype, resolve_auto_weight(problem, reduced.spectrum)
    exact = _on_rows(problem, reduced.spectrum.rows)
    solution = _solve(exact, reduced)
    if not solution.certificate.gap <= GOOD_GAP:
        precise = Reduced(exact, Spectrum(exact.retain_hidden, precise=True))
        pair = solution, _solve(exact, precise)
        solution = min(pair, key=lambda one: (one.certificate.gap, one.certificate.primal))
    if solution.branch != "none":
        unchanged = _no_change(exact, reduced, solution.mu)
        primal = solution.certificate.primal
        if dtype != torch.float64:  # as the answer will be stored
            left, right = (x.to(dtype).double() for x in (solution.left, solution.right))
            primal = float(exact.objective(left @ right))
        if not primal <= unchanged.certificate.primal:
            solution = unchanged
    proof = solution.certificate
    if proof.gap > WARN_GAP and not proof.primal <= proof.rounding:
        warnings.warn(
            f"the exact solver proves its answer to a relative gap of {proof.gap:.1e} only: "
            "badly scaled weights or hidden states",
            stacklevel=2,
        )
    return solution


def resolve_auto_weight(problem: ForgetProblem, spectrum: Spectrum | None = None) -> ForgetProblem:
    """The problem with a number in place of "auto": just above c*, so that the texts reach P.

    The paper's retry loop in one step. A problem that has a number comes back as it is.

    Raises:
        ProblemError: no weight is enough, because the target cannot be reached.
    """
    if problem.lamb_forget != AUTO:
        return problem
    return replace(problem, lamb_forget=auto_weight(thresholds(problem, spectrum).reach))


def auto_weight(reach: float) -> float:
    """The `lamb_forget` that "auto" stands for where c* is `reach`; ProblemError if infinite."""
    if reach == math.inf:
        raise ProblemError(
            "no lamb_forget takes the texts to their target: texts that repeat each other have "
            "different targets, or there are more texts than dimensions; choose lamb_forget"
        )
    return (1 + AUTO_MARGIN) * reach


def _on_rows(problem: ForgetProblem, rows: Tensor) -> ForgetProblem:
    """The problem in float64, with float64 `rows` (q, w) that stand for the retained texts."""
    nobody = torch.zeros(len(problem.retain_hidden), dtype=torch.bool)
    return replace(problem.part(slice(None), nobody).double, retain_hidden=rows)


def _reduced(problem: ForgetProblem, spectrum: Spectrum | None) -> Reduced:
    if problem.lamb_preserve == 0:  # the retained texts play no part
        spectrum = Spectrum(problem.retain_hidden[:0])
    spectrum = spectrum or Spectrum(problem.retain_hidden)
    return Reduced(_on_rows(problem, spectrum.rows[:0]), spectrum)


def _start(reduced: Reduced) -> tuple[float, float]:
    """The threshold below which nothing moves, and the mu at which the texts would start.

    At large r, F2 = lf^2 |D|^2 + (c |D|^2 - lf^2 <D, A D>) / r with c = lp^2 mu + lw^2: moving pays
    once lf^2 exceeds the minimum over mu of c |D|^2 / <D, A D>.
    """
    if not len(reduced.d):
        return math.inf, 0.0
    if reduced.lw == 0:
        return NoWeightTerm(reduced).start, 0.0
    mu = reduced.minimise_ratio(lambda mu: reduced.slope(mu, reduced.d))
    strength = float((reduced.c * reduced.a(mu)).sum())
    if strength <= 0:
        return math.inf, mu
    return (reduced.r_free_cost(mu) / strength) ** 0.5 * reduced.length, mu


def _reach(reduced: Reduced) -> float:
    """c*: the length of Y at r = 0, where the texts reach P; infinite if they cannot."""
    if reduced.unreachable_sq > 0:
        return math.inf
    if reduced.lw == 0:
        return NoWeightTerm(reduced).reach

    def on_target(mu: float) -> Tensor | None:
        """Z (p, d) at r = 0; None where A is singular and P out of reach."""
        root, info = torch.linalg.cholesky_ex(reduced.a(mu))
        return None if info else torch.cholesky_solve(reduced.d, root)

    def slope(mu: float) -> float:
        z = on_target(mu)
        return -1.0 if z is None else reduced.slope(mu, z)

    mu = reduced.minimise_ratio(slope)
    z = on_target(mu)
    if z is None:
        return math.inf
    length_sq = float(z.square().sum()) / float((z * reduced.d).sum())
    return (reduced.r_free_cost(mu) * length_sq) ** 0.5


def _solve(problem: ForgetProblem, reduced: Reduced) -> ExactSolution:
    """One pass with a given factorisation."""
    lf = problem.lamb_forget
    if reduced.length == 0 or lf == 0:
        return _no_change(problem, reduced, 0.0, 0.0)
    if reduced.lw == 0:
        branch, rho, *answer = NoWeightTerm(reduced).solve(lf, problem.retain_hidden)
        return _proved(problem, branch, 0.0, rho, *answer)
    start, mu_start = _start(reduced)
    if lf <= start:
        return _no_change(problem, reduced, mu_start)

    def best(mu: float) -> tuple[float, Tensor | None]:
        """F2 at one mu: the best r for it, and Z (p, d); None where moving does not pay."""
        a, rotation = torch.linalg.eigh(reduced.a(mu))  # (p,), (p, p)
        a = a.clamp(min=0)
        d = rotation.T @ reduced.d  # (p, d)
        cost = reduced.r_free_cost(mu)
        r = best_r(a, d.square().sum(dim=1), reduced.unreachable_sq, cost, lf)
        return r, rotation @ (d / (a + r)[:, None]) if r < math.inf else None

    def slope(mu: float) -> float:
        _, z = best(mu)
        # Where moving does not pay F2 is flat; its minimum lies towards mu_start.
        return (1.0 if mu > mu_start else -1.0) if z is None else reduced.slope(mu, z)

    mu = reduced.minimise_ratio(slope)
    r, z = best(mu)
    left = reduced.left_factor(mu)
    size = 0.0 if z is None else float(torch.linalg.matrix_norm(left @ z))
    if size == 0:  # just above the threshold: nothing moves yet, to rounding
        return _no_change(problem, reduced, mu_start)
    y = (reduced.lw / size) * reduced.multiplier(z, r)
    branch = "generic" if mu > 0 or reduced.lp == 0 else "kernel"
    rho = r / mu if mu > 0 else r
    return _proved(problem, branch, mu, rho, left, z, y, *_u_factors(reduced, mu, y))


def _no_change(
    problem: ForgetProblem, reduced: Reduced, mu: float, rho: float = math.inf
) -> ExactSolution:
    """No change at all, with the multipliers at mu."""
    w, d = problem.projection.shape
    left, right = reduced.rows.new_zeros(w, 0), reduced.rows.new_zeros(0, d)
    scale = problem.lamb_forget / reduced.length if reduced.length > 0 else 0.0
    y = scale * reduced.multiplier(reduced.d, 1.0)  # along D
    return _proved(problem, "none", mu, rho, left, right, y, *_u_factors(reduced, mu, y))


def _u_factors(reduced: Reduced, mu: float, y: Tensor) -> tuple[Tensor, Tensor]:
    """U as `H_r` times a basis (w, p) times (p, d).

    `H_f^T Y = V + H_r^T U` with `V = mu (G + mu)^-1 H_f^T Y` and `U = H_r (G + mu)^-1 H_f^T Y`.
    """
    basis = reduced.spectrum.vectors @ (reduced.inside / (reduced.e + mu)).T
    return basis, reduced.rotation.T @ y


def _proved(
    problem: ForgetProblem,
    branch: str,
    mu: float,
    rho: float,
    left: Tensor,
    right: Tensor,
    y: Tensor,
    basis: Tensor,
    u_right: Tensor,
) -> ExactSolution:
    """The answer with its certificate."""
    u_left = problem.retain_hidden @ basis  # (q, p)
    if problem.lamb_preserve == 0:  # the retained texts play no part, so U vanishes
        u_left = torch.zeros_like(u_left)
    proof = certify(problem, left, right, y, u_left, u_right)
    return ExactSolution(left, right, branch, mu, rho, proof, y, u_left, u_right, problem)


class NoWeightTerm:
    """A reduced problem without a weight term: what lies outside the retained span moves for free.

    The rows of `H_f` are rotated once more. `held` combinations lie in the span of the retained
    texts and move at a price, the `free` ones reach their target through the kernel alone. mu = 0
    throughout, and with `A = H G^+ H^T` of the held rows F2 = (lf^2 rho + lp^2) <D, (A + rho)^-1
    D>.
    """

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
        # Delta through the kernel that takes the free combinations to their target. What the small
        # singular values magnify of the retained span is taken out again.
        outside = vh[:rank].T - vectors @ (vectors.T @ vh[:rank].T)  # (w, t)
        self.free_left = outside / s[:rank]

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
        value = float((self.c / self.a).sum()) if len(self.d) else 0.0
        length_sq = float((self.c / self.a.square()).sum())
        return self.reduced.lp * (length_sq / value) ** 0.5 if value > 0 else 0.0

    def solve(
        self, lf: float, h_r: Tensor
    ) -> tuple[str, float, Tensor, Tensor, Tensor, Tensor, Tensor]:
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
        else:  # the held combinations stay where they are
            scale = lf / self.length if self.length else 0.0
            y = scale * reduced.multiplier(self.held @ self.d, 1.0)
        shift = self.free.T @ reduced.inside @ (vectors.T @ self.left) @ z  # (t, d)
        left = torch.cat([self.left, self.free_left], dim=1)  # (w, p)
        right = torch.cat([z, self.free.T @ reduced.d - shift])  # (p, d)
        # H_f^T Y - H_r^T U has to vanish here. One step of refinement takes it from the rounding of
        # G's inverse to that of its own terms.
        basis = self.left
        if reduced.lp > 0:
            rest = self.held.T @ reduced.rows - (h_r @ basis).T @ h_r  # (p - t, w)
            basis = basis + vectors @ ((rest @ vectors) / reduced.e).T
        u_right = self.held.T @ reduced.rotation.T @ y  # (p - t, d)
        branch = "generic" if moved else ("kernel" if len(self.free.T) else "none")
        return branch, rho, left, right, y, basis, u_right
