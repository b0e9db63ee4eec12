"""Proof of optimality: a lower bound of the objective that holds whatever made it.

Nothing here is shared with the solvers: a certificate takes the answer and two multipliers, and
works on `H_f`, `H_r`, `W` and `P` alone, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from forgetting.problem import ForgetProblem, pad_rows

# Without a weight term the objective says nothing about changes that no text sees, and a bound
# needs V = 0 exactly. In floating point it holds for all changes up to this many times the norm of
# the answer (or of the least change that lands, if that is larger) instead, and, the objective
# being convex, loses in proportion to the distance beyond.
FREE_RADIUS = 2.0
# What evaluating the objective in float64 may be off by, as a fraction of the lengths that enter.
# The most that was seen, against extended precision, is 2.3e-16 in 3,000 problems of all scales and
# 2e-17 on CLIP's features.
ROUNDING = 2e-15
POOR = 1e-6  # a gap or residual above this is no answer to rely on
BATCH = 256  # classes at a time; the memory is m x BATCH


@dataclass(frozen=True)
class Certificate:
    """What was reached and what nobody can go below.

    Attributes:
        primal: the objective at the answer.
        bound: a lower bound of the objective over all changes `Delta` with norm at most `radius`.
            What its own evaluation, and that of `primal`, may have rounded off is taken off it.
        gap: `(primal - bound) / primal`: no change is better than `primal (1 - gap)`. 0 if `primal`
            is 0, and 1 where nothing is proved: rounding as large as the objective, NaN.
        rounding: that part of the distance which is rounding.
        radius: infinite unless the weight term is off.
    """

    primal: float
    bound: float
    gap: float
    rounding: float = 0.0
    radius: float = math.inf

    @property
    def proved(self) -> bool:
        """Whether anything is proved."""
        return self.gap < 1

    @classmethod
    def of(
        cls, primal: float, bound: float, rounding: float, radius: float = math.inf
    ) -> Certificate:
        """The certificate of a computed bound that may be off, with `primal`, by `rounding`."""
        finite = all(map(math.isfinite, (primal, bound, rounding)))  # NaN compares as false
        if not finite or radius == 0:
            return cls(primal, 0.0, 1.0, rounding, radius)
        bound = min(max(bound - rounding, 0.0), primal)  # 0 is a bound: all terms are norms
        gap = (primal - bound) / primal if primal > 0 else 0.0
        return cls(primal, bound, gap, rounding, radius)


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
    # Orthonormal columns: however long the factors of U are, their product is no longer than U.
    u_left, r = torch.linalg.qr(u_left.double())
    u_right = r @ u_right.double()
    lf, lp, lw = problem.lamb_forget, problem.lamb_preserve, problem.lw
    norm = torch.linalg.matrix_norm
    size, y_norm, u_norm = float(_norm(left, right)), float(norm(y)), float(_norm(u_left, u_right))
    primal = float(lf * norm(d - (h_f @ left) @ right) + lp * _norm(h_r @ left, right) + lw * size)
    # What enters the evaluation: D was made of P and H_f W, Delta and U of their factors.
    length_f, length_r = float(norm(h_f)), float(norm(h_r))
    made = float(norm(problem.double.target) + length_f * norm(problem.double.projection))
    spread, u_spread = _spread(left, right), _spread(u_left, u_right)
    rounding = ROUNDING * (lf * (made + length_f * spread) + lp * length_r * spread + lw * spread)
    # V as a product of factors: (w, k + p) @ (k + p, d).
    v_left = torch.cat([h_f.T, -(h_r.T @ u_left)], dim=1)
    v_norm, value = float(_norm(v_left, torch.cat([y, u_right]))), float((y * d).sum())
    radius = math.inf
    if lw == 0:
        landing = float(norm(torch.linalg.lstsq(h_f, d).solution)) if h_f.shape[1] else 0.0
        radius = FREE_RADIUS * max(size, landing)

    def bound(value: float, v_norm: float) -> float:
        # Scaling Y, U and V together keeps their relation; shortening U alone would spoil V.
        scale = max(1.0, _ratio(y_norm, lf), _ratio(u_norm, lp))
        return value / max(scale, v_norm / lw) if lw > 0 else (value - v_norm * radius) / scale

    found = bound(value, v_norm)
    worst = bound(
        value - ROUNDING * y_norm * made,
        v_norm + ROUNDING * (length_f * y_norm + length_r * u_spread),
    )
    return Certificate.of(primal, found, rounding + found - worst, radius)


def _spread(left: Tensor, right: Tensor) -> float:
    """The lengths that are summed up in `left @ right`: of each column times its row."""
    return float((left.norm(dim=0) * right.norm(dim=1)).sum())


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
    triangle: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`certify` for C texts that are each forgotten alone, each by a change of rank one.

    All of class i's matrices are multiples of its unit displacement, so vectors are left:
    `Delta_i = left[i] (x) D_i`, `Y_i = y[i]`, `U_i = u_scale[i] H_r^(i) u_direction[i]`, where
    `H_r^(i)` is `retain_hidden` without the rows that `leaving[i]` marks.

    Args:
        problem: `forget_hidden` (C, w), `target` (C, d); its own `lamb_forget` plays no part.
        leaving: (C, m) bool; lamb_forget: (C,); left: (C, w); y: (C,); u_scale: (C,);
            u_direction: (C, w).
        triangle: (w, w), R of a QR factorisation of `retain_hidden`; then the cost does not depend
            on m, and what leaves is taken off the squares.

    Returns:
        primal, bound and gap, (C,) float64.
    """
    rows = problem.retain_hidden
    if triangle is not None:  # stands for them, so that they are not made float64
        problem = problem.part(slice(None), torch.zeros(len(rows), dtype=torch.bool))
    h_f = problem.double.forget_hidden
    h_r = problem.double.retain_hidden if triangle is None else triangle
    lp, lw = problem.lamb_preserve, problem.lw
    norm = torch.linalg.vector_norm
    length = norm(_distance(problem), dim=1)  # (C,)
    primal, bound = torch.empty_like(length), torch.empty_like(length)
    length_f, length_r = norm(h_f, dim=1), float(torch.linalg.matrix_norm(h_r))
    made = norm(problem.double.target, dim=1)
    made = made + length_f * float(torch.linalg.matrix_norm(problem.double.projection))
    for start in range(0, len(h_f), BATCH):
        part = slice(start, start + BATCH)
        lf = lamb_forget[part]  # (B,)
        seen = _seen(rows, h_r, leaving[part], triangle is not None)
        moved, _, blurred = seen(left[part])
        landed = (h_f[part] * left[part]).sum(dim=1)
        primal[part] = length[part] * (
            lf * (1 - landed).abs() + lp * moved + lw * norm(left[part], dim=1)
        )
        u_norm, back, u_blurred = seen(u_direction[part])
        u_norm, u_blurred = u_scale[part] * u_norm, u_scale[part] * u_blurred
        v_norm = norm(y[part, None] * h_f[part] - u_scale[part, None] * back, dim=1)  # (B,)
        v_rounded = v_norm + ROUNDING * (length_f[part] * y[part] + length_r * (u_norm + u_blurred))
        u_norm = u_norm + ROUNDING * u_blurred
        shorter = torch.stack([y[part] / lf, u_norm / lp, v_rounded / lw]).amax(dim=0)
        value = y[part] * (length[part] - ROUNDING * made[part])
        size = length[part] * norm(left[part], dim=1)
        rounding = ROUNDING * (
            lf * (made[part] + length_f[part] * size)
            + (lp * length_r + lw) * size
            + lp * length[part] * blurred
        )
        bound[part] = value / shorter.clamp(min=1.0) - rounding
    known = torch.isfinite(primal) & torch.isfinite(bound)
    bound = torch.where(known, torch.minimum(bound.clamp(min=0), primal), 0.0)
    gap = torch.where(primal > 0, (primal - bound) / primal.clamp(min=1e-300), 0.0)
    return primal, bound, torch.where(known, gap, 1.0)


def _seen(
    retain_hidden: Tensor, h_r: Tensor, leaving: Tensor, downdated: bool
) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """For vectors v (B, w), with H the retained rows that stay: `||H v||` (B,), `H^T H v` (B, w),
    and the length (B,) in units of which the first is rounded beyond its own."""
    norm = torch.linalg.vector_norm
    if not downdated:
        gone = leaving.T  # (m, B)

        def masked(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            image = (h_r @ v.T).masked_fill_(gone, 0.0)  # (m, B)
            return norm(image, dim=0), image.T @ h_r, v.new_zeros(len(v))

        return masked
    rows, _ = pad_rows(leaving, retain_hidden)
    rows = rows.double()  # (B, n, w)

    def taken_off(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, less = h_r @ v.T, (rows @ v[..., None])[..., 0]  # (q, B), (B, n)
        whole = image.square().sum(dim=0)
        rest = (whole - less.square().sum(dim=1)).clamp(min=0).sqrt()
        back = image.T @ h_r - (less[:, None] @ rows)[:, 0]
        return rest, back, whole / rest.clamp(min=1e-300)

    return taken_off


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
    for any Y. Y is taken as `right`. With `E = H_f^T Y - K Delta` and `K >= mu I` the second term
    is at most `tr Delta^T K Delta + 2 <Delta, E> + ||E||^2 / mu`, so that the answer costs at most

        2 <H_f Delta - D, Y> + ||E||^2 / mu

    more than the bound: how far it misses its targets, and, squared, how far it is from stationary.

    Args:
        gram: (w, w), the statistics of everything; leaving: (B, n, w), what left it in a request,
            each with its weight in `shares` (B, n): `K = gram + mu I - leaving^T shares leaving`.
        h_f: (B, k, w); d: (B, k, d); left: (B, w, k); right: (B, k, d); all float64.
    """
    norm = torch.linalg.matrix_norm
    # One product of two matrices; gram @ left would be B products of a matrix and k columns.
    image = (left.mT @ gram.T).mT + mu * left  # (B, w, k)
    image = image - leaving.mT @ (shares[..., None] * (leaving @ left))  # K left
    square = right @ right.mT  # (B, k, k)
    rest = h_f.mT - image  # E = rest @ right
    landed = h_f @ left  # (B, k, k)
    # tr Delta^T K Delta = <H_f Delta, Y> - <Delta, E>
    primal = ((landed - rest.mT @ left) * square).sum(dim=(1, 2))
    y, length = norm(right), norm(left)
    heavy = norm(gram) + mu + (shares * leaving.square().sum(dim=2)).sum(dim=1)  # (B,)
    # A Delta that misses its targets is no answer to the constrained problem, however small.
    missed = norm(landed @ right - d)
    # ||rest right||, by a triangle of k numbers in the place of w x d.
    error = norm(rest @ torch.linalg.qr(right.mT, mode="r").R.mT)
    rounding = 2 * ROUNDING * y * (norm(h_f) * length * y + norm(d))
    error = error + ROUNDING * y * (heavy * length + norm(h_f))
    bound = primal - 2 * missed * y - error.square() / mu
    return [
        Certificate.of(*numbers)
        for numbers in zip(*(x.tolist() for x in (primal, bound, rounding)), strict=True)
    ]


def _distance(problem: ForgetProblem) -> Tensor:
    """`D = P - H_f W`, (k, d) float64: made here, so that nothing is taken over from a solver."""
    exact = problem.double
    return exact.target - exact.forget_hidden @ exact.projection
