"""Closed forms that others use for the same job, written anew in the notation of this project.

Both were published for other matrices (cross-attention of a diffusion model, the MLPs of a language
model); here they edit the text projection: move `h_f` by `D`, leave `H_r` alone. Their constants
are those of their authors' code, in the authors' units.

- UCE: Gandikota, Orgad, Belinkov, Materzynska and Bau, "Unified Concept Editing in Diffusion
  Models", WACV 2024, equation 7: ridge regression towards the new values of all texts.
- AlphaEdit: Fang et al., "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models",
  ICLR 2025: a change within the directions that what is retained hardly uses.
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
    matrix = inside @ inside.T + damping * torch.eye(len(h_f), dtype=gram.dtype)
    # Pseudo-inverse: without free directions the matrix is zero and nothing can move.
    return free @ (inside.T @ torch.linalg.pinv(matrix, hermitian=True))  # (w, k)
