"""Every class of a set, each forgotten alone while all others are retained, at once.

For one text all of `solve_exact` is scalar: with `u = (G + mu I)^-1 h` the change is
`Delta = u D / (h u)`, and what is retained beside it only shifts mu. If the text is itself among
the retained ones, its row leaves: `G_i = G - h h^T`, and by Sherman and Morrison
`(G_i + mu I)^-1 h = u / (1 - h u)`. So one eigendecomposition of G serves all classes, and the
roots in mu are found for all of them together.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from forgetting.certificate import certify_each
from forgetting.exact import GOOD_GAP, solve_exact, thresholds
from forgetting.problem import ForgetProblem, ProblemError
from forgetting.reduction import Spectrum
from forgetting.roots import find_roots

NEAR_KERNEL = 1e-6  # of the largest mu that there can be


@dataclass(frozen=True)
class EachSolution:
    """C independent optima: class i changes the projection by `left[i] (x) right[i]`.

    Attributes:
        left: (C, w), right: (C, d), float64; zero where nothing moves.
        mu: (C,), reach: (C,) c*, the `lamb_forget` above which the class moves.
        primal, bound, gap: (C,), the certificates.
        solve_seconds, certify_seconds: how long each part took, for all classes together.
        alone: number of classes that were solved again by `solve_exact`, being too close to the
            kernel for the shared factorisation.
    """

    left: Tensor
    right: Tensor
    mu: Tensor
    reach: Tensor
    primal: Tensor
    bound: Tensor
    gap: Tensor
    solve_seconds: float
    certify_seconds: float
    alone: int


def solve_each(
    problem: ForgetProblem, own: Tensor | None = None, spectrum: Spectrum | None = None
) -> EachSolution:
    """Forget each of the C texts of `problem` alone.

    Args:
        problem: `forget_hidden` (C, w) and `target` (C, d) hold the classes; `retain_hidden` (m, w)
            everything that is retained, classes included.
        own: (C,) int64, the row of `retain_hidden` that is class i's own text and leaves when the
            class is forgotten; -1 if it has none. None: no class has one.
        spectrum: of `problem.retain_hidden`, if it is known.

    Raises:
        ProblemError: a row of `own` is not its class's hidden state.
    """
    h_f, h_r = problem.forget_hidden.double(), problem.retain_hidden.double()
    count = len(h_f)
    own = torch.full((count,), -1, device=h_f.device) if own is None else own.to(h_f.device)
    shared = own >= 0
    if not torch.equal(problem.retain_hidden[own[shared]], problem.forget_hidden[shared]):
        raise ProblemError("own must name rows of retain_hidden that equal their class's text")
    lw = problem.lamb_weight * problem.rank / problem.alpha
    if problem.lamb_preserve == 0 or lw == 0 or len(h_r) == 0:
        return _one_by_one(problem, own)

    started = time.perf_counter()
    spectrum = spectrum or Spectrum(problem.retain_hidden)
    direction, mu, y, u_scale, moves, reach = _roots(problem, spectrum, shared, lw)
    d = problem.target.double() - h_f @ problem.projection.double()  # (C, d)
    solved = time.perf_counter()
    primal, bound, gap = certify_each(
        problem, own, direction * moves[:, None], y, u_scale, direction
    )
    proved = time.perf_counter()

    left, right = direction * moves[:, None], d.clone()
    # Where almost nothing holds a class but its own row, the downdate cancels.
    bare = shared & (mu < NEAR_KERNEL * lw / problem.lamb_preserve * spectrum.values.max())
    poor = torch.nonzero(~(gap <= GOOD_GAP) | bare)[:, 0].tolist()
    for i in poor:
        single = _alone(problem, own, i)
        solution = solve_exact(single)
        reach[i] = thresholds(single).reach
        left[i], right[i] = 0.0, 0.0
        if solution.left.shape[1]:
            left[i], right[i] = solution.left[:, 0], solution.right[0]
        proof = solution.certificate
        mu[i], primal[i], bound[i], gap[i] = solution.mu, proof.primal, proof.bound, proof.gap
    return EachSolution(
        left,
        right,
        mu,
        reach,
        primal,
        bound,
        gap,
        solved - started + time.perf_counter() - proved,
        proved - solved,
        len(poor),
    )


def _roots(
    problem: ForgetProblem, spectrum: Spectrum, shared: Tensor, lw: float
) -> tuple[Tensor, ...]:
    """mu of every class by one batched root, and what follows from it.

    Returns:
        direction (C, w) with `Delta = direction (x) D`, mu, `||Y||`, the factor that makes U of
        `H_r direction`, whether the class moves, and c*, all (C,).
    """
    h_f, lf, lp = problem.forget_hidden.double(), problem.lamb_forget, problem.lamb_preserve
    e = spectrum.values.square()  # (q,)
    x = h_f @ spectrum.vectors  # (C, q)
    kernel = h_f - x @ spectrum.vectors.T  # (C, w)
    kernel = kernel - (kernel @ spectrum.vectors) @ spectrum.vectors.T
    length = torch.linalg.vector_norm(h_f, dim=1)
    noise = torch.linalg.vector_norm(kernel, dim=1) <= 8 * spectrum.noise * length.max()
    kernel[noise] = 0.0
    x2, kernel2 = x.square(), kernel.square().sum(dim=1)  # (C, q), (C,)
    own = shared.double()

    def sums(mu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """mu h (G + mu)^-1 h, the squared norm of mu (G + mu)^-1 h, and h G (G + mu)^-2 h."""
        inverse = (e + mu[:, None]).reciprocal_()  # (C, q)
        once = x2 * inverse
        a = once.sum(dim=1) * mu + kernel2
        twice = once.mul_(inverse)
        return a, twice.sum(dim=1) * mu.square() + kernel2, twice @ e

    def slope(mu: Tensor) -> Tensor:
        a, b, g = sums(mu)
        # Own row removed from || H_r Delta ||^2: h (G + mu)^-1 h is what it contributed.
        removed = own * torch.where(mu > 0, a / mu.clamp(min=1e-300), 0.0).square()
        rise, fall = lp**2 * b, lw**2 * (g - removed)
        return (rise - fall) / (rise + fall.abs()).clamp(min=1e-300)

    zeros = x2.new_zeros(len(x2))
    high = (2 * lw / lp) * spectrum.values.max() * torch.ones_like(zeros)
    log_high = high.log()
    log_low = log_high - 12.0
    if bool((slope(log_low.exp()) > 0).any()):  # a class near the kernel: look much lower
        log_low = log_high - 60.0
    mu = find_roots(lambda log_mu: slope(log_mu.exp()), log_low, log_high).exp()
    # A retained text has no part in the kernel but what the factorisation takes for zero.
    mu = torch.where((kernel2 > 0) & ~shared & (slope(zeros) >= 0), zeros, mu)

    a, b, _ = sums(mu)
    left_over = 1 - own * a / mu.clamp(min=1e-300)  # 1 - h (G + mu)^-1 h of the shared texts
    strength = a / left_over  # A(mu) of the class's own problem
    reach = ((lp**2 * mu + lw**2) / strength).sqrt()
    moves = reach < lf
    shrink = torch.where(mu[:, None] > 0, mu[:, None] / (e + mu[:, None]), 0.0)
    direction = ((x * shrink) @ spectrum.vectors.T + kernel) / a[:, None]
    y = torch.where(moves, lw * left_over / b.sqrt(), torch.full_like(mu, lf))
    u_scale = torch.where(mu > 0, y * a / (mu * left_over).clamp(min=1e-300), 0.0)
    return direction, mu, y, u_scale, moves, reach


def _alone(problem: ForgetProblem, own: Tensor, i: int) -> ForgetProblem:
    """Class i's problem by itself."""
    retained = problem.retain_hidden
    if own[i] >= 0:
        retained = torch.cat([retained[: own[i]], retained[own[i] + 1 :]])
    return replace(
        problem,
        forget_hidden=problem.forget_hidden[i : i + 1],
        retain_hidden=retained,
        target=problem.target[i : i + 1],
    )


def _one_by_one(problem: ForgetProblem, own: Tensor) -> EachSolution:
    """The cases in which the shared factorisation saves nothing or a weight is zero."""
    w, d = problem.projection.shape
    count = len(problem.forget_hidden)
    left, right = torch.zeros(count, w).double(), torch.zeros(count, d).double()
    rows = []
    started = time.perf_counter()
    for i in range(count):
        alone = _alone(problem, own, i)
        solution = solve_exact(alone)
        if solution.left.shape[1]:
            left[i], right[i] = solution.left[:, 0], solution.right[0]
        proof = solution.certificate
        reach = thresholds(alone).reach
        rows.append((solution.mu, reach, proof.primal, proof.bound, proof.gap))
    columns = torch.tensor(rows, dtype=torch.float64).reshape(count, 5).T
    return EachSolution(left, right, *columns, time.perf_counter() - started, 0.0, count)
