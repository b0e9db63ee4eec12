"""Closed forms to compare with, written anew in the notation of this project.

Two were published for other matrices (cross-attention of a diffusion model, the MLPs of a language
model); here they edit the text projection: move `h_f` by `D`, leave `H_r` alone. Their constants
are those of their authors' code, in the authors' units.

- UCE: Gandikota, Orgad, Belinkov, Materzynska and Bau, "Unified Concept Editing in Diffusion
  Models", WACV 2024, equation 7: ridge regression towards the new values of all texts.
- AlphaEdit: Fang et al., "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models",
  ICLR 2025: a change within the directions that what is retained hardly uses.

Two more are the least that can be compared with: zeroing what is forgotten, and noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

UCE_LAMBDA = 0.5
ALPHA_THRESHOLD = 2e-2  # of eigenvalues of the mean of h^T h over retained texts
ALPHA_DAMPING = 10.0


def uce_each(h_f: Tensor, gram: Tensor, erase: float = 1.0, lam: float = UCE_LAMBDA) -> Tensor:
    """UCE for each of C texts alone, all others retained: `Delta_i = left[:, i] (x) D_i`.

    `erase ||h_i W' - P_i||^2 + ||H_r (W' - W)||^2 + lam ||W' - W||^2` is smallest at
    `Delta_i = erase (H_r^T H_r + erase h_i^T h_i + lam I)^-1 h_i^T D_i`. With every text once in
    `K = gram + lam I` and `u_i = K^-1 h_i` this is `erase u_i / (1 + (erase - 1) h_i u_i)`, so one
    factorisation serves all.

    Args:
        h_f: (C, w); gram: (w, w), `H^T H` of all texts, those of `h_f` among them; erase: the
            weight of the forgotten text (UCE's erase scale).

    Returns:
        left (w, C).
    """
    matrix = gram + lam * torch.eye(len(gram), dtype=gram.dtype)
    u = torch.cholesky_solve(h_f.T, torch.linalg.cholesky(matrix))  # (w, C)
    return erase * u / (1 + (erase - 1) * (h_f.T * u).sum(dim=0))


def uce(h_f: Tensor, gram: Tensor, erase: float = 1.0, lam: float = UCE_LAMBDA) -> Tensor:
    """UCE for k texts at once: `Delta = left @ D`.

    `erase ||H_f Delta - D||^2 + ||H_r Delta||^2 + lam ||Delta||^2` is smallest at
    `left = K^-1 H_f^T (H_f K^-1 H_f^T + I / erase)^-1` with `K = G + lam I`. The larger `erase`,
    the nearer the texts come to their targets; texts that repeat each other share what they can.

    Args:
        h_f: (k, w); gram: `G = H_r^T H_r`, (w, w), of the retained texts alone; erase, lam: > 0.

    Returns:
        left (w, k).
    """
    matrix = gram + lam * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    base = torch.cholesky_solve(h_f.T, torch.linalg.cholesky(matrix))  # (w, k)
    inner = h_f @ base  # (k, k)
    eye = torch.eye(len(h_f), dtype=gram.dtype, device=gram.device)
    inner = (inner + inner.T) / 2 + eye / erase
    return torch.cholesky_solve(base.T, torch.linalg.cholesky(inner)).T  # (w, k)


def null_space(
    h_f: Tensor, gram: Tensor, count: int, damping: float, threshold: float = ALPHA_THRESHOLD
) -> Tensor:
    """A change in N only, the eigenvectors of `G / m` below `threshold`: `Delta = left @ D`.

    `left = N N^T H_f^T (H_f N N^T H_f^T + damping I)^-1` minimises
    `||H_f Delta - D||^2 + damping ||Delta||^2` there. `damping` 0 lands on the target.

    Args:
        h_f: (k, w); gram: `G`, (w, w); count: m, the number of texts in `gram`.

    Returns:
        left (w, k), zero if no direction lies below the threshold.
    """
    values, vectors = torch.linalg.eigh(gram / count)
    free = vectors[:, values < threshold]  # (w, q)
    inside = h_f @ free  # (k, q)
    matrix = inside @ inside.T  # (k, k)
    matrix = matrix + damping * torch.eye(len(h_f), dtype=gram.dtype, device=gram.device)
    # Pseudo-inverse: without free directions the matrix is zero and nothing can move.
    return free @ (inside.T @ torch.linalg.pinv(matrix, hermitian=True))  # (w, k)


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
    left = torch.randn(width, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, d, generator=generator, dtype=torch.float64)
    size = torch.linalg.matrix_norm(left @ right)
    return left * (norm / size if size > 0 else 0.0), right
