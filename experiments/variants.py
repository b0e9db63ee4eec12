"""The paper's descent with the known slips of its public code, one by one: for faithfulness.py.

Written from a description of those slips (docs/faithfulness.md), not from anybody's code.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor

from forgetting import ForgetProblem, LoraSettings, solve_exact


@dataclass(frozen=True)
class Variant:
    """One way to run the same descents."""

    name: str
    last_step: bool = False  # the weights before the last update, not of the lowest objective
    last_trial: bool = False  # the last trial, not the one of highest reduction
    # The adapter is added to the live projection and taken off again in every step, in this dtype,
    # and the answer is the live projection with the adapter added; None: never.
    merge: torch.dtype | None = None
    seed: int = 0  # of the adapters' first values; another one shows what chance alone does


VARIANTS = (
    Variant("ours"),
    Variant("ours, another seed", seed=1),
    Variant("last step kept", last_step=True),
    Variant("last trial kept", last_trial=True),
    Variant("merged and unmerged, float32", merge=torch.float32),
    Variant("merged and unmerged, float16", merge=torch.float16),
    Variant("all three, float16", last_step=True, last_trial=True, merge=torch.float16),
)


@dataclass(frozen=True)
class Trial:
    """One descent: the change `answer` (w, d) that its variant keeps, and what is left in the live
    projection without the adapter, over the length of W."""

    problem: ForgetProblem
    answer: Tensor
    drift: float = 0.0

    @property
    def reduction(self) -> float:
        return self.problem.reduction(self.answer)


def descend(
    problem: ForgetProblem,
    settings: LoraSettings,
    variant: Variant,
    generator: torch.Generator,
    live: Tensor | None,
) -> Trial:
    """`solve_lora`'s descent as a variant runs it; `live` (w, d) is the projection that the adapter
    is merged into, changed in place. The last update is never kept, as in the paper's code."""
    w, d = problem.projection.shape
    scale, bound = problem.alpha / problem.rank, 1 / math.sqrt(w)
    a = ((torch.rand(problem.rank, w, generator=generator) * 2 - 1) * bound).requires_grad_()
    b = torch.zeros(d, problem.rank, requires_grad=True)  # (d, r)
    optimizer = torch.optim.Adam([a, b], lr=settings.lr)
    retain = problem.retain_hidden  # (m, w)
    if len(retain) > w:
        retain = torch.linalg.qr(retain.double(), mode="r").R.to(retain)  # the same norm
    displacement = problem.displacement  # (k, d)
    best, kept = math.inf, None
    for step in range(settings.steps + 1):
        if live is not None:
            change = delta(a, b, scale).to(live.dtype)
            live += change
            live -= change
            displacement = problem.target - problem.forget_hidden @ live.to(problem.target)
        moved = (problem.forget_hidden @ a.T) @ b.T * scale  # (k, w) -> (k, r) -> (k, d)
        shifted = (retain @ a.T) @ b.T * scale  # (m, w) -> (m, r) -> (m, d)
        loss = (
            problem.lamb_forget * torch.linalg.matrix_norm(displacement - moved)
            + problem.lamb_preserve * torch.linalg.matrix_norm(shifted)
            + problem.lamb_weight * torch.linalg.matrix_norm(b @ a)
        )
        is_lowest = float(loss.detach()) < best
        best = min(best, float(loss.detach()))
        if step == settings.steps - 1 if variant.last_step else is_lowest:
            kept = delta(a, b, scale)
        if step < settings.steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    if live is None:
        return Trial(problem, kept)
    base = problem.projection.to(live.dtype).double()
    answer = (live + kept.to(live.dtype)).to(kept) - problem.projection
    return Trial(problem, answer, float((live.double() - base).norm() / base.norm()))


def delta(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`Delta = scale (B A)^T`, (w, d), of LoRA's factors A (r, w), B (d, r); without a gradient."""
    return scale * (a.detach().T @ b.detach().T)  # (w, r) @ (r, d) -> (w, d)


def run_variant(problem: ForgetProblem, settings: LoraSettings, variant: Variant) -> list[Trial]:
    """The trials of a variant, up to the first that reaches the reduction: the paper's retry."""
    generator = torch.Generator().manual_seed(variant.seed)
    live = None if variant.merge is None else problem.projection.to(variant.merge, copy=True)
    trials = []
    for number in range(settings.max_trials):
        raised = problem.lamb_forget + number * settings.lamb_forget_step
        attempt = replace(problem, lamb_forget=raised)
        trials.append(descend(attempt, settings, variant, generator, live))
        if trials[-1].reduction >= settings.reduction:
            break
    return trials


def choose(trials: Sequence[Trial], variant: Variant) -> Trial:
    """The trial that a variant keeps; of equal ones the first."""
    if variant.last_trial:
        return trials[-1]
    return max(trials, key=lambda trial: trial.reduction)


def run_variants(
    problem: ForgetProblem, settings: LoraSettings, variants: Sequence[Variant] = VARIANTS
) -> pd.DataFrame:
    """A row per variant, judged in float64 with the original projection; `above` is the relative
    distance to the optimum at the same lamb_forget, `size` the length of Delta."""
    rows = []
    for variant in variants:
        trials = run_variant(problem, settings, variant)
        trial = choose(trials, variant)
        objective = float(trial.problem.objective(trial.answer.double()))
        rows.append(
            {
                "variant": variant.name,
                "trials": len(trials),
                "lamb_forget": trial.problem.lamb_forget,
                "objective": objective,
                "above": objective / solve_exact(trial.problem).certificate.primal - 1,
                "reduction": trial.reduction,
                "size": float(trial.answer.norm()),
                "drift": trial.drift,
                "answer": trial.answer,
            }
        )
    return pd.DataFrame(rows)
