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

`r = 0`: the texts land on P. `mu = 0` (the kernel branch): no retained text moves. `r` infinite:
nothing moves. docs/exact.md has the derivation.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from forgetting.certificate import Certificate, certify
from forgetting.checks import ProblemError
from forgetting.problem import AUTO, ForgetProblem
from forgetting.spectrum import DEPENDENT, Reduced, Spectrum, best_ridge

GOOD_GAP = 1e-10  # a larger one from the fast factorisation asks for the precise one
WARN_GAP = 1e-6
AUTO_MARGIN = 1e-3  # `auto` goes this fraction above c*


@dataclass(frozen=True)
class ExactSolution:
    """The optimum of a `ForgetProblem`, `Delta = left @ right`, with its proof.

    Attributes:
        left: (w, p), right: (p, d), float64, p <= min(k, rank of H_f).
        branch: "generic", "kernel" (no retained text moves) or "none" (nothing moves).
        mu: the ratio above; rho: `r / mu`, so that `(H_f (G + mu I)^-1 H_f^T + rho I) Z' = D` for
            `Delta = (G + mu I)^-1 H_f^T Z'`; 0 where the texts reach P.
        certificate: primal value, lower bound and relative gap.
        y: (k, d), the multiplier; u_left (q, p) and u_right (p, d): the other one's factors.
        problem: in float64, as it was solved: its `retain_hidden` (q, w) are the retained texts or,
            if they are many more than their dimensions, their triangle (`Spectrum.rows`). With the
            fields above it is all that `certify` needs.
    """

    left: Tensor
    right: Tensor
    branch: str
    mu: float
    rho: float
    certificate: Certificate
    y: Tensor
    u_left: Tensor
    u_right: Tensor
    problem: ForgetProblem

    @property
    def delta(self) -> Tensor:
        """(w, d) float64."""
        return self.left @ self.right

    def truncated(self, rank: int) -> tuple[Tensor, Tensor, float]:
        """The best approximation of rank at most `rank`, and what it costs.

        Returns:
            left (w, r), right (r, d), and the objective's relative rise over the exact optimum.
        """
        left, right = _compress(self.left, self.right, rank)
        cut = certify(self.problem, left, right, self.y, self.u_left, self.u_right)
        exact = self.certificate.primal
        return left, right, (cut.primal - exact) / exact if exact > 0 else 0.0


@dataclass(frozen=True)
class Thresholds:
    """Where `lamb_forget` changes the answer: below `start` nothing moves, above `reach` (c*) the
    texts land on their target; between them they stop on the way. For one text the two are equal.
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
    """
    reduced = _reduced(problem, spectrum)
    problem = settle(problem, reduced.spectrum)
    exact = _on(problem, reduced.spectrum.rows)
    solution = _solve(exact, reduced)
    if not solution.certificate.gap <= GOOD_GAP:
        precise = Reduced(exact, Spectrum(exact.retain_hidden, precise=True))
        solution = min(solution, _solve(exact, precise), key=_rank)
    if solution.branch != "none":
        still = _answer(exact, reduced, None, solution.mu, math.inf, 0.0, "none")
        if not _worth(exact, problem.projection.dtype, solution) <= still.certificate.primal:
            solution = still
    proof = solution.certificate
    if proof.gap > WARN_GAP and not proof.primal <= proof.rounding:
        warnings.warn(
            f"the exact solver proves its answer to a relative gap of "
            f"{proof.gap:.1e} only: badly scaled weights or hidden states",
            stacklevel=2,
        )
    return solution


def _rank(solution: ExactSolution) -> tuple[float, float]:
    """What makes one of two answers the better one: what it proves, then what it costs."""
    return solution.certificate.gap, solution.certificate.primal


def _worth(exact: ForgetProblem, dtype: torch.dtype, solution: ExactSolution) -> float:
    """The objective at an answer as it will be stored, rounded to the problem's own dtype."""
    if dtype == torch.float64:
        return solution.certificate.primal
    left, right = (x.to(dtype).double() for x in (solution.left, solution.right))
    return float(exact.objective(left @ right))


def _on(problem: ForgetProblem, rows: Tensor) -> ForgetProblem:
    """The problem in float64, with float64 `rows` (q, w) that stand for the retained texts."""
    part = problem.part(
        torch.ones(len(problem.forget_hidden), dtype=torch.bool),
        torch.zeros(len(problem.retain_hidden), dtype=torch.bool),
    )
    return replace(part.double, retain_hidden=rows)


def _reduced(problem: ForgetProblem, spectrum: Spectrum | None) -> Reduced:
    if problem.lamb_preserve == 0:  # the retained texts play no part
        spectrum = Spectrum(problem.retain_hidden[:0])
    spectrum = spectrum or Spectrum(problem.retain_hidden)
    return Reduced(_on(problem, spectrum.rows[:0]), spectrum)


def settle(problem: ForgetProblem, spectrum: Spectrum | None = None) -> ForgetProblem:
    """The problem with a number in place of "auto": just above c*, so that the texts reach P.

    The paper's retry loop in one step. A problem that has a number comes back as it is.

    Raises:
        ProblemError: no weight is enough, because the target cannot be reached.
    """
    if problem.lamb_forget != AUTO:
        return problem
    return replace(problem, lamb_forget=above(thresholds(problem, spectrum).reach))


def above(reach: float) -> float:
    """The `lamb_forget` that "auto" stands for where c* is `reach`.

    Raises:
        ProblemError: it is infinite.
    """
    if reach == math.inf:
        raise ProblemError(
            "no lamb_forget takes the texts to their target: texts that repeat each other have "
            "different targets, or there are more texts than dimensions; choose lamb_forget"
        )
    return (1 + AUTO_MARGIN) * reach


def _start(reduced: Reduced) -> tuple[float, float]:
    """The threshold below which nothing moves, and the mu at which the texts would start.

    At large r, F2 = lf^2 |D|^2 + (price |D|^2 - lf^2 <D, A D>) / r: moving pays once lf^2 exceeds
    the minimum over mu of price |D|^2 / <D, A D>.
    """

    if not len(reduced.d):
        return math.inf, 0.0
    if reduced.lw == 0:
        return Weightless(reduced).start, 0.0

    mu = reduced.minimise_ratio(lambda mu: reduced.slope(mu, reduced.d))
    strength = float((reduced.c * reduced.a(mu)).sum())
    if strength <= 0:
        return math.inf, mu
    return (reduced.price(mu) / strength) ** 0.5 * reduced.length, mu


def _reach(reduced: Reduced) -> float:
    """c*: the length of Y at r = 0, where the texts land on P; infinite if they cannot."""
    if reduced.spread > 0:
        return math.inf
    if reduced.lw == 0:
        return Weightless(reduced).reach

    def landing(mu: float) -> Tensor | None:
        """Z (p, d) at r = 0; None where A is singular and P out of reach."""
        root, info = torch.linalg.cholesky_ex(reduced.a(mu))
        return None if info else torch.cholesky_solve(reduced.d, root)

    def slope(mu: float) -> float:
        z = landing(mu)
        return -1.0 if z is None else reduced.slope(mu, z)

    mu = reduced.minimise_ratio(slope)
    z = landing(mu)
    return (reduced.price(mu) * float(z.square().sum()) / float((z * reduced.d).sum())) ** 0.5


def _solve(problem: ForgetProblem, reduced: Reduced) -> ExactSolution:
    """One pass with a given factorisation."""
    lf = problem.lamb_forget
    if reduced.length == 0 or lf == 0:
        return _answer(problem, reduced, None, 0.0, 0.0, 0.0, "none")
    if reduced.lw == 0:
        return _solve_weightless(problem, reduced)
    start, mu_start = _start(reduced)
    if lf <= start:
        return _answer(problem, reduced, None, mu_start, math.inf, 0.0, "none")

    def slope(mu: float) -> float:
        state = _State(reduced, mu, lf)
        # Where moving does not pay F2 is flat; its minimum lies towards mu_start.
        return state.slope if state.r < math.inf else (1.0 if mu > mu_start else -1.0)

    mu = reduced.minimise_ratio(slope)
    state = _State(reduced, mu, lf)
    left = reduced.change(mu)
    size = float(torch.linalg.matrix_norm(left @ state.z)) if state.r < math.inf else 0.0
    if size == 0:  # a hair above the threshold: nothing moves yet, to rounding
        return _answer(problem, reduced, None, mu_start, math.inf, 0.0, "none")
    scale = reduced.lw / size
    branch = "generic" if mu > 0 or reduced.lp == 0 else "kernel"
    return _answer(problem, reduced, state.z, mu, state.r, scale, branch)


class _State:
    """F2 at one mu, at the best r for it: that r, the solution Z (p, d) and the slope in mu."""

    def __init__(self, reduced: Reduced, mu: float, lf: float) -> None:
        a, rotation = torch.linalg.eigh(reduced.a(mu))  # (p,), (p, p)
        a = a.clamp(min=0)
        turned = rotation.T @ reduced.d  # (p, d)
        self.r = best_ridge(a, turned.square().sum(dim=1), reduced.spread, reduced.price(mu), lf)
        if self.r < math.inf:
            self.z = rotation @ (turned / (a + self.r)[:, None])
            self.slope = reduced.slope(mu, self.z)


def _solve_weightless(problem: ForgetProblem, reduced: Reduced) -> ExactSolution:
    """The answer without a weight term; not the only minimiser, but one of least rank."""
    free, lf, h_r = Weightless(reduced), problem.lamb_forget, problem.double.retain_hidden
    rho = free.ridge(lf)
    moved = rho < math.inf and len(free.d) > 0
    z = free.z(rho) if moved else torch.zeros_like(free.d)
    target = free.free.T @ reduced.d  # (t, d)
    shift = free.free.T @ reduced.inside @ (reduced.spectrum.vectors.T @ free.left) @ z  # (t, d)
    left = torch.cat([free.left, free.free_left], dim=1)  # (w, p)
    right = torch.cat([z, target - shift])  # (p, d)
    if moved:
        pull = float(torch.linalg.matrix_norm(h_r @ free.left @ z))
        scale = problem.lamb_preserve / pull if pull > 0 else 0.0
        y = reduced.rotation @ free.held @ (scale * z)
        if rho > 0:
            y = y + (scale / rho) * reduced.unreachable
    elif free.length > 0:  # what is left stays where it is
        y = (reduced.rotation @ free.held @ free.d + reduced.unreachable) * (lf / free.length)
    else:
        y = torch.zeros_like(reduced.unreachable)
    # V has to vanish here; one step of refinement takes it from the rounding of G's inverse to that
    # of its own terms.
    basis, vectors = free.left, reduced.spectrum.vectors
    if problem.lamb_preserve > 0:
        rest = free.held.T @ reduced.rows - (_multiplier(problem, basis)).T @ h_r  # (p - t, w)
        basis = basis + vectors @ ((rest @ vectors) / reduced.e).T
    u_left = _multiplier(problem, basis)
    u_right = free.held.T @ reduced.rotation.T @ y
    branch = "generic" if moved else ("kernel" if len(free.free.T) else "none")
    proof = certify(problem, left, right, y, u_left, u_right)
    return ExactSolution(left, right, branch, 0.0, rho, proof, y, u_left, u_right, problem)


def _answer(
    problem: ForgetProblem,
    reduced: Reduced,
    z: Tensor | None,
    mu: float,
    r: float,
    scale: float,
    branch: str,
) -> ExactSolution:
    """Factors, multipliers and certificate at (mu, r); `z` None if nothing moves."""
    w, d = problem.projection.shape
    if z is None:
        left, right = reduced.rows.new_zeros(w, 0), reduced.rows.new_zeros(0, d)
        whole = reduced.rotation @ reduced.d + reduced.unreachable  # D
        y = whole * (problem.lamb_forget / reduced.length if reduced.length > 0 else 0.0)
    else:
        left, right = reduced.change(mu), z
        y = reduced.rotation @ (scale * z)  # (k, d)
        if r > 0:
            y = y + (scale / r) * reduced.unreachable
    # H_f^T Y = V + H_r^T U with V = mu (G + mu)^-1 H_f^T Y and U = H_r (G + mu)^-1 H_f^T Y.
    basis = reduced.spectrum.vectors @ (reduced.inside / (reduced.e + mu)).T  # (w, p)
    u_left = _multiplier(problem, basis)
    u_right = reduced.rotation.T @ y  # (p, d)
    proof = certify(problem, left, right, y, u_left, u_right)
    rho = r / mu if mu > 0 else r
    return ExactSolution(left, right, branch, mu, rho, proof, y, u_left, u_right, problem)


def _multiplier(problem: ForgetProblem, basis: Tensor) -> Tensor:
    """Left factor (m, p) of U, `H_r` times `basis` (w, p); zero where U must vanish."""
    left = problem.double.retain_hidden @ basis
    return left if problem.lamb_preserve > 0 else torch.zeros_like(left)


def _compress(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors of rank at most `rank` of `left @ right` (Eckart and Young)."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T)
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    return q_left @ (u * s), vh @ q_right.T


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
            return 0.0 if self.spread == 0 else math.inf
        return best_ridge(self.a, self.c, self.spread, self.price, lf)

    def z(self, rho: float) -> Tensor:
        """(p - t, d)."""
        return self.basis @ ((self.basis.T @ self.d) / (self.a + rho)[:, None])

    @property
    def start(self) -> float:
        if len(self.free.T):
            return 0.0
        strength = float((self.a * self.c).sum())
        return (self.price / strength) ** 0.5 * self.length if strength > 0 else math.inf

    @property
    def reach(self) -> float:
        if self.spread > 0:
            return math.inf
        q = float((self.c / self.a).sum()) if len(self.d) else 0.0
        return (self.price * float((self.c / self.a.square()).sum()) / q) ** 0.5 if q > 0 else 0.0
