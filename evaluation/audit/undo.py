"""Which class was it, and what was its text? What the changed weights say to who reads them.

Three attackers, by what they hold beside the method and a list of names: the public original, a
second adapter of the same run, or nothing. The change that they look for is
`Delta = K^-1 H_f^T Z` (`forgetting.solvers.constrained`; the paper's objective at its optimum and other
closed forms are the same with another K), so the column space of `Delta` betrays the forgotten
hidden states: they lie in `K` times it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evaluation.audit.attacker import TINY, Attacker, attacker
from evaluation.audit.case import Case, Common, Model
from evaluation.audit.order import highest

SHOWN = 5  # names that an attack puts first
EPSILON = torch.finfo(torch.float32).eps
NAMING = ("retained", "synonym")  # kinds of prompts that name the class as well as its own name
NOTHING: dict[str, Any] = dict.fromkeys(("rank", "rank_expected", "text_cosine", "place"))
NOTHING |= {"places": [], "top": []}
Difference = tuple[int, Tensor, Tensor]  # rank expected, left singular vectors, singular values


def measure(case: Case) -> dict[str, Any]:
    """Name the forgotten class from the changed projection, among up to 1,000 names.

    Returns:
        names: size of the list; attacks: what each attacker gets.

        - original_known: `D = W' - W`; its numerical rank, the cosine of the forgotten hidden text
          with its projection on the recovered directions, and its place when the names are ranked
          by how well they fit, see `Recovered`.
        - two_adapters: the same for the difference of this model and one with another adapter of
          the same run; both adapters' names should come first.
        - alone: `W'` only; names are ranked by `_oddness`.

        A place is 1 plus the names before it that nobody forgot and that mean something else; ties
        count half. `places` are those of all that is forgotten together, in two_adapters followed
        by those that the other adapter forgets.
    """
    known, found = case.common.once(attacker), case.together(_recovered)
    reasons: list[str] = []
    # No direction is recovered from the changed weights alone, so there is no cosine.
    alone = _ranking(case, known, case.after.block.once(_oddness, case.after), case.forgotten)
    attacks = {
        "original_known": _entry(case, known, found["original_known"], case.forgotten),
        "two_adapters": dict(NOTHING),
        "alone": NOTHING | alone,
    }
    if attacks["original_known"]["rank"] == 0:
        reasons.append("original_known: the projection is the original's to rounding")
    if case.stranger is not None:
        named = [*case.forgotten, *case.stranger[0]]
        attacks["two_adapters"] = _entry(case, known, found["two_adapters"], named)
    else:
        reasons.append("two_adapters: no second adapter of the same run")
    if case.common.once(_folded):
        reasons.append(
            "alone, beside a trained projection: the bundle's is the identity (folded into its "
            "hidden states), beside which a change stands out more"
        )
    return {"names": len(known.names), "attacks": attacks, "not_measured": reasons}


def _folded(common: Common) -> bool:
    """Whether the projection is the identity."""
    w = common.bundle.text_projection
    return torch.equal(w, torch.eye(*w.shape))


@dataclass(frozen=True)
class Recovered:
    """What the difference of two projections gives away.

    A change that forgets the text h has `K^-1 h` in its column space, spanned by its left singular
    vectors U. A name's score is the cosine of `K^-1 h` with that span: 1, the most that there is,
    for a forgotten text and the right K; about `sqrt(r / w)`, the same for all names, where U is
    chance. Of the known methods' K that one counts under which some name scores highest. (How far
    names move, `||h D|| / ||h W||`, puts the same name first on real features, but of no distance
    is it known that it is the most that there is.)

    Attributes:
        expected: rank that the adapters have together; rank: of the difference, beyond rounding.
        basis: (w, r) orthonormal, of `K U`, which the forgotten hidden states span; scores: (n,)
            of the names. None where all is rounding.
    """

    expected: int
    rank: int
    basis: Tensor | None = None
    scores: Tensor | None = None


def _recovered(cases: list[Case]) -> list[dict[str, Recovered]]:
    """Attack -> what it recovers of each case's change: of its difference from the original, and
    from a stranger's."""
    common = cases[0].common
    seen: dict[Model | Case, Difference] = {}
    for case in cases:
        if case.after not in seen:
            seen[case.after] = _difference(case.after, common.before)
        if case.stranger is not None:
            seen[case] = _difference(case.after, Model(common, case.stranger[1]))
    told = [(span, values) for _, span, values in seen.values() if len(values)]
    named = iter(common.once(attacker).recognise(*zip(*told, strict=True)) if told else ())
    found = {
        key: Recovered(expected, len(values), *(next(named) if len(values) else ()))
        for key, (expected, _, values) in seen.items()
    }
    attacks = ({"original_known": case.after, "two_adapters": case} for case in cases)
    return [{name: found[key] for name, key in of.items() if key in found} for of in attacks]


def _difference(one: Model, other: Model) -> Difference:
    """The rank that the difference of two projections should have, and its left singular vectors
    (w, r) and singular values (r,) that are more than rounding; both came in float32."""
    # Each entry was rounded once, so the rounding's norm is below that of the entries times eps.
    noise = EPSILON * (one.size + other.size)
    rows = torch.cat([one.change[1], other.change[1]]).double()  # (q, d)
    # All that is not rounding lies in the span of these rows: q columns instead of d.
    span = torch.linalg.qr(rows.T)[0]
    difference = (one.projection - other.projection).double() @ span  # (w, d) @ (d, q)
    u, values, _ = torch.linalg.svd(difference, full_matrices=False)
    rank = int((values > noise).sum())
    return len(rows), u[:, :rank], values[:rank]


def _oddness(models: list[Model]) -> list[Tensor]:
    """How unlike the others each model treats a name, (n,), from its `W'` alone.

    The least change of all else that moves a text is along what the other texts do not explain of
    it, so there `W'` must be unlike an untouched projection. The score of a name is its gain along
    that direction x, `log ||x W'|| / ||x||`, as distance from the median of all names. Unlike the
    length of `h W'` it also betrays a text that was sent elsewhere at its own length.
    """
    known = models[0].common.once(attacker)
    found = []
    for moved in known.unexplained.moved([model.change for model in models]):
        gain = (moved.lengths / known.unexplained_lengths).clamp_min(TINY).log()
        found.append((gain - gain.median()).abs())
    return found


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
    top = [known.names[row] for row in highest(scores, SHOWN).tolist()]
    return {"place": place, "places": places, "top": top}
