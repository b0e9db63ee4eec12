"""Seconds of the solvers: many requests together, and against the paper's descent.

    python -m benchmarks solver [--features BUNDLE.safetensors]

Every class of the bundle (of 1,000 random texts without one) is forgotten alone while the rest of
its vocabulary is retained, by the paper's objective with its target and weights, in one run on one
CPU thread, as the trainers solve. Seconds vary with the load of the machine, ratios less so.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, median

import pandas as pd
import torch
from torch import Tensor
from torch.linalg import matrix_norm
from torch.nn.functional import normalize

import train
from benchmarks import timed
from clip.bundle import FeatureBundle, bundle_path
from engine.cli import Parser
from engine.determinism import one_thread
from engine.log import quiet
from forgetting import ForgetProblem
from forgetting.problem import Batch
from forgetting.solvers.constrained import Ridge, solve_constrained_each
from forgetting.solvers.exact import solve_each
from forgetting.solvers.lora import LoraSettings, solve_lora_each

DESCENTS = (1, 4, 16, 64)  # that are computed together
KEYS = ["USE_CUDA", "False", "FORGET.LAMB_FORGET", "auto", "FORGET.LAMB_PRESERVE", "0.3"]


def random_bundle(classes: int = 1000, width: int = 512) -> FeatureBundle:
    """Random texts of CLIP's kind, which are their own vocabulary; no images. They have a common
    part of a third, which is also the empty prompt, and variances that fall as 1/rank."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, width + 1).rsqrt()  # (w,)
    common = normalize(torch.randn(1, width, generator=generator), dim=1)  # (1, w)
    common = common * (scale.square().sum() / 2).sqrt()
    hidden = common + scale * torch.randn(classes, width, generator=generator)  # (C, w)
    hidden = 10 * normalize(hidden, dim=1)
    states = dict.fromkeys(("class_hidden", "forget_hidden", "retain_hidden"), hidden)
    names = [f"thing {number}" for number in range(classes)]
    return FeatureBundle(
        image_features=torch.zeros(0, width),
        labels=torch.zeros(0, dtype=torch.int64),
        neutral_hidden=common,
        text_projection=torch.randn(width, width, generator=generator) / width**0.5,
        weights="random",
        split="none",
        template="a photo of a {}.",
        backbone="ViT-B/16",
        dataset="Random",
        **dict.fromkeys(("classnames", "retain_names"), names),
        **states,
    )


def arguments(bundle: FeatureBundle, folder: str, trainer: str) -> list[str]:
    """Those of train.py to forget every class of a bundle, which is written into `folder`."""
    bundle.save(bundle_path(folder, bundle.backbone, bundle.dataset))
    argv = ["--features", folder, "--backbone", bundle.backbone, "--trainer", trainer]
    return [*argv, "--dataset", bundle.dataset, "--forget", "all", "--output-dir", f"{folder}/out"]


def problem_of(bundle: FeatureBundle) -> tuple[ForgetProblem, Tensor]:
    """The trainer's problem for all classes of a bundle, C texts, and the names that are excluded
    with each, (C, m) bool."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        argv = [*arguments(bundle, folder, "ForgetOptimum"), *KEYS]
        trainer = train.build_trainer(train.setup_cfg(train.parse(argv)))
        requests = Batch([trainer.request(classes) for classes in trainer.plan.requests])
        return trainer.problem(requests)[:2]


def together(problem: ForgetProblem, excluded: Tensor) -> pd.DataFrame:
    """Seconds of the exact solvers for all classes at once, with their proofs."""
    double, owner = problem.double, torch.arange(len(excluded))
    rows = double.retain_hidden
    mu = 1e-3 * float(rows.square().sum(dim=1).mean())
    ridge = Ridge(rows, mu, torch.full((len(rows),), 1 / len(rows)))
    texts = double.forget_hidden, double.displacement, owner, excluded
    lines = []
    for name, *call in (
        ("paper's objective", solve_each, problem, owner, excluded),
        ("constrained form", solve_constrained_each, ridge, *texts),
    ):
        seconds, answers = zip(*(timed(*call) for _ in range(3)), strict=True)
        gap = max(answer.certificate.gap for answer in answers[0])
        lines.append((name, len(owner), median(seconds), gap))
    return pd.DataFrame(lines, columns=["solver", "classes", "seconds", "largest gap"])


def plain_descent(problem: ForgetProblem, constants: LoraSettings) -> float:
    """The lowest objective of one trial of the paper's descent, by autograd and torch's Adam."""
    (w, d), rank = problem.projection.shape, problem.rank
    draw = torch.Generator().manual_seed(0)
    a = ((torch.rand(rank, w, generator=draw) * 2 - 1) / w**0.5).requires_grad_()
    b = torch.zeros(d, rank, requires_grad=True)
    optimizer = torch.optim.Adam([a, b], lr=constants.lr)
    retain = torch.linalg.qr(problem.retain_hidden, mode="r").R  # at most w rows of the same norm
    scale, lowest = problem.alpha / rank, float("inf")
    for _ in range(constants.steps):
        moved = (problem.forget_hidden @ a.T) @ b.T * scale  # (k, w) -> (k, r) -> (k, d)
        shifted = (retain @ a.T) @ b.T * scale  # (w, w) -> (w, r) -> (w, d)
        loss = (
            problem.lamb_forget * matrix_norm(problem.displacement - moved)
            + problem.lamb_preserve * matrix_norm(shifted)
            + problem.lamb_weight * matrix_norm(b @ a)
        )
        lowest = min(lowest, float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return lowest


def descents(problem: ForgetProblem, excluded: Tensor) -> pd.DataFrame:
    """Seconds per class of one trial of the paper's descent, alone and together, and how far above
    the proved optimum it ends; first as autograd and torch's Adam do it class by class."""
    owner, constants = torch.arange(len(excluded)), LoraSettings(max_trials=1)
    exact = solve_each(problem, owner, excluded)
    optimum = [answer.certificate.primal for answer in exact]
    single = problem.part(owner[:1], ~excluded[0])
    single = replace(single, lamb_forget=exact[0].lamb_forget)
    alone, lowest = timed(plain_descent, single, constants)
    lines = [("autograd, one by one", 1, alone, 1.0, lowest / optimum[0] - 1)]
    for count in filter(lambda count: count <= len(owner), DESCENTS):
        part = problem.part(owner[:count]), owner[:count], excluded[:count]
        draws = [torch.Generator().manual_seed(0) for _ in range(count)]
        seconds, found = timed(solve_lora_each, *part, draws, constants)
        above = fmean(x.objective / best - 1 for x, best in zip(found, optimum, strict=False))
        lines.append(("together", count, seconds / count, alone * count / seconds, above))
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
    with one_thread():
        tables = {
            "all classes, each forgotten alone": together(problem, excluded),
            "one trial of 2,000 steps": descents(problem, excluded),
        }
    for title, table in tables.items():
        print(f"\n{title}\n{table.to_string(index=False, float_format='{:.3g}'.format)}")
    return tables
