"""Seconds of the solvers: many requests together, against descents, and in growth.

    python -m benchmarks solver [--features BUNDLE.safetensors]

Every class of the bundle (of 1,000 random texts without one) is forgotten alone while all others
and the vocabulary are retained, the paper's objective with its target and weights. All numbers are
of one run on one CPU thread, as the trainers solve (a second thread waits in a spin on a machine
that others use). Seconds waver with the load of the machine, ratios less so.
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
    RetainStatistics,
    Ridge,
    empty_target,
    solve_constrained_each,
    solve_each,
    solve_exact,
    solve_lora_each,
)
from forgetting.solvers.exact import resolve_auto_weight

NAMES = (10**2, 10**3, 10**4, 10**5, 10**6)
CLASSES = (10, 30, 100, 300, 1000)
WIDTHS = (512, 768, 1024, 1280)
DESCENTS = (1, 4, 16, 64)  # that are taken together
READ = 16_384  # names read at one time
REPEATS = 3


@dataclass(frozen=True)
class Workload:
    """C classes, each to be forgotten alone while everything else is retained.

    Attributes:
        problem: all of them, stacked; leaving: (C, m) bool, each class's own row.
    """

    name: str
    problem: ForgetProblem
    leaving: Tensor

    @classmethod
    def of(cls, name: str, projection: Tensor, classes: Tensor, more: Tensor, target: Tensor):
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
        """The first `count` classes; everything stays retained."""
        problem = self.problem.part(torch.arange(count))
        return Workload(self.name, problem, self.leaving[:count])


def from_bundle(path: str) -> Workload:
    """The classes of a bundle; its vocabulary less the names that are classes is retained too."""
    bundle = FeatureBundle.load(path)
    known = {name.casefold() for name in bundle.classnames}
    free = [i for i, name in enumerate(bundle.retain_names) if name.casefold() not in known]
    w = bundle.text_projection
    embeddings, empty = bundle.class_hidden @ w, bundle.neutral_hidden @ w  # (C, d), (1, d)
    generator = torch.Generator().manual_seed(0)
    targets = [
        empty_target(empty, embeddings, [i], generator)[0] for i in range(len(bundle.classnames))
    ]
    more = bundle.retain_hidden[free]
    name = f"{bundle.dataset}, {bundle.backbone}"
    return Workload.of(name, w, bundle.forget_hidden, more, torch.cat(targets))


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
        found = function()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), found


def together(work: Workload) -> pd.DataFrame:
    """Seconds a class of the exact solvers, for all classes at once."""
    seconds, each = median(lambda: solve_each(work.problem, work.leaving))
    problem, count = work.problem.double, len(work.leaving)
    rows = problem.retain_hidden / len(problem.retain_hidden) ** 0.5
    ridge = Ridge(rows.T @ rows, 1e-3 * float(rows.square().sum()))
    shares = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
    constrained, answers = median(
        lambda: solve_constrained_each(
            ridge,
            problem.forget_hidden,
            problem.displacement,
            torch.arange(count),
            problem.retain_hidden,
            shares,
            work.leaving,
        )
    )
    gaps = [answer.certificate.gap for answer in answers]
    return pd.DataFrame(
        [
            ("paper's objective", count, seconds, each.certify_seconds, float(each.gap.max())),
            ("constrained form", count, constrained, None, max(gaps)),
        ],
        columns=["solver", "classes", "seconds", "of them proving", "largest gap"],
    )


def descents(work: Workload) -> pd.DataFrame:
    """Seconds a class of one trial of the paper's descent, alone and together, and how far above
    the proved optimum it ends; first as autograd and torch's Adam do it class by class."""
    trial = LoraSettings(max_trials=1)
    rows = []
    started = time.perf_counter()
    objective = plain_descent(
        resolve_auto_weight(work.first(1).problem.part(torch.arange(1), ~work.leaving[0]))
    )
    alone = time.perf_counter() - started
    optimum = solve_each(work.problem, work.leaving)
    rows.append(("autograd, one by one", 1, alone, 1.0, objective / float(optimum.primal[0]) - 1))
    for count in DESCENTS:
        if count <= len(work.leaving):
            part = work.first(count)
            draws = [torch.Generator().manual_seed(0) for _ in range(count)]
            started = time.perf_counter()
            found = solve_lora_each(part.problem, torch.arange(count), part.leaving, draws, trial)
            seconds = (time.perf_counter() - started) / count
            above = [
                one.objective / best - 1
                for one, best in zip(found, optimum.primal.tolist(), strict=False)
            ]
            rows.append(("together", count, seconds, alone / seconds, statistics.fmean(above)))
    columns = ["descent", "classes", "seconds a class", "times as fast", "above optimum"]
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
    """One stream of names through `RetainStatistics`, and a class solved from them on the way.

    The names are mixtures of two of the retained texts. `read` is for all names so far, `solve`
    from the w x w matrix to the answer and its proof.
    """
    source, generator = work.problem.retain_hidden[1:], torch.Generator().manual_seed(0)
    names = RetainStatistics(source.shape[1])
    one = work.first(1).problem.double
    seconds, rows, read = 0.0, [], 0
    for count in NAMES:
        while read < count:
            size = min(READ, count - read)
            pick = torch.randint(len(source), (2, size), generator=generator)
            part = torch.rand(size, 1, generator=generator)
            batch = part * source[pick[0]] + (1 - part) * source[pick[1]]  # (size, w)
            started = time.perf_counter()
            names.update("names", batch)
            seconds += time.perf_counter() - started
            read += size
        root = names.root()
        solve, answer = median(lambda root=root: solve_exact(replace(one, retain_hidden=root)))
        rows.append(
            (count, seconds, solve, root.nbytes / 1e6, answer.branch, answer.certificate.gap)
        )
    columns = ["names", "read", "solve", "statistics, MB", "branch", "gap"]
    return pd.DataFrame(rows, columns=columns)


def growth_classes(work: Workload) -> pd.DataFrame:
    """The paper's objective for the first classes, everything retained."""
    rows = []
    for count in CLASSES:
        if count <= len(work.leaving):
            part = work.first(count)
            seconds, _ = median(lambda part=part: solve_each(part.problem, part.leaving))
            rows.append((count, seconds))
    return pd.DataFrame(rows, columns=["classes", "seconds"])


def growth_width() -> pd.DataFrame:
    """The paper's objective for 1,000 classes of random texts of each width, d = w."""
    rows = []
    for width in WIDTHS:
        work = random_workload(CLASSES[-1], width)
        rows.append((width, median(lambda work=work: solve_each(work.problem, work.leaving))[0]))
    return pd.DataFrame(rows, columns=["w = d", "seconds"])


def main(argv: Sequence[str] | None = None) -> dict[str, pd.DataFrame]:
    """Measure and print; returns the tables."""
    parser = Parser(prog="python -m benchmarks solver", description=__doc__.splitlines()[0])
    parser.add_argument("--features", help="a FeatureBundle; random texts without it")
    args = parser.parse_args(argv)
    work = from_bundle(args.features) if args.features else random_workload()
    (w, d), m = work.problem.projection.shape, len(work.problem.retain_hidden)
    print(f"{work.name}: {len(work.leaving)} classes, {m} names, w {w}, d {d}; one thread")
    tables: dict[str, Callable[[], pd.DataFrame]] = {
        "all classes, each forgotten alone": lambda: together(work),
        "one trial of 2,000 steps": lambda: descents(work),
        "names read into the statistics, then one class solved": lambda: growth_names(work),
        "classes of the paper's objective": lambda: growth_classes(work),
        "1,000 classes of random texts of width w": growth_width,
    }
    found = {}
    with one_thread():
        for title, measure in tables.items():
            found[title] = measure()
            print(f"\n{title}\n{found[title].to_string(index=False, float_format='{:.3g}'.format)}")
    return found
