"""Proofs of optimality: a lower bound of the objective that holds whatever computed it.

Nothing here is shared with the solvers. A certificate takes the answer and its multipliers, works
on `H_f`, `H_r`, `W` and `P` alone in float64, and takes off the bound what rounding may have added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from forgetting.problem import ForgetProblem

# Without a weight term the objective says nothing about changes that no text sees, and a bound
# needs V = 0 exactly. In floating point it holds for all changes up to this many times the norm of
# the answer (or of the least change that reaches P, if that is larger) instead, and, the objective
# being convex, loses in proportion to the distance beyond.
FREE_RADIUS = 2.0
# What an evaluation in float64 may be off by, as a fraction of the lengths that enter. The most
# that was seen, against extended precision, is 2.3e-16 in 3,000 problems of all scales and 2e-17 on
# CLIP's features.
ROUNDING = 2e-15
POOR = 1e-6  # a gap or residual above this is no answer to rely on
BATCH = 256  # classes at a time; the memory is m x BATCH


@dataclass(frozen=True)
class Certificate:
    """What was reached, and what no change can go below.

    Attributes:
        primal: the objective at the answer.
        bound: a lower bound of the objective over all changes `Delta` with norm at most `radius`.
            What the evaluations of `bound` and `primal` may have rounded off is taken off it.
        gap: `(primal - bound) / primal`: no change is better than `primal (1 - gap)`. 0 if `primal`
            is 0, and 1 where nothing is proved: rounding as large as the objective, or NaN.
        rounding: the part of `primal - bound` that is rounding.
        radius: infinite unless the weight term is off.
    """

    primal: float
    bound: float
    gap: float
    rounding: float = 0.0
    radius: float = math.inf

    @classmethod
    def of(
        cls, primal: float, bound: float, rounding: float, radius: float = math.inf
    ) -> Certificate:
        """The certificate of a computed bound that may be off, with `primal`, by `rounding`."""
        finite = all(map(math.isfinite, (primal, bound, rounding)))
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
    exact, norm = problem.double, torch.linalg.matrix_norm
    h_f, h_r, d = exact.forget_hidden, exact.retain_hidden, _displacement(exact)
    left, right, y = left.double(), right.double(), y.double()
    # Orthonormal columns: however long the factors of U are, their product is no longer than U.
    u_left, r = torch.linalg.qr(u_left.double())
    u_right = r @ u_right.double()
    lf, lp, lw = problem.lamb_forget, problem.lamb_preserve, problem.lw

    y_norm, u_norm = float(norm(y)), _product_norm(u_left, u_right)
    size, moved = _product_norm(left, right), _product_norm(h_r @ left, right)
    primal = lf * float(norm(d - (h_f @ left) @ right)) + lp * moved + lw * size
    # Lengths that enter the evaluation: D is made of P and H_f W, Delta and U of their factors.
    length_f, length_r = float(norm(h_f)), float(norm(h_r))
    length_d = float(norm(exact.target) + length_f * norm(exact.projection))
    length, u_length = _summed_length(left, right), _summed_length(u_left, u_right)
    rounding = ROUNDING * (lf * (length_d + length_f * length) + (lp * length_r + lw) * length)

    # V as a product of factors: (w, k + p) @ (k + p, d).
    v_left = torch.cat([h_f.T, -(h_r.T @ u_left)], dim=1)
    v_norm = _product_norm(v_left, torch.cat([y, u_right]))
    v_rounding = ROUNDING * (length_f * y_norm + length_r * u_length)
    value = float((y * d).sum())
    radius = math.inf
    if lw == 0:
        reaching = float(norm(torch.linalg.lstsq(h_f, d).solution))
        radius = FREE_RADIUS * max(size, reaching)

    def bound(value: float, v_norm: float) -> float:
        # Scaling Y, U and V together keeps their relation; shortening U alone would spoil V.
        scale = max(1.0, _ratio(y_norm, lf), _ratio(u_norm, lp))
        return value / max(scale, v_norm / lw) if lw > 0 else (value - v_norm * radius) / scale

    computed = bound(value, v_norm)
    worst = bound(value - ROUNDING * y_norm * length_d, v_norm + v_rounding)
    return Certificate.of(primal, computed, rounding + computed - worst, radius)


def _displacement(exact: ForgetProblem) -> Tensor:
    """`D = P - H_f W`, (k, d) float64: made here, so that nothing is taken over from a solver."""
    return exact.target - exact.forget_hidden @ exact.projection


def _summed_length(left: Tensor, right: Tensor) -> float:
    """The lengths that are summed up in `left @ right`: of each column times its row."""
    norm = torch.linalg.vector_norm
    return float((norm(left, dim=0) * norm(right, dim=1)).sum())


def _product_norm(left: Tensor, right: Tensor) -> float:
    """`||left @ right||` without the product, which is as large as W: `||left R^T||` of a QR."""
    if left.shape[1] == 0:
        return 0.0
    return float(torch.linalg.matrix_norm(left @ torch.linalg.qr(right.T, mode="r").R.T))


def _ratio(length: float, limit: float) -> float:
    """How far a length exceeds a limit, which may be zero."""
    return length / limit if limit > 0 else (0.0 if length == 0 else math.inf)


def certify_each(
    problem: ForgetProblem,
    excluded: Tensor,
    lamb_forget: Tensor,
    left: Tensor,
    y: Tensor,
    u_scale: Tensor,
    u_direction: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`certify` for C texts that are each forgotten alone, each by a change of rank one.

    All of class i's matrices are multiples of its unit displacement, so vectors are left:
    `Delta_i = left[i] (x) D_i`, `||Y_i|| = y[i]`, `U_i = u_scale[i] H_r^(i) u_direction[i]`, where
    `H_r^(i)` is `retain_hidden` without the rows that `excluded[i]` marks.

    Args:
        problem: `forget_hidden` (C, w), `target` (C, d); its own `lamb_forget` plays no part.
        excluded: (C, m) bool; lamb_forget: (C,); left: (C, w); y: (C,); u_scale: (C,);
            u_direction: (C, w).

    Returns:
        primal, bound and gap, (C,) float64.
    """
    exact, norm = problem.double, torch.linalg.vector_norm
    h_f, h_r, lp, lw = exact.forget_hidden, exact.retain_hidden, problem.lamb_preserve, problem.lw
    length = norm(_displacement(exact), dim=1)  # (C,)
    length_f, length_r = norm(h_f, dim=1), float(torch.linalg.matrix_norm(h_r))
    length_d = norm(exact.target, dim=1) + length_f * torch.linalg.matrix_norm(exact.projection)
    primal, bound = torch.empty_like(length), torch.empty_like(length)
    for part in torch.arange(len(h_f), device=h_f.device).split(BATCH):
        removed = excluded[part].T  # (m, B)
        image = (h_r @ left[part].T).masked_fill_(removed, 0.0)  # H_r^(i) left[i], (m, B)
        u = u_scale[part] * (h_r @ u_direction[part].T).masked_fill_(removed, 0.0)  # (m, B)
        lf, y_norm, u_norm = lamb_forget[part], y[part], norm(u, dim=0)  # (B,)
        size = norm(left[part], dim=1)
        missed = (1 - (h_f[part] * left[part]).sum(dim=1)).abs()
        primal[part] = length[part] * (lf * missed + lp * norm(image, dim=0) + lw * size)
        size = length[part] * size
        rounding = lf * (length_d[part] + length_f[part] * size) + (lp * length_r + lw) * size
        v_norm = norm(y_norm[:, None] * h_f[part] - u.T @ h_r, dim=1)
        v_norm += ROUNDING * (length_f[part] * y_norm + length_r * u_norm)
        scale = torch.stack([y_norm / lf, u_norm / lp, v_norm / lw]).amax(dim=0).clamp(min=1.0)
        value = y_norm * (length[part] - ROUNDING * length_d[part])
        bound[part] = value / scale - ROUNDING * rounding
    finite = torch.isfinite(primal) & torch.isfinite(bound)
    bound = torch.where(finite, torch.minimum(bound.clamp(min=0), primal), 0.0)
    gap = torch.where(primal > 0, (primal - bound) / primal.clamp(min=1e-300), 0.0)
    return primal, bound, torch.where(finite, gap, 1.0)


def certify_constrained(
    root: Tensor,
    mu: float,
    excluded_rows: Tensor,
    weights: Tensor,
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
        root: (q, w), a square root of the weighted Gram matrix of all that may be retained: its
            products with Delta have the digits that those of the Gram matrix lose.
        mu: the ridge.
        excluded_rows: (B, n, w), of these the rows that are not retained in a request, with the
            weight of each (B, n): `K = root^T root + mu I - excluded_rows^T weights excluded_rows`.
        h_f: (B, k, w); d: (B, k, d); left: (B, w, k); right: (B, k, d); all float64.
    """
    norm = torch.linalg.matrix_norm
    # In an orthonormal basis of right's rows, which changes no product: Y and Delta of k columns.
    y = torch.linalg.qr(right.mT, mode="r").R.mT  # (B, k, k)
    delta = left @ y  # (B, w, k)
    # One product of two matrices; root @ delta would be B products of a matrix and k columns.
    seen = delta.mT @ root.T  # (B, k, q)
    seen_excluded = excluded_rows @ delta  # (B, n, k)
    image = (
        (seen @ root).mT + mu * delta - excluded_rows.mT @ (weights[..., None] * seen_excluded)
    )  # K Delta
    of_all, of_excluded = norm(seen), norm(weights.sqrt()[..., None] * seen_excluded)  # (B,)
    primal = of_all.square() - of_excluded.square() + mu * norm(delta).square()
    error = norm(h_f.mT @ y - image)  # ||E||
    missed = norm((h_f @ left) @ right - d)

    # What rounding may have done to them, from the lengths that enter.
    y_norm, length_f, length = norm(y), norm(h_f), norm(left) * norm(y)
    length_excluded = (weights * excluded_rows.square().sum(dim=2)).sum(dim=1).sqrt()
    weight = norm(root).square() + length_excluded.square() + mu  # at least ||K||
    error = error + ROUNDING * (weight * length + length_f * y_norm)
    rounding = 2 * (of_all * norm(root) + of_excluded * length_excluded + norm(image)) * length
    rounding = rounding + primal + ROUNDING * weight * length.square()
    rounding = rounding + 2 * y_norm * (length_f * length + norm(d))
    least = mu - ROUNDING * weight  # K is a rounded sum
    loss = torch.where(least > 0, error.square() / least, torch.inf)
    bound = primal - 2 * missed * y_norm - loss
    numbers = (x.tolist() for x in (primal, bound, ROUNDING * rounding))
    return [Certificate.of(*one) for one in zip(*numbers, strict=True)]
