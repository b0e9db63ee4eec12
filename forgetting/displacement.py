"""How far an edit moves other texts, from text alone: before any image is seen.

A request moves the embedding of a text r by `r Delta = s D`, with the displacement ratios
`s = r K^-1 H_f^T (H_f K^-1 H_f^T)^-1` of the displacements `D`: 1 for the forgotten text itself,
0.6 to 0.95 for other words for it, near 0 for what is retained. Had a retained name not been in the
list, its ratio would have been larger (Sherman, Morrison and Woodbury; c is its weight in G):

    s_without = s / (1 - c q),    q = r K^-1 r^T - s (H_f K^-1 r^T)

A name that is retained in two prompts leaves with both: then r is (2, w), and `1 - c q` a (2, 2)
matrix. So the list itself tells how far names *like* those in it move that nobody listed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from forgetting.edited_texts import EditedTexts, EmbeddedTexts
from forgetting.problem import LowRankEdit, pad_indices
from forgetting.solvers.constrained import Excluded, Ridge, pinv_psd, request_batches

MOST_AFFECTED = 5  # names of a forecast
SHORTEST = 1e-300
VANISHED = 1e-5  # of its length: the direction of a text of which less is left is rounding


def displacement_ratios(
    ridge: Ridge,
    hidden: Tensor,
    displacement: Tensor,
    owner: Tensor,
    excluded: Tensor,
    variant_of: Tensor | None = None,
) -> Tensor:
    """How far each of R requests moves each name of `ridge`, (R, n) float64: `||s D||` in units of
    the root mean square of the rows of D, for one text `|s|`.

    Args:
        hidden: (K, w), the texts of all requests; displacement: `D`, (K, d); owner: (K,) int64, the
            request of each text; excluded: (R, n) bool, the names that are not retained in it.
        variant_of: (n,) int64, the same name in its other prompt; itself where there is none. With
            it each name moves as if it had not been listed. Those that are excluded are not.
    """
    h, ratios = hidden.to(ridge.weights), ridge.weights.new_zeros(excluded.shape)
    rows = ridge.rows.to(ridge.weights)
    for numbers, texts, columns, removed in request_batches(ridge, h, owner, excluded):
        product = columns @ rows.T  # (B, k, n)
        s = pinv_psd(h[texts] @ columns.mT) @ product
        if variant_of is not None:
            s = _left_out(ridge, excluded[numbers], variant_of, removed, product, s)
        d = displacement[texts].to(s)
        size = d @ d.mT  # (B, k, k)
        unit = size.diagonal(dim1=1, dim2=2).mean(dim=1).sqrt()[:, None].clamp_min(SHORTEST)
        ratios[numbers] = ((size @ s) * s).sum(dim=1).clamp_min(0).sqrt() / unit
    return ratios


def _left_out(
    ridge: Ridge, excluded: Tensor, variant: Tensor, removed: Excluded, product: Tensor, s: Tensor
) -> Tensor:
    """Ratios (B, k, n) as if each name had not been listed, from those as it is, s, and `product`,
    `H_f K^-1 r^T` of every name r; excluded: (B, n) bool, and the same as rows, `removed`."""
    weights, base, rows = ridge.weights, ridge.base, ridge.rows.to(ridge.weights)
    excluded = excluded.to(weights.device)
    in_pairs = variant != torch.arange(len(rows), device=variant.device)
    q = (base * rows).sum(dim=1) - (s * product).sum(dim=1)  # (B, n)
    cross = (base * rows[variant]).sum(dim=1) - (s * product[..., variant]).sum(dim=1)
    if removed.rows.shape[1]:
        # Many requests exclude the same names: one product for each name, not each request.
        few, which = pad_indices(excluded & (weights > 0), weights)[0].unique(return_inverse=True)
        met = (base[few] @ rows.T)[which] * (removed.weights > 0)[..., None]  # (B, n', n)
        gained = torch.linalg.solve_triangular(removed.root, met, upper=False)
        q = q + gained.square().sum(dim=1)
        cross = cross + (gained * gained[..., variant]).sum(dim=1)
    c = weights.masked_fill(excluded, 0.0)  # (B, n)
    own = 1 - c * q
    other = torch.where(in_pairs, own[:, variant], 1.0)
    between = torch.where(in_pairs, c * cross, 0.0)
    scale = (own * other - between.square()).clamp_min(SHORTEST)
    return (other[:, None] * s + between[:, None] * s[..., variant]) / scale[:, None]


def displacement_along(edit: LowRankEdit, text: Tensor, others: Tensor) -> Tensor:
    """How far other texts (n, w) move along the displacement of a text (w,): (n,), 1 is as far."""
    moved = (torch.stack([text, *others]).to(edit.left) @ edit.left) @ edit.right  # (1 + n, d)
    size = moved[0] @ moved[0]
    return torch.where(size > 0, (moved[1:] @ moved[0]) / size, 1.0)


class AffectedName(NamedTuple):
    """A name whose text an edit moves."""

    name: str
    displacement: float  # how far its text moves, in units of the forgotten texts' displacement
    cosine_loss: float  # 1 minus the cosine between its text before and after
    margin: float  # 1 minus the cosine of its text with that of the nearest other name, before

    @property
    def likely_misclassified(self) -> bool:
        return self.cosine_loss > self.margin


class Margin(NamedTuple):
    """How a forgotten class's text fares, in cosine; None where there is no other class, or nothing
    is left of the text."""

    margin: float | None  # how much nearer another class's text lies to it after the edit
    gap: float | None  # how much nearer, as it was, it lay to itself than to any other class

    def survives(self, error: float) -> bool:
        """Whether the text stays nearer to another class after rounding, see `rounding_error`."""
        return self.margin is not None and self.margin > error


def rounding_error(exact: Tensor, rounded: Tensor) -> float:
    """By how much rounding changes the difference between two cosines at most: twice the largest
    distance between the directions of vectors (n, d) before and after it. Of a rounded model they
    are the embeddings of the classes' texts after the edit, of a rounded index its vectors."""
    return 2 * float((normalize(exact.double()) - normalize(rounded.double())).norm(dim=1).max())


def worst(margins: Sequence[Margin]) -> Margin:
    """That of the class which fares worst."""
    known = [margin for margin in margins if margin.margin is not None]
    return min(known, key=lambda one: one.margin - one.gap, default=Margin(None, None))


@dataclass(frozen=True)
class Forecast:
    """What an edit does, as far as text tells."""

    # Group of retained names -> root mean square and maximum of the displacement ratios of names
    # like them that nobody listed.
    unlisted: dict[str, tuple[float, float]]
    affected: list[AffectedName]  # the names that lose most cosine, most first
    margin: float | None  # see `Margin`; of the class that fares worst
    gap: float | None

    def survives(self, error: float) -> bool:
        """Whether what is forgotten stays so after rounding, by text alone: see `Margin`."""
        return Margin(self.margin, self.gap).survives(error)


@dataclass(frozen=True, eq=False)
class ClassifierTexts:
    """Texts by which images are classified, n of them."""

    names: Sequence[str]
    texts: EmbeddedTexts  # in the untouched model
    label: Mapping[str, int]  # class -> its row
    n_classes: int  # images are classified among so many of the first
    watched: Sequence[int] = ()  # rows that `affected` says in any case

    @cached_property
    def directions(self) -> Tensor:
        return self.texts.embeddings / self.texts.lengths[:, None]  # (n, d)

    def affected(self, texts: EditedTexts, forgotten: Sequence[int]) -> list[AffectedName]:
        """The names that lose most cosine by an edit, and those watched, but for the rows that it
        forgets, most first."""
        own = torch.tensor(forgotten, device=self.directions.device)
        cosines = texts.cosines_with_before.index_fill(0, own, torch.inf)
        count = min(MOST_AFFECTED, len(cosines) - len(own.unique()))
        top = cosines.topk(count, largest=False).indices
        top = torch.cat([top, top.new_tensor(self.watched)]).unique()
        top = top[cosines[top].argsort()]
        others = self.directions[top] @ self.directions.T  # (b, d) @ (d, n)
        nearest = others.scatter_(1, top[:, None], -1.0).amax(dim=1)
        moved = texts.distances / texts.distances[own].mean().clamp_min(SHORTEST)
        numbers = (x.tolist() for x in (moved[top], 1 - cosines[top], 1 - nearest))
        return list(map(AffectedName, [self.names[i] for i in top.tolist()], *numbers))

    def margins(self, texts: EditedTexts, forgotten: Sequence[int]) -> list[Margin]:
        """The margin of each row that an edit forgets, among the other classes."""
        own = torch.tensor(forgotten, device=self.directions.device)
        was = self.directions[own]  # (o, d)
        products = was @ self.texts.embeddings.T  # (o, n)
        after = texts.image_cosines(products, was @ texts.right.T)
        others = torch.arange(self.n_classes, device=own.device)
        others = others[~torch.isin(others, own)]
        known = (texts.lengths > VANISHED * self.texts.lengths)[own].tolist()
        if not len(others):
            return [Margin(None, None)] * len(known)
        gap = 1 - (products / self.texts.lengths)[:, others].amax(dim=1)
        margin = after[:, others].amax(dim=1) - after.gather(1, own[:, None])[:, 0]
        pairs = zip(margin.tolist(), gap.tolist(), known, strict=True)
        return [Margin(m, g) if is_known else Margin(None, None) for m, g, is_known in pairs]
