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


@dataclass(frozen=True)
class Certificate:
    """What was reached, and what no change can go below."""

    primal: float  # the objective at the answer
    # A lower bound of the objective over all changes `Delta` with norm at most `radius`. What the
    # evaluations of `bound` and `primal` may have rounded off is taken off it.
    bound: float
    # `(primal - bound) / primal`: no change is better than `primal (1 - gap)`. 0 if `primal` is 0,
    # and 1 where nothing is proved: rounding as large as the objective, or NaN.
    gap: float
    rounding: float = 0.0  # the part of `primal - bound` that is rounding
    radius: float = math.inf  # finite where the weight term is off

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
    rows: Tensor,
    excluded: Tensor,
    lamb_forget: Tensor,
    left: Tensor,
    right: Tensor,
    y: Tensor,
    u_left: Tensor,
    u_right: Tensor,
) -> list[Certificate]:
    """Certify B answers `Delta = left @ right` by multipliers `Y` and `U = H_r u_left u_right`.

    For any `Y` (k, d) and `U` (m, d) put `V = H_f^T Y - H_r^T U`. For every `Delta`

        <Y, D> = <Y, D - H_f Delta> + <U, H_r Delta> + <V, Delta>
              <= ||Y|| ||D - H_f Delta|| + ||U|| ||H_r Delta|| + ||V|| ||Delta||,

    and division by `max(1, ||Y|| / lf, ||U|| / lp, ||V|| / lw)` makes that at most the objective.

    Args:
        problem: of B * k texts, k for each answer, in any dtype; its own `retain_hidden` and
            `lamb_forget` play no part.
        rows: (m, w), what is retained, or a square root of `H_r^T H_r`; excluded: (B, m) bool, the
            rows that are not retained; lamb_forget: (B,).
        left: (B, w, r); right: (B, r, d); y: (B, k, d); u_left: (B, w, p); u_right: (B, p, d);
            multipliers that are too long cost a gap.
    """
    exact, norm, batch = problem.double, torch.linalg.matrix_norm, (len(left), -1)
    h_f, h_r = exact.forget_hidden.unflatten(0, batch), rows.double()  # (B, k, w), (m, w)
    target, projection = exact.target.unflatten(0, batch), exact.projection
    d = target - h_f @ projection  # made here: nothing is taken over from a solver
    lf, lp, lw = lamb_forget, problem.lamb_preserve, problem.lw

    def seen(columns: Tensor) -> Tensor:
        """`H_r` times columns (B, w, p), (B, m, p)."""
        return (columns.mT @ h_r.T).masked_fill(excluded[:, None], 0.0).mT

    # Orthonormal columns: however long the factors of U are, their product is no longer than U.
    u_left, triangle = torch.linalg.qr(seen(u_left))  # (B, m, p)
    u_right = triangle @ u_right
    y_norm, u_norm = norm(y), norm(u_right)  # (B,)
    size, moved = _product_norm(left, right), _product_norm(seen(left), right)
    primal = lf * norm(d - (h_f @ left) @ right) + lp * moved + lw * size
    # Lengths that enter the evaluation: D is made of P and H_f W, Delta and U of their factors.
    length_f, length_r = norm(h_f), norm(h_r)
    length_d = norm(target) + length_f * norm(projection)
    length, u_length = _summed_length(left, right), _summed_length(u_left, u_right)
    rounding = ROUNDING * (lf * (length_d + length_f * length) + (lp * length_r + lw) * length)

    # V as a product of factors: (w, k + p) @ (k + p, d).
    pulled = (u_left.mT @ h_r).mT  # U has no rows of what is excluded
    v_norm = _product_norm(torch.cat([h_f.mT, -pulled], 2), torch.cat([y, u_right], 1))
    v_rounding = ROUNDING * (length_f * y_norm + length_r * u_length)
    value, radius = (y * d).sum(dim=(1, 2)), torch.full_like(size, math.inf)
    if lw == 0:
        radius = FREE_RADIUS * torch.maximum(size, norm(torch.linalg.lstsq(h_f, d).solution))

    def bound(value: Tensor, v_norm: Tensor) -> Tensor:
        # Scaling Y, U and V together keeps their relation; shortening U alone would spoil V.
        ratios = torch.stack([y_norm / lf, u_norm / torch.full_like(lf, lp)])  # 0 / 0: nothing
        scale = ratios.nan_to_num(0.0, math.inf).amax(dim=0).clamp(min=1.0)
        if lw == 0:
            return (value - v_norm * radius) / scale
        return value / torch.maximum(scale, v_norm / lw)

    computed = bound(value, v_norm)
    lowest = bound(value - ROUNDING * y_norm * length_d, v_norm + v_rounding)
    numbers = primal, computed, rounding + computed - lowest, radius
    return [Certificate.of(*one) for one in zip(*(x.tolist() for x in numbers), strict=True)]


def _summed_length(left: Tensor, right: Tensor) -> Tensor:
    """The lengths (B,) that are summed up in `left @ right`: of each column times its row."""
    norm = torch.linalg.vector_norm
    return (norm(left, dim=1) * norm(right, dim=2)).sum(dim=1)


def _product_norm(left: Tensor, right: Tensor) -> Tensor:
    """`||left @ right||` without the product, which is as large as W: `||left R^T||` of a QR."""
    return torch.linalg.matrix_norm(left @ torch.linalg.qr(right.mT, mode="r").R.mT)


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
    pulled = excluded_rows.mT @ (weights[..., None] * seen_excluded)
    image = (seen @ root).mT + mu * delta - pulled  # K Delta
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
