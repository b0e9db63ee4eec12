"""What is retained: names with their hidden states, and the statistics that a solver needs of them.

The retained texts enter every solve through `G = sum of h^T h` only. So they can be read as a
stream, in any order, on several machines, one (w, w) matrix a group (`RetainStatistics`). Which
names must leave with a forgotten class can only be said while the names are at hand (`RetainSet`).
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from forgetting.checks import ProblemError, indices, matrix, number, weight, whole
from forgetting.constrained import Ridge
from forgetting.files import check_tensors, naming, pack, sha256, text, unpack, write_bytes

FORMAT = "clip-forget-statistics/2"
# What a file holds: groups with the rows that they were made of, those that left, and what the
# digests of the rows that are there add up to.
GROUP = {"name": text, "count": whole, "removed": partial(whole, least=0), "rows": sha256}
FIELDS = {"width": whole, "groups": [GROUP]}
CHUNK = 4096  # rows that are in float64 at one time
DIGEST = 2**256
KEY = 2**64
LARGEST = 1e90  # of a Gram matrix; the squares of float32 are below 1e78
# A Gram matrix may lose this fraction of its largest eigenvalue, times w, to rounding and stay one.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Group:
    """Names that are retained for one reason.

    Attributes:
        names: m of them, in any spelling; rows: (m, w), their hidden states.
        weight: w_g of the whole group, so that each of its names weighs w_g / m in G; None: each
            name weighs 1, as in the paper's plain sum.
        alike: whether a name leaves for being similar to a forgotten text. The other classes of a
            set do not: they are different things, however alike their names.
    """

    names: Sequence[str]
    rows: Tensor
    weight: float | None = None
    alike: bool = True


class RetainSet:
    """Retained names in groups: what each weighs, which leave with a class, and what is solved on.

    Attributes:
        groups: those that hold names; counts: how many each holds.
        names: n of all groups in turn; rows: (n, w) their hidden states; shares: (n,) float64,
            what each weighs in G; statistics: of all of them.
    """

    def __init__(
        self,
        groups: Mapping[str, Group],
        similarity: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Args:
        similarity: cosine of hidden states beyond which a name leaves with a text; 1: none does.
        device: where `rows`, `gram` and everything made of them are.

        Raises:
            ProblemError: no group, a group whose names and rows do not fit, an impossible weight.
        """
        if not groups:
            raise ProblemError("a retain set needs at least one group, which may be empty")
        self.similarity = number("similarity", similarity)
        width = matrix("hidden states", next(iter(groups.values())).rows).shape[1]
        self.statistics = RetainStatistics(width)
        for name, group in groups.items():
            if group.weight is not None:
                weight(f"the weight of group {name!r}", group.weight)
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
        total = float(self.shares.sum())
        if total <= 0:
            raise ProblemError("no retained name has any weight: nothing would be retained")
        return Ridge(self.gram, mu * float(self.gram.trace()) / total)

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
            rows = normalize(self.rows, dim=1)
            for part in torch.arange(len(hidden)).split(CHUNK):
                texts = normalize(hidden[part].to(self.rows), dim=1)
                near = (texts @ rows.T > self.similarity) & self._alike  # (b, w) @ (w, n)
                text, place = near.nonzero(as_tuple=True)
                leaving[owner.to(device)[part.to(device)][text], place] = True
        return leaving

    def named(self, leaving: Tensor) -> list[str]:
        """The names that a mask (n,) marks, sorted, each once."""
        return sorted({self.names[place] for place in leaving.nonzero()[:, 0].tolist()})


class RetainStatistics:
    """Gram matrices and counts of named groups of hidden states, in float64 on the CPU.

    Memory is one (w, w) matrix a group, 8 bytes a row, and `CHUNK` rows, however many rows are
    read. Order, batches and merging change the matrices by rounding only (1e-12 relative and less),
    and change `sha256` not at all: it is made of the rows' own digests. Of each digest 64 bits are
    kept, so that only what was read can be removed.

    What a certificate from the statistics alone can reach: it proves an answer for `square_root`,
    whose singular values below about 3e-7 of the largest (`sqrt(eps w)`; eigenvalues of G that
    rounding hides) are taken for zero. Where `H_r` has none of those, in either branch, that is the
    same problem: on ImageNetText the gap judged with `H_r` is the certified one, 1e-15 to 1e-13
    (generic) and 1e-13 to 1e-11 (kernel, 100 texts). Where it has some, the certificate cannot
    know: with half of the singular values at 1e-8 of the largest it said 3e-14 while the gap judged
    with `H_r` was 6e-9 to 6e-8. Who needs more keeps `H_r`.

    Attributes:
        width: w; counts: rows that each group was made of, the `m_g` of its mean.
    """

    def __init__(self, width: int) -> None:
        if width < 1:
            raise ProblemError(f"hidden states have at least one dimension, not {width}")
        self.width = width
        self.counts: dict[str, int] = {}
        self._grams: dict[str, Tensor] = {}
        self._removed: dict[str, int] = {}
        self._digests: dict[str, int] = {}
        self._keys: dict[str, list[Tensor]] = {}  # of the rows that are there, int64

    def update(self, group: str, rows: Tensor) -> None:
        """Add `rows` (n, w) to a group, which is made if it is new; n = 0 changes nothing.

        The products are taken on the device of `rows`.

        Raises:
            ProblemError: another width, no floating point numbers, NaN, or numbers beyond float32.
        """
        text("the name of a group", group)
        rows = self._check(rows)
        if not len(rows):
            return
        gram, digest, keys = _summary(rows)
        self._grams[group] = self._grams.get(group, 0) + gram
        self._digests[group] = (self._digests.get(group, 0) + digest) % DIGEST
        self._keys.setdefault(group, []).append(keys)
        self._removed.setdefault(group, 0)
        self.counts[group] = self.counts.get(group, 0) + len(rows)

    def remove(self, group: str, rows: Tensor) -> None:
        """Take `rows` (n, w) out of a group's Gram matrix (downdate).

        The group's count stays what it was: the weight of a name, w_g / m_g, must not depend on
        which other names have left. A row is known by its numbers in float32, all of them: one that
        was encoded in another batch is another row.

        Raises:
            ProblemError: an unknown group, rows that are not in it or not that often, or rows so
                much longer than all others that what is left would be rounding. Nothing changes.
        """
        self._known(group)
        rows = self._check(rows)
        left = self.counts[group] - self._removed[group]
        if len(rows) > left:
            raise ProblemError(f"{len(rows)} rows cannot leave group {group!r}: it has {left}")
        if not len(rows):
            return
        gram, digest, keys = _summary(rows)
        there, gone = torch.cat(self._keys[group]).sort().values, keys.sort().values
        # The second copy of a row takes the second place among its equals.
        copies = torch.arange(len(gone)) - torch.searchsorted(gone, gone)
        places = torch.searchsorted(there, gone) + copies
        if not torch.equal(there[places.clamp(max=len(there) - 1)], gone):
            raise ProblemError(f"a row leaves group {group!r} that was not part of it")
        rest = self._grams[group] - gram if len(rows) < left else torch.zeros_like(gram)
        if (wrong := _no_gram(rest, left - len(rows))) is not None:
            raise ProblemError(f"what is left of group {group!r} is lost in rounding: {wrong}")
        stay = torch.ones(len(there), dtype=torch.bool)
        stay[places] = False
        self._grams[group], self._keys[group] = rest, [there[stay]]
        self._digests[group] = (self._digests[group] - digest) % DIGEST
        self._removed[group] += len(rows)

    def merge(self, other: RetainStatistics) -> RetainStatistics:
        """The statistics of the rows of both, as a new object; groups of one name are joined.

        Raises:
            ProblemError: hidden states of another width.
        """
        if other.width != self.width:
            raise ProblemError(
                f"statistics of width {self.width} and {other.width} belong to two backbones"
            )
        merged = RetainStatistics(self.width)
        for part in (self, other):
            for group, gram in part._grams.items():
                merged._grams[group] = merged._grams.get(group, 0) + gram
                digest = merged._digests.get(group, 0) + part._digests[group]
                merged._digests[group] = digest % DIGEST
                merged._keys[group] = [*merged._keys.get(group, ()), *part._keys[group]]
                merged._removed[group] = merged._removed.get(group, 0) + part._removed[group]
                merged.counts[group] = merged.counts.get(group, 0) + part.counts[group]
        return merged

    def weighted(self, weights: dict[str, float]) -> Tensor:
        """`G = sum over groups of (w_g / m_g) H_g^T H_g`, (w, w) float64.

        Raises:
            ProblemError: a group without a weight, a weight without a group, a negative weight.
        """
        for group in weights:
            self._known(group)
        total = torch.zeros(self.width, self.width, dtype=torch.float64)
        for group, gram in self._grams.items():
            total += self.share(group, weights) * gram
        return total

    def share(self, group: str, weights: dict[str, float]) -> float:
        """`w_g / m_g`, the weight that one text of a group has in `weighted`."""
        self._known(group)
        if group not in weights:
            raise ProblemError(
                f"group {group!r} has no weight; weigh each of {', '.join(map(repr, self.counts))}"
            )
        return weight(f"the weight of group {group!r}", weights[group]) / self.counts[group]

    def plain(self) -> Tensor:
        """`G = H_r^T H_r` over all groups, the paper's unweighted sum, (w, w) float64."""
        total = torch.zeros(self.width, self.width, dtype=torch.float64)
        for gram in self._grams.values():
            total += gram
        return total

    @property
    def sha256(self) -> str:
        """Names what was read: groups, counts and rows (to float32), whatever their order."""
        content = [
            [group, self.counts[group], self._removed[group], f"{self._digests[group]:064x}"]
            for group in sorted(self.counts)
        ]
        return hashlib.sha256(json.dumps([FORMAT, self.width, content]).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the statistics; the file appears whole or not at all."""
        groups = [
            {
                "name": group,
                "count": count,
                "removed": self._removed[group],
                "rows": f"{self._digests[group]:064x}",
            }
            for group, count in self.counts.items()
        ]
        tensors = {f"gram.{i}": gram for i, gram in enumerate(self._grams.values())}
        tensors |= {f"keys.{i}": torch.cat(keys) for i, keys in enumerate(self._keys.values())}
        write_bytes(pack(FORMAT, {"width": self.width, "groups": groups}, tensors), path)

    @classmethod
    def load(cls, path: str | Path) -> RetainStatistics:
        """Read statistics that `save` wrote, which are as they were written.

        Raises:
            ProblemError: no such file, no statistics, damaged or changed ones, or (also where
                digests were made anew) some that no rows can have: matrices that are not symmetric
                or have negative eigenvalues, or more positive ones than there are rows; counts,
                keys and digests that contradict each other. The message names the file.
        """
        _, fields, tensors = unpack(path, FORMAT, FIELDS)
        statistics = cls(width := fields["width"])
        with naming(path):
            table: dict = {}
            for i, group in enumerate(fields["groups"]):
                table[f"gram.{i}"] = ((torch.float64,), (width, width))
                table[f"keys.{i}"] = ((torch.int64,), (group["count"] - group["removed"],))
            check_tensors(tensors, table)
            for i, group in enumerate(fields["groups"]):
                name, digest = group["name"], int(group["rows"], 16)
                gram, keys = tensors[f"gram.{i}"], tensors[f"keys.{i}"]
                if name in statistics.counts:
                    raise ProblemError(f"group {name!r} is there twice")
                if (int(keys.sum()) - digest) % KEY:  # int64 is counted modulo 2^64
                    raise ProblemError(f"the keys and the digest of {name!r} are of other rows")
                if (wrong := _no_gram(gram, len(keys))) is not None:
                    raise ProblemError(f"gram.{i} is not of {len(keys)} rows: {wrong}")
                statistics._grams[name], statistics._keys[name] = gram, [keys]
                statistics._digests[name], statistics._removed[name] = digest, group["removed"]
                statistics.counts[name] = group["count"]
        return statistics

    def _known(self, group: str) -> None:
        if group not in self.counts:
            known = ", ".join(map(repr, self.counts)) or "none"
            raise ProblemError(f"no group {group!r} in the retain statistics; known: {known}")

    def _check(self, rows: Tensor) -> Tensor:
        rows = matrix("the retained rows", rows, self.width)
        if not all(torch.isfinite(chunk.float()).all() for chunk in rows.split(CHUNK)):
            raise ProblemError("the retained rows hold numbers beyond float32")
        return rows


def square_root(gram: Tensor) -> Tensor:
    """Rows `R` (q, w) with `R^T R = G` to rounding, q the rank of G (w, w): a stand-in for `H_r`.

    Eigenvalues that rounding alone can make are left out, so that a kernel stays a kernel.
    """
    values, vectors = torch.linalg.eigh(gram.double())
    keep = values > torch.finfo(torch.float64).eps * len(gram) * values[-1].clamp(min=0)
    return values[keep].sqrt()[:, None] * vectors[:, keep].T  # (q, w)


def _summary(rows: Tensor) -> tuple[Tensor, int, Tensor]:
    """Of rows (n, w) the Gram matrix (w, w), the sum of their SHA-256 modulo 2^256, and the last 64
    bits of each (n,) int64."""
    gram, digest, keys = 0, 0, []
    for chunk in rows.detach().split(CHUNK):
        exact = chunk.double()
        gram = gram + exact.T @ exact
        # -0.0 and 0.0 are the same number: adding 0 makes them the same bytes.
        for row in (chunk.to("cpu", torch.float32) + 0.0).numpy().astype("<f4"):
            found = hashlib.sha256(row).digest()
            digest += int.from_bytes(found, "big")
            keys.append(int.from_bytes(found[-8:], "big", signed=True))
    return gram.cpu(), digest % DIGEST, torch.tensor(keys, dtype=torch.int64)


def _no_gram(gram: Tensor, count: int) -> str | None:
    """Why a matrix (w, w) cannot be `H^T H` of `count` rows, to rounding; None if it can."""
    if not float(gram.abs().max()) < LARGEST:
        return "its numbers are out of range"
    values = torch.linalg.eigvalsh(gram)
    rounding = ROUNDING * len(gram) * float(values.abs().max())
    if float((gram - gram.T).abs().max()) > rounding:
        return "it is not symmetric"
    if values[0] < -rounding:
        return f"it has the negative eigenvalue {float(values[0]):.1e}"
    if count < len(gram) and values[len(gram) - count - 1] > rounding:
        return f"its rank is larger than {count}"
    return None
