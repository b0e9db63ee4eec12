"""Methods to compare with, written anew in the notation of this project.

Two were published for other matrices (cross-attention of a diffusion model, the MLPs of a language
model); here they edit the text projection: move `h_f` by `D`, leave `H_r` alone. Their constants
are those of their authors' code, in the authors' units.

- UCE: Gandikota, Orgad, Belinkov, Materzynska and Bau, "Unified Concept Editing in Diffusion
  Models", WACV 2024, equation 7: ridge regression towards the new values of all texts.
- AlphaEdit: Fang et al., "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models",
  ICLR 2025: a change within the directions that what is retained hardly uses.

Three more are the least that can be compared with: zeroing what is forgotten, noise, and gradient
ascent on the texts' own classification. (LEACE, which a library brings, is called in trainers/.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from forgetting.errors import ProblemError, number
from forgetting.io import indices, matrices, matrix, texts
from forgetting.problem import LowRankEdit

LOGIT_SCALE = 100.0  # CLIP's, where its training ends


def uce(h_f: Tensor, gram: Tensor, erase: float, lam: float) -> Tensor:
    """UCE for k texts at once: `Delta = left @ D`.

    `erase ||H_f Delta - D||^2 + ||H_r Delta||^2 + lam ||Delta||^2` is smallest at
    `left = K^-1 H_f^T (H_f K^-1 H_f^T + I / erase)^-1` with `K = G + lam I`. The larger `erase`,
    the nearer the texts come to their targets; texts that repeat each other share what they can.

    Args:
        h_f: (k, w); gram: `G = H_r^T H_r`, (w, w), of the retained texts alone; erase, lam:
            > 0; the authors' are 1 and 0.5.

    Returns:
        left (w, k).
    """
    h_f, gram = texts("h_f", h_f, "gram", gram, square=True)
    number("erase", erase, above=0)
    ridged = gram + number("lam", lam, above=0) * torch.eye(len(gram)).to(gram)
    base = torch.cholesky_solve(h_f.T, _root(ridged))  # (w, k)
    inner = h_f @ base  # (k, k)
    eye = torch.eye(len(h_f), dtype=gram.dtype, device=gram.device)
    inner = (inner + inner.T) / 2 + eye / erase
    return torch.cholesky_solve(base.T, _root(inner)).T  # (w, k)


def null_space(h_f: Tensor, gram: Tensor, count: int, damping: float, threshold: float) -> Tensor:
    """A change in N only, the eigenvectors of `G / m` below `threshold`: `Delta = left @ D`.

    `left = N N^T H_f^T (H_f N N^T H_f^T + damping I)^-1` minimises
    `||H_f Delta - D||^2 + damping ||Delta||^2` there. `damping` 0 lands on the target.

    Args:
        h_f: (k, w); gram: `G`, (w, w); count: m, the number of texts in `gram`.

    Returns:
        left (w, k), zero if no direction lies below the threshold.
    """
    h_f, gram = texts("h_f", h_f, "gram", gram, square=True)
    number("threshold", threshold)
    number("damping", damping, low=0)
    values, vectors = torch.linalg.eigh(gram / number("count", count, low=1, whole=True))
    free = vectors[:, values < threshold]  # (w, q)
    inside = h_f @ free  # (k, q)
    inner = inside @ inside.T + damping * torch.eye(len(h_f)).to(gram)  # (k, k)
    # Pseudo-inverse: without free directions it is zero and nothing can move.
    return free @ (inside.T @ torch.linalg.pinv(inner, hermitian=True))  # (w, k)


def _root(square: Tensor) -> Tensor:
    """The Cholesky factor of a positive definite matrix."""
    root, info = torch.linalg.cholesky_ex(square)
    if info:
        raise ProblemError("the statistics are not positive semidefinite")
    return root


def zeroing(h_f: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """The least change that leaves nothing of the texts: `Delta = -H_f^+ H_f W`.

    `H_f (W + Delta) = 0`, and no smaller `||Delta||_F` does that. The factors are `-V` and `V^T W`
    with V an orthonormal basis of the texts' span, not `-H_f^+` and `H_f W`: texts that nearly
    repeat each other have a huge pseudo-inverse, which float32 would not hold.

    Args:
        h_f: (k, w); projection: `W`, (w, d).

    Returns:
        left (w, r), right (r, d) with r the rank of `h_f`.
    """
    h_f, projection = texts("h_f", h_f, "projection", projection)
    _, values, basis = torch.linalg.svd(h_f, full_matrices=False)
    small = torch.finfo(h_f.dtype).eps * max(h_f.shape) * values.max()
    basis = basis[values > small]  # (r, w)
    return -basis.T, basis @ projection


def noise(
    width: int, d: int, rank: int, norm: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A random change of given size: Gaussian factors with `||left @ right||_F = norm`.

    A text h is moved by `h left right`. Whatever the rank, the direction of `left`'s rows is
    uniform, so the mean of `||h Delta||^2` over draws is `||h||^2 norm^2 / width`: that of full
    Gaussian noise of the same Frobenius norm. Low rank only makes one text's share vary more from
    draw to draw, and takes `rank (width + d)` numbers to store instead of `width d`.

    Args:
        generator: on the CPU, so that every device gets the same numbers.

    Returns:
        left (width, rank), right (rank, d), float64.
    """
    for name, size in (("width", width), ("d", d), ("rank", rank)):
        if number(name, size, low=0, whole=True) > 2**20:
            raise ProblemError(f"{name} is {size}: too large for a projection")
    number("norm", norm, low=0)
    left = torch.randn(width, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, d, generator=generator, dtype=torch.float64)
    size = torch.linalg.matrix_norm(left @ right)
    return left * (norm / size if size > 0 else 0.0), right


@dataclass(frozen=True)
class Ascent(LowRankEdit):
    """`Delta = left @ right`, left (w, k) and right (k, d); how many steps it took and whether all
    texts got below the limit; each text's probability of its own class (k,) before and after."""

    steps: int
    reached: bool
    before: Tensor
    after: Tensor


def ascend(
    hidden: Tensor,
    projection: Tensor,
    names: Tensor,
    own: Tensor,
    lr: float,
    steps: int,
    limit: float,
    bias: Tensor | None = None,
) -> Ascent:
    """Gradient steps on the projection until every text's own class is below `limit`.

    With p a text's probability of its own class, the gradient of its cross-entropy `-log p` is
    1 - p times that of its log odds `log((1 - p) / p)`. At CLIP's scale 1 - p is 1e-3 to 1e-10
    before the first step, so steps along the former go nowhere (2,000 of them left p at 1). Steps
    along the latter have the same direction for every text and do not vanish; those are taken. A
    text below the limit rests while it stays there.

    In W the gradient is `H_f^T g` with g (k, d) the gradients in the texts' embeddings. So every
    step stays in the span of the texts, and summing g alone is exact: `Delta = H_f^T B`.

    Args:
        hidden: `H_f`, (k, w); projection: `W`, (w, d); names: (C, d), unit embeddings to classify
            among; own: (k,) int64, each text's class. float64.
        lr: of mean squared embedding length over mean squared hidden length, so that one number
            means the same for every backbone.
        bias: (d,), what the model adds to `hidden @ projection`; None: nothing.

    Returns:
        See `Ascent`.
    """
    hidden, projection, names = matrices(hidden=hidden, projection=projection, names=names)
    hidden = matrix("hidden", hidden, len(projection))
    names = matrix("names", names, projection.shape[1])
    own = indices("own", own, len(hidden), len(names))
    number("lr", lr, above=0)
    number("limit", limit)
    number("steps", steps, low=0, whole=True)
    if not len(hidden) or len(names) < 2:
        raise ProblemError("ascent needs a text, and two classes to take it for")
    start = hidden @ projection  # (k, d)
    start = start if bias is None else start + bias.to(start)
    gram = hidden @ hidden.T  # (k, k)
    rate = lr * float(start.square().sum() / gram.trace())
    mine = torch.nn.functional.one_hot(own, len(names)).to(start)  # (k, C)
    total = torch.zeros_like(start)  # B, (k, d)
    before = None
    for step in range(steps + 1):
        embedding = start + gram @ total
        length = torch.linalg.vector_norm(embedding, dim=1, keepdim=True)
        unit = normalize(embedding, dim=1)
        p = (LOGIT_SCALE * unit @ names.T).softmax(dim=1)  # (k, C)
        probability = (p * mine).sum(dim=1)
        before = probability if before is None else before
        above = probability >= limit
        if step == steps or not above.any():
            break
        rivals = p * (1 - mine)
        rivals = rivals / rivals.sum(dim=1, keepdim=True)
        slope = LOGIT_SCALE * (rivals - mine) @ names  # of the log odds in `unit`, (k, d)
        slope = slope - (slope * unit).sum(dim=1, keepdim=True) * unit
        total = total + rate * above[:, None] * slope / length
    return Ascent(hidden.T, total, step, not bool(above.any()), before, probability)
