"""A data set, the sets beside it, and which names are retained when classes are forgotten."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

import datasets
from clip.bundle import FeatureBundle
from engine.config import paper_weights, settings
from engine.seeds import seeded
from evaluation.results import join_label
from evaluation.zero_shot import class_embeddings
from forgetting import (
    Group,
    RetainSet,
    empty_target,
    opposite_target,
    orthogonal_target,
    specific_target,
)


@dataclass(frozen=True, eq=False)
class Task:
    """One row to make: classes forgotten at once, by one solver, in one setting of a study.

    Attributes:
        labels: of the classes; texts: (k, w), what stands for them; owner: (k,) index into labels.
        solver, setting: names; place: where the setting lies on a numeric axis, NaN if on none.
        target, beta: where texts are sent; rank: of the descent and of the weight term.
        off: a loss term, or a retained group, that is switched off.
        pick: (n,) rows of the vocabulary that alone are retained; None: what the method retains.
    """

    labels: tuple[int, ...]
    texts: Tensor
    owner: tuple[int, ...]
    solver: str
    setting: str
    target: str
    beta: float
    rank: int
    place: float = float("nan")
    off: str = ""
    pick: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Joined:
    """R tasks that share what is retained, their K texts one below the other.

    Attributes:
        texts: (K, w); owner: (K,) the task of each.
        retain: what is retained; leaving: (R, n), which of its names leave with each task;
            by_class: (K, n), which leave with the class of each text alone.
    """

    tasks: Sequence[Task]
    texts: Tensor
    owner: Tensor
    retain: RetainSet
    leaving: Tensor
    by_class: Tensor


def retained_groups(
    bundle: FeatureBundle, others: Iterable[FeatureBundle], weights: Mapping[str, float]
) -> dict[str, Group]:
    """What ForgetExact retains beside a set: the groups that hold names and have weight."""
    others = list(others)
    foreign = [bundle.forget_hidden[:0], *(other.forget_hidden for other in others)]
    held = {
        "own": (bundle.classnames, bundle.forget_hidden),
        "vocabulary": (bundle.retain_names, bundle.retain_hidden),
        "others": ([name for other in others for name in other.classnames], torch.cat(foreign)),
    }
    return {
        group: Group([*map(datasets.plain, names)], rows, weights[group], alike=group != "own")
        for group, (names, rows) in held.items()
        if len(rows) and weights[group] > 0
    }


class World:
    """One data set under one backbone, with everything that can be retained beside its classes.

    Attributes:
        bundle: the set that classes are forgotten from; others: the other sets.
        exact: config of a run of ForgetExact; paper: that of one of ForgetLoRA, for one class
            (False) and for several at once (True).
        retain: what ForgetExact retains; vocabulary: what the paper's objective retains.
        mu: ridge of the constrained form; lam: that of the target specific. Both come from all
            groups together, so that they do not move with what a study retains.
    """

    def __init__(
        self,
        bundle: FeatureBundle,
        others: dict[str, FeatureBundle],
        seed: int = 0,
        opts: Sequence[str] = (),
    ) -> None:
        """Raises UserError: no loss weights for that backbone, or config keys (`opts`, KEY VALUE)
        that do not fit."""
        self.bundle, self.others, self.seed = bundle, others, seed
        names = bundle.dataset, bundle.backbone
        self.exact = settings("ForgetExact", *names, opts)
        self.paper = {
            several: settings("ForgetLoRA", *names, [*opts, "FORGET.MULTICLASS", str(several)])
            for several in (False, True)
        }
        for cfg in self.paper.values():
            paper_weights(cfg)  # refuses missing ones
        node = self.exact.TRAINER.FORGETEXACT
        weights = {group: node[group.upper()] for group in ("own", "vocabulary", "others")}
        groups = retained_groups(bundle, others.values(), weights)
        self.retain = RetainSet(groups, self.exact.FORGET.SIMILARITY)
        self.vocabulary = self.names_alone(self.paper[False].FORGET.SIMILARITY)
        self.mu = self.retain.ridge(node.MU).mu
        w, gram = bundle.text_projection.double(), self.retain.gram
        total = float(self.retain.shares.sum())
        self.lam = node.SHARED * float((gram @ w * w).sum()) / total

    def names_alone(
        self, similarity: float = 1.0, pick: Tensor | None = None, weight: float | None = None
    ) -> RetainSet:
        """The vocabulary (the rows `pick` of it) as a retain set."""
        names = [*map(datasets.plain, self.bundle.retain_names)]
        rows = self.bundle.retain_hidden
        if pick is not None:
            names, rows = [names[row] for row in pick.tolist()], rows[pick]
        return RetainSet({"vocabulary": Group(names, rows, weight)}, similarity)

    def label(self, labels: Sequence[int]) -> str:
        """The classes' names as one, as in logs.json."""
        return join_label([self.bundle.classnames[index] for index in labels])

    def generator(self, labels: Sequence[int], purpose: str = "") -> torch.Generator:
        """Random numbers of these classes; without a purpose those of a run of train.py."""
        return seeded(self.seed, self.bundle.dataset, self.label(labels) + purpose)

    def pool(self, label: int) -> Tensor:
        """(n,) rows of the vocabulary that a study of retained names may pick from: those that
        neither mean the class nor are more similar to it than the limit."""
        names = self.names_alone(self.exact.FORGET.SIMILARITY)
        text, owner = self.bundle.forget_hidden[[label]], torch.zeros(1, dtype=torch.int64)
        return torch.nonzero(~names.leaving(self._same([label]), text, owner)[0])[:, 0]

    def join(self, tasks: Sequence[Task], retain: RetainSet | None = None) -> Joined:
        """Tasks that share what is retained, together.

        Args:
            retain: instead of what the tasks themselves say.
        """
        texts = torch.cat([task.texts for task in tasks])
        owner = torch.arange(len(tasks)).repeat_interleave(
            torch.tensor([len(task.texts) for task in tasks])
        )
        first = tasks[0]
        if first.pick is not None and retain is None:
            pick = torch.cat([task.pick for task in tasks]).unique()
            weight = 1.0 if first.solver == "constrained" else None
            retain = self.names_alone(pick=pick, weight=weight)
            leaving = torch.stack([~torch.isin(pick, task.pick) for task in tasks])
            return Joined(tasks, texts, owner, retain, leaving, leaving[owner])
        if retain is None and first.solver != "constrained":
            retain = self.vocabulary
        elif retain is None:
            groups = {name: g for name, g in self.retain.groups.items() if name != first.off}
            retain = RetainSet(groups, self.retain.similarity) if first.off else self.retain
        same = [names for task in tasks for names in self._same(task.labels)]
        start, classes = 0, []
        for task in tasks:
            classes += [start + index for index in task.owner]
            start += len(task.labels)
        of_class = torch.tensor(classes)
        by_class = retain.leaving(same, texts, of_class)[of_class]
        leaving = torch.stack([by_class[owner == i].any(dim=0) for i in range(len(tasks))])
        return Joined(tasks, texts, owner, retain, leaving, by_class)

    def gram(self, task: Task) -> Tensor:
        """`G` (w, w) float64 of what the solver of a task retains by default."""
        joined = self.join([replace(task, pick=None, off="")])
        stay = ~joined.leaving[0]
        rows = joined.retain.rows[stay].double()
        return (rows.T * joined.retain.shares[stay]) @ rows  # (w, m) @ (m, w) -> (w, w)

    @cached_property
    def singular(self) -> tuple[Tensor, Tensor, Tensor]:
        """The singular value decomposition of W in float64."""
        return torch.linalg.svd(self.bundle.text_projection.double())

    def targets(self, joined: Joined, generators: Sequence[torch.Generator]) -> Tensor:
        """`P` (K, d) float64 of the tasks' texts; `specific` turns round what the names that the
        constrained form retains do not explain."""
        w = self.bundle.text_projection
        found = joined.texts.new_empty(len(joined.texts), w.shape[1]).double()
        specific: dict[float, list[int]] = {}
        for number, (task, generator) in enumerate(zip(joined.tasks, generators, strict=True)):
            mine = joined.owner == number
            if task.target == "specific":
                specific.setdefault(task.beta, []).append(number)
            elif task.target == "opposite":
                found[mine] = opposite_target(task.texts.double(), w.double(), task.beta)
            elif task.target == "orthogonal":
                found[mine] = self._unused.double()
            else:
                found[mine] = self._empty(task, generator).double()
        if specific and joined.tasks[0].solver != "constrained":
            joined = self.join(joined.tasks, self.retain)
        retain = joined.retain
        for beta, numbers in specific.items():
            mine = torch.isin(joined.owner, torch.tensor(numbers))
            parts = retain.rows, retain.shares, joined.by_class[mine]
            found[mine] = specific_target(
                joined.texts[mine], w, retain.gram, self.lam, beta, *parts
            )
        return found

    @cached_property
    def _unused(self) -> Tensor:
        """The direction (1, d) that texts use least."""
        bundle = self.bundle
        texts = torch.cat([bundle.class_hidden, bundle.forget_hidden, bundle.retain_hidden])
        return orthogonal_target(texts @ bundle.text_projection, 1)

    def _empty(self, task: Task, generator: torch.Generator) -> Tensor:
        bundle, std = self.bundle, self.paper[False].FORGET.NOISE_STD
        labels = [task.labels[index] for index in task.owner]
        classes, w = class_embeddings(bundle), bundle.text_projection
        return empty_target(bundle.neutral_hidden, w, classes, labels, generator, std)[0]

    def _same(self, labels: Iterable[int]) -> list[set[str]]:
        """For each class the names that mean the same."""
        names, dataset = self.bundle.classnames, self.bundle.dataset
        return [datasets.same_meaning([names[label]], dataset) for label in labels]
