"""Which class was forgotten, and what was its text? What the changed weights give away.

Three attackers hold the method, a list of names, and beside the changed weights: the public
original, a second adapter of the same run, or nothing. The change that they look for is
`Delta = K^-1 H_f^T Z` (`forgetting.solvers.constrained`; the paper's objective at its optimum and
other closed forms have another K), so the column space of `Delta` betrays the forgotten hidden
states: they lie in `K` times it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evaluation.audit.attacker import TINY, Attacker
from evaluation.audit.case import Case, Model
from evaluation.audit.names import ATTACKERS
from evaluation.audit.statistics import highest

SHOWN = 5  # names that an attack puts first
EPSILON = torch.finfo(torch.float32).eps
NAMING = ("retained", "synonym")  # kinds of prompts that name the class as well as its own name
NOTHING: dict[str, Any] = dict.fromkeys(("rank", "rank_expected", "text_cosine", "place"))
NOTHING |= {"places": [], "top": []}


def measure(case: Case) -> dict[str, Any]:
    """Name the forgotten class from the changed projection, among up to 1,000 names.

    Returns:
        names: size of the list; attacks: what each attacker gets.

        - original_known: `D = W' - W`; its numerical rank, the cosine of the forgotten hidden text
          with its projection on the recovered directions, and its place when the names are ranked
          by how well they fit, see `Attacker.recognise`.
        - two_adapters: the same for the difference of this model and one with another adapter of
          the same run; both adapters' names should come first.
        - alone: `W'` only; names are ranked by `oddness`.

        A place is 1 plus the names before it that nobody forgot and that mean something else; ties
        count half. `places` are those of all that is forgotten together, in two_adapters followed
        by those that the other adapter forgets.
    """
    known = case.data.once(Attacker)
    reasons: list[str] = []
    attacks = dict.fromkeys(ATTACKERS, NOTHING)
    attacks["original_known"] = _of_difference(case, known, case.before, case.forgotten)
    if attacks["original_known"]["rank"] == 0:
        reasons.append("original_known: the projection is the original's to rounding")
    if case.stranger is None:
        reasons.append("two_adapters: no second adapter of the same run")
    else:
        classes, edit = case.stranger
        named = [*case.forgotten, *classes]
        attacks["two_adapters"] = _of_difference(case, known, Model(case.data, edit), named)
    # No direction is recovered from the changed weights alone, so there is no cosine.
    attacks["alone"] = NOTHING | _ranking(case, known, oddness(known, case.after), case.forgotten)
    w = case.bundle.text_projection
    if torch.equal(w, torch.eye(*w.shape)):
        reasons.append(
            "alone, beside a trained projection: the bundle's is the identity (folded into its "
            "hidden states), beside which a change stands out more"
        )
    return {"names": len(known.names), "attacks": attacks, "not_measured": reasons}


def difference(model: Model, other: Model) -> tuple[Tensor, Tensor]:
    """Left singular vectors (w, r) and singular values (r,) of the difference of two published
    projections that are more than rounding."""
    # Both were rounded to float32, so the rounding's norm is below that of the entries times eps.
    noise = EPSILON * float(model.projection.double().norm() + other.projection.double().norm())
    rows = torch.cat([model.edit.right, other.edit.right]).double()  # (q, d)
    # All that is not rounding lies in the span of these rows: q columns instead of d.
    span = torch.linalg.qr(rows.T)[0]
    change = (model.projection.double() - other.projection.double()) @ span  # (w, d) @ (d, q)
    u, values, _ = torch.linalg.svd(change, full_matrices=False)
    rank = int((values > noise).sum())
    return u[:, :rank], values[:rank]


def _of_difference(case: Case, known: Attacker, other: Model, named: list[str]) -> dict[str, Any]:
    """What the difference from another model gives away, in which these names were forgotten."""
    span, values = difference(case.after, other)
    expected = len(case.after.edit.right) + len(other.edit.right)
    entry = NOTHING | {"rank": len(values), "rank_expected": expected}
    if not len(values):
        return entry
    basis, scores = known.recognise(span, values)
    cosine = _text_cosine(case, known, basis)
    return entry | {"text_cosine": cosine} | _ranking(case, known, scores, named)


def oddness(known: Attacker, model: Model) -> Tensor:
    """How unlike the others the model treats a name, (n,), from its `W'` alone.

    The least change of all else that moves a text is along what the other texts do not explain of
    it, so there `W'` must be unlike an untouched projection. The score of a name is its gain along
    that unit direction x, `log ||x W'||`, as distance from the median of all names. Unlike the
    length of `h W'` it also betrays a text that was sent elsewhere at its own length.
    """
    moved = known.unexplained @ model.projection.double()  # (n, w) @ (w, d)
    gain = moved.norm(dim=1).clamp_min(TINY).log()
    return (gain - gain.median()).abs()


def _text_cosine(case: Case, known: Attacker, basis: Tensor) -> float:
    """Of the best direction in a span (w, r) with a text that the class was forgotten by.

    The direction that all texts share is taken out of both: bare names have cosines of about 0.75
    with one another, so that with it any recovered direction would look like any text.
    """
    texts = [prompt.hidden for prompt in case.prompts if prompt.seen]
    texts = torch.stack(texts or [case.bundle.forget_hidden[case.label]]).double()  # (k, w)
    shared = known.shared  # (w,)
    texts = texts - (texts @ shared)[:, None] * shared
    basis = torch.linalg.qr(basis - shared[:, None] * (shared @ basis))[0]
    cosines = (texts @ basis).norm(dim=1) / texts.norm(dim=1).clamp_min(TINY)  # (k, r) -> (k,)
    return float(cosines.max().clamp(max=1))


def _ranking(case: Case, known: Attacker, scores: Tensor, named: list[str]) -> dict[str, Any]:
    """Places of the names that were forgotten, and the names of highest score."""
    same = [prompt.text for prompt in case.prompts if prompt.kind in NAMING]
    rows = [known.row(name) for name in named]
    innocent = torch.ones(len(scores), dtype=torch.bool)
    innocent[[row for row in (*rows, *map(known.row, same)) if row is not None]] = False
    rivals = scores[innocent]
    places = [
        1 + int((rivals > scores[row]).sum()) + int((rivals == scores[row]).sum()) // 2
        for row in rows
        if row is not None
    ]
    # All classes of the set are on the list, and with them those that are forgotten.
    place = places[case.forgotten.index(case.name)]
    top = [known.names[row] for row in highest(scores, SHOWN).tolist()]
    return {"place": place, "places": places, "top": top}
