"""Forget completely: solve, check what text alone says of the answer, and solve again.

One solve puts the texts of a class on their target. Then two things are checked: whether other
texts for the class (paraphrases) move with it, and whether another class lies clearly nearer to its
text than it does itself. Where a paraphrase hardly moves, the one that moves least is forgotten
too. Where the margin is small, the target goes further. Those requests are solved again. No image
is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from forgetting.displacement import (
    AffectedName,
    ClassifierTexts,
    Margin,
    RetainedNames,
    displacement_along,
    leave_one_out_ratios,
    worst,
)
from forgetting.errors import number
from forgetting.problem import Batch, Paraphrases, Request
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
    own: float = setting(1.0, "weight of the other classes of the set, as a group", 0.0, 1e6)
    vocabulary: float | None = setting(
        None,
        f"weight of the retain vocabulary, as a group; none: {LISTED['vocabulary']} where the names "
        f"of other sets are retained, {ALONE['vocabulary']} where they are not",
        0.0,
        1e6,
        optional=True,
    )
    generic: float = setting(
        0.5,
        "part of the vocabulary's weight that a generic vocabulary takes over where there is a "
        "model to encode it (all of it where the set has none)",
        0.0,
        1.0,
    )
    others: float = setting(0.1, "weight of the other sets' classes, as a group", 0.0, 1e6)
    protect: float = setting(
        0.1,
        "weight of the protected names, as a group, beside that of their own",
        above=0,
        high=1e6,
    )
    ridge: float | None = setting(
        None,
        "ridge, in mean squared lengths of a retained hidden state; none: chosen from the names "
        "(forgetting/ridge.py)",
        1e-12,
        1e6,
        optional=True,
    )
    max_displacement: float | None = setting(
        None,
        "how far the ridge lets retained names move, in distances to their nearest neighbour; none: "
        f"{LISTED['max_displacement']} where the names of other sets are retained, "
        f"{ALONE['max_displacement']} where they are not",
        1e-12,
        1e6,
        optional=True,
    )
    specific_ridge: float = setting(
        0.5,
        "ridge of the target specific, in mean squared lengths of a retained embedding",
        1e-12,
        1e6,
    )
    min_margin: float = setting(
        1.0,
        "beta is raised for a class until another class lies this much nearer to its text, in units "
        "of the gap before; 0: never",
        0.0,
        1e3,
    )
    min_displacement: float = setting(
        0.5,
        "a paraphrase that moves a smaller part of its class's way is forgotten too; 0: none is",
        0.0,
        1.0,
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
        paraphrases: text -> how far it moves along its class; lagging: those that move less than
            `min_displacement` and were not added.
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
    affected: list[AffectedName] = field(default_factory=list)
    unlisted: dict[str, dict[str, float]] = field(default_factory=dict)
    paraphrases: dict[str, float] = field(default_factory=dict)
    lagging: dict[str, float] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        """JSON values for logs and adapters."""
        margin = worst(self.margins)
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
                **margin._asdict(),
            },
            "paraphrases": {
                "checked": len(self.paraphrases),
                "added": self.added,
                "lagging": self.lagging,
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
        if self.lagging:
            least = min(self.lagging, key=self.lagging.__getitem__)
            notes.append(
                f"warning: {len(self.lagging)} of {len(self.paraphrases)} paraphrases hardly move, "
                f"least {least!r} ({self.lagging[least]:.2f} of the way)"
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
        settings: their ridge is not used: it was decided on with `ridge`.
    """

    retain: RetainSet
    ridge: Ridge
    inputs: TargetInputs
    classifier: ClassifierTexts
    settings: ExactSettings = ExactSettings()

    def forget(self, requests: Sequence[Request]) -> list[Answer]:
        """Forget each request from the original model.

        Raises:
            ProblemError: a target that cannot be had; names that were not part of the Gram matrix.
        """
        current = list(requests)
        betas = [[float(self.settings.beta)] * len(request.classes) for request in requests]
        answers = self._solve(current, requests, betas)
        for _ in range(ROUNDS):
            again = []
            for i, answer in enumerate(answers):
                if lagging := self._lagging_most(answer):
                    current[i] = current[i].with_texts(lagging)
                elif (raised := self._raised(answer)) != betas[i]:
                    betas[i] = raised
                else:
                    continue
                again.append(i)
            if not again:
                break
            some = ([part[i] for i in again] for part in (current, requests, betas))
            for i, answer in zip(again, self._solve(*some), strict=True):
                answers[i] = answer
        return self._with_forecast(answers)

    def embed(self, hidden: Tensor) -> Tensor:
        """`h W + b`, (n, d) float64, of hidden states (n, w)."""
        return self.inputs.embed(hidden)

    def _solve(
        self, current: Sequence[Request], first: Sequence[Request], betas: Sequence[list[float]]
    ) -> list[Answer]:
        """Solve requests once; `first`: as they came; `betas`: of their classes."""
        batch, retain = Batch(current), self.retain
        excluded = retain.excluded(batch.same, batch.hidden, batch.owner)  # (C, n)
        beta = torch.tensor([x for row in betas for x in row], dtype=torch.float64)[batch.owner]
        target, draws = targets(self.settings.target, batch, self.inputs, beta, excluded)
        hidden = batch.hidden.double().to(target.device)
        displacement = target - self.embed(hidden)  # D = P - (H W + b)
        any_class = batch.of_requests(excluded)  # a name that two classes exclude counts once
        edits = solve_constrained_each(
            self.ridge,
            hidden,
            displacement,
            batch.of_text,
            retain.rows,
            retain.name_weights,
            any_class,
        )
        rows = [[self.classifier.label[name] for name in request.classes] for request in batch]
        margins = self.classifier.margins(self.classifier.moved(edits), rows)
        sizes = [len(request.classes) for request in batch]
        pieces = zip(displacement.split(batch.sizes), excluded.split(sizes), any_class, strict=True)
        return [
            Answer(
                request,
                added=request.texts[len(first[i].texts) :],
                edit=edits[i],
                displacement=d,
                excluded=by_class,
                excluded_names=retain.named(names),
                target_draws=draws[i],
                mu=self.ridge.mu,
                betas=betas[i],
                margins=margins[i],
            )
            for i, (request, (d, by_class, names)) in enumerate(zip(batch, pieces, strict=True))
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

    def _lagging_most(self, answer: Answer) -> list[tuple[int, str, Tensor]]:
        """Of each class (by index) the paraphrase that moves least, if it lags and may be added."""
        request, found = answer.request, []
        for index, paraphrases in enumerate(self._paraphrases(request)):
            if request.owner[len(request.owner) - len(answer.added) :].count(index) >= MAX_ADDED:
                continue
            ratios = self._ratios(answer, index)
            free = [i for i, text in enumerate(paraphrases.texts) if text not in request.texts]
            least = min(free, key=ratios.__getitem__, default=None)
            if least is not None and ratios[least] < self.settings.min_displacement:
                found.append((index, paraphrases.texts[least], paraphrases.hidden[least]))
        return found

    def _paraphrases(self, request: Request) -> Sequence[Paraphrases]:
        """Those of each class that are to be checked."""
        return request.paraphrases if self.settings.min_displacement else ()

    def _ratios(self, answer: Answer, index: int) -> list[float]:
        """How far each paraphrase of a class moves along the class's first text."""
        request = answer.request
        text = request.hidden[request.owner.index(index)]
        device = answer.edit.left.device
        others = request.paraphrases[index].hidden.to(device)
        return displacement_along(answer.edit, text.to(device), others).tolist()

    def _with_forecast(self, answers: Sequence[Answer]) -> list[Answer]:
        """Answers with what text alone says of other names and of the paraphrases."""
        rows = [[self.classifier.label[n] for n in answer.request.classes] for answer in answers]
        moved = self.classifier.moved([answer.edit for answer in answers])
        affected = self.classifier.affected(moved, rows)
        unlisted = self._unlisted(answers)
        complete = []
        for i, answer in enumerate(answers):
            ratios = {
                text: ratio
                for index, paraphrases in enumerate(self._paraphrases(answer.request))
                for text, ratio in zip(paraphrases.texts, self._ratios(answer, index), strict=True)
            }
            lagging = {
                text: ratio
                for text, ratio in ratios.items()
                if text not in answer.request.texts and ratio < self.settings.min_displacement
            }
            more = {"affected": affected[i], "unlisted": unlisted[i]}
            complete.append(replace(answer, paraphrases=ratios, lagging=lagging, **more))
        return complete

    def _unlisted(self, answers: Sequence[Answer]) -> list[dict[str, dict[str, float]]]:
        """Group -> rms and max of how far names like those of the group move that nobody listed."""
        retain, batch = self.retain, Batch([answer.request for answer in answers])
        excluded = torch.stack([answer.excluded.any(dim=0) for answer in answers])
        moved = torch.cat(
            [a.request.hidden.to(a.edit.left) @ a.edit.left @ a.edit.right for a in answers]
        )
        names = RetainedNames(retain.rows, retain.name_weights, excluded, retain.variant_of)
        hidden, owner = batch.hidden.to(moved), batch.of_text
        ratios = leave_one_out_ratios(self.ridge, hidden, moved, owner, names)
        groups = retain.rms_and_max(ratios.masked_fill(excluded, torch.nan))
        return [
            {
                name: {"rms": float(rms[i]), "max": float(most[i])}
                for name, (rms, most) in groups.items()
            }
            for i in range(len(answers))
        ]
