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

from forgetting.errors import ProblemError, shown
from forgetting.io import indices, mask
from forgetting.problem import AUTO, ForgetProblem, LowRankEdit, pad_rows, texts_per_request
from forgetting.settings import setting, validate
from forgetting.solvers.batched import solve_each
from forgetting.solvers.exact import resolve_auto_weight

BATCH_NUMBERS = 2**22  # numbers of all adapters that are descended together; Adam holds eight such


@dataclass(frozen=True)
class LoraSettings:
    """The paper's constants of the descent and of its retry."""

    steps: int = setting(2000, "optimiser steps of one trial, full batch", 1, 10**6)
    lr: float = setting(0.01, "Adam's learning rate, constant", above=0, high=1e6)
    reduction: float = setting(
        0.7, "part of the forget norm that must go, else another trial follows", 0, 1
    )
    lamb_forget_step: float = setting(
        0.05, "added to lamb_forget before every further trial", 0, 1e6
    )
    max_trials: int = setting(100, "trials at most; then the best is kept", 1, 10**4)

    def __post_init__(self) -> None:
        validate(self)


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
class LoraSolution(LowRankEdit):
    """The change of the trial that was kept, and how it came about.

    Attributes:
        lamb_forget, objective, reduction: of the trial that was kept.
        reached: whether its reduction reached the threshold (True if none was asked for).
        trials: all trials in the order in which they ran.
    """

    lamb_forget: float
    objective: float
    reduction: float
    reached: bool
    trials: list[LoraTrial]


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
        generator: draws the adapters, on the CPU so that every device starts from the same numbers;
            None takes a generator seeded with 0. With the same state it gives the same factors.
        on_step: called with (trial, step) after every step, for a progress bar.

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

    Raises:
        ProblemError: an owner, a mask or a number of generators that does not fit.
    """
    device, (w, d) = problem.projection.device, problem.projection.shape
    leaving = mask("leaving", leaving, len(problem.retain_hidden)).to(device)
    owner = indices("owner", owner, len(problem.forget_hidden), len(leaving)).to(device)
    if not isinstance(generators, Sequence) or not all(
        isinstance(one, torch.Generator) for one in generators
    ):
        raise ProblemError(f"generators must be torch.Generator objects, not {shown(generators)}")
    if len(generators) != len(leaving):
        raise ProblemError(f"{len(generators)} generators for {len(leaving)} requests")
    lamb_forget = _lamb_forget(problem, owner, leaving)  # (R,)
    found: list[LoraSolution] = []
    size = max(1, BATCH_NUMBERS // (problem.rank * (w + d)))
    for requests in torch.arange(len(leaving), device=device).split(size):
        chosen = [generators[i] for i in requests.tolist()]
        descent = _Descent(problem, owner, leaving, requests, chosen, settings, on_step)
        found += descent.solve(lamb_forget[requests.cpu()].tolist())
    return found


def _lamb_forget(problem: ForgetProblem, owner: Tensor, leaving: Tensor) -> Tensor:
    """The weight (R,) that each request starts with."""
    count = texts_per_request(owner, len(leaving))
    if problem.lamb_forget != AUTO:
        found = [problem.lamb_forget] * len(leaving)
    elif (count == 1).all():
        found = solve_each(problem.part(owner.argsort()), leaving).lamb_forget.tolist()
    else:
        found = [
            resolve_auto_weight(problem.part(owner == request, ~gone)).lamb_forget
            for request, gone in enumerate(leaving)
        ]
    return torch.tensor(found, dtype=torch.float64)


class _Descent:
    """A batch of B requests, laid out for descents: texts padded to the longest request."""

    def __init__(
        self,
        problem: ForgetProblem,
        owner: Tensor,
        leaving: Tensor,
        requests: Tensor,
        generators: Sequence[torch.Generator],
        settings: LoraSettings,
        on_step: Callable[[int, int], None] | None,
    ) -> None:
        self.problem, self.settings = problem, settings
        self.generators, self.on_step = generators, on_step
        mine = (owner[:, None] == requests).T  # (B, k)
        self.hidden, _ = pad_rows(mine, problem.forget_hidden)  # (B, k', w)
        self.displacement, _ = pad_rows(mine, problem.displacement)  # (B, k', d)
        self.gone, _ = pad_rows(leaving[requests], problem.retain_hidden)  # (B, n, w)
        retained = problem.double.retain_hidden
        self.gram = (retained.T @ retained).to(self.hidden)  # (w, w)

    def solve(self, lamb_forget: list[float]) -> list[LoraSolution]:
        """Trials until each request has forgotten or had its last."""
        settings, active = self.settings, list(range(len(lamb_forget)))
        trials: list[list[LoraTrial]] = [[] for _ in lamb_forget]
        kept: dict[int, tuple[LoraTrial, Tensor, Tensor]] = {}
        for turn in range(settings.max_trials):
            weights = [lamb_forget[i] + turn * settings.lamb_forget_step for i in active]
            for i, one in zip(active, self.trial(active, weights, turn), strict=True):
                trials[i].append(one[0])
                if i not in kept or one[0].reduction > kept[i][0].reduction:
                    kept[i] = one
            active = [
                i
                for i in active
                if lamb_forget[i] > 0 and trials[i][-1].reduction < settings.reduction
            ]
            if not active:
                break
        found = []
        for i, of in enumerate(trials):
            best, left, right = kept[i]
            reached = not lamb_forget[i] > 0 or best.reduction >= settings.reduction
            numbers = best.lamb_forget, best.objective, best.reduction
            found.append(LoraSolution(left, right, *numbers, reached, of))
        return found

    def trial(
        self, active: list[int], lamb_forget: list[float], turn: int
    ) -> list[tuple[LoraTrial, Tensor, Tensor]]:
        """One trial of each active request: the summary, and its factors of lowest objective."""
        problem, (w, d), r = self.problem, self.problem.projection.shape, self.problem.rank
        settings, scale = self.settings, problem.alpha / r
        hidden, target, gone = (x[active] for x in (self.hidden, self.displacement, self.gone))
        lf = torch.tensor(lamb_forget).to(target)  # (B,)
        lp, lw = problem.lamb_preserve, problem.lamb_weight
        bound = 1 / math.sqrt(w)  # kaiming_uniform_(a=sqrt(5)) of a (r, w) matrix
        draws = [self.generators[i] for i in active]
        start = [(torch.rand(r, w, generator=g) * 2 - 1) * bound for g in draws]
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
            if self.on_step:
                self.on_step(turn, step + 1)
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
