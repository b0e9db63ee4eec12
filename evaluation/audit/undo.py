"""Which class was forgotten, and what was its text? What the changed weights give away.

Three attackers hold the method, a list of names, and beside the changed weights: the public
original, a second adapter of the same run, or nothing. The change that they look for is
`Delta = K^-1 H_f^T Z` (`forgetting.solvers.constrained`; the paper's objective at its optimum and
other closed forms have another K), so the column space of `Delta` betrays the forgotten hidden
states: they lie in `K` times it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evaluation.audit.attacker import TINY, Attacker, attacker
from evaluation.audit.case import AuditData, Case, Model
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
          by how well they fit, see `recover`.
        - two_adapters: the same for the difference of this model and one with another adapter of
          the same run; both adapters' names should come first.
        - alone: `W'` only; names are ranked by `oddness`.

        A place is 1 plus the names before it that nobody forgot and that mean something else; ties
        count half. `places` are those of all that is forgotten together, in two_adapters followed
        by those that the other adapter forgets.
    """
    known = case.data.once(attacker)
    reasons: list[str] = []
    attacks = dict.fromkeys(ATTACKERS, NOTHING)
    difference = recover(known, case.after, case.before)
    attacks["original_known"] = _entry(case, known, difference, case.forgotten)
    if difference.rank == 0:
        reasons.append("original_known: the projection is the original's to rounding")
    if case.stranger is not None:
        classes, edit = case.stranger
        difference = recover(known, case.after, Model(case.data, edit))
        attacks["two_adapters"] = _entry(case, known, difference, [*case.forgotten, *classes])
    else:
        reasons.append("two_adapters: no second adapter of the same run")
    # No direction is recovered from the changed weights alone, so there is no cosine.
    attacks["alone"] = NOTHING | _ranking(case, known, oddness(known, case.after), case.forgotten)
    if case.data.once(_folded):
        reasons.append(
            "alone, beside a trained projection: the bundle's is the identity (folded into its "
            "hidden states), beside which a change stands out more"
        )
    return {"names": len(known.names), "attacks": attacks, "not_measured": reasons}


def _folded(data: AuditData) -> bool:
    """Whether the projection is the identity."""
    w = data.bundle.text_projection
    return torch.equal(w, torch.eye(*w.shape))


@dataclass(frozen=True)
class Recovered:
    """What the difference of two projections gives away.

    Attributes:
        expected: rank that the adapters have together; rank: of the difference, beyond rounding.
        basis: (w, r) orthonormal, of `K U`, which the forgotten hidden states span; scores: (n,)
            of the names. None where all is rounding.
    """

    expected: int
    rank: int
    basis: Tensor | None = None
    scores: Tensor | None = None


def recover(known: Attacker, model: Model, other: Model) -> Recovered:
    """What the difference of two published projections, both rounded to float32, gives away.

    A change that forgets the text h has `K^-1 h` in its column space, spanned by its left singular
    vectors U. A name's score is the cosine of `K^-1 h` with that span: 1, the maximum, for a
    forgotten text and the right K; about `sqrt(r / w)`, the same for all names, where U is random.
    Of the known methods' K the one is taken under which some name scores highest. (How far names
    move, `||h D|| / ||h W||`, puts the same name first on real features, but no distance is known
    to be the maximum.)
    """
    # Each entry was rounded once, so the rounding's norm is below that of the entries times eps.
    noise = EPSILON * float(model.projection.double().norm() + other.projection.double().norm())
    rows = torch.cat([model.edit.right, other.edit.right]).double()  # (q, d)
    # All that is not rounding lies in the span of these rows: q columns instead of d.
    span = torch.linalg.qr(rows.T)[0]
    difference = (model.projection.double() - other.projection.double()) @ span  # (w, d) @ (d, q)
    u, values, _ = torch.linalg.svd(difference, full_matrices=False)
    rank = int((values > noise).sum())
    if rank == 0:
        return Recovered(len(rows), 0)
    return Recovered(len(rows), rank, *known.recognise(u[:, :rank], values[:rank]))


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


def _entry(case: Case, known: Attacker, found: Recovered, named: list[str]) -> dict[str, Any]:
    """The entry of an attack on a difference, in which these names were forgotten."""
    entry = NOTHING | {"rank": found.rank, "rank_expected": found.expected}
    if found.basis is None or found.scores is None:
        return entry
    cosine = _text_cosine(case, known, found.basis)
    return entry | {"text_cosine": cosine} | _ranking(case, known, found.scores, named)


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
