"""The table of studies: what each varies, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip.audit_texts import audit_rows
from experiments.solvers import DEFAULT_TARGETS, SOLVERS, Answer
from experiments.spectrum import spectrum_cells
from experiments.world import Task, World

NEAR = 100  # retained names of the study `retained`
COUNTS = (0, 10, 30, 100, 300, 1000, 3000, 10000)
RANKS = (1, 2, 5, 10, 50)
TERMS = ("forget", "preserve", "weight")
BETAS = (0.0, 0.1, 0.2, 1.0)  # of the target opposite
OTHER_THINGS = ("hypernym",)  # kinds of an audit's texts that name more than the class
SAME = 1e-4  # relative distance below which two hidden states are of one text

Tasks = Iterator[Task]


@dataclass(frozen=True)
class Study:
    """One study.

    Attributes:
        about: what it varies, in a few words.
        tasks: its rows for the chosen labels; those of other solvers than asked for are left out.
        axis: label of a numeric axis; empty: settings are names.
        cells: further cells of a row.
    """

    about: str
    tasks: Callable[[World, Sequence[int]], Tasks]
    axis: str = ""
    cells: Callable[[World, Task, Answer], dict[str, Any]] | None = None


def task(
    world: World, labels: Sequence[int], solver: str, setting: str, texts=None, **more: Any
) -> Task:
    """A task with the method's defaults where `more` says nothing; texts: (k, w) of one class."""
    hidden = world.bundle.forget_hidden[list(labels)] if texts is None else texts
    owner = tuple(range(len(labels))) if texts is None else (0,) * len(texts)
    defaults = {
        "target": DEFAULT_TARGETS[solver],
        "beta": world.exact.FORGET.BETA,
        "rank": world.paper[False].FORGET.RANK,
    }
    return Task(tuple(labels), hidden, owner, solver, setting, **defaults | more)


def retained(world: World, labels: Sequence[int]) -> Tasks:
    """Nothing, random, dissimilar, similar names of the vocabulary, or all of it, retained."""
    for label in labels:
        text = world.bundle.forget_hidden[[label]]
        pool = world.pool(label)
        cosines = normalize(world.bundle.retain_hidden[pool], dim=1) @ normalize(text, dim=1)[0]
        nearest = pool[cosines.argsort(descending=True, stable=True)]
        number = min(NEAR, len(pool) // 2)  # so that similar and dissimilar never overlap
        picks = {
            "none": pool[:0],
            "random": _shuffled(world, label, pool)[:number],
            "dissimilar": nearest[len(pool) - number :],
            "similar": nearest[:number],
            "all": pool,
        }
        for solver in SOLVERS:
            for setting, pick in picks.items():
                yield task(world, [label], solver, setting, pick=pick)


def count(world: World, labels: Sequence[int]) -> Tasks:
    """More and more names of the vocabulary retained, in a random order."""
    for label in labels:
        pool = _shuffled(world, label, world.pool(label))
        sizes = [size for size in COUNTS if size < len(pool)] + [len(pool)]
        for solver in SOLVERS:
            for size in sizes:
                setting = "all" if size == len(pool) else str(size)
                yield task(world, [label], solver, setting, pick=pool[:size], place=float(size))


def terms(world: World, labels: Sequence[int]) -> Tasks:
    """Each loss term of the paper off; for the constrained form each group of retained names."""
    for label in labels:
        for solver in SOLVERS:
            parts = world.retain.groups if solver == "constrained" else TERMS
            yield task(world, [label], solver, "all on")
            for part in parts:
                yield task(world, [label], solver, f"no {part}", off=part)


def targets(world: World, labels: Sequence[int]) -> Tasks:
    """Where the text is sent; `specific` is computed from the constrained form's retained names."""
    table = {"empty": ("empty", 0.0)}
    table |= {f"opposite {beta:g}": ("opposite", beta) for beta in BETAS}
    table["orthogonal"] = ("orthogonal", 0.0)
    table[f"specific {world.exact.FORGET.BETA:g}"] = ("specific", world.exact.FORGET.BETA)
    for label in labels:
        for solver in SOLVERS:
            for setting, (target, beta) in table.items():
                yield task(world, [label], solver, setting, target=target, beta=beta)


def rank(world: World, labels: Sequence[int]) -> Tasks:
    """LoRA's rank, which also multiplies the weight term, for each class and for all at once.

    The optimum has that weight term but no bound on its rank; the constrained form knows no rank.
    """
    requests = [[label] for label in labels]
    if 1 < len(labels) < len(world.bundle.classnames):
        requests.append(list(labels))
    for request in requests:
        for solver in ("lora", "optimum"):
            for number in RANKS:
                setting = f"rank {number}"
                yield task(world, request, solver, setting, rank=number, place=float(number))
        place = float(len(request))
        yield task(world, request, "constrained", "rank = classes", place=place)


def templates(world: World, labels: Sequence[int]) -> Tasks:
    """Which texts are forgotten: the name, the evaluation prompt, both, and what an audit has."""
    bundle = world.bundle
    for label in labels:
        name, prompt = bundle.forget_hidden[[label]], bundle.class_hidden[[label]]
        settings = {"name": name, "prompt": prompt, "both": torch.cat([name, prompt])}
        rows = audit_rows(bundle, bundle.classnames[label])
        for kind in dict.fromkeys(kind for _, kind, _ in rows if kind not in OTHER_THINGS):
            more = torch.stack([hidden for _, k, hidden in rows if k == kind]).to(name)
            settings[f"name + {kind}"] = torch.cat([name, more])
        for solver in SOLVERS:
            for setting, hidden in settings.items():
                yield task(world, [label], solver, setting, texts=_distinct(hidden))


def spectrum(world: World, labels: Sequence[int]) -> Tasks:
    """Where the change sits; beside the defaults the least change, which retains nothing."""
    nothing = torch.empty(0, dtype=torch.int64)
    for label in labels:
        for solver in SOLVERS:
            yield task(world, [label], solver, "default")
        yield task(world, [label], "constrained", "nothing retained", pick=nothing)


STUDIES: dict[str, Study] = {
    "retained": Study("which names of the vocabulary are retained", retained),
    "count": Study("how many names are retained", count, axis="retained names"),
    "terms": Study("loss terms, or retained groups, switched off", terms),
    "targets": Study("where the text is sent", targets),
    "rank": Study("LoRA's rank", rank, axis="rank"),
    "templates": Study("which text is forgotten, judged on the evaluation prompt", templates),
    "spectrum": Study(
        "where in the spectrum of W and G the change sits", spectrum, cells=spectrum_cells
    ),
}


def _shuffled(world: World, label: int, pool: Tensor) -> Tensor:
    order = torch.randperm(len(pool), generator=world.generator((label,), "/names"))
    return pool[order]


def _distinct(rows: Tensor) -> Tensor:
    """Rows (k, w) without those that repeat an earlier one."""
    kept: list[int] = []
    for index, row in enumerate(rows):
        if not any((row - rows[other]).norm() <= SAME * row.norm() for other in kept):
            kept.append(index)
    return rows[kept]
