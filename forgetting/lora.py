"""The paper's solver: gradient descent on a LoRA adapter of the text projection."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from forgetting.problem import ForgetProblem, ProblemError


@dataclass(frozen=True)
class LoraSettings:
    """The paper's constants of the descent and of its retry.

    Attributes:
        steps: optimiser steps of one trial, full batch.
        lr: Adam's learning rate, constant.
        reduction: the forget norm must fall by this fraction, else another trial follows.
        lamb_forget_step: added to `lamb_forget` before every further trial.
        max_trials: after so many trials the best one is kept, whatever it reached.
    """

    steps: int = 2000
    lr: float = 0.01
    reduction: float = 0.7
    lamb_forget_step: float = 0.05
    max_trials: int = 100

    def __post_init__(self) -> None:
        if self.steps < 1 or self.max_trials < 1:
            raise ProblemError(
                f"steps and max_trials must be at least 1, got {self.steps} and {self.max_trials}"
            )
        if not (self.lr > 0 and 0 <= self.reduction <= 1 and self.lamb_forget_step >= 0):
            raise ProblemError(
                "lr must be positive, reduction from 0 to 1, lamb_forget_step not negative; got "
                f"{self.lr}, {self.reduction}, {self.lamb_forget_step}"
            )


@dataclass(frozen=True)
class LoraTrial:
    """One descent from a fresh adapter.

    `step` is the number of updates after which the objective was lowest; `history` (steps + 1,)
    holds the objective before every update and after the last.
    """

    lamb_forget: float
    objective: float
    reduction: float
    step: int
    history: Tensor


@dataclass(frozen=True)
class LoraSolution:
    """`Delta = left @ right` of the trial that was kept, and how it came about.

    Attributes:
        left: (w, r), right: (r, d).
        lamb_forget, objective, reduction: of the trial that was kept.
        reached: whether its reduction reached the threshold (True if none was asked for).
        trials: all trials in the order in which they ran.
    """

    left: Tensor
    right: Tensor
    lamb_forget: float
    objective: float
    reduction: float
    reached: bool
    trials: list[LoraTrial]

    @property
    def delta(self) -> Tensor:
        """(w, d)."""
        return self.left @ self.right


def solve_lora(
    problem: ForgetProblem,
    settings: LoraSettings = LoraSettings(),
    generator: torch.Generator | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> LoraSolution:
    """Descend the paper's objective by Adam on LoRA factors, and retry until it forgets.

    A trial starts from `A` (r, w) Kaiming-uniform with a = sqrt(5) and `B` (d, r) zero. Within a
    trial the adapter of lowest objective is kept. While the forget norm falls by less than
    `settings.reduction`, `lamb_forget` grows and a fresh adapter is trained; if no trial reaches
    the threshold, the one of highest reduction is kept. With `lamb_forget = 0` the forget term is
    switched off, so there is nothing to retry for and one trial runs. The base projection is only
    ever read.

    Args:
        problem: what to forget and to retain; the descent has its tensors' dtype and device.
        settings: the paper's constants.
        generator: draws the adapters, on the CPU so that every device starts from the same numbers;
            None takes a generator seeded with 0.
        on_step: called with (trial, step) after every step, for a progress bar.

    Returns:
        The solution; the same problem, settings and generator state give the same factors.

    Source: Kravets and Namboodiri, TMLR 2025 (objective, LoRA, Adam, retry).
    """
    generator = generator or torch.Generator().manual_seed(0)
    retry = problem.lamb_forget > 0
    trials: list[LoraTrial] = []
    kept: tuple[LoraTrial, Tensor, Tensor] | None = None
    for number in range(settings.max_trials if retry else 1):
        lamb_forget = problem.lamb_forget + number * settings.lamb_forget_step
        attempt = replace(problem, lamb_forget=lamb_forget)
        report = partial(on_step, number) if on_step else None
        trial, left, right = _descend(attempt, settings, generator, report)
        trials.append(trial)
        if kept is None or trial.reduction > kept[0].reduction:
            kept = (trial, left, right)
        if trial.reduction >= settings.reduction:
            break
    trial, left, right = kept
    return LoraSolution(
        left=left,
        right=right,
        lamb_forget=trial.lamb_forget,
        objective=trial.objective,
        reduction=trial.reduction,
        reached=not retry or trial.reduction >= settings.reduction,
        trials=trials,
    )


def _descend(
    problem: ForgetProblem,
    settings: LoraSettings,
    generator: torch.Generator,
    report: Callable[[int], None] | None,
) -> tuple[LoraTrial, Tensor, Tensor]:
    """One trial: the summary and the factors left (w, r), right (r, d) of lowest objective."""
    w, d = problem.projection.shape
    scale = problem.alpha / problem.rank
    displacement = problem.displacement  # (k, d)
    bound = 1 / math.sqrt(w)  # kaiming_uniform_(a=sqrt(5)) of a (r, w) matrix
    init = (torch.rand(problem.rank, w, generator=generator) * 2 - 1) * bound
    a = init.to(displacement).requires_grad_()  # (r, w)
    b = torch.zeros(d, problem.rank).to(displacement).requires_grad_()  # (d, r)
    optimizer = torch.optim.Adam([a, b], lr=settings.lr)
    retain = problem.retain_hidden  # (m, w)
    if len(retain) > w:
        # || H_r Delta || = || R Delta || for H_r = Q R: the same norm from (w, w) numbers.
        retain = torch.linalg.qr(retain.double(), mode="r").R.to(displacement)  # (w, w)

    def objective() -> Tensor:
        # Terms through the factors: Delta = scale * A^T B^T is never formed but for its own norm,
        # whose (d, w) product keeps the gradient at B = 0 finite where a Gram matrix would not.
        moved = (problem.forget_hidden @ a.T) @ b.T * scale  # (k, w) -> (k, r) -> (k, d)
        loss = problem.lamb_forget * torch.linalg.matrix_norm(displacement - moved)
        if problem.lamb_preserve and len(retain):
            shifted = (retain @ a.T) @ b.T * scale  # (m, w) -> (m, r) -> (m, d)
            loss = loss + problem.lamb_preserve * torch.linalg.matrix_norm(shifted)
        if problem.lamb_weight:
            loss = loss + problem.lamb_weight * torch.linalg.matrix_norm(b @ a)
        return loss

    history = torch.empty(settings.steps + 1, dtype=displacement.dtype, device=displacement.device)
    best = torch.full_like(history[0], torch.inf)
    best_a, best_b = a.detach().clone(), b.detach().clone()
    for step in range(settings.steps + 1):
        loss = objective()
        history[step] = loss.detach()
        # torch.where instead of a Python branch: no synchronisation with the device per step.
        better = history[step] < best
        best = torch.where(better, history[step], best)
        best_a = torch.where(better, a.detach(), best_a)
        best_b = torch.where(better, b.detach(), best_b)
        if step < settings.steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if report:
                report(step + 1)
    if not torch.isfinite(history).all():
        raise ProblemError("the descent left the range of numbers (NaN): lower the learning rate")
    left, right = best_a.T.contiguous(), (best_b.T * scale).contiguous()  # (w, r), (r, d)
    trial = LoraTrial(
        lamb_forget=problem.lamb_forget,
        objective=float(best),
        reduction=problem.reduction(left @ right),
        step=int(history.argmin()),
        history=history.cpu(),
    )
    return trial, left, right
