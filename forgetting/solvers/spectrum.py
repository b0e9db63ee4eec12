"""The retained texts, factorised once, and the scalar roots in which every exact solution ends."""

from collections.abc import Callable

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
CHUNK = 4096  # rows of a factorisation that are taken at one time
MAX_STEPS = 200  # bisection alone needs about 60 for any bracket of float64 logarithms


def triangle(rows: Tensor) -> Tensor:
    """R (q, w) float64, q <= w, of a QR factorisation of `rows` (m, w): `R^T R = H^T H`.

    For every norm and product that a solver or a proof takes, R stands for the rows, to the last
    digits; their Gram matrix loses half of them. Computed a chunk at a time (Demmel and others,
    2012, "tall-skinny QR").
    """
    r = rows[:0].double()
    for chunk in rows.split(CHUNK):
        r = torch.linalg.qr(torch.cat([r, chunk.double()]), mode="r").R
    return r


class Spectrum:
    """Singular values and right singular vectors of retained hidden states (m, w)."""

    def __init__(self, rows: Tensor) -> None:
        # float64, `H_r` itself, or its `triangle` if that is smaller
        self.rows = triangle(rows) if len(rows) > rows.shape[1] else rows.double()
        _, values, vectors = torch.linalg.svd(self.rows, full_matrices=False)
        self.noise = EPS * max(rows.shape)  # of the length of a row in the span, what is rounding
        keep = values > self.noise * values[:1].sum()
        self.values, self.vectors = values[keep], vectors[keep].T  # (q,), (w, q)

    def outside(self, rows: Tensor) -> Tensor:
        """The parts of rows (..., w) outside the span; rounding counts as none."""
        kernel = rows - (rows @ self.vectors) @ self.vectors.T
        kernel = kernel - (kernel @ self.vectors) @ self.vectors.T  # twice is enough
        lengths = torch.linalg.vector_norm(rows, dim=-1).amax(dim=-1, keepdim=True)
        inside = torch.linalg.vector_norm(kernel, dim=-1) <= 8 * self.noise * lengths
        return kernel.masked_fill(inside[..., None], 0.0)


def find_roots(function: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Where each component of `function` (B,) changes sign between `low` and `high`, (B,) float64,
    to their resolution. It is not positive at `low` and not negative at `high`; a component without
    a sign change gives the end where it is nearer to zero.

    Source: Chandrupatla (Advances in Engineering Software 28, 1997): inverse quadratic
    interpolation where it is safe, bisection elsewhere.
    """
    a, b = high.clone(), low.clone()
    fa, fb = function(a), function(b)
    c, fc = a.clone(), fa.clone()
    t = torch.full_like(a, 0.5)
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
        limit = 4 * EPS * best.abs().clamp(min=1e-3) / width
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
