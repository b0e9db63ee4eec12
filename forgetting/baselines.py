"""Methods to compare with, in the notation of this project: move `h_f` by `D`, leave `H_r` alone.

Their constants are those of their authors' code, in the authors' units. All tensors are float64.

- `uce`: Gandikota, Orgad, Belinkov, Materzynska and Bau, "Unified Concept Editing in Diffusion
  Models", WACV 2024, equation 7: ridge regression towards the new values of all texts. Published
  for cross-attention matrices.
- `null_space`: Fang et al., "AlphaEdit: Null-Space Constrained Knowledge Editing for Language
  Models", ICLR 2025: a change within the directions that what is retained hardly uses. Published
  for the MLPs of language models.
- `leace`: Belrose et al., "LEACE: Perfect linear concept erasure in closed form", NeurIPS 2023, by
  the authors' package.
- `zeroing`, `noise`, `ascend`: the least that can be compared with.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from forgetting.problem import LowRankEdit

LOGIT_SCALE = 100.0  # CLIP's, where its training ends


def uce(h_f: Tensor, gram: Tensor, erase: float, lam: float) -> Tensor:
    """UCE for k texts at once: left (w, k) of `Delta = left @ D`.

    `erase ||H_f Delta - D||^2 + ||H_r Delta||^2 + lam ||Delta||^2` is smallest at
    `left = K^-1 H_f^T (H_f K^-1 H_f^T + I / erase)^-1` with `K = G + lam I`. The larger `erase`,
    the nearer the texts come to their targets. Texts that repeat each other share what they can.

    Args:
        h_f: (k, w); gram: `G = H_r^T H_r`, (w, w), of the retained texts alone.
        erase, lam: > 0; the authors' are 1 and 0.5.
    """
    base = torch.linalg.solve(gram + lam * torch.eye(len(gram)).to(gram), h_f.T)  # (w, k)
    inner = h_f @ base + torch.eye(len(h_f)).to(gram) / erase  # (k, k)
    return torch.linalg.solve(inner, base, left=False)


def null_space(h_f: Tensor, gram: Tensor, count: int, damping: float, threshold: float) -> Tensor:
    """A change in N only, the eigenvectors of `G / count` below `threshold`: `Delta = left @ D`.

    `left = N N^T H_f^T (H_f N N^T H_f^T + damping I)^-1`, (w, k), minimises
    `||H_f Delta - D||^2 + damping ||Delta||^2` there. Without damping the texts reach their target.
    It is zero if no direction lies below the threshold. h_f: (k, w); gram: `G`, (w, w),
    of `count` texts."""
    values, vectors = torch.linalg.eigh(gram / count)
    free = vectors[:, values < threshold]  # (w, q)
    inside = h_f @ free  # (k, q)
    inner = inside @ inside.T + damping * torch.eye(len(h_f)).to(gram)  # (k, k)
    # Pseudo-inverse: without free directions it is zero and nothing can move.
    return free @ (inside.T @ torch.linalg.pinv(inner, hermitian=True))  # (w, k)


def leace(
    texts: Sequence[Tensor], retained: Tensor, projection: Tensor
) -> tuple[Tensor, Tensor, float]:
    """Erase k classes of texts at once: left (w, k), right (k, d), and the largest part, over the
    classes, of the distance between the class's mean and that of all other texts that is left.

    The eraser is fitted without its bias (`affine=False`). Then it is a linear map of the hidden
    state and folds into the projection as a change of rank k.

    A class's indicator is standardised: the package drops singular values of the whitened
    cross-covariance below 0.01, so that with an indicator of 0 and 1 nothing would be erased from
    20,000 names on. `constrain_cov_trace` is off: where it acts the eraser has full rank, and folds
    into no small adapter.

    texts: for each class (n_i, w) hidden states; retained: (m, w); projection: (w, d)."""
    with warnings.catch_warnings():
        # torch 2.14 says so of the package's own use of it, on import.
        warnings.filterwarnings("ignore", r".torch\.jit\.script. is deprecated", FutureWarning)
        from concept_erasure import LeaceFitter

    x = torch.cat([*texts, retained])  # (n, w)
    sizes = torch.tensor([*map(len, texts), len(retained)], device=x.device)
    owner = torch.arange(len(sizes), device=x.device).repeat_interleave(sizes)
    members = owner[:, None] == torch.arange(len(texts), device=x.device)  # (n, k)
    z = members.double()
    eraser = LeaceFitter.fit(x, z / z.std(dim=0), affine=False, constrain_cov_trace=False).eraser
    left, right = -eraser.proj_right.T, eraser.proj_left.T  # (w, k), (k, w)
    means = torch.stack([x[m].mean(dim=0) - x[~m].mean(dim=0) for m in members.T])  # (k, w)
    after = means + (means @ left) @ right
    return left, right @ projection, float((after.norm(dim=1) / means.norm(dim=1)).max())


def zeroing(h_f: Tensor, projection: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The least change that leaves nothing of the texts: `Delta = -H_f^+ (H_f W + b)`.

    The factors left (w, r), right (r, d), r the rank of `h_f` (k, w), are `-V` and `V^T W` with V
    an orthonormal basis of the texts' span, not `-H_f^+` and `H_f W`: texts that nearly repeat each
    other have a huge pseudo-inverse, which float32 would not hold.
    """
    u, values, basis = torch.linalg.svd(h_f, full_matrices=False)
    keep = values > torch.finfo(h_f.dtype).eps * max(h_f.shape) * values.max()
    basis = basis[keep]  # (r, w)
    right = basis @ projection
    if bias is not None:
        right = right + (u[:, keep].sum(dim=0) / values[keep])[:, None] * bias.to(right)
    return -basis.T, right


def noise(
    width: int, d: int, rank: int, norm: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A random change of given size: Gaussian left (width, rank), right (rank, d) with
    `||left @ right||_F = norm`; the generator is on the CPU.

    Whatever the rank, the mean of `||h Delta||^2` over draws is `||h||^2 norm^2 / width`: that of
    full Gaussian noise of the same Frobenius norm.
    """
    left = torch.randn(width, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, d, generator=generator, dtype=torch.float64)
    size = torch.linalg.matrix_norm(left @ right)
    return left * (norm / size if size > 0 else 0.0), right


@dataclass(frozen=True)
class Ascent(LowRankEdit):
    """`Delta = left @ right`, left (w, k), right (k, d)."""

    steps: int
    reached: bool  # whether all texts got below the limit
    before: Tensor  # (k,), each text's probability of its own class
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
        hidden: `H_f`, (k, w); projection: `W`, (w, d); bias: `b`, (d,), or None.
        names: (C, d), unit embeddings to classify among; own: (k,) int64, each text's class.
        lr: of mean squared embedding length over mean squared hidden length, so that one number
            means the same for every backbone.
    """
    start = hidden @ projection  # (k, d)
    start = start if bias is None else start + bias.to(start)
    gram = hidden @ hidden.T  # (k, k)
    rate = lr * float(start.square().sum() / gram.trace())
    own = one_hot(own, len(names)).to(start)  # (k, C)
    total = torch.zeros_like(start)  # B, (k, d)
    before = None
    for step in range(steps + 1):
        embedding = start + gram @ total
        length = torch.linalg.vector_norm(embedding, dim=1, keepdim=True)
        unit = normalize(embedding, dim=1)
        p = (LOGIT_SCALE * unit @ names.T).softmax(dim=1)  # (k, C)
        probability = (p * own).sum(dim=1)
        before = probability if before is None else before
        moving = probability >= limit
        if step == steps or not moving.any():
            break
        others = p * (1 - own)
        others = others / others.sum(dim=1, keepdim=True)
        slope = LOGIT_SCALE * (others - own) @ names  # of the log odds in `unit`, (k, d)
        slope = slope - (slope * unit).sum(dim=1, keepdim=True) * unit
        total = total + rate * moving[:, None] * slope / length
    return Ascent(hidden.T, total, step, not bool(moving.any()), before, probability)
