"""Methods to compare with: closed forms from a few texts to a change of the text projection.

Each is a function `method(inputs, settings) -> Edit`, with its settings in a dataclass of its own.
Constants are those of the authors' code unless a comment says otherwise. `trainers.baselines` has
the table of all of them. The newest ones stand in `forgetting.erasers`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from forgetting.problem import LowRankEdit
from forgetting.settings import setting

FREE = "part of the mean eigenvalue of H^T H / m below which all is free"
BEYOND = 1e-5  # of the way to zero; float32 leaves a few 1e-7 of a text's length


@dataclass(frozen=True)
class EditInputs:
    """What a method sees of a request. Embeddings are `h W + b`; tensors are float64."""

    hidden: Tensor  # `H_f`, (k, w), hidden states of the texts to forget
    projection: Tensor  # `W`, (w, d)
    retained: Tensor  # `H_r`, (m, w), of the texts to retain; empty where a method has none
    displacement: Tensor  # `D`, (k, d), from each text to its target; to zero without a target
    labels: Tensor  # (k,) int64, the class of each text
    neutral: Tensor  # (1, w), hidden state of the empty prompt
    seed: int = 0

    @property
    def embeddings(self) -> Tensor:
        """`H_f W`, (k, d), without the bias, which no edit moves."""
        return self.hidden @ self.projection


@dataclass(frozen=True)
class Edit(LowRankEdit):
    """A change `left @ right`, JSON values to report of it, and lines for the reader."""

    report: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class UceSettings:
    # With the authors' 1 a text goes a quarter of its way; from 100 on it reaches its target.
    erase: float = setting(1000.0, "weight of a forgotten text; retained: 1", above=0, high=1e6)
    ridge: float = setting(0.5, "the authors' lambda", above=0, high=1e6)


def uce(inputs: EditInputs, settings: UceSettings) -> Edit:
    """UCE (Gandikota, Orgad, Belinkov, Materzynska and Bau, "Unified Concept Editing in Diffusion
    Models", WACV 2024, equation 7), published for cross-attention matrices.

    `erase ||H_f Delta - D||^2 + ||H_r Delta||^2 + ridge ||Delta||^2` is smallest at
    `Delta = K^-1 H_f^T (H_f K^-1 H_f^T + I / erase)^-1 D` with `K = H_r^T H_r + ridge I`. Texts
    that repeat each other share what they can."""
    h, gram = inputs.hidden, inputs.retained.T @ inputs.retained
    base = torch.linalg.solve(gram + settings.ridge * torch.eye(len(gram)).to(gram), h.T)  # (w, k)
    inner = h @ base + torch.eye(len(h)).to(gram) / settings.erase  # (k, k)
    return Edit(torch.linalg.solve(inner, base, left=False), inputs.displacement)


@dataclass(frozen=True)
class NullSpaceSettings:
    threshold: float = setting(0.5, FREE, above=0, high=1e6)
    # With the authors' 10, for a language model, a text of CLIP goes a fifth of its way.
    damping: float = setting(0.0, "damping; the authors' is 10", 0, 1e6)


def null_space(inputs: EditInputs, settings: NullSpaceSettings) -> Edit:
    """AlphaEdit (Fang et al., "Null-Space Constrained Knowledge Editing for Language Models", ICLR
    2025), published for the MLPs of language models.

    The change stays in N, the directions that retained texts hardly use, and minimises
    `||H_f Delta - D||^2 + damping ||Delta||^2` there:
    `Delta = N N^T H_f^T (H_f N N^T H_f^T + damping I)^-1 D`. It is zero if no direction is free."""
    free, report, notes = free_directions(inputs.retained, settings.threshold)  # (w, q)
    inside = inputs.hidden @ free  # (k, q)
    inner = inside @ inside.T + settings.damping * torch.eye(len(inside)).to(inside)  # (k, k)
    # Pseudo-inverse: without free directions it is zero and nothing can move.
    left = free @ (inside.T @ torch.linalg.pinv(inner, hermitian=True))  # (w, k)
    return Edit(left, inputs.displacement, report, notes)


def free_directions(retained: Tensor, threshold: float) -> tuple[Tensor, dict[str, Any], list[str]]:
    """Eigenvectors (w, q) of `H^T H / m` below `threshold` times its mean eigenvalue; what to
    report of them, and a line for the reader. retained: `H`, (m, w)."""
    gram = retained.T @ retained
    limit = threshold * float(gram.trace()) / (len(retained) * len(gram))
    values, vectors = torch.linalg.eigh(gram / len(retained))
    free = vectors[:, values < limit]
    count = free.shape[1]
    note = f"{count} of {len(gram)} directions lie below the threshold {limit:.3g}"
    return free, {"free": count}, [note]


def zero(inputs: EditInputs, settings: None = None) -> Edit:
    """The least change that leaves nothing of the texts, `Delta = H_f^+ D` with D to zero.

    The factors are `V` and `V^T H_f^+ D`, V an orthonormal basis of the texts' span: texts that
    nearly repeat each other have a huge pseudo-inverse, which float32 would not hold. Cosines see
    no length, and float32 leaves a millionth of a zeroed text in a direction of chance. So the
    change goes a hundred-thousandth beyond zero, which decides this in the method's favour."""
    u, values, basis = svd(inputs.hidden)
    right = (u / values).T @ inputs.displacement  # (r, k) @ (k, d)
    return Edit(basis.T, (1 + BEYOND) * right)


def svd(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`rows` (k, n) as `u * values @ basis`, u (k, r), values (r,) and basis (r, n), r its rank."""
    u, values, basis = torch.linalg.svd(rows, full_matrices=False)
    kept = values > torch.finfo(rows.dtype).eps * max(rows.shape) * values.max()
    return u[:, kept], values[kept], basis[kept]
