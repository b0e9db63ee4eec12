"""Forget completely: solve, check what text alone says of the answer, and solve again.

One solve puts the texts of a class on their target. Then two things are checked: whether other
texts for the class (paraphrases) move with it, and whether another class lies clearly nearer to its
text than it does itself. Where a paraphrase hardly moves, the one that moves least is forgotten
too. Where the margin is small, the target goes further. Those requests are solved again. No image
is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from forgetting.displacement import (
    AffectedName,
    ClassifierTexts,
    Margin,
    displacement_along,
    displacement_ratios,
    worst,
)
from forgetting.errors import number
from forgetting.problem import Batch, Request
from forgetting.retain import RetainSet, key
from forgetting.settings import setting, validate
from forgetting.solvers.certificate import POOR
from forgetting.solvers.constrained import ConstrainedSolution, Ridge, solve_constrained_each
from forgetting.targets import TargetInputs, check_target, takes, targets

MAX_ADDED = 3  # paraphrases of a class that are forgotten too: each harms the others a little more
ROUNDS = 8  # times that a request is solved again, at most
NOTED = 3  # names in a note
BETAS = (0.05, 0.1, 0.2, 0.4)  # steps by which a target goes further
LISTED = {"vocabulary": 0.03, "max_displacement": 0.045}  # where other sets' names are retained
ALONE = {"vocabulary": 0.5, "max_displacement": 0.1}  # where they are not
# For an index of images. Texts that are searched by do not get their length back, as an edited text
# encoder gives it to them: retained names must move less, and less of what is common is removed.
INDEX = {"specific_ridge": 0.05, "ridge": 3e-4}


@dataclass(frozen=True)
class ExactSettings:
    """Settings of complete forgetting, the same for `forget()` and the trainer ForgetExact.

    They were chosen on real CLIP features and serve every data set and backbone (docs/method.md).
    The weights are of whole groups of names, see `forgetting.retain.Group`.
    """

    target: str | Tensor = "specific"  # of `forgetting.targets.TARGETS`, `text:TEXT`, or (d,)
    beta: float = 0.0  # how far beyond zero the targets `opposite` and `specific` go
    noise_std: float = 0.5  # on the empty prompt while it lies nearest to a class to forget
    similarity: float = 0.95  # cosine with a forgotten text that excludes a name; 1: none
    own: float = setting(1.0, "weight of the other classes of the set", 0, 1e6)
    vocabulary: float | None = setting(
        None, "weight of the vocabulary; none: 0.03 beside names of other sets, else 0.5", 0, 1e6
    )
    generic: float = setting(
        0.5, "part of that for a generic vocabulary, all of it where the set has none", 0, 1
    )
    others: float = setting(0.1, "weight of the other sets' classes", 0, 1e6)
    protect: float = setting(0.1, "weight of the protected names, as a group", above=0, high=1e6)
    ridge: float | None = setting(
        None, "in mean squared lengths of a hidden state; none: chosen from the names", 1e-12, 1e6
    )
    max_displacement: float | None = setting(
        None,
        "how far the ridge lets retained names move, in distances to their nearest neighbour; "
        "none: 0.045 beside names of other sets, else 0.1",
        1e-12,
        1e6,
    )
    specific_ridge: float = setting(
        0.5, "of the target specific, in mean squared lengths of an embedding", 1e-12, 1e6
    )
    min_margin: float = setting(
        1.0, "beta is raised until the margin is so many times the gap before; 0: never", 0, 1e3
    )
    min_displacement: float = setting(
        0.5, "a paraphrase that moves a smaller part of the way is forgotten too; 0: none", 0, 1
    )

    def __post_init__(self) -> None:
        validate(self)
        number("noise_std", self.noise_std, low=0, high=1e6)
        number("similarity", self.similarity, above=0, high=1)
        check_target(self.target, self.beta)

    def chosen(self, listed: bool) -> ExactSettings:
        """With the values that depend on whether the names of other sets are retained."""
        defaults = LISTED if listed and self.others > 0 else ALONE
        missing = {name: x for name, x in defaults.items() if getattr(self, name) is None}
        return replace(self, **missing)

    def group_weights(self, listed: bool, vocabulary: bool, generic: bool) -> dict[str, float]:
        """The weight of every group, some of them 0. `listed`: whether the names of other sets can
        be retained; `vocabulary`, `generic`: whether there is a vocabulary of the set, and a
        generic one."""
        common = self.chosen(listed).vocabulary
        part = (self.generic if vocabulary else float(self.generic > 0)) if generic else 0.0
        return {
            "own": self.own,
            "vocabulary": (1 - part) * common if vocabulary else 0.0,
            "others": self.others if listed else 0.0,
            "protect": self.protect,
            "generic": part * common,
        }


class Lagging(NamedTuple):
    """A paraphrase that moves too small a part, `ratio`, of the way of its class (an index)."""

    ratio: float
    owner: int
    text: str
    hidden: Tensor


@dataclass(frozen=True)
class Answer:
    """One request, completely forgotten."""

    request: Request  # with the paraphrases that were added to its texts
    edit: ConstrainedSolution
    displacement: Tensor  # `D = P - (H_f W + b)`, (k, d) float64
    excluded: Tensor  # (C, n) bool, the retained names that are excluded with each class
    excluded_names: list[str]  # with any class
    mu: float  # the ridge in absolute units
    betas: list[float]  # of each class
    margins: list[Margin]
    checked: int  # number of paraphrases that were checked
    lagging: list[Lagging]  # those that lag and are not forgotten themselves, the least ratio first
    affected: list[AffectedName] = field(default_factory=list)  # see `Forecast`
    unlisted: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def added(self) -> list[str]:
        """The paraphrases that were added to the texts."""
        return self.request.texts[len(self.request.texts) - self.request.added :]

    def report(self) -> dict[str, Any]:
        """JSON values for logs and adapters."""
        return {
            "certificate": asdict(self.edit.certificate),
            "residual": self.edit.residual,
            "texts": self.request.texts,
            "excluded": self.excluded_names,
            "mu": self.mu,
            "beta": max(self.betas),
            "forecast": {
                "unlisted": self.unlisted,
                "affected": [name._asdict() for name in self.affected],
                **worst(self.margins)._asdict(),
            },
            "paraphrases": {
                "checked": self.checked,
                "added": self.added,
                "lagging": {one.text: one.ratio for one in self.lagging},
            },
            "notes": self.notes(),
        }

    def notes(self) -> list[str]:
        """What a reader should know, in short lines."""
        notes = [proof(self.edit.certificate.gap)]
        notes += excluded_note(self.excluded_names, self.request.classes)
        if self.edit.residual > POOR:
            missed = f"the texts miss their targets by {self.edit.residual:.1e} of the way"
            notes.append(f"warning: {missed}; texts that repeat each other have different targets")
        if self.added:
            notes.append(f"forgotten too, since they hardly moved: {', '.join(self.added)}")
        if self.lagging:
            least = self.lagging[0]
            notes.append(
                f"warning: {len(self.lagging)} of {self.checked} paraphrases hardly move, least "
                f"{least.text!r} ({least.ratio:.2f} of the way)"
            )
        if most := self.affected[:NOTED]:
            notes.append(f"most affected by text alone: {losses(most)}")
        if names := [one.name for one in self.affected if one.likely_misclassified]:
            notes.append(f"warning: likely misclassified: {', '.join(names)} (protect them)")
        return notes


def losses(names: Sequence[AffectedName]) -> str:
    """Names and the cosine that each loses, in words."""
    return ", ".join(f"{one.name} (-{one.cosine_loss:.3f} cosine)" for one in names)


def excluded_note(names: Sequence[str], classes: Sequence[str]) -> list[str]:
    """How many names are not retained beside the classes themselves, and the first; one line."""
    own = {key(name) for name in classes}
    others = [name for name in names if key(name) not in own]
    some = f"{len(others)} ({', '.join(others[:NOTED])})"
    return [f"names that the model reads like the class are not retained: {some}"] if others else []


def proof(gap: float) -> str:
    """A certificate's relative gap in words."""
    if gap <= POOR:
        return f"proved optimal to a relative gap of {gap:.1e}"
    return f"warning: not proved optimal (relative gap {gap:.1e}): weights or ridge badly scaled"


@dataclass(frozen=True)
class ForgetContext:
    """What requests are solved in, the same for all of them."""

    retain: RetainSet
    ridge: Ridge  # `G + mu I` of the retained names, see `RetainSet.ridge`
    inputs: TargetInputs  # what targets are computed from; it holds W and b
    classifier: ClassifierTexts
    settings: ExactSettings = ExactSettings()  # their ridge is not used: `ridge` was made by it

    def forget(self, requests: Sequence[Request]) -> list[Answer]:
        """Forget each request from the original model. Raises ProblemError: a target that cannot be
        had, or a ridge that is too small."""
        betas = [[float(self.settings.beta)] * len(request.classes) for request in requests]
        answers = self._solve(requests, betas)
        for _ in range(ROUNDS):
            steps = {i: step for i, answer in enumerate(answers) if (step := self._step(answer))}
            if not steps:
                break
            again = self._solve(*zip(*steps.values(), strict=True))
            for i, answer in zip(steps, again, strict=True):
                answers[i] = answer
        return self._with_forecast(answers)

    def _solve(self, requests: Sequence[Request], betas: Sequence[list[float]]) -> list[Answer]:
        """Solve requests once; `betas` are of their classes."""
        batch, retain = Batch(requests), self.retain
        excluded = retain.excluded(batch.same, batch.hidden, batch.owner)  # (C, n)
        any_class = batch.of_requests(excluded)  # a name that two classes exclude counts once
        beta = torch.tensor([x for row in betas for x in row], dtype=torch.float64)[batch.owner]
        target = targets(self.settings.target, batch, self.inputs, beta, excluded)
        hidden = batch.hidden.double().to(target.device)
        displacement = target - self.inputs.embed(hidden)  # D = P - (H W + b)
        edits = solve_constrained_each(self.ridge, hidden, displacement, batch.of_text, any_class)
        margins = self._each(self.classifier.margins, batch, edits)
        displacements = displacement.split(batch.sizes)
        by_class = excluded.split([len(request.classes) for request in batch])
        return [
            Answer(
                request,
                edits[i],
                displacements[i],
                by_class[i],
                retain.named(any_class[i]),
                self.ridge.mu,
                betas[i],
                margins[i],
                *self._lagging(request, edits[i]),
            )
            for i, request in enumerate(batch)
        ]

    def _each(
        self, of: Callable[..., list], batch: Batch, edits: Sequence[ConstrainedSolution]
    ) -> list[list]:
        """What the classifier says of each edit and the rows of its classes."""
        rows = [[self.classifier.label[name] for name in request.classes] for request in batch]
        return list(map(of, self.classifier.texts.edited(edits), rows))

    def _lagging(self, request: Request, edit: ConstrainedSolution) -> tuple[int, list[Lagging]]:
        """The number of paraphrases that are checked, and those that lag: each by how far it moves
        along the first text of its class."""
        limit, checked, found = self.settings.min_displacement, 0, []
        for owner, paraphrases in enumerate(request.paraphrases if limit else ()):
            first = request.hidden[request.owner.index(owner)]
            ratios = displacement_along(edit, first, paraphrases.hidden).tolist()
            checked += len(ratios)
            for ratio, text, hidden in zip(ratios, *paraphrases, strict=True):
                if ratio < limit and text not in request.texts:
                    found.append(Lagging(ratio, owner, text, hidden))
        return checked, sorted(found, key=lambda one: one.ratio)

    def _step(self, answer: Answer) -> tuple[Request, list[float]] | None:
        """What to solve next, with its betas; None if the answer is good.

        Of each class the paraphrase that lags most is added to the texts. Where none is, the beta
        of each class whose margin is too small goes one step further.
        """
        request, settings = answer.request, self.settings
        owners = request.owner[len(request.owner) - request.added :]  # of what was added
        least: dict[int, Lagging] = {}
        for one in answer.lagging:
            if owners.count(one.owner) < MAX_ADDED:
                least.setdefault(one.owner, one)
        if least:
            return request.with_texts([one[1:] for one in least.values()]), answer.betas
        if not takes(settings.target, "beta") or not settings.min_margin:
            return None
        betas = [
            next((step for step in BETAS if step > beta), beta)
            if one.margin is not None and one.margin < settings.min_margin * one.gap
            else beta
            for one, beta in zip(answer.margins, answer.betas, strict=True)
        ]
        return (request, betas) if betas != answer.betas else None

    def _with_forecast(self, answers: Sequence[Answer]) -> list[Answer]:
        """Answers with what text alone says of other names: of those by which images are
        classified, and of names like the retained ones that nobody listed."""
        retain, batch = self.retain, Batch([answer.request for answer in answers])
        edits = [answer.edit for answer in answers]
        affected = self._each(self.classifier.affected, batch, edits)
        excluded = torch.stack([answer.excluded.any(dim=0) for answer in answers])
        moved = torch.cat([answer.displacement for answer in answers])
        of_batch = batch.hidden, moved, batch.of_text, excluded
        ratios = displacement_ratios(self.ridge, *of_batch, retain.variant_of)
        groups = retain.rms_and_max(ratios.masked_fill(excluded, torch.nan))
        return [
            replace(
                answer,
                affected=affected[i],
                unlisted={
                    name: {"rms": float(rms[i]), "max": float(most[i])}
                    for name, (rms, most) in groups.items()
                },
            )
            for i, answer in enumerate(answers)
        ]
