"""Seconds of the solvers: many requests together, against descents, and in growth.

    python -m benchmarks solver [--features BUNDLE.safetensors]

Every class of the bundle (of 1,000 random texts without one) is forgotten alone while all others
and the vocabulary are retained, the paper's objective with its target and weights. All numbers are
of one run on one CPU thread, as the trainers solve (a second thread waits in a spin on a machine
that others use). Seconds vary with the load of the machine, ratios less so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip.bundle import FeatureBundle
from engine.cli import Parser
from engine.config import settings
from engine.determinism import one_thread
from forgetting import (
    ForgetProblem,
    LoraSettings,
    Ridge,
    solve_constrained_each,
    solve_each,
    solve_exact,
    solve_lora_each,
)
from forgetting.solvers.exact import ExactSolution

NAMES = (10**2, 10**3, 10**4, 10**5)
CLASSES = (10, 30, 100, 300, 1000)
WIDTHS = (512, 768, 1024, 1280)
DESCENTS = (1, 4, 16, 64)  # that are computed together
REPEATS = 3


@dataclass(frozen=True)
class Workload:
    """C classes, each to be forgotten alone while everything else is retained.

    Attributes:
        problem: all of them, stacked; excluded: (C, m) bool, each class's own row.
    """

    name: str
    problem: ForgetProblem
    excluded: Tensor

    @classmethod
    def of(
        cls, name: str, projection: Tensor, classes: Tensor, more: Tensor, target: Tensor
    ) -> Workload:
        """Of hidden states (C, w) of classes and (M, w) of further names, with targets (C, d)."""
        cfg = settings("ForgetOptimum", opts=("FORGET.LAMB_PRESERVE", "0.3"))
        problem = ForgetProblem(
            projection=projection,
            forget_hidden=classes,
            retain_hidden=torch.cat([classes, more]),
            target=target,
            lamb_forget="auto",
            lamb_preserve=cfg.FORGET.LAMB_PRESERVE,
            lamb_weight=cfg.FORGET.LAMB_WEIGHT,
            rank=cfg.FORGET.RANK,
            alpha=cfg.FORGET.ALPHA,
        )
        return cls(name, problem, torch.eye(len(classes), len(classes) + len(more)).bool())

    def first(self, count: int) -> Workload:
        """The first `count` classes; all names stay."""
        problem = self.problem.part(torch.arange(count))
        return Workload(self.name, problem, self.excluded[:count])

    def solve(self) -> list[ExactSolution]:
        return solve_each(self.problem, torch.arange(len(self.excluded)), self.excluded)


def from_bundle(path: str) -> Workload:
    """The classes of a bundle; its vocabulary less the names that are classes is retained too."""
    bundle = FeatureBundle.load(path)
    known = {name.casefold() for name in bundle.classnames}
    free = [i for i, name in enumerate(bundle.retain_names) if name.casefold() not in known]
    target = normalize(bundle.neutral_hidden @ bundle.text_projection, dim=1)
    return Workload.of(
        f"{bundle.dataset}, {bundle.backbone}",
        bundle.text_projection,
        bundle.forget_hidden,
        bundle.retain_hidden[free],
        target.expand(len(bundle.classnames), -1).clone(),
    )


def random_workload(classes: int = 1000, width: int = 512) -> Workload:
    """Random texts of CLIP's kind: a common part of a third and variances that fall as 1/rank.

    The projection is (w, w); the target is the unit-norm embedding of the common part.
    """
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, width + 1).rsqrt()  # (w,)
    common = normalize(torch.randn(1, width, generator=generator), dim=1)  # (1, w)
    common = common * (scale.square().sum() / 2).sqrt()
    hidden = common + scale * torch.randn(classes, width, generator=generator)  # (C, w)
    projection = torch.randn(width, width, generator=generator) / width**0.5
    target = normalize(common @ projection, dim=1).expand(classes, -1).clone()  # (C, w)
    hidden = 10 * normalize(hidden, dim=1)
    return Workload.of(f"random, w = d = {width}", projection, hidden, hidden[:0], target)


def median(function: Callable[[], Any], repeats: int = REPEATS) -> tuple[float, Any]:
    """Median seconds of some calls, and what the last one gave."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        answer = function()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), answer


def together(work: Workload) -> pd.DataFrame:
    """Seconds of the exact solvers for all classes at once, with their proofs."""
    seconds, each = median(work.solve)
    problem, count = work.problem.double, len(work.excluded)
    rows = problem.retain_hidden
    mu = 1e-3 * float(rows.square().sum(dim=1).mean())
    ridge = Ridge(rows, mu, torch.full((len(rows),), 1 / len(rows)))
    of_all = problem.forget_hidden, problem.displacement, torch.arange(count)
    constrained, answers = median(lambda: solve_constrained_each(ridge, *of_all, work.excluded))
    gap = max(answer.certificate.gap for answer in answers)
    return pd.DataFrame(
        [
            ("paper's objective", count, seconds, max(x.certificate.gap for x in each)),
            ("constrained form", count, constrained, gap),
        ],
        columns=["solver", "classes", "seconds", "largest gap"],
    )


def descents(work: Workload) -> pd.DataFrame:
    """Seconds per class of one trial of the paper's descent, alone and together, and how far above
    the proved optimum it ends; first as autograd and torch's Adam do it class by class."""
    trial = LoraSettings(max_trials=1)
    single = work.first(1).problem.part(torch.arange(1), ~work.excluded[0])
    started = time.perf_counter()
    objective = plain_descent(replace(single, lamb_forget=solve_exact(single).lamb_forget))
    alone = time.perf_counter() - started
    optimum = [answer.certificate.primal for answer in work.solve()]
    rows = [("autograd, one by one", 1, alone, 1.0, objective / optimum[0] - 1)]
    for count in filter(lambda count: count <= len(work.excluded), DESCENTS):
        part = work.first(count)
        draws = [torch.Generator().manual_seed(0) for _ in range(count)]
        started = time.perf_counter()
        solutions = solve_lora_each(part.problem, torch.arange(count), part.excluded, draws, trial)
        seconds = (time.perf_counter() - started) / count
        excess = statistics.fmean(
            answer.objective / best - 1 for answer, best in zip(solutions, optimum, strict=False)
        )
        rows.append(("together", count, seconds, alone / seconds, excess))
    columns = ["descent", "classes", "seconds per class", "times as fast", "above optimum"]
    return pd.DataFrame(rows, columns=columns)


def plain_descent(problem: ForgetProblem) -> float:
    """The lowest objective of a trial written down plainly: norms of products, autograd, Adam."""
    w, d = problem.projection.shape
    constants, scale = LoraSettings(), problem.alpha / problem.rank
    start = torch.rand(problem.rank, w, generator=torch.Generator().manual_seed(0))
    a = ((start * 2 - 1) * w**-0.5).requires_grad_()  # (r, w)
    b = torch.zeros(d, problem.rank, requires_grad=True)  # (d, r)
    optimizer = torch.optim.Adam([a, b], lr=constants.lr)
    best = torch.tensor(torch.inf)
    for _ in range(constants.steps):
        moved = (problem.forget_hidden @ a.T) @ b.T * scale  # (k, d)
        loss = problem.lamb_forget * torch.linalg.matrix_norm(problem.displacement - moved)
        shifted = (problem.retain_hidden @ a.T) @ b.T * scale  # (m, d)
        loss = loss + problem.lamb_preserve * torch.linalg.matrix_norm(shifted)
        loss = loss + problem.lamb_weight * torch.linalg.matrix_norm(b @ a)
        best = torch.minimum(best, loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(best)


def growth_names(work: Workload) -> pd.DataFrame:
    """One class solved while ever more names are retained, mixtures of two of the workload's."""
    source, generator = work.problem.retain_hidden[1:], torch.Generator().manual_seed(0)
    single, rows = work.first(1).problem, []
    for count in NAMES:
        pick = torch.randint(len(source), (2, count), generator=generator)
        part = torch.rand(count, 1, generator=generator)
        names = part * source[pick[0]] + (1 - part) * source[pick[1]]  # (count, w)
        problem = replace(single, retain_hidden=names)
        seconds, answer = median(lambda problem=problem: solve_exact(problem))
        rows.append((count, seconds, answer.branch, answer.certificate.gap))
    return pd.DataFrame(rows, columns=["names", "seconds", "branch", "gap"])


def growth_classes(work: Workload) -> pd.DataFrame:
    """The paper's objective for the first classes, everything retained."""
    parts = [work.first(count) for count in CLASSES if count <= len(work.excluded)]
    rows = [(len(part.excluded), median(part.solve)[0]) for part in parts]
    return pd.DataFrame(rows, columns=["classes", "seconds"])


def growth_width() -> pd.DataFrame:
    """The paper's objective for 1,000 classes of random texts of each width, d = w."""
    rows = []
    for width in WIDTHS:
        work = random_workload(CLASSES[-1], width)
        rows.append((width, median(work.solve)[0]))
    return pd.DataFrame(rows, columns=["w = d", "seconds"])


def main(argv: Sequence[str] | None = None) -> dict[str, pd.DataFrame]:
    """Measure and print; returns the tables."""
    parser = Parser(prog="python -m benchmarks solver", description=__doc__.splitlines()[0])
    parser.add_argument("--features", help="a FeatureBundle; random texts without it")
    args = parser.parse_args(argv)
    work = from_bundle(args.features) if args.features else random_workload()
    (w, d), m = work.problem.projection.shape, len(work.problem.retain_hidden)
    print(f"{work.name}: {len(work.excluded)} classes, {m} names, w {w}, d {d}; one thread")
    tables: dict[str, Callable[[], pd.DataFrame]] = {
        "all classes, each forgotten alone": lambda: together(work),
        "one trial of 2,000 steps": lambda: descents(work),
        "one class, more names": lambda: growth_names(work),
        "classes of the paper's objective": lambda: growth_classes(work),
        "1,000 classes of random texts of width w": growth_width,
    }
    results = {}
    with one_thread():
        for title, measure in tables.items():
            results[title] = measure()
            table = results[title].to_string(index=False, float_format="{:.3g}".format)
            print(f"\n{title}\n{table}")
    return results
