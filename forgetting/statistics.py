"""What a solver needs of retained texts, read as a stream: one triangle and a count per group.

The retained texts enter every solve through `G = sum of h^T h` only. So they can be read in any
order and on several machines, and a million of them take as much memory as a thousand. What is
kept is not G but the triangle R of a QR factorisation, `R^T R = G`, which has all digits of the
rows themselves: a proof from it is a proof for the texts (`forgetting.solvers.spectrum.triangle`).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from forgetting.errors import ProblemError, number
from forgetting.io import matrix, naming, pack, raw, unpack, write_bytes
from forgetting.solvers.spectrum import CHUNK, EPS, triangle

FORMAT = "clip-forget-statistics/3"
NAMED = "clip-forget-statistics/2"  # a word in `sha256`
DIGEST = 2**256
LARGEST = 1e90  # of a Gram matrix; the squares of float32 are below 1e78
# A Gram matrix may lose this fraction of its largest eigenvalue, times w, to rounding and stay one.
ROUNDING = 1e-12


class RetainStatistics:
    """Triangles and counts of named groups of hidden states, in float64 on the CPU.

    Memory is one (w, w) matrix a group, 8 bytes a row, and `CHUNK` rows, however many rows are
    read. Order, batches and merging change `R^T R` by rounding only (1e-12 relative and less), and
    change `sha256` not at all: it is made of the rows' own digests. Of each digest 64 bits are
    kept, so that only what was read can be removed.

    Attributes:
        width: w; counts: rows that each group was made of, the `m_g` of its mean.
    """

    def __init__(self, width: int) -> None:
        if width < 1:
            raise ProblemError(f"hidden states have at least one dimension, not {width}")
        self.width = width
        self.counts: dict[str, int] = {}
        self._roots: dict[str, Tensor] = {}
        self._removed: dict[str, int] = {}
        self._digests: dict[str, int] = {}
        self._keys: dict[str, list[Tensor]] = {}  # of the rows that are there, int64

    def update(self, group: str, rows: Tensor) -> None:
        """Add `rows` (n, w) to a group, which is made if it is new; n = 0 changes nothing.

        The factorisation is made on the device of `rows`. Many rows at once are cheaper: each call
        costs as much as w more of them.

        Raises:
            ProblemError: another width, no floating point numbers, NaN, or numbers beyond float32.
        """
        rows = self._check(rows)
        if len(rows):
            digest, keys = _names(rows)
            self._add(group, triangle(rows, self._roots.get(group)), [keys], digest, len(rows))

    def remove(self, group: str, rows: Tensor) -> None:
        """Take `rows` (n, w) out of a group again (downdate), which costs half of R's digits.

        The group's count stays what it was: the weight of a name, w_g / m_g, must not depend on
        which other names have left. A row is known by its numbers in float32, all of them: one that
        was encoded in another batch is another row.

        Raises:
            ProblemError: an unknown group, rows that are not in it or not that often, or rows so
                much longer than all others that what is left would be rounding. Nothing changes.
        """
        self._known(group)
        rows = self._check(rows)
        before = self.counts[group] - self._removed[group]
        if (left := before - len(rows)) < 0:
            raise ProblemError(f"{len(rows)} rows cannot leave group {group!r}: it has {before}")
        if not len(rows):
            return
        digest, keys = _names(rows)
        there, gone = torch.cat(self._keys[group]).sort().values, keys.sort().values
        # The second copy of a row takes the second place among its equals.
        copies = torch.arange(len(gone)) - torch.searchsorted(gone, gone)
        places = torch.searchsorted(there, gone) + copies
        if not torch.equal(there[places.clamp(max=len(there) - 1)], gone):
            raise ProblemError(f"a row leaves group {group!r} that was not part of it")
        taken = triangle(rows).cpu()
        gram = self._roots[group].T @ self._roots[group]
        rest = (gram - taken.T @ taken) * (left > 0)
        wrong = _no_gram(rest, left)
        if left and EPS * float(gram.trace()) > ROUNDING * self.width * float(rest.trace()):
            wrong = wrong or "the rows that leave are too long"
        if wrong is not None:
            raise ProblemError(f"what is left of group {group!r} is lost in rounding: {wrong}")
        stay = torch.ones(len(there), dtype=torch.bool)
        stay[places] = False
        self._roots[group] = square_root(rest)[-left:] if left else rest[:0]
        self._keys[group] = [there[stay]]
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
            for group, root in part._roots.items():
                merged._add(
                    *(group, triangle(root, merged._roots.get(group)), part._keys[group]),
                    *(part._digests[group], part.counts[group], part._removed[group]),
                )
        return merged

    def weighted(self, weights: dict[str, float] | None) -> Tensor:
        """`G = sum over groups of (w_g / m_g) H_g^T H_g`, (w, w) float64; None: each text weighs 1.

        Raises:
            ProblemError: a group without a weight, a weight without a group, a negative weight.
        """
        rows = self._rows(weights)
        return rows.T @ rows

    def root(self, weights: dict[str, float] | None = None) -> Tensor:
        """`R` (q, w), q <= w, with `R^T R = weighted(weights)`: a stand-in for `H_r` in every solve
        and proof. Errors as in `weighted`."""
        return triangle(self._rows(weights))

    def share(self, group: str, weights: dict[str, float]) -> float:
        """`w_g / m_g`, the weight that one text of a group has in `weighted`."""
        self._known(group)
        if group not in weights:
            raise ProblemError(
                f"group {group!r} has no weight; weigh each of {', '.join(map(repr, self.counts))}"
            )
        value = number(f"the weight of group {group!r}", weights[group], low=0)
        return value / self.counts[group]

    @property
    def sha256(self) -> str:
        """Names what was read: groups, counts and rows (to float32), whatever their order."""
        content = [
            [group, self.counts[group], self._removed[group], f"{self._digests[group]:064x}"]
            for group in sorted(self.counts)
        ]
        return hashlib.sha256(json.dumps([NAMED, self.width, content]).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the statistics; the file appears whole or not at all."""
        groups, held = [], {}
        for i, (group, count) in enumerate(self.counts.items()):
            rows = f"{self._digests[group]:064x}"
            groups.append(
                {"name": group, "count": count, "removed": self._removed[group], "rows": rows}
            )
            held |= {f"root.{i}": self._roots[group], f"keys.{i}": torch.cat(self._keys[group])}
        write_bytes(pack(FORMAT, {"width": self.width, "groups": groups}, held), path)

    @classmethod
    def load(cls, path: str | Path) -> RetainStatistics:
        """Read statistics that `save` wrote, which are as they were written.

        Raises:
            ProblemError: no such file, no statistics, or damaged or changed ones; the message
                names the file.
        """
        fields, held = unpack(path, FORMAT)
        with naming(path):
            statistics = cls(fields["width"])
            for i, group in enumerate(fields["groups"]):
                name, digest = group["name"], int(group["rows"], 16)
                root, keys = held[f"root.{i}"], held[f"keys.{i}"]
                statistics._add(name, root, [keys], digest, group["count"], group["removed"])
        return statistics

    def _add(
        self,
        group: str,
        root: Tensor,
        keys: list[Tensor],
        digest: int,
        count: int,
        removed: int = 0,
    ) -> None:
        """Put `root` in the place of a group's triangle, and add the rest to what there is."""
        self._roots[group] = root.cpu()
        self._keys[group] = [*self._keys.get(group, ()), *keys]
        self._digests[group] = (self._digests.get(group, 0) + digest) % DIGEST
        self._removed[group] = self._removed.get(group, 0) + removed
        self.counts[group] = self.counts.get(group, 0) + count

    def _rows(self, weights: dict[str, float] | None) -> Tensor:
        """The triangles of all groups, weighted, one below the other."""
        for group in weights or ():
            self._known(group)
        share = {g: 1.0 if weights is None else self.share(g, weights) for g in self.counts}
        empty = torch.zeros(0, self.width, dtype=torch.float64)
        return torch.cat([empty, *(share[g] ** 0.5 * root for g, root in self._roots.items())])

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
    """Rows `R` (q, w) with `R^T R = G` to rounding, q the rank of G (w, w), shortest row first.

    Eigenvalues that rounding alone can make are left out, so that a kernel stays a kernel; so are
    singular values below `sqrt(eps w)` of the largest, which G hides (and a triangle does not).
    """
    values, vectors = torch.linalg.eigh(gram.double())
    keep = values > EPS * len(gram) * values[-1].clamp(min=0)
    return values[keep].sqrt()[:, None] * vectors[:, keep].T  # (q, w)


def _names(rows: Tensor) -> tuple[int, Tensor]:
    """Of rows (n, w) the sum of their SHA-256 modulo 2^256, and the last 64 bits of each (n,)."""
    digest, keys = 0, []
    for chunk in rows.split(CHUNK):
        # -0.0 and 0.0 are the same number: adding 0 makes them the same bytes.
        held = raw(chunk.to("cpu", torch.float32) + 0.0)
        size = len(held) // len(chunk)
        for start in range(0, len(held), size):
            found = hashlib.sha256(held[start : start + size]).digest()
            digest += int.from_bytes(found, "big")
            keys.append(int.from_bytes(found[-8:], "big", signed=True))
    return digest % DIGEST, torch.tensor(keys, dtype=torch.int64)


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
