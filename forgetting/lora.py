"""The paper's solver: gradient descent on LoRA adapters of the text projection, many at once.

With `Delta = s A^T B^T` and `s = alpha / r`, the two norms that do not see the target are numbers
of size r x r: `||H_r Delta||^2 = s^2 <A G A^T, B^T B>` and `||B A||^2 = <A A^T, B^T B>`, where
`G = H_r^T H_r` is summed once. So a step costs the same however many names are retained, and
requests that share the retain set are descended together, each with its own adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from forgetting.batches import padded, padded_rows, texts_each
from forgetting.checks import POSITIVE, WEIGHT, ProblemError, check, indices, mask, whole
from forgetting.each import solve_each
from forgetting.exact import settle
from forgetting.problem import AUTO, ForgetProblem

BATCH_NUMBERS = 2**22  # numbers of all adapters that are descended together; Adam holds eight such


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
        check(self.steps, whole(1), "steps")
        check(self.max_trials, whole(1), "max_trials")
        check(self.lr, POSITIVE, "lr")
        check(self.lamb_forget_step, WEIGHT, "lamb_forget_step")
        if check(self.reduction, WEIGHT, "reduction") > 1:
            raise ProblemError(f"reduction must lie from 0 to 1, got {self.reduction}")


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
    owner = torch.zeros(len(problem.forget_hidden), dtype=torch.int64)
    leaving = torch.zeros(1, len(problem.retain_hidden), dtype=torch.bool)
    generators = [generator or torch.Generator().manual_seed(0)]
    return solve_lora_each(problem, owner, leaving, generators, settings, on_step)[0]


def solve_lora_each(
    problem: ForgetProblem,
    owner: Tensor,
    leaving: Tensor,
    generators: Sequence[torch.Generator],
    settings: LoraSettings = LoraSettings(),
    on_step: Callable[[int, int], None] | None = None,
) -> list[LoraSolution]:
    """`solve_lora` for R requests together; each ends as it would alone, to rounding.

    Args:
        problem: the texts of all requests, and everything that may be retained beside them. A
            `lamb_forget` of "auto" is each request's own.
        owner: (k,) int64, the request of each text; each of 0 .. R - 1 has at least one.
        leaving: (R, m) bool, which rows of `retain_hidden` leave with a request.
        generators: R of them; each draws the adapters of its request's trials.
        settings, on_step: as in `solve_lora`; the step is that of all requests in descent.
    """
    device, (w, d) = problem.projection.device, problem.projection.shape
    leaving = mask("leaving", leaving, len(problem.retain_hidden)).to(device)
    owner = indices("owner", owner, len(problem.forget_hidden), len(leaving)).to(device)
    lamb_forget = _lamb_forget(problem, owner, leaving)  # (R,)
    found: list[LoraSolution] = []
    size = max(1, BATCH_NUMBERS // (problem.rank * (w + d)))
    for requests in torch.arange(len(leaving), device=device).split(size):
        descent = _Descent(problem, owner, leaving, requests)
        chosen = [generators[i] for i in requests.tolist()]
        found += _retry(descent, lamb_forget[requests], settings, chosen, on_step)
    return found


def _lamb_forget(problem: ForgetProblem, owner: Tensor, leaving: Tensor) -> Tensor:
    """The weight (R,) that each request starts with."""
    count = texts_each(owner, len(leaving))
    if problem.lamb_forget != AUTO:
        return torch.full((len(leaving),), float(problem.lamb_forget), dtype=torch.float64)
    if (count == 1).all():
        return solve_each(problem.part(owner.argsort()), leaving).lamb_forget.cpu()
    alone = [
        settle(problem.part(owner == request, ~gone)).lamb_forget
        for request, gone in enumerate(leaving)
    ]
    return torch.tensor(alone, dtype=torch.float64)


def _retry(
    descent: _Descent,
    lamb_forget: Tensor,
    settings: LoraSettings,
    generators: Sequence[torch.Generator],
    on_step: Callable[[int, int], None] | None,
) -> list[LoraSolution]:
    """Trials for a batch of requests, until each has forgotten or had its last."""
    trials: list[list[LoraTrial]] = [[] for _ in generators]
    kept: list[tuple[LoraTrial, Tensor, Tensor] | None] = [None] * len(generators)
    active = list(range(len(generators)))
    for turn in range(settings.max_trials):
        weights = [float(lamb_forget[i]) + turn * settings.lamb_forget_step for i in active]
        draws = [generators[i] for i in active]
        outcome = descent.run(active, weights, draws, settings, turn, on_step)
        for i, (trial, left, right) in zip(active, outcome, strict=True):
            trials[i].append(trial)
            if kept[i] is None or trial.reduction > kept[i][0].reduction:
                kept[i] = (trial, left, right)
        active = [
            i for i in active if lamb_forget[i] > 0 and trials[i][-1].reduction < settings.reduction
        ]
        if not active:
            break
    return [
        LoraSolution(
            left=left,
            right=right,
            lamb_forget=trial.lamb_forget,
            objective=trial.objective,
            reduction=trial.reduction,
            reached=not lamb_forget[i] > 0 or trial.reduction >= settings.reduction,
            trials=trials[i],
        )
        for i, (trial, left, right) in enumerate(kept)
    ]


class _Descent:
    """A batch of requests, laid out for descents: texts padded to the longest request."""

    def __init__(
        self, problem: ForgetProblem, owner: Tensor, leaving: Tensor, requests: Tensor
    ) -> None:
        self.problem = problem
        like = problem.displacement
        mine = owner[:, None] == requests  # (k, B)
        places, there = padded(mine.T, like.new_ones(len(mine)))  # (B, k')
        there = there[..., None].to(like)  # (B, k', 1)
        self.hidden = problem.forget_hidden[places] * there  # (B, k', w)
        self.displacement = like[places] * there  # (B, k', d)
        retained = problem.double.retain_hidden
        self.gram = (retained.T @ retained).to(like)  # (w, w)
        self.gone, _ = padded_rows(leaving[requests], problem.retain_hidden)  # (B, n, w)

    def run(
        self,
        active: list[int],
        lamb_forget: list[float],
        generators: Sequence[torch.Generator],
        settings: LoraSettings,
        turn: int,
        on_step: Callable[[int, int], None] | None,
    ) -> list[tuple[LoraTrial, Tensor, Tensor]]:
        """One trial of each active request: the summary, and its factors of lowest objective."""
        problem, (w, d), r = self.problem, self.problem.projection.shape, self.problem.rank
        scale = problem.alpha / r
        hidden, target, gone = (x[active] for x in (self.hidden, self.displacement, self.gone))
        lf = torch.tensor(lamb_forget).to(target)  # (B,)
        lp, lw = problem.lamb_preserve, problem.lamb_weight
        bound = 1 / math.sqrt(w)  # kaiming_uniform_(a=sqrt(5)) of a (r, w) matrix
        start = [(torch.rand(r, w, generator=g) * 2 - 1) * bound for g in generators]
        # A (B, r, w) and the transpose of B (B, r, d) side by side: one tensor for Adam.
        factors = torch.cat([torch.stack(start), torch.zeros(len(active), r, d)], dim=2).to(target)
        factors.grad = torch.empty_like(factors)
        a, b = factors[..., :w], factors[..., w:]
        grad_a, grad_b = factors.grad[..., :w], factors.grad[..., w:]
        optimizer = torch.optim.Adam([factors], lr=settings.lr, fused=True)
        history = target.new_empty(settings.steps + 1, len(active))
        best, best_factors = torch.full_like(lf, torch.inf), factors.clone()
        for step in range(settings.steps + 1):
            states = hidden @ a.mT  # (B, k, w) @ (B, w, r) -> (B, k, r)
            missing = torch.baddbmm(target, states, b, alpha=-scale)  # (B, k, d)
            seen = (a.reshape(-1, w) @ self.gram).view_as(a)  # A G, (B, r, w)
            if gone.shape[1]:
                seen = torch.baddbmm(seen, a @ gone.mT, gone, alpha=-1)
            outer, size, moved = b @ b.mT, a @ a.mT, seen @ a.mT  # (B, r, r)
            forget = torch.linalg.vector_norm(missing, dim=(1, 2))  # (B,)
            preserve = scale * _root((moved * outer).sum(dim=(1, 2)))
            weight = _root((size * outer).sum(dim=(1, 2)))
            loss = lf * forget + lp * preserve + lw * weight
            history[step] = loss
            # torch.where instead of a Python branch: no synchronisation with the device per step.
            better = loss < best
            best = torch.where(better, loss, best)
            best_factors = torch.where(better[:, None, None], factors, best_factors)
            if step == settings.steps:
                break
            # Slopes of the norms; a norm that is zero (B starts there) has none.
            by_forget, by_preserve, by_weight = (
                torch.where(norm > 0, factor / norm, 0.0)[:, None, None]
                for norm, factor in (
                    (forget, scale * lf),
                    (preserve, scale**2 * lp),
                    (weight, lw),
                )
            )
            grad_a.copy_(outer @ (by_preserve * seen + by_weight * a))
            grad_a.sub_((by_forget * (b @ missing.mT)) @ hidden)
            grad_b.copy_((by_preserve * moved + by_weight * size) @ b)
            grad_b.sub_((by_forget * states.mT) @ missing)
            optimizer.step()
            if on_step:
                on_step(turn, step + 1)
        if not torch.isfinite(history).all():
            raise ProblemError(
                "the descent left the range of numbers (NaN): lower the learning rate"
            )
        left = best_factors[..., :w].mT.contiguous()  # (B, w, r)
        right = best_factors[..., w:] * scale  # (B, r, d)
        before = torch.linalg.vector_norm(target, dim=(1, 2))
        after = torch.linalg.vector_norm(target - (hidden @ left) @ right, dim=(1, 2))
        reduction = torch.where(
            before > 0, (before - after).abs() / before, (after == 0).to(before)
        ).tolist()
        steps, history = history.argmin(dim=0).tolist(), history.T.cpu()
        return [
            (
                LoraTrial(lamb_forget[i], float(best[i]), reduction[i], steps[i], history[i]),
                left[i],
                right[i],
            )
            for i in range(len(active))
        ]


def _root(square: Tensor) -> Tensor:
    """The root of what is a square but for rounding."""
    return square.clamp(min=0).sqrt()
