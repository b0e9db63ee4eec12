"""Who else feels it: the classes nearest to the forgotten one, and all texts that should stay."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import datasets
from evaluation.audit.case import SHORTEST, Case, Common
from evaluation.audit.interval import mean_value
from evaluation.zero_shot import CANCELS

NEAREST = 10  # classes listed, and texts compared for the overlap
WORST = 10  # texts listed
BLOCK = 256  # rows of a similarity matrix at once: 10,000 texts then need 10 MB for each
WATCHED = 1000  # texts whose neighbours are compared: a sample where there are more
TIE = 1e-6  # cosines closer than float32 rounding are one place


def measure(case: Case) -> dict[str, Any]:
    """Accuracy of the nearest retained classes, and how far all retained texts moved.

    A retained text is the evaluation prompt of a class that is not forgotten, a name of the
    vocabulary, or the evaluation prompt of a class of another set; a name that equals a forgotten
    class or is marked as its synonym is none. Texts are listed by their names.

    Returns:
        classes: the at most ten retained classes of highest cosine to the class in the untouched
            model, nearest first; mean_before, mean_after: over those that have images.
        moved: count of texts; mean_cosine between a text's embeddings before and after;
            nearest_kept: share of texts whose nearest text, among the others, is still nearest
            (ties count as kept); top10_overlap: share of a text's ten nearest (all, if there are
            fewer) that still are (both over at most 1,000 texts, drawn once for the set); worst:
            the ten texts of lowest cosine, and the place that their former nearest text has now, 1
            for still nearest.
        not_measured: what could not be measured, and why.
    """
    columns = nearest_classes(case)
    similarities = case.before.classes[columns] @ case.before.classes[case.label]  # (n, d) @ (d,)
    classes = [
        {
            "name": case.bundle.classnames[column],
            "similarity": float(similarity),
            **case.sides(lambda model, column=column: model.accuracy(column)),
        }
        for column, similarity in zip(columns, similarities, strict=True)
    ]
    bare = [entry["name"] for entry in classes if entry["before"]["n"] == 0]
    missing = [f"neighbours: no image of {', '.join(bare)}"] if bare else []
    if not classes:
        missing.append("neighbours: no class is retained")
    texts, stay = case.common.once(texts_of), retained_texts(case)
    if stay.sum() < 2:
        missing.append(f"moved texts: {int(stay.sum())} of at least 2 retained texts")
    left, right = case.after.change
    return {
        "classes": classes,
        "mean_before": mean_value([entry["before"] for entry in classes]),
        "mean_after": mean_value([entry["after"] for entry in classes]),
        "moved": _moved(texts, stay, texts.hidden @ left, right),
        "not_measured": missing,
    }


@dataclass(frozen=True)
class Texts:
    """All texts that could stay, of a set and of the sets beside it.

    Attributes:
        names, groups: T names as they are spelled, and "class", "vocabulary" or a data set.
        rows: key of a name -> its rows; of the classes of the set, which have the first ones, none.
        hidden: (T, w), embedded: (T, d) in the untouched model, not normalised; lengths: (T,).
        watched: rows (W,) of the texts whose neighbours are compared; products: (W, T) of their
            embeddings with all; nearest: (W, n), the nearest other texts, nearest first.
    """

    names: list[str]
    groups: list[str]
    rows: dict[str, list[int]]
    hidden: Tensor
    embedded: Tensor
    lengths: Tensor
    watched: Tensor
    products: Tensor
    nearest: Tensor


def texts_of(common: Common) -> Texts:
    """The texts that the classes of a set have in common, before any is left out."""
    bundle = common.bundle
    parts = [
        ("class", bundle.classnames, bundle.class_hidden),
        ("vocabulary", bundle.retain_names, bundle.retain_hidden),
        *((name, other.classnames, other.class_hidden) for name, other in common.others.items()),
    ]
    names = [name for _, part, _ in parts for name in part]
    groups = [group for group, part, _ in parts for _ in part]
    rows = defaultdict(list)
    for row, name in list(enumerate(names))[len(bundle.classnames) :]:
        rows[datasets.key(name)].append(row)
    hidden = torch.cat([rows for _, _, rows in parts])
    embedded = hidden @ bundle.text_projection  # (T, w) @ (w, d)
    lengths = embedded.norm(dim=1).clamp_min(SHORTEST)
    watched = torch.arange(len(names))
    if len(names) > WATCHED:
        drawn = torch.randperm(len(names), generator=common.generator("watched"))
        watched = drawn[:WATCHED].sort().values
    products = embedded[watched] @ embedded.T  # (W, d) @ (d, T)
    everything = torch.ones(len(names), dtype=torch.bool)
    cosines = _cosines(products, lengths, watched, everything)
    nearest = cosines.topk(min(NEAREST, len(names) - 1)).indices
    return Texts(names, groups, rows, hidden, embedded, lengths, watched, products, nearest)


def nearest_classes(case: Case) -> list[int]:
    """Columns of the at most ten retained classes nearest to the class by the cosine of their
    evaluation prompts in the untouched model, nearest first."""
    retained = case.retained.nonzero()[:, 0]
    cosines = case.before.classes[retained] @ case.before.classes[case.label]  # (n, d) @ (d,)
    return retained[cosines.topk(min(NEAREST, len(retained))).indices].tolist()


def retained_texts(case: Case) -> Tensor:
    """Which of the texts should stay as they are, (T,) bool."""
    texts = case.common.once(texts_of)
    stay = torch.ones(len(texts.names), dtype=torch.bool)
    stay[: len(case.retained)] = case.retained
    for key in datasets.same_meaning(case.forgotten, case.bundle.dataset):
        stay[texts.rows.get(key, [])] = False
    return stay


def _moved(texts: Texts, stay: Tensor, shares: Tensor, right: Tensor) -> dict[str, Any]:
    """The entry "moved" of the texts that stay (T,), where a change moves text t by
    `shares[t] @ right`, (T, r) @ (r, d)."""
    count = int(stay.sum())
    if count < 2:
        nothing = dict.fromkeys(("mean_cosine", "nearest_kept", "top10_overlap"))
        return {"count": count, **nothing, "worst": []}
    after = texts.embedded + shares @ right  # (T, d)
    lengths = after.norm(dim=1).clamp_min(SHORTEST)
    cosine = ((texts.embedded * after).sum(dim=1) / texts.lengths / lengths).clamp(-1, 1)  # (T,)
    # F is moved by S R, and the products F F^T by S Z^T + Z S^T with Z = (F + S R / 2) R^T: a class
    # under audit costs W T r products and not W T d.
    sent = (texts.embedded + after) @ right.T / 2  # (T, r)
    change = torch.cat([shares, sent], dim=1), torch.cat([sent, shares], dim=1)
    kept, overlap = _neighbourhoods(texts, stay, change, after, lengths)
    rows = stay.nonzero()[:, 0]
    worst = rows[cosine[rows].argsort(stable=True)[:WORST]]
    old = _cosines(texts.embedded[worst] @ texts.embedded.T, texts.lengths, worst, stay)  # (n, T)
    now = _cosines(after[worst] @ after.T, lengths, worst, stay)
    nearest = old.argmax(dim=1)
    rank = 1 + (now > now.gather(1, nearest[:, None]) + TIE).sum(dim=1)
    return {
        "count": count,
        "mean_cosine": float(cosine[stay].double().mean()),
        "nearest_kept": float(kept.double().mean()),
        "top10_overlap": float(overlap.mean()),
        "worst": [
            {
                "text": texts.names[row],
                "group": texts.groups[row],
                "cosine": float(cosine[row]),
                "nearest_before": texts.names[neighbour],
                "rank_after": place,
            }
            for row, neighbour, place in zip(
                worst.tolist(), nearest.tolist(), rank.tolist(), strict=True
            )
        ],
    }


def _neighbourhoods(
    texts: Texts, stay: Tensor, change: tuple[Tensor, Tensor], after: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """For each watched text that stays: whether its nearest other text before is the nearest after,
    and the share of its ten nearest before that are among its ten nearest after; (n,) each.

    Args:
        stay: (T,) bool, the texts that count; change: factors (T, q) of the change of all products,
            `a @ b.T`.
        after: embeddings (T, d) after it, not normalised; lengths: their norms (T,).
    """
    k = min(NEAREST, int(stay.sum()) - 1)
    shrunk = lengths < CANCELS * texts.lengths
    kept, overlap = [], []
    for part in stay[texts.watched].nonzero()[:, 0].split(BLOCK):
        rows, old = texts.watched[part], texts.products[part]  # (b,), (b, T)
        new = torch.addmm(old, change[0][rows], change[1].T)
        new[:, shrunk] = after[rows] @ after[shrunk].T
        new[shrunk[rows]] = after[rows][shrunk[rows]] @ after.T
        new = _cosines(new, lengths, rows, stay)
        near = texts.nearest[part, :k].clone()  # (b, k)
        lost = ~stay[near].all(dim=1)  # a neighbour left: another one takes its place
        near[lost] = _cosines(old[lost], texts.lengths, rows[lost], stay).topk(k).indices
        cosines, now = new.topk(k)
        kept.append(cosines[:, 0] <= new.gather(1, near[:, :1])[:, 0] + TIE)
        both = (near[:, :, None] == now[:, None, :]).any(dim=2)  # (b, k, k) -> (b, k)
        overlap.append(both.double().mean(dim=1))
    return torch.cat(kept), torch.cat(overlap)


def _cosines(products: Tensor, lengths: Tensor, rows: Tensor, stay: Tensor) -> Tensor:
    """Cosines (b, T) of texts `rows` (b,) with all others that stay; -inf with the rest."""
    cosines = products / lengths
    cosines /= lengths[rows, None]
    cosines[:, ~stay] = -torch.inf
    cosines[torch.arange(len(rows)), rows] = -torch.inf  # a text is not its neighbour
    return cosines
