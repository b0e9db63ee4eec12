"""Forget completely: solve, check what text alone says of the answer, and solve again.

One solve puts the texts of a class on their target. Then two things are checked: whether other
texts for the class (paraphrases) move with it, and whether another class lies clearly nearer to its
text than it does itself. Where a paraphrase hardly moves, the one that moves least is forgotten
too. Where the margin is small, the target goes further. Those requests are solved again. No image
is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

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
from forgetting.targets import WITH_BETA, TargetInputs, check_target, targets

MAX_ADDED = 3  # paraphrases of a class that are forgotten too: each harms the others a little more
ROUNDS = 8  # times that a request is solved again, at most
NOTED = 3  # affected names in a note
BETAS = (0.05, 0.1, 0.2, 0.4)  # steps by which a target goes further
LISTED = {"vocabulary": 0.03, "max_displacement": 0.045}  # where other sets' names are retained
ALONE = {"vocabulary": 0.5, "max_displacement": 0.1}  # where they are not


@dataclass(frozen=True)
class ExactSettings:
    """Settings of complete forgetting, the same for `forget()` and the trainer ForgetExact.

    They were chosen on real CLIP features and hold for every data set and backbone (docs/exact.md).
    The weights are of whole groups of names, see `forgetting.retain.Group`.

    Attributes:
        target: one of `forgetting.targets.TARGETS`, `text:TEXT`, or a vector (d,).
        beta: how far beyond zero the targets `opposite` and `specific` go.
        noise_std: noise on the empty prompt while it lies nearest to a class to forget.
        similarity: cosine with a forgotten text above which a retained name is excluded; 1: none.
    """

    target: str | Tensor = "specific"
    beta: float = 0.0
    noise_std: float = 0.5
    similarity: float = 0.95
    own: float = setting(1.0, "weight of the other classes of the set", 0, 1e6)
    vocabulary: float | None = setting(
        None,
        "weight of the retain vocabulary; none: 0.03 where the names of other sets are retained, "
        "0.5 where they are not",
        low=0,
        high=1e6,
    )
    generic: float = setting(
        0.5,
        "part of that weight for a generic vocabulary, if there is a model to encode it (all of it "
        "where the set has no vocabulary)",
        low=0,
        high=1,
    )
    others: float = setting(0.1, "weight of the other sets' classes", 0, 1e6)
    protect: float = setting(
        0.1, "weight of the protected names, beside that of their own group", above=0, high=1e6
    )
    ridge: float | None = setting(
        None,
        "in mean squared lengths of a retained hidden state; none: chosen from the names",
        low=1e-12,
        high=1e6,
    )
    max_displacement: float | None = setting(
        None,
        "how far the ridge lets retained names move, in distances to their nearest neighbour; "
        "none: 0.045 where the names of other sets are retained, 0.1 where they are not",
        low=1e-12,
        high=1e6,
    )
    specific_ridge: float = setting(
        0.5, "of the target specific, in mean squared lengths of an embedding", 1e-12, 1e6
    )
    min_margin: float = setting(
        1.0,
        "beta is raised until another class lies this much nearer to the class's text than it does "
        "itself, in units of the gap before; 0: never",
        low=0,
        high=1e3,
    )
    min_displacement: float = setting(
        0.5,
        "a paraphrase that moves a smaller part of its class's way is forgotten too; 0: none",
        low=0,
        high=1,
    )

    def __post_init__(self) -> None:
        validate(self)
        number("noise_std", self.noise_std, low=0, high=1e6)
        number("similarity", self.similarity, above=0, high=1)
        number("beta", self.beta, above=-1, high=1e6)
        check_target(self.target, self.beta)

    def chosen(self, listed: bool) -> ExactSettings:
        """With the values that depend on whether the names of other sets are retained."""
        defaults = LISTED if listed and self.others > 0 else ALONE
        missing = {name: x for name, x in defaults.items() if getattr(self, name) is None}
        return replace(self, **missing)

    def group_weights(self, listed: bool, vocabulary: bool, generic: bool) -> dict[str, float]:
        """The weight of every group, some of them 0.

        Args:
            listed: whether the names of other sets can be retained; vocabulary, generic: whether
                there is a vocabulary of the set, and a generic one.
        """
        common = self.chosen(listed).vocabulary
        part = (self.generic if vocabulary else float(self.generic > 0)) if generic else 0.0
        return {
            "own": self.own,
            "vocabulary": (1 - part) * common if vocabulary else 0.0,
            "others": self.others if listed else 0.0,
            "protect": self.protect,
            "generic": part * common,
        }


@dataclass(frozen=True)
class Answer:
    """One request, completely forgotten.

    Attributes:
        request: with the paraphrases that were added to its texts; added: those texts.
        edit: the optimum and its certificate; displacement: `D = P - (H_f W + b)`, (k, d) float64.
        excluded: (C, n) bool, the retained names that are excluded with each class;
            excluded_names: of any class.
        target_draws: of noise; mu: the ridge in absolute units; betas: of each class.
        margins: of each class; affected, unlisted: see `forgetting.displacement.Forecast`.
        ratios: of each class, how far its paraphrases move along its text; empty if none is
            checked; min_displacement: below which a paraphrase lags.
    """

    request: Request
    added: list[str]
    edit: ConstrainedSolution
    displacement: Tensor
    excluded: Tensor
    excluded_names: list[str]
    target_draws: int
    mu: float
    betas: list[float]
    margins: list[Margin]
    ratios: list[list[float]]
    min_displacement: float
    affected: list[AffectedName] = field(default_factory=list)
    unlisted: dict[str, dict[str, float]] = field(default_factory=dict)

    def lagging(self) -> Iterator[tuple[int, int, float]]:
        """Class, index and ratio of each paraphrase that lags and is not forgotten itself."""
        for owner, (paraphrases, ratios) in enumerate(
            zip(self.request.paraphrases, self.ratios, strict=False)
        ):
            for i, (text, ratio) in enumerate(zip(paraphrases.texts, ratios, strict=True)):
                if ratio < self.min_displacement and text not in self.request.texts:
                    yield owner, i, ratio

    def report(self) -> dict[str, Any]:
        """JSON values for logs and adapters."""
        texts = [paraphrases.texts for paraphrases in self.request.paraphrases]
        return {
            "certificate": asdict(self.edit.certificate),
            "residual": self.edit.residual,
            "texts": self.request.texts,
            "excluded": self.excluded_names,
            "target_draws": self.target_draws,
            "mu": self.mu,
            "beta": max(self.betas),
            "forecast": {
                "unlisted": self.unlisted,
                "affected": [name._asdict() for name in self.affected],
                **worst(self.margins)._asdict(),
            },
            "paraphrases": {
                "checked": sum(map(len, self.ratios)),
                "added": self.added,
                "lagging": {texts[owner][i]: ratio for owner, i, ratio in self.lagging()},
            },
            "notes": self.notes(),
        }

    def notes(self) -> list[str]:
        """What a reader should know, in short lines."""
        notes = [proof(self.edit.certificate.gap)]
        notes += excluded_note(self.excluded_names, self.request.classes)
        if self.edit.residual > POOR:
            notes.append(
                f"warning: the texts miss their targets by {self.edit.residual:.1e} of the way; "
                "texts that repeat each other have different targets"
            )
        if self.added:
            notes.append(f"forgotten too, since they hardly moved: {', '.join(self.added)}")
        if lagging := list(self.lagging()):
            owner, i, ratio = min(lagging, key=lambda one: one[2])
            notes.append(
                f"warning: {len(lagging)} of {sum(map(len, self.ratios))} paraphrases hardly move, "
                f"least {self.request.paraphrases[owner].texts[i]!r} ({ratio:.2f} of the way)"
            )
        if most := self.affected[:NOTED]:
            names = ", ".join(f"{one.name} (-{one.cosine_loss:.3f} cosine)" for one in most)
            notes.append(f"most affected by text alone: {names}")
        if names := [one.name for one in self.affected if one.likely_misclassified]:
            notes.append(
                f"warning: likely to be misclassified: {', '.join(names)} (protect them to prevent "
                "it: --protect NAME)"
            )
        return notes


def excluded_note(names: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Which names are not retained, but for the forgotten classes themselves; at most one line."""
    own = {key(name) for name in classes}
    others = [name for name in names if key(name) not in own]
    return [f"excluded from the retain set: {', '.join(others)}"] if others else []


def proof(gap: float) -> str:
    """A certificate's relative gap in words."""
    if gap <= POOR:
        return f"proved optimal to a relative gap of {gap:.1e}"
    return f"warning: not proved optimal (relative gap {gap:.1e}): weights or ridge badly scaled"


@dataclass(frozen=True)
class ForgetContext:
    """What requests are solved in, the same for all of them.

    Attributes:
        retain: the retained names; ridge: `G + mu I` of them, see `RetainSet.ridge`.
        inputs: what targets are computed from; it holds W and b.
        classifier: the texts by which images are classified.
        settings: their ridge is not used: `ridge` was made by it.
    """

    retain: RetainSet
    ridge: Ridge
    inputs: TargetInputs
    classifier: ClassifierTexts
    settings: ExactSettings = ExactSettings()

    def forget(self, requests: Sequence[Request]) -> list[Answer]:
        """Forget each request from the original model.

        Raises:
            ProblemError: a target that cannot be had, or a ridge that is too small.
        """
        current, added = list(requests), [[] for _ in requests]
        betas = [[float(self.settings.beta)] * len(request.classes) for request in requests]
        answers = self._solve(current, added, betas)
        for _ in range(ROUNDS):
            again = []
            for i, answer in enumerate(answers):
                if more := self._to_add(answer):
                    current[i] = current[i].with_texts(more)
                    added[i] = current[i].texts[len(requests[i].texts) :]
                elif (raised := self._raised(answer)) != betas[i]:
                    betas[i] = raised
                else:
                    continue
                again.append(i)
            if not again:
                break
            some = ([part[i] for i in again] for part in (current, added, betas))
            for i, answer in zip(again, self._solve(*some), strict=True):
                answers[i] = answer
        return self._with_forecast(answers)

    def embed(self, hidden: Tensor) -> Tensor:
        """`h W + b`, (n, d) float64, of hidden states (n, w)."""
        return self.inputs.embed(hidden)

    def _solve(
        self,
        requests: Sequence[Request],
        added: Sequence[list[str]],
        betas: Sequence[list[float]],
    ) -> list[Answer]:
        """Solve requests once. Some of their texts were `added`; `betas` are of their classes."""
        batch, retain = Batch(requests), self.retain
        excluded = retain.excluded(batch.same, batch.hidden, batch.owner)  # (C, n)
        any_class = batch.of_requests(excluded)  # a name that two classes exclude counts once
        beta = torch.tensor([x for row in betas for x in row], dtype=torch.float64)[batch.owner]
        target, draws = targets(self.settings.target, batch, self.inputs, beta, excluded)
        hidden = batch.hidden.double().to(target.device)
        displacement = target - self.embed(hidden)  # D = P - (H W + b)
        edits = solve_constrained_each(self.ridge, hidden, displacement, batch.of_text, any_class)
        margins = self.classifier.margins(self.classifier.texts.edited(edits), self._rows(batch))
        displacements = displacement.split(batch.sizes)
        by_class = excluded.split([len(request.classes) for request in batch])
        return [
            Answer(
                request,
                added[i],
                edits[i],
                displacements[i],
                by_class[i],
                retain.named(any_class[i]),
                draws[i],
                self.ridge.mu,
                betas[i],
                margins[i],
                self._ratios(request, edits[i]),
                self.settings.min_displacement,
            )
            for i, request in enumerate(batch)
        ]

    def _rows(self, requests: Sequence[Request]) -> list[list[int]]:
        """The rows of the requests' classes among the classifier's texts."""
        return [[self.classifier.label[name] for name in r.classes] for r in requests]

    def _ratios(self, request: Request, edit: ConstrainedSolution) -> list[list[float]]:
        """Of each class how far its paraphrases move along its first text."""
        if not self.settings.min_displacement:
            return []
        first = [request.hidden[request.owner.index(i)] for i in range(len(request.classes))]
        return [
            displacement_along(edit, text, paraphrases.hidden).tolist()
            for text, paraphrases in zip(first, request.paraphrases, strict=False)
        ]

    def _raised(self, answer: Answer) -> list[float]:
        """The betas, that of each class whose margin is too small one step further."""
        if self.settings.target not in WITH_BETA or not self.settings.min_margin:
            return answer.betas
        return [
            next((step for step in BETAS if step > beta), beta)
            if one.margin is not None and one.margin < self.settings.min_margin * one.gap
            else beta
            for one, beta in zip(answer.margins, answer.betas, strict=True)
        ]

    def _to_add(self, answer: Answer) -> list[tuple[int, str, Tensor]]:
        """Of each class (by index) the paraphrase that moves least, if it lags and may be added."""
        request, least = answer.request, {}
        for owner, i, ratio in answer.lagging():
            if ratio < least.get(owner, (1.0, 0))[0]:
                least[owner] = ratio, i
        owners = request.owner[len(request.owner) - len(answer.added) :]  # of what was added
        return [
            (owner, request.paraphrases[owner].texts[i], request.paraphrases[owner].hidden[i])
            for owner, (_, i) in least.items()
            if owners.count(owner) < MAX_ADDED
        ]

    def _with_forecast(self, answers: Sequence[Answer]) -> list[Answer]:
        """Answers with what text alone says of other names: of those by which images are
        classified, and of names like the retained ones that nobody listed."""
        retain, batch = self.retain, Batch([answer.request for answer in answers])
        edits = [answer.edit for answer in answers]
        affected = self.classifier.affected(self.classifier.texts.edited(edits), self._rows(batch))
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
