"""The paper's solver: gradient descent on LoRA factors of the text projection, many at once.

With `Delta = s A^T B^T` and `s = alpha / r`, the two norms that do not see the target are numbers
of size r x r: `||H_r Delta||^2 = s^2 <A G A^T, B^T B>` and `||B A||^2 = <A A^T, B^T B>`, where
`G = H_r^T H_r` is summed once. So a step costs the same however many names are retained, and
requests that share the retain set are descended together, each with its own adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.optim.adam import adam

from forgetting.errors import ProblemError, shown
from forgetting.io import indices, mask
from forgetting.problem import AUTO, ForgetProblem, LowRankEdit, pad_rows
from forgetting.settings import setting, validate
from forgetting.solvers.exact import solve_each


@dataclass(frozen=True)
class LoraSettings:
    """The paper's constants of the descent and of its retry."""

    steps: int = setting(2000, "optimiser steps of one trial, full batch", 1, 10**6)
    lr: float = setting(0.01, "Adam's learning rate, constant", above=0, high=1e6)
    reduction: float = setting(0.7, "part of the forget norm to go, else another trial", 0, 1)
    lamb_forget_step: float = setting(0.05, "added to lamb_forget before a further trial", 0, 1e6)
    max_trials: int = setting(100, "trials at most; then the best is kept", 1, 10**4)

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class LoraTrial:
    """One descent from a fresh adapter."""

    lamb_forget: float
    objective: float  # the lowest
    reduction: float  # of the forget norm there
    step: int  # number of updates after which the objective was lowest
    history: Tensor  # (steps + 1,), the objective before every update and after the last


@dataclass(frozen=True)
class LoraSolution(LowRankEdit):
    """The change of the trial that was kept, and how it came about."""

    lamb_forget: float
    objective: float
    reduction: float
    reached: bool  # the threshold; True if there was nothing to reach
    trials: list[LoraTrial]  # in the order in which they ran


# Called after every step with the trial, the step, and the norms (3, B) of the B requests that are
# still descended: `||P - H_f (W + Delta)||`, `||H_r Delta||` and `||B A||` before that step.
OnStep = Callable[[int, int, Tensor], None]


def solve_lora(
    problem: ForgetProblem,
    settings: LoraSettings = LoraSettings(),
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> LoraSolution:
    """Descend the paper's objective by Adam on LoRA factors, and retry until it forgets.

    A trial starts from `A` (r, w) Kaiming-uniform with a = sqrt(5) and `B` (d, r) zero. Within a
    trial the adapter of lowest objective is kept. While the forget norm falls by less than
    `settings.reduction`, `lamb_forget` grows and a fresh adapter is trained. If no trial reaches
    the threshold, the one of highest reduction is kept. With `lamb_forget = 0` one trial runs.

    Args:
        problem: what to forget and to retain; the descent has its tensors' dtype and device.
        generator: draws the adapters, on the CPU so that every device starts from the same numbers;
            None: seeded with 0.
        on_step: for a progress bar, see `OnStep`.

    Source: Kravets and Namboodiri, TMLR 2025 (objective, LoRA, Adam, retry).
    """
    owner = torch.zeros(len(problem.forget_hidden), dtype=torch.int64)
    excluded = torch.zeros(1, len(problem.retain_hidden), dtype=torch.bool)
    generators = [generator or torch.Generator().manual_seed(0)]
    return solve_lora_each(problem, owner, excluded, generators, settings, on_step)[0]


def solve_lora_each(
    problem: ForgetProblem,
    owner: Tensor,
    excluded: Tensor,
    generators: Sequence[torch.Generator],
    settings: LoraSettings = LoraSettings(),
    on_step: OnStep | None = None,
) -> list[LoraSolution]:
    """`solve_lora` for R requests together; each ends as it would alone, to rounding.

    Args:
        problem, owner, excluded: as in `forgetting.solvers.exact.solve_each`.
        generators: R of them; each draws the adapters of its request's trials.
        settings, on_step: as in `solve_lora`.

    Raises ProblemError: an owner, a mask or a number of generators that does not fit; numbers that
    leave the range of the dtype.
    """
    device = problem.projection.device
    excluded = mask("excluded", excluded, len(problem.retain_hidden)).to(device)
    owner = indices("owner", owner, len(problem.forget_hidden), len(excluded)).to(device)
    drawn = isinstance(generators, Sequence) and len(generators) == len(excluded)
    if not drawn or not all(isinstance(one, torch.Generator) for one in generators):
        words = f"generators must be {len(excluded)} objects of torch.Generator"
        raise ProblemError(f"{words}, not {shown(generators)}")
    lamb_forget = [problem.lamb_forget] * len(excluded)
    if problem.lamb_forget == AUTO:
        lamb_forget = [one.lamb_forget for one in solve_each(problem, owner, excluded)]
    gram = problem.retain_hidden.double().T @ problem.retain_hidden.double()  # (w, w)
    texts = owner == torch.arange(len(excluded), device=device)[:, None]  # (R, k)
    objective = _Objective(
        problem,
        pad_rows(texts, problem.forget_hidden),
        pad_rows(texts, problem.displacement),
        pad_rows(excluded, problem.retain_hidden),
        gram.to(problem.projection),
    )
    return _descend(objective, lamb_forget, generators, settings, on_step)


def _descend(
    objective: _Objective,
    lamb_forget: list[float],
    generators: Sequence[torch.Generator],
    settings: LoraSettings,
    on_step: OnStep | None,
) -> list[LoraSolution]:
    """Trials of B requests until each has forgotten or had its last."""
    trials: list[list[LoraTrial]] = [[] for _ in lamb_forget]
    kept: dict[int, tuple[LoraTrial, Tensor, Tensor]] = {}
    active = list(range(len(lamb_forget)))
    for turn in range(settings.max_trials):
        weights = [lamb_forget[i] + turn * settings.lamb_forget_step for i in active]
        draws = [generators[i] for i in active]
        report = None if on_step is None else partial(on_step, turn)
        answers = _trial(objective.part(active), weights, draws, settings, report)
        for i, answer in zip(active, answers, strict=True):
            trials[i].append(answer[0])
            if i not in kept or answer[0].reduction > kept[i][0].reduction:
                kept[i] = answer
        active = [i for i in active if trials[i][-1].reduction < settings.reduction]
        active = [i for i in active if lamb_forget[i] > 0]
        if not active:
            break
    solutions = []
    for i, of_request in enumerate(trials):
        best, left, right = kept[i]
        reached = lamb_forget[i] == 0 or best.reduction >= settings.reduction
        numbers = best.lamb_forget, best.objective, best.reduction
        solutions.append(LoraSolution(left, right, *numbers, reached, of_request))
    return solutions


def _trial(
    objective: _Objective,
    lamb_forget: list[float],
    generators: Sequence[torch.Generator],
    settings: LoraSettings,
    on_step: Callable[[int, Tensor], None] | None,
) -> list[tuple[LoraTrial, Tensor, Tensor]]:
    """One trial of B requests: for each its summary, and its best left (w, r) and right (r, d)."""
    problem, like = objective.problem, objective.displacement
    (w, d), r = problem.projection.shape, problem.rank
    bound = 1 / math.sqrt(w)  # kaiming_uniform_(a=sqrt(5)) of a (r, w) matrix
    a = torch.stack([(torch.rand(r, w, generator=g) * 2 - 1) * bound for g in generators])
    # A (B, r, w) and the transpose of B (B, r, d) side by side: one tensor for Adam.
    factors = torch.cat([a, torch.zeros(len(a), r, d)], dim=2).to(like)
    gradient = torch.empty_like(factors)
    # Adam as a function: its class imports torch._dynamo, two seconds of every process.
    update = partial(
        adam,
        params=[factors],
        grads=[gradient],
        exp_avgs=[torch.zeros_like(factors)],
        exp_avg_sqs=[torch.zeros_like(factors)],
        max_exp_avg_sqs=[],
        state_steps=[torch.zeros((), device=factors.device)],
        lr=settings.lr,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        amsgrad=False,
        maximize=False,
        fused=True,
    )
    lf, lp, lw = torch.tensor(lamb_forget).to(like), problem.lamb_preserve, problem.lamb_weight
    history = like.new_empty(settings.steps + 1, len(a))
    best, best_factors = torch.full_like(history[0], torch.inf), factors.clone()
    for step in range(settings.steps + 1):
        norms = objective.norms_and_gradient(factors, lf, gradient)
        history[step] = loss = lf * norms[0] + lp * norms[1] + lw * norms[2]
        # torch.where instead of a Python branch: no synchronisation with the device per step.
        better = loss < best
        best = torch.where(better, loss, best)
        best_factors = torch.where(better[:, None, None], factors, best_factors)
        if step < settings.steps:
            update()
            if on_step:
                on_step(step + 1, norms)
    if not torch.isfinite(history).all():
        raise ProblemError("the descent left the range of numbers (NaN): lower the learning rate")
    left = best_factors[..., :w].mT.contiguous()  # (B, w, r)
    right = best_factors[..., w:] * objective.scale  # (B, r, d)
    reduction, steps = objective.reduction(left, right).tolist(), history.argmin(dim=0).tolist()
    rows = zip(lamb_forget, best.tolist(), reduction, steps, history.T.cpu(), strict=True)
    return list(zip((LoraTrial(*row) for row in rows), left, right, strict=True))


@dataclass(frozen=True)
class _Objective:
    """The paper's objective of B requests, as a function of their LoRA factors."""

    problem: ForgetProblem
    hidden: Tensor  # (B, k, w), the texts of each, padded with rows of zeros, as is what follows
    displacement: Tensor  # (B, k, d)
    excluded: Tensor  # (B, n, w), rows that are not retained in a request
    gram: Tensor  # `H_r^T H_r`, (w, w), of all names

    @property
    def scale(self) -> float:
        """`s = alpha / r`."""
        return self.problem.alpha / self.problem.rank

    def part(self, requests: list[int]) -> _Objective:
        """The objective of some of the requests."""
        rows = (x[requests] for x in (self.hidden, self.displacement, self.excluded))
        return _Objective(self.problem, *rows, self.gram)

    def norms_and_gradient(self, factors: Tensor, lamb_forget: Tensor, gradient: Tensor) -> Tensor:
        """The three norms (3, B), see `OnStep`, at `factors` (B, r, w + d), A and the transpose of
        B side by side; `gradient` is overwritten by the objective's there, with `lamb_forget` (B,)
        in the place of the problem's. A norm that is zero (B starts there) has none."""
        w, scale = self.gram.shape[0], self.scale
        a, b = factors[..., :w], factors[..., w:]
        states = self.hidden @ a.mT  # (B, k, w) @ (B, w, r) -> (B, k, r)
        missing = torch.baddbmm(self.displacement, states, b, alpha=-scale)  # (B, k, d)
        seen = (a.reshape(-1, w) @ self.gram).view_as(a)  # A G, (B, r, w)
        if self.excluded.shape[1]:
            seen = torch.baddbmm(seen, a @ self.excluded.mT, self.excluded, alpha=-1)
        outer, size, moved = b @ b.mT, a @ a.mT, seen @ a.mT  # (B, r, r)
        squares = torch.stack([moved, size]).mul(outer).sum(dim=(2, 3))  # (2, B)
        preserve, weight = squares.clamp(min=0).sqrt()  # squares but for rounding
        forget = torch.linalg.vector_norm(missing, dim=(1, 2))
        norms = torch.stack([forget, scale * preserve, weight])
        lp, lw = self.problem.lamb_preserve, self.problem.lamb_weight
        slopes = torch.stack([scale * lamb_forget / forget, scale**2 * lp / norms[1], lw / weight])
        slopes = torch.where(norms > 0, slopes, 0.0)[..., None, None]
        by_forget, by_preserve, by_weight = slopes  # (B, 1, 1) each
        gradient[..., :w] = outer @ (by_preserve * seen + by_weight * a)
        gradient[..., :w] -= (by_forget * (b @ missing.mT)) @ self.hidden
        gradient[..., w:] = (by_preserve * moved + by_weight * size) @ b
        gradient[..., w:] -= (by_forget * states.mT) @ missing
        return norms

    def reduction(self, left: Tensor, right: Tensor) -> Tensor:
        """`ForgetProblem.reduction` of each request, (B,), for left (B, w, r), right (B, r, d)."""
        target = self.displacement
        before = torch.linalg.vector_norm(target, dim=(1, 2))
        after = torch.linalg.vector_norm(target - (self.hidden @ left) @ right, dim=(1, 2))
        return torch.where(before > 0, (before - after).abs() / before, (after == 0).to(before))
