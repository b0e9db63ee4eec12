"""Names to retain, in groups: what each weighs, and which must leave with a forgotten class.

That can only be said while the names are at hand; what is solved on are their statistics.
"""

from __future__ import annotations

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
from forgetting.solvers.spectrum import CHUNK
from forgetting.statistics import RetainStatistics


@dataclass(frozen=True)
class Group:
    """Names that are retained for one reason.

    Attributes:
        names: m of them, in any spelling; rows: (m, w), their hidden states.
        weight: w_g of the whole group, so that each of its names weighs w_g / m in G; None: each
            name weighs 1, as in the paper's plain sum.
        alike: whether a name leaves for being similar to a forgotten text. The other classes of a
            set do not: they are different things, however alike their names.
        safe: whether the ridge keeps these very names safe (`forgetting.ridge`); others stand for
            the many that nobody listed.
        twice: the second half are the names of the first half again, in another wording.
    """

    names: Sequence[str]
    rows: Tensor
    weight: float | None = None
    alike: bool = True
    safe: bool = True
    twice: bool = False


class RetainSet:
    """Retained names in groups: what each weighs, which leave with a class, and what is solved on.

    Attributes:
        groups: those that hold names; counts: how many each holds.
        names: n of all groups in turn; rows: (n, w) their hidden states; shares: (n,) float64,
            what each weighs in G; statistics: of all of them.
        twin: (n,) int64, the other wording of each name; itself where there is none.
    """

    def __init__(
        self,
        groups: Mapping[str, Group],
        similarity: float = 1.0,
        device: torch.device | str = "cpu",
        most: int | None = None,
    ) -> None:
        """Args:
        similarity: cosine of hidden states beyond which a name leaves with a text; 1: none does.
        device: where `rows`, `gram` and everything made of them are.
        most: how many names leave with one text for being similar, at most, the nearest; None: any
            number. A tower that hardly tells words apart finds thousands of them alike.

        Raises:
            ProblemError: no group, a group whose names and rows do not fit, an impossible weight.
        """
        if not groups:
            raise ProblemError("a retain set needs at least one group, which may be empty")
        self.similarity = number("similarity", similarity)
        self.most = None if most is None else number("most", most, low=1, whole=True)
        width = matrix("hidden states", next(iter(groups.values())).rows).shape[1]
        self.statistics = RetainStatistics(width)
        for name, group in groups.items():
            if group.weight is not None:
                number(f"the weight of group {name!r}", group.weight, low=0)
            if len(group.names) != len(matrix(f"group {name!r}", group.rows, width)):
                raise ProblemError(
                    f"group {name!r}: {len(group.names)} names, {len(group.rows)} hidden states"
                )
            self.statistics.update(name, group.rows.to(device))
        self.groups = {name: group for name, group in groups.items() if len(group.names)}
        self.counts = dict(self.statistics.counts)
        self.weights = {
            name: float(len(group.names)) if group.weight is None else group.weight
            for name, group in self.groups.items()
        }
        self.names = [name for group in self.groups.values() for name in group.names]
        empty = next(iter(groups.values())).rows[:0]
        rows = torch.cat([empty, *(group.rows for group in self.groups.values())])
        self.rows = rows.to(device)  # (n, w)
        share = [self.statistics.share(name, self.weights) for name in self.groups]
        sizes = torch.tensor(list(self.counts.values()), dtype=torch.int64)
        self.shares = torch.tensor(share, dtype=torch.float64).repeat_interleave(sizes).to(device)
        twins, first = [], 0
        for name, group in self.groups.items():
            place, half = torch.arange(self.counts[name]), self.counts[name] // 2
            twins.append(first + (place.roll(half) if group.twice else place))
            first += self.counts[name]
        self.twin = torch.cat([torch.arange(0), *twins]).to(device)  # (n,)
        alike = torch.tensor([group.alike for group in self.groups.values()], dtype=torch.bool)
        self._alike = alike.repeat_interleave(sizes).to(device)  # (n,)
        self._places: dict[str, list[int]] = defaultdict(list)
        for place, name in enumerate(self.names):
            self._places[name.casefold()].append(place)

    @cached_property
    def gram(self) -> Tensor:
        """`G = sum of share h^T h` over all names, (w, w) float64."""
        return self.statistics.weighted(self.weights).to(self.rows.device)

    def ridge(self, mu: float) -> Ridge:
        """`G + mu' I`, with `mu` in mean squared lengths of a retained hidden state."""
        return Ridge(self.gram, mu * self.squared_length)

    @cached_property
    def _directions(self) -> Tensor:
        """The names' hidden states at length 1, (n, w)."""
        return normalize(self.rows, dim=1)

    @property
    def squared_length(self) -> float:
        """The mean squared length of a retained hidden state, by the names' shares."""
        total = float(self.shares.sum())
        if total <= 0:
            raise ProblemError("no retained name has any weight: nothing would be retained")
        return float(self.gram.trace()) / total

    def squared_embedding(self, projection: Tensor, bias: Tensor | None = None) -> float:
        """The mean squared length of a retained embedding under `W` (w, d), by the shares; with a
        bias (d,), of `h W + b`."""
        w = projection.to(self.gram)
        if bias is not None:
            embedded = self.rows.to(w) @ w + bias.to(w)
            return float((self.shares * embedded.square().sum(1)).sum()) / float(self.shares.sum())
        return float((self.gram @ w * w).sum()) / float(self.shares.sum())

    def leaving(self, same: Sequence[Collection[str]], hidden: Tensor, owner: Tensor) -> Tensor:
        """Which names leave when each of C classes is forgotten, (C, n) bool.

        Args:
            same: for each class the names, in small letters, that mean the same as it.
            hidden: (K, w), the texts by which the classes are forgotten; owner: (K,) int64, the
                class of each. Names of a larger cosine with one of a class's texts than
                `similarity` leave with it, where their group allows that.

        Raises:
            ProblemError: tensors that are no texts of this width, or of other classes.
        """
        device = self.rows.device
        hidden = matrix("hidden", hidden, self.rows.shape[1])
        owner = indices("owner", owner, len(hidden), len(same))
        leaving = torch.zeros(len(same), len(self.names), dtype=torch.bool, device=device)
        for i, names in enumerate(same):
            places = [place for name in names for place in self._places.get(name, ())]
            leaving[i, places] = True
        if self.similarity < 1 and len(self.names):
            for part in torch.arange(len(hidden)).split(CHUNK):
                texts = normalize(hidden[part].to(self.rows), dim=1)
                cosine = texts @ self._directions.T  # (b, w) @ (w, n)
                near = (cosine > self.similarity) & self._alike
                if self.most is not None and self.most < len(self.names):
                    least = cosine.masked_fill(~self._alike, -1.0)
                    least = least.topk(self.most, dim=1).values[:, -1:]
                    near &= cosine >= least
                text, place = near.nonzero(as_tuple=True)
                leaving[owner.to(device)[part.to(device)][text], place] = True
        return leaving

    def spread(self, values: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Group -> root mean square and maximum (R,) of values (R, n) of its names; NaN counts not,
        and a group of which nothing counts gives 0."""
        parts = values.split(list(self.counts.values()), dim=1)
        found = {}
        for name, part in zip(self.counts, parts, strict=True):
            mean = part.square().nanmean(dim=1).nan_to_num(0.0)
            found[name] = mean.sqrt(), part.nan_to_num(0.0).amax(dim=1)
        return found

    def named(self, leaving: Tensor) -> list[str]:
        """The names that a mask (n,) marks, sorted, each once."""
        return sorted({self.names[place] for place in leaving.nonzero()[:, 0].tolist()})
