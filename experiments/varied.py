"""The table of studies: what each varies, setting by setting."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip.audit_texts import audit_rows
from experiments.measure import spectrum_cells
from experiments.solvers import SOLVERS, Answer, task
from experiments.world import Task, World
from forgetting.problem import Request

NEAR = 100  # retained names of the study `retained`
COUNTS = (0, 10, 30, 100, 300, 1000, 3000, 10000)
RANKS = (1, 2, 5, 10, 50)
TERMS = ("forget", "preserve", "weight")
BETAS = (0.0, 0.1, 0.2, 1.0)  # of the target opposite
OTHER_THINGS = ("hypernym",)  # kinds of an audit's texts that name more than the class
SAME = 1e-4  # relative distance below which two hidden states are of one text

Settings = dict[str, dict[str, Any]]  # name of a setting -> what it changes in a `Task`


@dataclass(frozen=True)
class Study:
    """One study.

    Attributes:
        about: what it varies, in a few words.
        vary: the settings of one request under one solver.
        axis: label of a numeric axis; empty: settings are names.
        several: whether all classes at once are a request too.
        cells: further cells of a row.
    """

    about: str
    vary: Callable[[World, Request, str], Settings]
    axis: str = ""
    several: bool = False
    cells: Callable[[World, Task, Answer], dict[str, Any]] | None = None

    def tasks(
        self, world: World, classes: list[str], solvers: Iterable[str] = tuple(SOLVERS)
    ) -> Iterator[Task]:
        """A task for every class, solver and setting."""
        requests = [[name] for name in classes]
        if self.several and 1 < len(classes) < len(world.bundle.classnames):
            requests.append(classes)
        for request in map(world.texts.request, requests):
            for solver in SOLVERS:
                if solver in solvers:
                    for setting, change in self.vary(world, request, solver).items():
                        yield task(world, solver, setting, **{"request": request} | change)


def retained(world: World, request: Request, solver: str) -> Settings:
    """Nothing, random, dissimilar, similar names of the vocabulary, or all of it, retained."""
    pool = world.pool(request)
    rows = normalize(world.bundle.retain_hidden[pool], dim=1)
    cosines = rows @ normalize(request.hidden, dim=1)[0]
    nearest = pool[cosines.argsort(descending=True, stable=True)]
    number = min(NEAR, len(pool) // 2)  # so that similar and dissimilar never overlap
    picks = {
        "none": pool[:0],
        "random": _shuffled(world, request)[:number],
        "dissimilar": nearest[len(pool) - number :],
        "similar": nearest[:number],
        "all": pool,
    }
    return {setting: {"pick": pick} for setting, pick in picks.items()}


def count(world: World, request: Request, solver: str) -> Settings:
    """More and more names of the vocabulary retained, in a random order."""
    pool = _shuffled(world, request)
    picks = {str(size): pool[:size] for size in COUNTS if size < len(pool)} | {"all": pool}
    return {name: {"pick": pick, "place": float(len(pick))} for name, pick in picks.items()}


def terms(world: World, request: Request, solver: str) -> Settings:
    """Each loss term of the paper off; for the constrained form each group of retained names."""
    parts = world.retain.groups if solver == "constrained" else TERMS
    return {"all on": {}} | {f"no {part}": {"off": part} for part in parts}


def targets(world: World, request: Request, solver: str) -> Settings:
    """Where the text is sent; `specific` is computed from the constrained form's retained names."""
    table = {"empty": {"target": "empty"}}
    table |= {f"opposite {beta:g}": {"target": "opposite", "beta": beta} for beta in BETAS}
    table |= {"orthogonal": {"target": "orthogonal"}}
    return table | {f"specific {world.exact.FORGET.BETA:g}": {"target": "specific"}}


def rank(world: World, request: Request, solver: str) -> Settings:
    """LoRA's rank, which also multiplies the weight term, for each class and for all at once.

    The optimum has that weight term but no bound on its rank; the constrained form knows no rank.
    """
    if solver == "constrained":
        return {"rank = classes": {"place": float(len(request.classes))}}
    return {f"rank {number}": {"rank": number, "place": float(number)} for number in RANKS}


def templates(world: World, request: Request, solver: str) -> Settings:
    """Which texts are forgotten: the name, the evaluation prompt, both, and what an audit has."""
    bundle, (name,) = world.bundle, request.classes
    own, prompt = request.hidden, bundle.class_hidden[[world.texts.label[name]]]
    found = {"name": own, "prompt": prompt, "both": torch.cat([own, prompt])}
    rows = audit_rows(bundle).get(name, [])
    for kind in dict.fromkeys(kind for _, kind, _ in rows if kind not in OTHER_THINGS):
        more = torch.stack([hidden for _, k, hidden in rows if k == kind]).to(own)
        found[f"name + {kind}"] = torch.cat([own, more])
    return {setting: {"request": _of(request, setting, rows)} for setting, rows in found.items()}


def spectrum(world: World, request: Request, solver: str) -> Settings:
    """Where the change sits; beside the defaults the least change, which retains nothing."""
    if solver != "constrained":
        return {"default": {}}
    return {"default": {}, "nothing retained": {"pick": torch.empty(0, dtype=torch.int64)}}


STUDIES: dict[str, Study] = {
    "retained": Study("which names of the vocabulary are retained", retained),
    "count": Study("how many names are retained", count, axis="retained names"),
    "terms": Study("loss terms, or retained groups, switched off", terms),
    "targets": Study("where the text is sent", targets),
    "rank": Study("LoRA's rank", rank, axis="rank", several=True),
    "templates": Study("which text is forgotten, judged on the evaluation prompt", templates),
    "spectrum": Study(
        "where in the spectrum of W and G the change sits", spectrum, cells=spectrum_cells
    ),
}


def _shuffled(world: World, request: Request) -> Tensor:
    """The pool of a request in a random order."""
    pool = world.pool(request)
    return pool[torch.randperm(len(pool), generator=world.generator(request.classes, "/names"))]


def _of(request: Request, setting: str, rows: Tensor) -> Request:
    """The class of a request by the hidden states `rows` (k, w), those that repeat an earlier one left out."""
    kept: list[int] = []
    for index, row in enumerate(rows):
        if not any((row - rows[other]).norm() <= SAME * row.norm() for other in kept):
            kept.append(index)
    texts = [f"{setting} {index}" for index in kept]
    return replace(request, texts=texts, hidden=rows[kept], owner=[0] * len(kept))
