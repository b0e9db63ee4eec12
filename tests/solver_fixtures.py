"""Random problems for the solvers, ordinary ones and ones with a defect."""

import torch
from hypothesis import HealthCheck
from torch import Tensor

from forgetting import ForgetProblem
from forgetting.solvers.certificate import Certificate
from tests.conftest import REPOSITORY

REAL_CLIP = REPOSITORY.parent / "shared" / "real_clip"
GAP = 1e-9
EVERY = dict(suppress_health_check=list(HealthCheck))
TENSORS = ("projection", "forget_hidden", "retain_hidden", "target")
SPOILS = [
    *("", "duplicate", "collinear", "same target", "retained", "spanned", "graded", "still"),
    *("reachable", "duplicate reachable", "collinear reachable retained", "spanned reachable"),
    *("graded spanned", "same target collinear", "nothing retained"),
]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_problem(k, m, w, d, seed, spoil="", **weights) -> ForgetProblem:
    """A problem with the edge cases that `spoil` names."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    h_f, h_r, projection, target = normal(k, w), normal(m, w), normal(w, d), normal(k, d)
    if "duplicate" in spoil and k > 1:
        h_f[1] = h_f[0]
    if "collinear" in spoil and k > 1:
        h_f[-1] = -2.5 * h_f[0]
    if "same target" in spoil:
        target = target[:1].expand(k, -1).clone()
    if "reachable" in spoil:
        target = h_f @ normal(w, d)
    if "retained" in spoil and m:
        h_r[0] = h_f[0]
    if "spanned" in spoil and m:
        h_f = normal(k, m) @ h_r
    if "graded" in spoil and weights.get("lamb_weight", 1.0) > 0:  # four decades
        h_r = h_r * torch.logspace(-2, 2, w, dtype=torch.float64)
    if "nothing" in spoil:
        h_r = torch.zeros_like(h_r)
    if "zero row" in spoil:
        h_f[0] = 0
    if "mean" in spoil and m > 1:
        h_f[0] = (h_r[0] + h_r[1]) / 2
    if "rank one" in spoil and m:
        h_r = h_r[:1] * torch.linspace(0.1, 1, m, dtype=torch.float64)[:, None]
    if "still" in spoil:
        target = h_f @ projection
    defaults = {"lamb_forget": 1.3, "lamb_preserve": 0.3, "lamb_weight": 1.0}
    return ForgetProblem(projection, h_f, h_r, target, **defaults | weights)


def class_set(classes, further, w, d, seed, **weights) -> tuple[ForgetProblem, Tensor]:
    """A set whose classes are retained beside `further` names, but for the last. Each class
    excludes its own text (C, m), and every second one a further name too."""
    problem = random_problem(classes, further, w, d, seed, **weights)
    rows = torch.cat([problem.retain_hidden, problem.forget_hidden[:-1]])
    excluded = torch.zeros(classes, len(rows), dtype=torch.bool)
    excluded[: classes - 1, further:] = torch.eye(classes - 1, dtype=torch.bool)
    excluded[::2, : min(1, further)] = True
    tensors = problem.projection, problem.forget_hidden, rows, problem.target
    numbers = problem.lamb_forget, problem.lamb_preserve, problem.lamb_weight
    return ForgetProblem(*tensors, *numbers), excluded


def tight(proof: Certificate) -> bool:
    """Whether what is proved is as good as float64 allows."""
    return proof.primal - proof.bound <= GAP * proof.primal + proof.rounding
