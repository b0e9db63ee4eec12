"""Proof of optimality: a lower bound of the objective that holds whatever made it.

Nothing here is shared with the solvers: a certificate takes the answer and two multipliers, and
works on `H_f`, `H_r`, `W` and `P` alone, in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from forgetting.problem import ForgetProblem

# Without a weight term the objective says nothing about changes that no text sees, and a bound
# needs V = 0 exactly. In floating point it holds for all changes up to this many times the norm of
# the answer instead, and, the objective being convex, loses in proportion to the distance beyond.
FREE_RADIUS = 2.0
# What the objective's own evaluation rounds off, as a fraction of the lengths that enter it: no
# difference below that says anything. On CLIP's features it is 1e-14 of the objective itself; it
# shows only where nearly everything moves for free and the optimum is nearly zero.
ROUNDING = 1e-14


@dataclass(frozen=True)
class Certificate:
    """What was reached and what nobody can go below.

    Attributes:
        primal: the objective at the answer.
        bound: a lower bound of the objective over all changes `Delta` with norm at most `radius`.
        gap: `max(0, primal - bound - rounding) / primal`, 0 if `primal` is 0.
        radius: infinite unless the weight term is off.
    """

    primal: float
    bound: float
    gap: float
    radius: float = float("inf")


def certify(
    problem: ForgetProblem,
    left: Tensor,
    right: Tensor,
    y: Tensor,
    u_left: Tensor,
    u_right: Tensor,
) -> Certificate:
    """Certify `Delta = left @ right` by the multipliers `Y` and `U = u_left @ u_right`.

    For any `Y` (k, d) and `U` (m, d) put `V = H_f^T Y - H_r^T U`. For every `Delta`

        <Y, D> = <Y, D - H_f Delta> + <U, H_r Delta> + <V, Delta>
              <= ||Y|| ||D - H_f Delta|| + ||U|| ||H_r Delta|| + ||V|| ||Delta||,

    and dividing by `max(1, ||Y|| / lf, ||U|| / lp, ||V|| / lw)` makes the right side at most the
    objective.

    Args:
        problem: any dtype; `retain_hidden` may be replaced by a square root of `H_r^T H_r`.
        left: (w, r), right: (r, d).
        y: (k, d), u_left: (m, p), u_right: (p, d); multipliers that are too long cost a gap.
    """
    h_f, h_r, d = problem.double.forget_hidden, problem.double.retain_hidden, _distance(problem)
    left, right, y = left.double(), right.double(), y.double()
    lf, lp, lw = problem.lamb_forget, problem.lamb_preserve, problem.lw
    size = _norm(left, right)
    primal = float(
        lf * torch.linalg.matrix_norm(d - (h_f @ left) @ right)
        + lp * _norm(h_r @ left, right)
        + lw * size
    )
    # V as a product of factors: (w, k + p) @ (k + p, d).
    v_left = torch.cat([h_f.T, -(h_r.T @ u_left.double())], dim=1)
    v_norm = float(_norm(v_left, torch.cat([y, u_right.double()])))
    value = float((y * d).sum())
    # Scaling Y, U and V together keeps their relation; shortening U alone would spoil a small V.
    scale = max(
        1.0,
        _ratio(float(torch.linalg.matrix_norm(y)), lf),
        _ratio(float(_norm(u_left.double(), u_right.double())), lp),
    )
    radius = float("inf")
    if lw > 0:
        bound = value / max(scale, v_norm / lw)
    else:
        radius = FREE_RADIUS * float(size)
        bound = (value - v_norm * radius) / scale
    # 0 is a bound as well: all terms are norms.
    bound = max(bound, 0.0) if bound == bound else bound
    norm = torch.linalg.matrix_norm
    lengths = lf * (norm(d) + norm(h_f) * size) + lp * norm(h_r) * size
    rounding = ROUNDING * float(lengths)
    gap = max(0.0, primal - bound - rounding) / primal if primal > 0 else 0.0
    if not (math.isfinite(primal) and math.isfinite(bound)):  # NaN compares as false: no proof
        bound, gap = 0.0, 1.0
    return Certificate(primal, bound, gap, radius)


def _ratio(length: float, weight: float) -> float:
    """length / weight; a multiplier of a term that is off has to vanish."""
    if weight > 0:
        return length / weight
    return 0.0 if length == 0 else float("inf")


def _norm(left: Tensor, right: Tensor) -> Tensor:
    """|| left @ right ||_F without the product: triangular factors have the same norm."""
    if left.shape[1] == 0:
        return left.new_zeros(())
    r_left = torch.linalg.qr(left, mode="r").R
    r_right = torch.linalg.qr(right.T, mode="r").R
    return torch.linalg.matrix_norm(r_left @ r_right.T)


def certify_each(
    problem: ForgetProblem,
    leaving: Tensor,
    lamb_forget: Tensor,
    left: Tensor,
    y: Tensor,
    u_scale: Tensor,
    u_direction: Tensor,
    batch: int = 256,
) -> tuple[Tensor, Tensor, Tensor]:
    """`certify` for C texts that are each forgotten alone, each by a change of rank one.

    All of class i's matrices are multiples of its unit displacement, so vectors are left:
    `Delta_i = left[i] (x) D_i`, `Y_i = y[i]`, `U_i = u_scale[i] H_r^(i) u_direction[i]`, where
    `H_r^(i)` is `retain_hidden` without the rows that `leaving[i]` marks.

    Args:
        problem: `forget_hidden` (C, w), `target` (C, d); its own `lamb_forget` plays no part.
        leaving: (C, m) bool; lamb_forget: (C,); left: (C, w); y: (C,); u_scale: (C,);
            u_direction: (C, w).
        batch: classes at a time; the memory is m x batch.

    Returns:
        primal, bound and gap, (C,) float64.
    """
    h_f, h_r = problem.double.forget_hidden, problem.double.retain_hidden
    lp, lw = problem.lamb_preserve, problem.lw
    norm = torch.linalg.vector_norm
    length = norm(_distance(problem), dim=1)  # (C,)
    primal, bound = torch.empty_like(length), torch.empty_like(length)
    for start in range(0, len(h_f), batch):
        part = slice(start, start + batch)
        lf, gone = lamb_forget[part], leaving[part].T  # (B,), (m, B)
        moved = norm((h_r @ left[part].T).masked_fill_(gone, 0.0), dim=0)
        landed = (h_f[part] * left[part]).sum(dim=1)
        primal[part] = length[part] * (
            lf * (1 - landed).abs() + lp * moved + lw * norm(left[part], dim=1)
        )
        u = (h_r @ u_direction[part].T).masked_fill_(gone, 0.0) * u_scale[part]  # (m, B)
        v = y[part, None] * h_f[part] - u.T @ h_r  # (B, w); rows that left are zero in u
        scale = torch.stack([y[part] / lf, norm(u, dim=0) / lp, norm(v, dim=1) / lw])
        bound[part] = length[part] * y[part] / scale.amax(dim=0).clamp(min=1.0)
    gap = torch.where(primal > 0, (primal - bound).clamp(min=0) / primal.clamp(min=1e-300), 0.0)
    return primal, bound, torch.where(torch.isfinite(gap), gap, 1.0)


def certify_constrained(
    gram: Tensor,
    mu: float,
    leaving: Tensor,
    shares: Tensor,
    h_f: Tensor,
    d: Tensor,
    left: Tensor,
    right: Tensor,
) -> list[Certificate]:
    """Prove B constrained answers `Delta = left @ right` optimal without inverting anything.

    With `K` what is retained in a request, the problem is to minimise `tr Delta^T K Delta` subject
    to `H_f Delta = D`. Weak duality: `2 <Y, D> - tr (H_f^T Y)^T K^-1 (H_f^T Y)` is a lower bound
    for any Y. With `E = H_f^T Y - K Delta` and `K >= mu I` the second term is at most
    `tr Delta^T K Delta + 2 <Delta, E> + ||E||^2 / mu`. Y is taken as `right`, so that
    `E = (H_f^T - K left) right` and all terms come from k x k matrices.

    Args:
        gram: (w, w), the statistics of everything; leaving: (B, n, w), what left it in a request,
            each with its weight in `shares` (B, n): `K = gram + mu I - leaving^T shares leaving`.
        h_f: (B, k, w); d: (B, k, d); left: (B, w, k); right: (B, k, d); all float64.
    """
    image = gram @ left + mu * left  # (w, w) @ (B, w, k) -> (B, w, k)
    image = image - leaving.mT @ (shares[..., None] * (leaving @ left))  # K left
    square = right @ right.mT  # (B, k, k)
    rest = h_f.mT - image  # E = rest @ right
    missed = torch.linalg.matrix_norm((h_f @ left) @ right - d)  # (B,)
    slack = 2 * missed * torch.linalg.matrix_norm(right)

    def trace(a: Tensor, b: Tensor) -> Tensor:
        """`tr (a right)^T (b right)`, (B,)."""
        return ((a.mT @ b) * square).sum(dim=(1, 2))

    primal = trace(left, image)
    bound = 2 * (right * d).sum(dim=(1, 2)) - primal - 2 * trace(left, rest)
    bound = bound - trace(rest, rest) / mu
    found = []
    for p, b, m, s in zip(*(x.tolist() for x in (primal, bound, missed, slack)), strict=True):
        if not all(map(math.isfinite, (p, b, m))):  # NaN compares as false: no proof
            found.append(Certificate(p, 0.0, 1.0))
            continue
        # A Delta that misses its targets is no answer to the constrained problem, however small.
        found.append(Certificate(p, b, max(0.0, p + s - b) / p if p > 0 else float(m > 0)))
    return found


def _distance(problem: ForgetProblem) -> Tensor:
    """`D = P - H_f W`, (k, d) float64: made here, so that nothing is taken over from a solver."""
    exact = problem.double
    return exact.target - exact.forget_hidden @ exact.projection
