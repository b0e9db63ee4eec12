"""What may be retained, in groups of names, and which of them leave with a class.

One rule for every method that retains names, so that a table compares methods and not retain sets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import datasets
from clip.bundle import FeatureBundle
from engine import UserError
from forgetting.retain import RetainStatistics
from trainers.base import ForgetTrainer, Solved
from trainers.texts import Request

GROUPS = ("own", "vocabulary", "others")
Place = tuple[str, int]  # group and row of a retained name


class RetainSet:
    """The other classes of a set, its vocabulary, and the classes of the other sets.

    Args:
        bundle: the set that classes are forgotten from; others: the other sets.
        similarity: cosine of hidden states beyond which a name means the same as a text.
        groups: those of `GROUPS` that are retained.
        device: where products of hidden states are taken.

    Attributes:
        names: group -> names; rows: group -> hidden states (m, w) of these names; both hold every
            group. statistics: of the retained groups.
    """

    def __init__(
        self,
        bundle: FeatureBundle,
        others: Iterable[FeatureBundle],
        similarity: float,
        groups: Sequence[str] = GROUPS,
        device: torch.device | str = "cpu",
    ) -> None:
        plain, others = datasets.plain, list(others)
        self.dataset, self.similarity = bundle.dataset, similarity
        self.names = {
            "own": [plain(name) for name in bundle.classnames],
            "vocabulary": bundle.retain_names,
            "others": [plain(name) for other in others for name in other.classnames],
        }
        self.rows = {
            "own": bundle.forget_hidden,
            "vocabulary": bundle.retain_hidden,
            "others": torch.cat(
                [bundle.forget_hidden[:0], *(other.forget_hidden for other in others)]
            ),
        }
        self.statistics = RetainStatistics(bundle.text_projection.shape[0])
        for group in groups:
            self.statistics.update(group, self.rows[group].to(device))

    def leaving(self, request: Request, index: int) -> set[Place]:
        """Places of the retained names that mean the same as class `index` of a request.

        These are its own name, those marked as synonyms, and those of the vocabulary and of other
        sets whose hidden state is more similar to one of its texts than the threshold.
        """
        same = datasets.same_meaning([request.classes[index]], self.dataset)
        mine = [row for row, owner in enumerate(request.owner) if owner == index]
        texts = normalize(request.hidden[mine], dim=1)  # (k, w)
        places = set()
        for group in self.statistics.counts:
            nearest = (normalize(self.rows[group], dim=1) @ texts.T).amax(dim=1)  # (m,)
            for row, other in enumerate(self.names[group]):
                # The set's own classes are different things, however alike their names.
                alike = group != "own" and self.similarity < 1
                alike = alike and float(nearest[row]) > self.similarity
                if datasets.key(other) in same or alike:
                    places.add((group, row))
        return places

    def at(self, places: Iterable[Place]) -> Tensor:
        """Hidden states (n, w) at those places, in their order."""
        rows = [self.rows[group][row] for group, row in places]
        return torch.stack(rows) if rows else self.rows["own"][:0]

    def named(self, places: Iterable[Place]) -> list[str]:
        """The names at those places, sorted, each once."""
        return sorted({self.names[group][row] for group, row in places})

    def without(self, places: Iterable[Place]) -> Tensor:
        """Hidden states (m, w) of all retained names but those at `places`."""
        gone = set(places)
        groups = [
            self.rows[group][[row for row in range(count) if (group, row) not in gone]]
            for group, count in self.statistics.counts.items()
        ]
        return torch.cat([self.rows["own"][:0], *groups])


def print_leaving(classes: list[str], names: list[str]) -> None:
    """Say which names left the retain set, beside those of the forgotten classes themselves."""
    similar = [name for name in names if name not in set(map(datasets.plain, classes))]
    if similar:
        print(f"  left the retain set: {', '.join(similar)}")


class RetainingTrainer(ForgetTrainer):
    """A trainer whose method sees every retained name, each with the same weight."""

    def build_model(self) -> None:
        """The projection, and everything that may be retained."""
        super().build_model()
        similarity = self.cfg.FORGET.SIMILARITY
        self.retain = RetainSet(
            self.bundle, self.others.values(), similarity, GROUPS, device=self.device
        )
        counts = self.retain.statistics.counts
        print(f"retained: {', '.join(f'{count} {group}' for group, count in counts.items())}")

    def solver_settings(self) -> dict[str, Any]:
        """The texts, the retain set, and the method's own constants."""
        node = self.cfg.TRAINER.get(type(self).__name__.upper(), {})
        constants = {key.lower(): value for key, value in node.items()}
        return {
            **self.text_settings(),
            **constants,
            "similarity": float(self.retain.similarity),
            "statistics": self.retain.statistics.sha256,
        }

    def staying(self, request: Request) -> tuple[Tensor, list[str]]:
        """Hidden states (m, w), float64, of the names that stay, and the names that left."""
        places = set().union(
            *(self.retain.leaving(request, index) for index in range(len(request.classes)))
        )
        names = self.retain.named(places)
        print_leaving(request.classes, names)
        rows = self.retain.without(places)
        if not len(rows):
            raise UserError(
                f"no name is left to retain beside {', '.join(request.classes)} of "
                f"{self.plan.dataset}: {type(self).__name__} needs some"
            )
        return rows.double().to(self.device), names


class EditTrainer(RetainingTrainer):
    """A closed form `Delta = left @ D` that sees the retained names through `H_r^T H_r` alone.

    Its default target is `opposite`, which needs nothing but the text itself and, unlike the empty
    prompt, is no reason of its own for other words to keep the class. ForgetExact with the target
    `opposite` is what such a row is to be compared with.
    """

    default_target = "opposite"

    def solve(self, classes: list[str], generator: torch.Generator) -> Solved:
        request = self.request(classes)
        target, draws = self.target(request, generator)
        staying, names = self.staying(request)
        hidden = request.hidden.double().to(self.device)
        displacement = target.double().to(self.device) - hidden @ self.model.projection.double()
        left, report = self.left(hidden, staying.T @ staying, len(staying))  # (w, k)
        missed = (hidden @ left) @ displacement - displacement  # (k, d)
        size = torch.linalg.matrix_norm(displacement)
        residual = float(torch.linalg.matrix_norm(missed) / size) if size > 0 else 0.0
        print(f"  the texts go {1 - residual:.1%} of their way to the target")
        report |= {
            "residual": residual,
            "texts": request.texts,
            "target_draws": draws,
            "retained": len(staying),
            "left_retain_set": names,
        }
        return Solved(left.float(), displacement.float(), report)

    def left(self, hidden: Tensor, gram: Tensor, count: int) -> tuple[Tensor, dict[str, Any]]:
        """The factor (w, k) of the change, and what to report beside it.

        Args:
            hidden: `H_f`, (k, w) float64; gram: `H_r^T H_r`, (w, w), over `count` retained texts.
        """
        raise NotImplementedError(f"{type(self).__name__} must have a closed form")
