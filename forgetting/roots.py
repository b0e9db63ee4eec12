"""Scalar roots, many at once: bracketed, derivative-free, to the last digit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MAX_STEPS = 200  # bisection alone needs about 60 for any bracket of float64 logarithms


def find_roots(function: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """A sign change of each component of `function` between `low` and `high`.

    Args:
        function: (B,) -> (B,), componentwise; not positive at `low`, not negative at `high`.
        low, high: (B,) float64, the brackets.

    Returns:
        (B,), where the function changes sign, to the resolution of float64. A component without
        a sign change in its bracket gives the end where the function is nearer to zero.

    Source: Chandrupatla (Advances in Engineering Software 28, 1997): inverse quadratic
    interpolation where it is safe, bisection elsewhere.
    """
    a, b = high.clone(), low.clone()
    fa, fb = function(a), function(b)
    c, fc = a.clone(), fa.clone()
    t = torch.full_like(a, 0.5)
    tolerance = 4 * torch.finfo(a.dtype).eps
    for _ in range(MAX_STEPS):
        x = a + t * (b - a)
        fx = function(x)
        same = torch.sign(fx) == torch.sign(fa)
        c, fc = torch.where(same, a, b), torch.where(same, fa, fb)
        b, fb = torch.where(same, b, a), torch.where(same, fb, fa)
        a, fa = x, fx
        nearer = fa.abs() < fb.abs()
        best = torch.where(nearer, a, b)
        width = (b - a).abs()
        limit = tolerance * best.abs().clamp(min=1e-3) / width
        if bool(((limit > 0.5) | (torch.where(nearer, fa, fb) == 0) | (width == 0)).all()):
            break
        xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
        smooth = (phi**2 < xi) & ((1 - phi) ** 2 < 1 - xi)
        quadratic = fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (
            fc - fb
        )
        t = torch.where(smooth & torch.isfinite(quadratic), quadratic, torch.full_like(t, 0.5))
        limit = limit.clamp(max=0.5)
        t = t.clamp(min=limit, max=1 - limit)
    return torch.where(fa.abs() < fb.abs(), a, b)
