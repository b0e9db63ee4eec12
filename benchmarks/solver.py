"""Seconds of the solvers: many requests together, and against the paper's descent.

    python -m benchmarks solver [--features BUNDLE.safetensors]

Every class of the bundle (of 1,000 random texts without one) is forgotten alone while all others
and the vocabulary are retained, the paper's objective with its target and weights, in one run on
one CPU thread, as the trainers solve. Seconds vary with the load of the machine, ratios less so.
"""

import statistics
import time
import timeit
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip.bundle import FeatureBundle
from engine.cli import Parser
from engine.config import settings
from engine.determinism import one_thread
from experiments.variants import Variant, descend
from forgetting import (
    ForgetProblem,
    LoraSettings,
    Ridge,
    solve_constrained_each,
    solve_each,
    solve_exact,
    solve_lora_each,
)

DESCENTS = (1, 4, 16, 64)  # that are computed together


def problem_of(bundle: FeatureBundle) -> tuple[ForgetProblem, Tensor]:
    """The classes of a bundle, C stacked problems, and the names that are excluded with each (its
    own), (C, m) bool. The vocabulary less the names that are classes is retained too."""
    known = {name.casefold() for name in bundle.classnames}
    free = [i for i, name in enumerate(bundle.retain_names) if name.casefold() not in known]
    retained = torch.cat([bundle.forget_hidden, bundle.retain_hidden[free]])
    target = normalize(bundle.neutral_hidden @ bundle.text_projection, dim=1)
    cfg = settings("ForgetOptimum", opts=("FORGET.LAMB_PRESERVE", "0.3"))
    problem = ForgetProblem(
        projection=bundle.text_projection,
        forget_hidden=bundle.forget_hidden,
        retain_hidden=retained,
        target=target.expand(len(bundle.classnames), -1).clone(),
        lamb_forget="auto",
        lamb_preserve=cfg.FORGET.LAMB_PRESERVE,
        lamb_weight=cfg.FORGET.LAMB_WEIGHT,
        rank=cfg.FORGET.RANK,
        alpha=cfg.FORGET.ALPHA,
    )
    return problem, torch.eye(len(bundle.classnames), len(retained)).bool()


def random_bundle(classes: int = 1000, width: int = 512) -> FeatureBundle:
    """Random texts of CLIP's kind, which are their own vocabulary; no images. They have a common
    part of a third, which is also the empty prompt, and variances that fall as 1/rank."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, width + 1).rsqrt()  # (w,)
    common = normalize(torch.randn(1, width, generator=generator), dim=1)  # (1, w)
    common = common * (scale.square().sum() / 2).sqrt()
    hidden = common + scale * torch.randn(classes, width, generator=generator)  # (C, w)
    hidden = 10 * normalize(hidden, dim=1)
    texts = [f"thing {number}" for number in range(classes)]
    return FeatureBundle(
        image_features=torch.zeros(0, width),
        labels=torch.zeros(0, dtype=torch.int64),
        class_hidden=hidden,
        forget_hidden=hidden,
        retain_hidden=hidden,
        neutral_hidden=common,
        text_projection=torch.randn(width, width, generator=generator) / width**0.5,
        weights="random",
        split="none",
        template="a photo of a {}.",
        classnames=texts,
        retain_names=texts,
        backbone="ViT-B/16",
        dataset="Random",
    )


def together(problem: ForgetProblem, excluded: Tensor) -> pd.DataFrame:
    """Seconds of the exact solvers for all classes at once, with their proofs."""
    double, owner = problem.double, torch.arange(len(excluded))
    rows = double.retain_hidden
    mu = 1e-3 * float(rows.square().sum(dim=1).mean())
    ridge = Ridge(rows, mu, torch.full((len(rows),), 1 / len(rows)))
    texts = double.forget_hidden, double.displacement, owner, excluded
    lines = []
    for name, solve in {
        "paper's objective": lambda: solve_each(problem, owner, excluded),
        "constrained form": lambda: solve_constrained_each(ridge, *texts),
    }.items():
        seconds = statistics.median(timeit.repeat(solve, number=1, repeat=3))
        answers = solve()
        lines.append((name, len(owner), seconds, max(x.certificate.gap for x in answers)))
    return pd.DataFrame(lines, columns=["solver", "classes", "seconds", "largest gap"])


def descents(problem: ForgetProblem, excluded: Tensor) -> pd.DataFrame:
    """Seconds per class of one trial of the paper's descent, alone and together, and how far above
    the proved optimum it ends; first as autograd and torch's Adam do it class by class."""
    owner = torch.arange(len(excluded))
    optimum = [x.certificate.primal for x in solve_each(problem, owner, excluded)]
    single = problem.part(owner[:1], ~excluded[0])
    single = replace(single, lamb_forget=solve_exact(single).lamb_forget)
    constants, draw = LoraSettings(max_trials=1), torch.Generator().manual_seed(0)
    started = time.perf_counter()
    trial = descend(single, constants, Variant("plain"), draw, None)
    alone = time.perf_counter() - started
    excess = float(single.objective(trial.answer)) / optimum[0] - 1
    lines = [("autograd, one by one", 1, alone, 1.0, excess)]
    for count in filter(lambda count: count <= len(owner), DESCENTS):
        part = problem.part(owner[:count]), owner[:count], excluded[:count]
        draws = [torch.Generator().manual_seed(0) for _ in range(count)]
        started = time.perf_counter()
        solutions = solve_lora_each(*part, draws, constants)
        seconds = (time.perf_counter() - started) / count
        excess = statistics.fmean(
            answer.objective / best - 1 for answer, best in zip(solutions, optimum, strict=False)
        )
        lines.append(("together", count, seconds, alone / seconds, excess))
    columns = ["descent", "classes", "seconds per class", "times as fast", "above optimum"]
    return pd.DataFrame(lines, columns=columns)


def main(argv: Sequence[str] | None = None) -> dict[str, pd.DataFrame]:
    """Measure and print; returns the tables."""
    parser = Parser(prog="python -m benchmarks solver", description=__doc__.splitlines()[0])
    parser.add_argument("--features", help="a FeatureBundle; random texts without it")
    args = parser.parse_args(argv)
    bundle = FeatureBundle.load(args.features) if args.features else random_bundle()
    problem, excluded = problem_of(bundle)
    (count, names), (w, d) = excluded.shape, problem.projection.shape
    print(f"{bundle.dataset}: {count} classes, {names} names, w {w}, d {d}; one thread")
    results = {}
    with one_thread():
        for title, measure in {
            "all classes, each forgotten alone": together,
            "one trial of 2,000 steps": descents,
        }.items():
            results[title] = measure(problem, excluded)
            table = results[title].to_string(index=False, float_format="{:.3g}".format)
            print(f"\n{title}\n{table}")
    return results
