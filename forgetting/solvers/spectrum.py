"""The retained texts, factorised once, and problems in the coordinates that this gives.

`Spectrum` is what the retained texts are to a solver, `Reduced` a problem in which only k x k
matrices are left, `find_roots` finds the scalar roots in which every exact solution ends.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from forgetting.errors import ProblemError
from forgetting.io import matrix
from forgetting.problem import ForgetProblem

EPS = torch.finfo(torch.float64).eps
TALL = 2  # times as many rows as columns: from there on their triangle is cheaper than they are
CHUNK = 4096  # rows of a factorisation that are taken at one time
MAX_STEPS = 200  # bisection alone needs about 60 for any bracket of float64 logarithms
DEPENDENT = 1e-10  # forgotten rows whose singular value is below this fraction count as dependent


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
    """Singular values and right singular vectors of the retained hidden states.

    Attributes:
        values: (q,) positive singular values `sigma`; vectors: (w, q).
        rows: (m, w), `H_r` itself, or (w, w) its `triangle` where m is much larger: what `U` and a
            certificate refer to.
        noise: what rounding leaves of a row inside the span, as a fraction of its length.
    """

    def __init__(self, rows: Tensor, precise: bool = False) -> None:
        """Factorise `rows` (m, w): through `G` in milliseconds, or `precise` through an SVD.

        The eigenvalues of G lose half the digits of small singular values, which matters only
        near the kernel branch.
        """
        rows = matrix("retained texts", rows)
        m, w = rows.shape
        if w == 0:
            raise ProblemError("hidden states have at least one dimension")
        self.rows = rows = triangle(rows) if m > TALL * w else rows.double()
        if m == 0:
            self.values, self.vectors = rows.new_zeros(0), rows.new_zeros(w, 0)
            self.noise = EPS * w
            return
        if precise or m < w:
            _, values, vectors_t = torch.linalg.svd(rows, full_matrices=False)
            vectors, floor = vectors_t.T, EPS * max(m, w)
        else:
            values, vectors = torch.linalg.eigh(rows.T @ rows)
            values, floor = values.clamp(min=0).sqrt(), (EPS * w) ** 0.5
        keep = values > floor * values.amax()
        self.values, self.vectors = values[keep], vectors[:, keep]
        # Of a row inside the span the vectors leave this fraction, however they were made.
        self.noise = EPS * max(m, w)


class Reduced:
    """A problem in coordinates in which only p x p matrices are left, p the rank of `H_f`.

    The rows of `H_f` and D are rotated together, so that dependent rows vanish; what of D no change
    can reach is kept as one squared length, `unreachable_sq`.
    """

    def __init__(self, problem: ForgetProblem, spectrum: Spectrum) -> None:
        self.lp, self.lw = problem.lamb_preserve, problem.lw
        h_f, d = problem.double.forget_hidden, problem.double.displacement  # (k, w), (k, d)
        self.spectrum = spectrum
        self.e = spectrum.values.square()  # (q,) eigenvalues of G
        u, s, vh = torch.linalg.svd(h_f, full_matrices=False)
        keep = s > DEPENDENT * s.max()
        self.rotation = u[:, keep]  # (k, p)
        self.rows = s[keep, None] * vh[keep]  # (p, w)
        self.d = self.rotation.T @ d  # (p, d)
        self.unreachable = d - self.rotation @ self.d  # (k, d)
        self.unreachable -= self.rotation @ (self.rotation.T @ self.unreachable)  # to rounding
        self.length = float(torch.linalg.matrix_norm(d))
        if float(torch.linalg.matrix_norm(self.unreachable)) <= 1e-13 * self.length:
            self.unreachable = torch.zeros_like(d)
        self.unreachable_sq = float(self.unreachable.square().sum())
        self.c = self.d @ self.d.T  # (p, p)
        self.inside = self.rows @ spectrum.vectors  # (p, q)
        kernel = self.rows - self.inside @ spectrum.vectors.T  # (p, w)
        kernel = kernel - (kernel @ spectrum.vectors) @ spectrum.vectors.T  # twice is enough
        # What rounding leaves of a row inside the span is no kernel part.
        noise = torch.linalg.vector_norm(kernel, dim=1) <= 8 * spectrum.noise * s.max()
        self.kernel = torch.where(noise[:, None], 0.0, kernel)

    def shrink(self, mu: float) -> Tensor:
        """`mu / (e + mu)`, (q,): what `(I + G / mu)^-1` does to each eigenvector of G."""
        return mu / (self.e + mu) if mu > 0 else torch.zeros_like(self.e)

    def a(self, mu: float) -> Tensor:
        """A(mu), (p, p)."""
        return (self.inside * self.shrink(mu)) @ self.inside.T + self.kernel @ self.kernel.T

    def slope(self, mu: float, z: Tensor) -> float:
        """Sign and relative size of F2's slope in mu where `Delta = (I + G / mu)^-1 H_f^T z`.

        At the best r for mu the slope has the sign of

            lp^2 ||Delta||^2 - lw^2 ||H_r Delta||^2 / mu^2,

        a difference without the large common terms of F2's own derivative.

        Args:
            z: (p, d).
        """
        inside = self.inside.T @ z  # (q, d)
        square = inside.square().sum(dim=1)  # (q,)
        size = (square * self.shrink(mu).square()).sum() + (self.kernel.T @ z).square().sum()
        moved = (square * self.e / (self.e + mu).square()).sum()
        rise, fall = float(self.lp**2 * size), float(self.lw**2 * moved)
        return (rise - fall) / (rise + fall) if rise + fall > 0 else 0.0

    def r_free_cost(self, mu: float) -> float:
        """`lp^2 mu + lw^2`, the part of F2's first factor that r leaves alone."""
        return self.lp**2 * mu + self.lw**2

    def multiplier(self, z: Tensor, r: float) -> Tensor:
        """Y (k, d), but for a factor, from Z (p, d): what no change can reach is pulled at too."""
        y = self.rotation @ z
        return y + self.unreachable / r if r > 0 else y

    def left_factor(self, mu: float) -> Tensor:
        """Left factor (w, p) of `Delta = (I + G / mu)^-1 H_f^T Z`."""
        return self.spectrum.vectors @ (self.shrink(mu)[:, None] * self.inside.T) + self.kernel.T

    def minimise_ratio(self, slope: Callable[[float], float]) -> float:
        """The mu at which a quasi-convex function of mu is lowest, given its slope's sign.

        `slope` may have any positive scale. Returns 0 if the slope is not negative there.
        """
        if not len(self.e) or slope(0.0) >= 0:  # without retained texts mu means nothing
            return 0.0
        ratio = self.lw / self.lp  # mu = ratio * ||H_r Delta|| / ||Delta||, within sigma's range
        high = 2 * ratio * float(self.spectrum.values.max())
        has_kernel = bool(self.kernel.any())
        low = high * 1e-24 if has_kernel else ratio * float(self.spectrum.values.min()) / 2
        ends = torch.tensor([low, high], dtype=torch.float64).log()

        def at(log_mu: Tensor) -> Tensor:
            return torch.tensor(
                [slope(float(value)) for value in log_mu.exp()], dtype=torch.float64
            )

        return float(find_roots(at, ends[:1], ends[1:]).exp())


def best_r(a: Tensor, c: Tensor, unreachable_sq: float, r_free_cost: float, lf: float) -> float:
    """The r >= 0 that minimises `(lf^2 r + r_free_cost) (sum c_i / (a_i + r) + unreachable_sq /
    r)`.

    Its derivative is `sum c_i (lf^2 a_i - r_free_cost) / (a_i + r)^2 - r_free_cost unreachable_sq /
    r^2`, which changes sign once. Returns 0 or infinity if the minimum is at an end.
    """
    top = float(a.max())
    if top <= 0:  # nothing can be reached at this mu
        return float("inf")

    def slope(log_r: Tensor) -> Tensor:
        r = log_r.exp()[:, None]
        value = (c * (lf**2 * a - r_free_cost) * ((r + top) / (a + r)).square()).sum(dim=1)
        return value - r_free_cost * unreachable_sq * ((r[:, 0] + top) / r[:, 0]).square()

    ends = torch.tensor([1e-18, 1e18], dtype=a.dtype, device=a.device).mul(top).log()
    low, high = slope(ends)
    if low >= 0:
        return 0.0
    if high <= 0:
        return float("inf")
    return float(find_roots(slope, ends[:1], ends[1:]).exp())


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
