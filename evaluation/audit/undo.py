"""Which class was it, and what was its text? What the changed weights say to who reads them.

Three attackers, by what they hold beside the method and a list of names: the public original, a
second adapter of the same run, or nothing. The change that they look for is
`Delta = K^-1 H_f^T Z` (`forgetting.constrained`; the paper's objective at its optimum and other
closed forms are the same with another K), so the column space of `Delta` betrays the forgotten
hidden states: they lie in `K` times it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evaluation.audit.attacker import TINY, Attacker, attacker
from evaluation.audit.case import Case, Model
from evaluation.zero_shot import Factors

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
          by `span_scores`.
        - two_adapters: the same for the difference of this model and one with another adapter of
          the same run; both adapters' names should come first.
        - alone: `W'` only; names are ranked by `oddness`.

        A place is 1 plus the names before it that nobody forgot and that mean something else; ties
        count half. `places` are those of all that is forgotten together, in two_adapters followed
        by those that the other adapter forgets.
    """
    known = case.common.once(attacker)
    reasons: list[str] = []
    scores = oddness(case.after.change, known)  # no direction is recovered, so there is no cosine
    attacks = {
        "original_known": _difference(case, known, case.before, case.forgotten),
        "two_adapters": dict(NOTHING),
        "alone": NOTHING | _ranking(case, known, scores, case.forgotten),
    }
    if attacks["original_known"]["rank"] == 0:
        reasons.append("original_known: the projection is the original's to rounding")
    if case.stranger is not None:
        classes, factors = case.stranger
        other = Model(case.common, factors)
        attacks["two_adapters"] = _difference(case, known, other, [*case.forgotten, *classes])
    else:
        reasons.append("two_adapters: no second adapter of the same run")
    w = case.bundle.text_projection
    if torch.equal(w, torch.eye(*w.shape)):
        reasons.append(
            "alone, beside a trained projection: the bundle's is the identity (folded into its "
            "hidden states), beside which a change stands out more"
        )
    return {"names": len(known.names), "attacks": attacks, "not_measured": reasons}


def span_scores(difference: Tensor, noise: float, known: Attacker) -> tuple[int, Tensor, Tensor]:
    """How nearly a change is one that forgets each name.

    A change that forgets the text h has `K^-1 h` in its column space, spanned by its left singular
    vectors U. A name's score is the cosine of `K^-1 h` with that span: 1, the most that there is,
    for a forgotten text and the right K; about `sqrt(r / w)`, the same for all names, where U is
    chance. Of the known methods' K that one counts under which some name scores highest. (How far
    names move, `||h D|| / ||h W||`, puts the same name first on real features, but of no distance
    is it known that it is the most that there is.)

    Args:
        difference: (w, q) float64, the change along all directions in which it can be more than
            rounding; noise: singular values up to it are rounding.

    Returns:
        the numerical rank r, an orthonormal basis (w, r) of `K U`, which the forgotten hidden
        states span, and the scores (n,).
    """
    u, values, _ = torch.linalg.svd(difference, full_matrices=False)
    rank = int((values > noise).sum())
    u, values = u[:, :rank], values[:rank]
    basis, scores = u, difference.new_zeros(len(known.names))
    for guess in known.guesses(u, values) if rank else ():
        cosines = guess.cosines(u)
        if cosines.max() > scores.max():
            basis, scores = guess.texts(u), cosines
    return rank, basis, scores


def oddness(change: Factors, known: Attacker) -> Tensor:
    """How unlike the others a name is treated, (n,), from `W'` alone.

    The least change of all else that moves a text is along what the other texts do not explain of
    it, so there `W'` must be unlike an untouched projection. The score of a name is its gain along
    that direction x, `log ||x W'|| / ||x||`, as distance from the median of all names. Unlike the
    length of `h W'` it also betrays a text that was sent elsewhere at its own length.

    Args:
        change: left (w, r), right (r, d) of `W' - W`, in which no name is worth the product of all
            of them with `W'` again.
    """
    left, right = (factor.double() for factor in change)
    x, lengths, untouched = known.unexplained
    gain = (untouched + (x @ left) @ right).norm(dim=1) / lengths  # (n, d) -> (n,)
    gain = gain.clamp_min(TINY).log()
    return (gain - gain.median()).abs()


def _difference(case: Case, known: Attacker, other: Model, named: list[str]) -> dict[str, Any]:
    """The attack on the difference of two projections that both came in float32."""
    one, two = case.after.projection, other.projection
    # Each entry was rounded once, so the rounding's norm is below that of the entries times eps.
    noise = EPSILON * float(torch.linalg.matrix_norm(one) + torch.linalg.matrix_norm(two))
    rows = torch.cat([case.after.change[1], other.change[1]]).double()  # (q, d)
    # All that is not rounding lies in the span of these rows: q columns instead of d.
    span = torch.linalg.qr(rows.T)[0]
    rank, basis, scores = span_scores((one.double() - two.double()) @ span, noise, known)
    found = NOTHING | {"rank": rank, "rank_expected": len(rows)}
    if rank == 0:
        return found
    cosine = _text_cosine(case, known, basis)
    return found | {"text_cosine": cosine} | _ranking(case, known, scores, named)


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
    rows = [known.find(name) for name in named]
    innocent = torch.ones(len(scores), dtype=torch.bool)
    innocent[[row for row in (*rows, *map(known.find, same)) if row is not None]] = False
    rivals = scores[innocent]
    places = [
        1 + int((rivals > scores[row]).sum()) + int((rivals == scores[row]).sum()) // 2
        for row in rows
        if row is not None
    ]
    # All classes of the set are on the list, and with them those that are forgotten.
    place = places[case.forgotten.index(case.name)]
    top = [known.names[row] for row in scores.argsort(descending=True, stable=True)[:SHOWN]]
    return {"place": place, "places": places, "top": top}
