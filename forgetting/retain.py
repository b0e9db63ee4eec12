"""Names to retain, in weighted groups, and which of them are excluded when a class is forgotten."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize

from forgetting.errors import ProblemError, number
from forgetting.io import indices, matrix
from forgetting.solvers.constrained import Ridge
from forgetting.solvers.spectrum import triangle

CHUNK = 4096  # texts that are compared with all names at once


def key(name: str) -> str:
    """What all spellings of a name have in common: underscores are spaces, case does not count."""
    return " ".join(name.replace("_", " ").split()).casefold()


@dataclass(frozen=True)
class Group:
    """Names that are retained for one reason."""

    names: Sequence[str]  # m names in any spelling
    rows: Tensor  # (m, w), their hidden states
    # w_g of the whole group: each name weighs w_g / m in G. None: 1, as in the paper's plain sum.
    weight: float | None = None
    # Whether names whose hidden state is similar to a forgotten text's are excluded. The other
    # classes of a set are different things, however similar.
    exclude_similar: bool = True
    # Whether the ridge limits how far these names move; others stand for those that nobody listed.
    limit_displacement: bool = True
    prompt_variants: bool = False  # the second half repeats the first in another prompt

    @cached_property
    def root(self) -> Tensor:
        """`R` (q, w) float64 with `R^T R = H^T H` of the group, unweighted; q <= w."""
        return triangle(self.rows)

    @property
    def name_weight(self) -> float:
        """The weight of one name in G: w_g / m, or 1."""
        return 1.0 if self.weight is None else self.weight / max(1, len(self.names))


class RetainSet:
    """Retained names in groups, and their weighted Gram matrix.

    Args:
        similarity: cosine of hidden states above which a name is excluded with a text; 1: none is.
        device: where `rows`, `gram` and all that is computed from them lie.
        max_similar: names that one text excludes for their similarity, at most (the nearest);
            None: any number. A weak text encoder finds thousands of names similar.

    Raises ProblemError: no group, names and rows that do not fit, a negative weight.
    """

    def __init__(
        self,
        groups: Mapping[str, Group],
        similarity: float = 1.0,
        device: torch.device | str = "cpu",
        max_similar: int | None = None,
    ) -> None:
        if not groups:
            raise ProblemError("a retain set needs at least one group, which may be empty")
        self.similarity = number("similarity", similarity)
        self.max_similar = max_similar
        if max_similar is not None:
            number("max_similar", max_similar, low=1, whole=True)
        width = None
        for name, group in groups.items():
            rows = matrix(f"group {name!r}", group.rows, width)
            width = rows.shape[1]
            if len(group.names) != len(rows):
                raise ProblemError(f"group {name!r}: {len(group.names)} names, {len(rows)} rows")
            if group.weight is not None:
                number(f"the weight of group {name!r}", group.weight, low=0)
        self.groups = {name: group for name, group in groups.items() if len(group.names)}
        chosen = list(self.groups.values())
        self.counts = {name: len(group.names) for name, group in self.groups.items()}
        self.weights = {n: g.name_weight * len(g.names) for n, g in self.groups.items()}  # w_g
        self.names = [name for group in chosen for name in group.names]  # n of them
        self.rows = torch.cat([rows[:0], *(group.rows for group in chosen)]).to(device)  # (n, w)
        sizes = torch.tensor(list(self.counts.values()), dtype=torch.int64)
        weights = torch.tensor([group.name_weight for group in chosen], dtype=torch.float64)
        self.name_weights = weights.repeat_interleave(sizes).to(device)  # (n,) float64, in G
        similar = torch.tensor([group.exclude_similar for group in chosen], dtype=torch.bool)
        self._exclude_similar = similar.repeat_interleave(sizes).to(device)  # (n,)
        variants, start = [torch.arange(0)], 0
        for group in chosen:
            count = len(group.names)
            shift = count // 2 if group.prompt_variants else 0
            variants.append(start + torch.arange(count).roll(shift))
            start += count
        self.variant_of = torch.cat(variants).to(device)  # (n,), the same name in another prompt
        self._index: dict[str, list[int]] = defaultdict(list)
        for position, name in enumerate(self.names):
            self._index[key(name)].append(position)

    @cached_property
    def root(self) -> Tensor:
        """`R` (q, w) float64 with `R^T R = G`, q <= w."""
        roots = [group.name_weight**0.5 * group.root for group in self.groups.values()]
        return triangle(torch.cat([self.rows[:0].double().cpu(), *roots])).to(self.rows.device)

    @cached_property
    def gram(self) -> Tensor:
        """`G`, the sum over names of `weight * h^T h`, (w, w) float64."""
        return self.root.T @ self.root

    @property
    def total_weight(self) -> float:
        total = sum(self.weights.values())
        if total <= 0:
            raise ProblemError("no retained name has any weight: nothing would be retained")
        return total

    @property
    def squared_length(self) -> float:
        """The weighted mean squared length of a retained hidden state."""
        return float(self.gram.trace()) / self.total_weight

    def ridge(self, mu: float) -> Ridge:
        """`G + mu' I`, with `mu` in units of `squared_length`."""
        return Ridge(self.rows, mu * self.squared_length, self.name_weights, self.root)

    def squared_embedding(self, projection: Tensor, bias: Tensor | None = None) -> float:
        """The weighted mean squared length of a retained embedding."""
        w = projection.to(self.root)
        total = (self.root @ w).square().sum()
        if bias is not None:
            b = bias.to(w)
            mean = (self.name_weights @ self.rows.double()) @ w  # (d,), the weighted sum of h W
            total = total + 2 * mean @ b + self.total_weight * b @ b
        return float(total) / self.total_weight

    def excluded(self, same: Sequence[Collection[str]], hidden: Tensor, owner: Tensor) -> Tensor:
        """Which names are not retained when each of C classes is forgotten, (C, n) bool.

        Args:
            same: for each class the names, in any spelling, that mean the same as it.
            hidden: (K, w), the texts by which the classes are forgotten; owner: (K,) int64, the
                class of each text. Names that are more similar to one of a class's texts than
                `similarity` are excluded with it, where their group allows that.

        Raises ProblemError: tensors that are no texts of this width, or of other classes.
        """
        hidden = matrix("hidden", hidden, self.rows.shape[1])
        owner = indices("owner", owner, len(hidden), len(same)).to(self.rows.device)
        excluded = torch.zeros(len(same), len(self.names), dtype=torch.bool).to(self.rows.device)
        for row, names in zip(excluded, same, strict=True):
            row[[i for name in names for i in self._index.get(key(name), ())]] = True
        if self.similarity < 1 and len(self.names):
            for part in torch.arange(len(hidden), device=owner.device).split(CHUNK):
                text, name = self._similar(hidden.to(self.rows)[part]).nonzero(as_tuple=True)
                excluded[owner[part][text], name] = True
        return excluded

    def _similar(self, hidden: Tensor) -> Tensor:
        """Which names are similar to texts (b, w), (b, n) bool."""
        cosine = normalize(hidden, dim=1) @ self._directions.T  # (b, w) @ (w, n)
        similar = (cosine > self.similarity) & self._exclude_similar
        if self.max_similar is not None and self.max_similar < len(self.names):
            allowed = cosine.masked_fill(~self._exclude_similar, -1.0)
            similar &= cosine >= allowed.topk(self.max_similar, dim=1).values[:, -1:]
        return similar

    @cached_property
    def _directions(self) -> Tensor:
        return normalize(self.rows, dim=1)  # (n, w)

    def rms_and_max(self, values: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Of values (R, n) of the names the root mean square and the maximum (R,) of each group.
        NaN does not count; a group of which nothing counts gives 0."""
        parts = values.split(list(self.counts.values()), dim=1)
        return {
            name: (
                part.square().nanmean(dim=1).nan_to_num(0.0).sqrt(),
                part.nan_to_num(0.0).amax(dim=1),
            )
            for name, part in zip(self.counts, parts, strict=True)
        }

    def named(self, mask: Tensor) -> list[str]:
        """The names that a mask (n,) marks, sorted, each once."""
        return sorted({self.names[position] for position in mask.nonzero()[:, 0].tolist()})

    @cached_property
    def ids(self) -> list[tuple[str, str, int]]:
        """What each name is known by in adapters: its group, the name, and how many of that name
        come before it in the group (its other prompts)."""
        ids = []
        for group, held in self.groups.items():
            seen: dict[str, int] = defaultdict(int)
            for name in held.names:
                ids.append((group, name, seen[name]))
                seen[name] += 1
        return ids

    @cached_property
    def sha256(self) -> str:
        """Digest of the names, their groups and weights, not of their hidden states: two sets that
        were encoded apart differ in the last digits."""
        groups = [[n, self.weights[n], sorted(g.names)] for n, g in sorted(self.groups.items())]
        return hashlib.sha256(json.dumps(groups).encode()).hexdigest()
