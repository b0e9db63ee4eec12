"""Forget completely: solve, look at what text alone says of the answer, and solve again.

One solve puts the texts of a class on their target. Then its other wordings are looked at, and
whether another name lies clearly nearer to the class's text than the class does now. Where a
wording hardly follows, the one that follows least becomes a forgotten text too; where the margin is
small, the target goes further; and those requests are solved again. No image is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from forgetting.adapter import Part, recipe_parts
from forgetting.displacement import AffectedName, Margin, Watch, follow, shares_each, worst
from forgetting.problem import Batch, Paraphrases, Request
from forgetting.retain import RetainSet
from forgetting.settings import setting
from forgetting.solvers.certificate import POOR
from forgetting.solvers.constrained import ConstrainedSolution, Ridge, solve_constrained_each
from forgetting.targets import Specific

JOIN = 3  # wordings of a class that may join its texts: each harms the others a little more
ROUNDS = 8  # times that a request is solved again, at most
SHOWN = 3  # names that are said to feel it
BETAS = (0.05, 0.1, 0.2, 0.4)  # steps of a target that goes further


@dataclass(frozen=True)
class ExactSettings:
    """Constants of complete forgetting: one default for every data set and backbone, found on real
    CLIP features (docs/exact.md). A weight is that of a whole group of retained names."""

    own: float = setting(1.0, "weight of the other classes of the set", 0, 1e6)
    vocabulary: float | None = setting(
        None,
        "weight of the retain vocabulary; none: VOCABULARY_LISTED or VOCABULARY_ALONE",
        low=0,
        high=1e6,
        optional=True,
    )
    vocabulary_listed: float = setting(
        0.03, "weight of the vocabulary where other sets' names are retained", 0, 1e6
    )
    vocabulary_alone: float = setting(0.5, "weight of the vocabulary where none are", 0, 1e6)
    generic: float = setting(
        0.5,
        "part of that weight for generic names, if there is a model to encode them (all of it where "
        "a set has no vocabulary); 0: they are not retained",
        low=0,
        high=1,
    )
    others: float = setting(0.1, "weight of the other sets' classes", 0, 1e6)
    protect: float = setting(
        0.1, "weight of the names of FORGET.PROTECT, beside that of their own", above=0, high=1e6
    )
    mu: float | None = setting(
        None,
        "ridge, in mean squared lengths of a retained hidden state; none: found from the names",
        above=0,
        high=1e6,
        optional=True,
    )
    max_displacement: float | None = setting(
        None,
        "how far the ridge lets retained names move, in distances to their nearest neighbour; none: "
        "MAX_DISPLACEMENT_LISTED or MAX_DISPLACEMENT_ALONE",
        above=0,
        high=1e6,
        optional=True,
    )
    max_displacement_listed: float = setting(
        0.045, "that limit where other sets' names are retained", above=0, high=1e6
    )
    max_displacement_alone: float = setting(0.1, "that limit where none are", above=0, high=1e6)
    specific_ridge: float = setting(
        0.5,
        "ridge of the target specific, in mean squared lengths of a retained embedding",
        above=0,
        high=1e6,
    )
    min_margin: float = setting(
        1.0,
        "BETA is raised for a class until another class lies nearer to the class's text by this "
        "part of the margin that the class had; 0: never",
        low=0,
        high=10,
    )
    min_displacement: float = setting(
        0.5,
        "a paraphrase of the class that moves less than this part of the way of its texts is "
        "forgotten as well; 0: none",
        low=0,
        high=1,
    )


@dataclass(frozen=True)
class World:
    """What requests are solved in, the same for all of them.

    Attributes:
        retain: the names; ridge: `G + mu I` of them.
        projection: `W`, (w, d); bias: (d,), what the model adds to `h W`; None: nothing.
        watch: texts by which images are classified; label: class -> its row there.
        leaving: which retained names leave with each of C classes, (C, n) bool.
        send: the targets `P` (K, d) of requests, and the draws of noise for each: of the requests,
            what leaves, their numbers among all, and the beta of each text, (K,) float64.
        dataset: what the classes belong to, in adapters.
        follow: a wording that goes less of the way joins; margin: wanted, in units of the lead.
        further: whether the target can go further by beta.
        option: how a reader keeps a name from falling, for the notes.
        solved: (n, w), the names' rows of `K_0^-1`, if they serve many requests.
    """

    retain: RetainSet
    ridge: Ridge
    projection: Tensor
    watch: Watch
    label: Mapping[str, int]
    leaving: Callable[[Batch], Tensor]
    send: Callable[[Batch, Tensor, Sequence[int], Tensor], tuple[Tensor, list[int]]]
    dataset: str
    follow: float
    margin: float
    further: bool
    option: str
    bias: Tensor | None = None
    solved: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.projection.device


@dataclass(frozen=True)
class Answer:
    """One request, completely forgotten.

    Attributes:
        first: the request as it was asked; request: with the wordings that joined.
        solution: the change and its proof; betas: how far each class's target went in the end.
        left_retain_set: names that were not retained; draws: of noise, for the target.
        felt: see `forgetting.displacement.Forecast`; marks: of each class; unlisted: group -> rms and
            max.
        parts, recipe: what composing needs.
        shares: of each wording that was looked at, how far it follows; limit: of them.
        option: how a reader keeps a name from falling.
    """

    first: Request
    request: Request
    solution: ConstrainedSolution
    left_retain_set: list[str]
    draws: int
    mu: float
    betas: list[float]
    felt: list[AffectedName]
    marks: list[Margin]
    parts: list[Part]
    recipe: dict[str, Any]
    limit: float
    option: str
    unlisted: dict[str, dict[str, float]] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)

    @property
    def joined(self) -> list[str]:
        """Wordings that became forgotten texts."""
        return self.request.texts[len(self.first.texts) :]

    @property
    def behind(self) -> dict[str, float]:
        """Wordings that hardly follow and did not join, with their shares."""
        free = {t: share for t, share in self.shares.items() if t not in self.request.texts}
        return {text: share for text, share in free.items() if share < self.limit}

    def report(self) -> dict[str, Any]:
        """All of it in JSON values, for logs and adapters."""
        behind, mark = self.behind, worst(self.marks)
        found = {"checked": len(self.shares), "added": self.joined, "lagging": behind}
        return {
            "certificate": asdict(self.solution.certificate),
            "residual": self.solution.residual,
            "texts": self.request.texts,
            "excluded": self.left_retain_set,
            "target_draws": self.draws,
            "mu": self.mu,
            "beta": max(self.betas),
            "forecast": {
                "unlisted": self.unlisted,
                "affected": [one._asdict() for one in self.felt],
                "margin": mark.margin,
                "gap": mark.gap,
            },
            "paraphrases": found,
        }

    def notes(self, own: Sequence[str]) -> list[str]:
        """What a reader should know, a line each; `own`: the classes' names as they are retained,
        which leave with them as a matter of course."""
        notes, gap = [proof(self.solution.certificate.gap)], self.solution.residual
        notes += left_notes(self.left_retain_set, own)
        if gap > POOR:
            notes.append(
                f"warning: texts end {gap:.1e} of their way beside their targets; texts that "
                "repeat each other have different ones"
            )
        if self.joined:
            words = ", ".join(self.joined)
            notes.append(f"forgotten as well, since they hardly followed: {words}")
        if behind := self.behind:
            least = min(behind, key=behind.__getitem__)
            notes.append(
                f"warning: {len(behind)} of {len(self.shares)} wordings hardly follow, least "
                f"{least!r} ({behind[least]:.2f} of the way)"
            )
        if self.felt:
            shown = ", ".join(
                f"{one.name} (-{one.cosine_loss:.3f} of cosine)" for one in self.felt[:SHOWN]
            )
            notes.append(f"by text alone these feel it most: {shown}")
        if falling := [one.name for one in self.felt if one.likely_misclassified]:
            names = ", ".join(falling)
            notes.append(
                f"warning: likely to fall with it: {names} ({self.option} holds a name still)"
            )
        return notes


def left_notes(names: Sequence[str], own: Sequence[str]) -> list[str]:
    """Which names left the retain set, beside those of the forgotten classes themselves."""
    similar = [name for name in names if name not in own]
    return [f"left the retain set: {', '.join(similar)}"] if similar else []


def proof(gap: float) -> str:
    """A certificate's relative gap in words."""
    if gap <= POOR:
        return f"proved optimal to a relative gap of {gap:.1e}"
    return f"warning: not proved optimal (relative gap {gap:.1e}): weights or ridge badly scaled"


def forget_completely(
    world: World,
    requests: Sequence[Request],
    wordings: Mapping[str, Paraphrases],
    beta: float = 0.0,
) -> list[Answer]:
    """Forget each request from the original model.

    Args:
        wordings: other texts of each class, of which `JOIN` may join if they hardly follow.
        beta: where the target starts.

    Raises:
        ProblemError: whatever the solver and the targets refuse.
    """
    first, current = list(requests), list(requests)
    betas = [[float(beta)] * len(request.classes) for request in first]
    answers = _solve(world, first, current, range(len(first)), betas)
    for _ in range(ROUNDS):
        again = []
        for i, answer in enumerate(answers):
            if behind := _behind(world, answer, wordings):
                current[i] = current[i].with_texts(behind)
            elif further := _further(world, answer):
                betas[i] = further
            else:
                continue
            again.append(i)
        if not again:
            break
        some = [[part[i] for i in again] for part in (first, current, betas)]
        for i, answer in zip(again, _solve(world, *some[:2], again, some[2]), strict=True):
            answers[i] = answer
    unlisted = _unlisted(world, answers)
    return [
        replace(answer, unlisted=felt, shares=_shares(world, answer, wordings))
        for answer, felt in zip(answers, unlisted, strict=True)
    ]


def _solve(
    world: World,
    first: Sequence[Request],
    current: Sequence[Request],
    numbers: Sequence[int],
    betas: Sequence[list[float]],
) -> list[Answer]:
    """One solve of each request; `numbers`: their places among all; `betas`: of their classes."""
    retain, ridge, requests = world.retain, world.ridge, Batch(current)
    leaving = world.leaving(requests)  # (C, n)
    each_class = torch.tensor([beta for part in betas for beta in part], dtype=torch.float64)
    target, draws = world.send(requests, leaving, numbers, each_class[requests.owner])
    hidden = requests.hidden.double().to(world.device)
    here = hidden @ world.projection.double()
    if world.bias is not None:
        here = here + world.bias.to(here)
    displacement = target.double().to(world.device) - here  # D = P - (H W + b)
    # A name that leaves with two classes of one request leaves once.
    gone = requests.of_requests(leaving)
    solutions = solve_constrained_each(
        ridge, hidden, displacement, requests.of_text, retain.rows, retain.shares, gone
    )
    rows = [[world.label[name] for name in request.classes] for request in requests]
    felt = world.watch.each(solutions, rows)
    names = [(world.dataset, name) for name in requests.classes]
    texts = requests.hidden, displacement, requests.owner, names
    each = iter(recipe_parts(ridge, *texts, retain.rows, retain.shares, leaving))
    recipe = {
        "objective": "constrained",
        "statistics": retain.statistics.sha256,
        "weights": retain.weights,
        "mu": ridge.mu,
    }
    return [
        Answer(
            first[i],
            request,
            solution,
            left_retain_set=retain.named(gone[i]),
            draws=draws[i],
            mu=ridge.mu,
            betas=betas[i],
            felt=felt[i][0],
            marks=felt[i][1],
            parts=list(islice(each, len(request.classes))),
            recipe=recipe,
            limit=world.follow,
            option=world.option,
        )
        for i, (request, solution) in enumerate(zip(requests, solutions, strict=True))
    ]


def _further(world: World, answer: Answer) -> list[float] | None:
    """The betas, that of each class whose text shows too small a margin a step further; None: all
    are good, or there is no step."""
    if not world.further or not world.margin:
        return None
    found = [
        next((step for step in BETAS if step > beta), beta)
        if mark.margin is not None and mark.margin < world.margin * mark.gap
        else beta
        for mark, beta in zip(answer.marks, answer.betas, strict=True)
    ]
    return None if found == answer.betas else found


def _behind(
    world: World, answer: Answer, wordings: Mapping[str, Paraphrases]
) -> list[tuple[int, str, Tensor]]:
    """Of each class (by number) that may be joined by more the wording that follows its texts
    least, if it hardly does."""
    found, request = [], answer.request
    for number, name in enumerate(request.classes):
        if request.owner.count(number) - answer.first.owner.count(number) >= JOIN:
            continue
        texts, hidden = wordings[name]
        shares = _follow(world, answer, number, hidden).tolist()
        free = [i for i, text in enumerate(texts) if text not in request.texts]
        least = min(free, key=shares.__getitem__, default=None)
        if least is not None and shares[least] < world.follow:
            found.append((number, texts[least], hidden[least]))
    return found


def _follow(world: World, answer: Answer, number: int, hidden: Tensor) -> Tensor:
    """How far wordings (n, w) of a class follow its first text, (n,)."""
    text = answer.request.hidden[answer.request.owner.index(number)]
    left, right = answer.solution.left.float(), answer.solution.right.float()
    return follow(left, right, text.to(world.device), hidden.to(world.device))


def _shares(world: World, answer: Answer, wordings: Mapping[str, Paraphrases]) -> dict[str, float]:
    """How far each wording of the classes follows."""
    return {
        text: share
        for number, name in enumerate(answer.request.classes)
        for text, share in zip(
            wordings[name].texts,
            _follow(world, answer, number, wordings[name].hidden).tolist(),
            strict=True,
        )
    }


def _unlisted(world: World, answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Group -> what names like those of the group would feel that nobody listed."""
    retain, requests = world.retain, Batch([answer.request for answer in answers])
    rows = requests.hidden.double().to(world.device)
    gone = requests.of_requests(world.leaving(requests))
    moved = torch.cat(
        [
            (part @ answer.solution.left.float().to(part)) @ answer.solution.right.float().to(part)
            for part, answer in zip(rows.split(requests.sizes), answers, strict=True)
        ]
    )
    of_names = retain.rows, retain.shares, gone, retain.twin, world.solved
    _, shares = shares_each(world.ridge, rows, moved, requests.of_text, *of_names)
    groups = retain.spread(shares.masked_fill(gone, torch.nan))
    return [
        {
            name: {"rms": rms[i].item(), "max": most[i].item()}
            for name, (rms, most) in groups.items()
        }
        for i in range(len(answers))
    ]


class SpecificTargets:
    """`P` (K, d) of the target `specific` for requests of one retain set, float64.

    Of one beta a class's own target does not depend on which others are forgotten with it, so that
    requests compose: only its own names are taken out of what it is compared with.
    """

    def __init__(
        self, projection: Tensor, retain: RetainSet, lam: float, bias: Tensor | None = None
    ) -> None:
        """Args:
        lam: the ridge, see `Specific`; bias: (d,), what the model adds to `h W`.
        """
        w = projection.double()
        self._rows, self._shares, self._embed = retain.rows, retain.shares, None
        if bias is None:
            self._specific = Specific(w, retain.gram, lam)
            return
        # What is split are embeddings, bias and all: they stand for hidden states under W = I.
        self._embed = w, bias.double()
        self._rows = rows = self._embedded(retain.rows)
        gram = rows.T @ (retain.shares.to(rows)[:, None] * rows)
        self._specific = Specific(torch.eye(len(gram)).to(gram), gram, lam)

    def _embedded(self, hidden: Tensor) -> Tensor:
        if self._embed is None:
            return hidden
        w, bias = self._embed
        return hidden.to(w) @ w + bias

    def __call__(self, requests: Batch, leaving: Tensor, beta: float | Tensor) -> Tensor:
        """Args:
        leaving: (C, n) bool, the names that leave with each class.
        """
        hidden, owner = (x.to(self._rows.device) for x in (requests.hidden, requests.owner))
        names = self._rows, self._shares, leaving[owner]
        return self._specific(self._embedded(hidden), beta, *names)
