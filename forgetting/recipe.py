"""The recipe of forgotten classes: what `forgetting.compose` solves again together with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from forgetting.errors import ProblemError
from forgetting.io import FLOATS, tensor

if TYPE_CHECKING:
    from forgetting.context import Answer, ForgetContext

TEXTS = ("hidden", "base", "displacement")  # tensors of a recipe with a row for each text
EXCLUDED = ("excluded_hidden", "excluded_base", "excluded_weight")  # and for each excluded name
TENSORS = TEXTS + EXCLUDED

Excluded = tuple[str, str, int]  # a retained name: its group, the name, and which of its prompts


@dataclass(frozen=True)
class Part:
    """One class of a recipe.

    Attributes:
        dataset, name: of the class.
        texts: by which it is forgotten; excluded: the names that are not retained with it.
    """

    dataset: str
    name: str
    texts: list[str]
    excluded: list[Excluded]


@dataclass(frozen=True)
class Recipe:
    """What composing needs: the classes, and their rows of `K_0^-1` for `K_0 = G + mu I`.

    Texts and names are known by their strings: the hidden states of one text differ in their last
    digits from machine to machine.

    Attributes:
        encoder: digest of what a hidden state depends on beside its text; retain: of all retained
            names and their groups; weights: of the groups; mu: the ridge.
        texts: K texts; hidden: (K, w) float32, their hidden states `h`; base: (K, w) float64,
            `h K_0^-1`; displacement: (K, d) float64, from each text to its target.
        excluded: E names; excluded_hidden, excluded_base: likewise; excluded_weight: (E,) float64,
            the weight of each name in G.
        parts: the classes, in the order in which they came.
    """

    encoder: str
    retain: str
    weights: dict[str, float]
    mu: float
    texts: list[str]
    hidden: Tensor
    base: Tensor
    displacement: Tensor
    excluded: list[Excluded]
    excluded_hidden: Tensor
    excluded_base: Tensor
    excluded_weight: Tensor
    parts: list[Part]

    @classmethod
    def of(cls, context: ForgetContext, answer: Answer, dataset: str, encoder: str) -> Recipe:
        """The recipe of an answer.

        Args:
            dataset: of the request's classes; encoder: see `Recipe`.
        """
        retain, ridge, request = context.retain, context.ridge, answer.request
        excluded = answer.excluded & (retain.name_weights > 0)  # (C, n)
        used = excluded.any(dim=0).nonzero()[:, 0].tolist()
        hidden, rows = request.hidden.float(), retain.rows[used].float()
        parts = [
            Part(
                dataset,
                name,
                [t for t, owner in zip(request.texts, request.owner, strict=True) if owner == i],
                [retain.ids[j] for j in excluded[i].nonzero()[:, 0].tolist()],
            )
            for i, name in enumerate(request.classes)
        ]
        return cls(
            encoder,
            retain.sha256,
            retain.weights,
            ridge.mu,
            list(request.texts),
            hidden.cpu(),
            ridge.solve(hidden.to(ridge.gram)).cpu(),
            answer.displacement.double().cpu(),
            [retain.ids[j] for j in used],
            rows.cpu(),
            ridge.solve(rows.to(ridge.gram)).cpu(),
            retain.name_weights[used].double().cpu(),
            parts,
        )

    def fields(self) -> dict[str, Any]:
        """Everything but the tensors, in JSON values."""
        names = ("encoder", "retain", "weights", "mu", "texts", "excluded")
        return {n: getattr(self, n) for n in names} | {"parts": [asdict(p) for p in self.parts]}

    @classmethod
    def read(cls, fields: dict[str, Any], tensors: dict[str, Tensor], w: int, d: int) -> Recipe:
        """The recipe of `fields` and tensors; ProblemError if they do not fit together."""
        try:
            excluded = [(str(g), str(n), int(i)) for g, n, i in fields["excluded"]]
            texts, known = [str(text) for text in fields["texts"]], set(excluded)
            parts = [
                Part(
                    str(part["dataset"]),
                    str(part["name"]),
                    list(part["texts"]),
                    [(g, n, i) for g, n, i in part["excluded"]],
                )
                for part in fields["parts"]
            ]
            if not all(set(p.texts) <= set(texts) and set(p.excluded) <= known for p in parts):
                raise ValueError("a class has texts or names without rows")
            widths = {"displacement": (d,), "excluded_weight": ()}
            for name in TENSORS:
                count = len(excluded if name in EXCLUDED else texts)
                tensor(name, tensors[name], FLOATS, (count, *widths.get(name, (w,))))
            if not parts or not (tensors["excluded_weight"] > 0).all():
                raise ValueError("no class, or a name without weight")
            return cls(
                str(fields["encoder"]),
                str(fields["retain"]),
                {str(group): float(weight) for group, weight in fields["weights"].items()},
                float(fields["mu"]),
                texts=texts,
                excluded=excluded,
                parts=parts,
                **{name: tensors[name] for name in TENSORS},
            )
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
            raise ProblemError(f"a recipe that does not fit together ({error})") from error


def rows_of(known: Sequence[Any], wanted: Sequence[Any]) -> list[int]:
    """The row of each of `wanted` in the list `known`."""
    row = {item: i for i, item in enumerate(known)}
    return [row[item] for item in wanted]
