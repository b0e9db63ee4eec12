"""Which class was forgotten? What the changed weights give away.

Two attackers hold the method, a list of names, and beside the changed weights the public original,
or nothing. Methods and constants are public, and every
candidate name can be encoded by CLIP's text encoder, which forgetting does not touch. The change
that they look for is `Delta = K^-1 H_f^T Z` with `K = G + mu I` (`forgetting.solvers.constrained`;
the paper's objective at its optimum and other closed forms have another K), so the column space of
`Delta` betrays the forgotten texts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import datasets
from clip.retain import exact_context
from engine.config import paper_weights, settings
from evaluation.audit.case import AuditData, Case, Model, highest
from forgetting.context import ExactSettings

EPSILON = torch.finfo(torch.float32).eps
NAMING = ("retained", "synonym")  # kinds of prompts that name the class as well as its own name
LIMIT = 1000  # names that a class is looked for among
# Ridge of the statistics of all listed names, in mean eigenvalues. On real features one forgotten
# class is named first with any from 0.001 to 0.1; of several at once this names most.
EXPLAINED = 1e-2
TINY = torch.finfo(torch.float64).tiny
KERNEL = 1e-9  # of the trace: the least ridge where the paper's own is 0


def measure(case: Case) -> dict[str, Any]:
    """Name the forgotten class from the changed projection, among up to 1,000 names.

    Returns:
        names: size of the list; attacks: attacker -> `top`, the names that it puts first, and
        `place`: 1 plus the names before the class that nobody forgot and that mean something else
        (ties count half). Names are ranked by `Attacker.recognise` of `W' - W`, and of `W'` alone
        by `Attacker.oddness`.
    """
    known = case.data.once(Attacker)
    recognised = known.recognise(*change(case))
    attacks = {"original_known": recognised, "alone": known.oddness(case.after)}
    missing = ["original_known: the projection is the same"] if recognised is None else []
    w = case.bundle.text_projection
    if torch.equal(w, torch.eye(*w.shape)):
        missing.append("alone, beside a trained projection: here it is folded into hidden states")
    return {
        "names": len(known.names),
        "attacks": {name: _place(case, known, scores) for name, scores in attacks.items()},
        "not_measured": missing,
    }


def change(case: Case) -> tuple[Tensor, Tensor]:
    """Left singular vectors (w, r) and singular values (r,) of `W' - W`, as both are published,
    that are more than rounding."""
    before, after = case.before.projection.double(), case.after.projection.double()
    # Both were rounded to float32, so the rounding's norm is below that of the entries times eps.
    noise = EPSILON * float(after.norm() + before.norm())
    # All that is not rounding lies in the span of these rows (q, d): q columns instead of d.
    span = torch.linalg.qr(case.after.edit.right.double().T)[0]
    u, values, _ = torch.linalg.svd((after - before) @ span, full_matrices=False)  # (w, q)
    rank = int((values > noise).sum())
    return u[:, :rank], values[:rank]


def _place(case: Case, known: Attacker, scores: Tensor | None) -> dict[str, Any]:
    """The place of the class by these scores (n,), and the names of highest score."""
    if scores is None:
        return {"place": None, "top": []}
    same = [prompt.text for prompt in case.prompts if prompt.kind in NAMING]
    excluded = {known.rows.get(datasets.key(name)) for name in [*case.forgotten, *same]}
    rivals = scores[[row for row in range(len(scores)) if row not in excluded]]
    own = scores[known.rows[datasets.key(case.name)]]  # all classes of the set are on the list
    place = 1 + int((rivals > own).sum()) + int((rivals == own).sum()) // 2
    return {"place": place, "top": [known.names[row] for row in highest(scores, 5).tolist()]}


class Statistics:
    """Statistics `G` (w, w) that a change may have, and the hidden states (n, w) of all names."""

    def __init__(self, gram: Tensor, hidden: Tensor) -> None:
        self.values, self.basis = torch.linalg.eigh(gram)  # (w,), (w, w)
        self.names = hidden @ self.basis  # (n, w)

    def directions(self, mu: float) -> Tensor:
        """Unit vectors (n, w) along `K^-1 h`, in which whoever forgets h changes the projection; in
        the eigenbasis of G."""
        return normalize(self.names / (self.values + mu), dim=1, eps=TINY)

    def cosines(self, span: Tensor, mu: float) -> Tensor:
        """Cosine (n,) of every name's direction with the span of orthonormal columns (w, r)."""
        cosines = (self.directions(mu) @ (self.basis.T @ span)).norm(dim=1)
        # Names that are forgotten together all score 1: rounding does not put one of them first.
        return cosines.round(decimals=12)


class Attacker:
    """What an attacker knows of a data set, float64. The set's own classes come first and are all
    on the list of names; the rest is drawn if there are too many."""

    def __init__(self, data: AuditData) -> None:
        bundle = data.bundle
        context = exact_context(ExactSettings(), bundle, list(data.others.values()))
        first: dict[str, int] = {}
        for row, name in enumerate(context.retain.names):
            first.setdefault(datasets.key(name), row)
        chosen = list(first.values())
        own = sum(row < len(bundle.classnames) for row in chosen)
        order = torch.randperm(len(chosen) - own, generator=data.generator("names"))
        drawn = order[: max(0, LIMIT - own)].sort().values.tolist()
        chosen = chosen[:own] + [chosen[own + index] for index in drawn]
        self.names = [datasets.clean_name(context.retain.names[row]) for row in chosen]
        self.rows = {datasets.key(name): row for row, name in enumerate(self.names)}  # by key
        hidden = context.retain.rows[chosen].double()  # (n, w)
        vocabulary = bundle.retain_hidden.double()
        # Ridge regression of h on all names leaves `mu (K - h^T h)^-1 h`, which is along `K^-1 h`.
        gram = hidden.T @ hidden
        uniform, mu = Statistics(gram, hidden), EXPLAINED * float(gram.trace()) / len(gram)
        # (n, w), unit norm, what the other names do not explain of each
        self.unexplained = uniform.directions(mu) @ uniform.basis.T
        self.ridge = context.ridge  # `G + mu I` of all names by ForgetExact's defaults
        exact = Statistics(self.ridge.gram, hidden), self.ridge.mu
        none = Statistics(torch.zeros_like(gram), hidden), 1.0
        self._methods = [exact, (uniform, mu), none]
        self._vocabulary, self._paper = vocabulary, Statistics(vocabulary.T @ vocabulary, hidden)
        cfg = settings("ForgetLoRA", bundle.dataset, bundle.backbone)
        weights = paper_weights(cfg)
        lw = weights["lamb_weight"] * cfg.FORGET.RANK / cfg.FORGET.ALPHA
        self.ratio = lw / weights["lamb_preserve"]  # `lw / lp` of the paper

    def recognise(self, span: Tensor, values: Tensor) -> Tensor | None:
        """Which names a change forgets, by the known method that fits it best.

        A change that forgets the text h has `K^-1 h` in its column space. A name's score is the
        cosine of `K^-1 h` with that space: 1 for a forgotten text and the right K, about
        `sqrt(r / w)` for all names where the change is random. K is that of ForgetExact's defaults,
        of all names with equal weight, of none (the text itself is the direction, as in zeroing
        it), or of the paper's vocabulary, whose ridge follows from the change: at the optimum
        `mu = (lw / lp) ||H_r Delta|| / ||Delta||`. The K under which some name scores highest wins.

        Args: see `change`. Returns every name's score, (n,); None where r is 0.
        """
        if not len(values):
            return None
        methods = list(self._methods)
        if len(self._vocabulary):
            moved = float((self._vocabulary @ (span * values)).norm() / values.norm())
            least = KERNEL * float(self._paper.values.sum())
            methods.append((self._paper, max(self.ratio * moved, least)))
        scores = [statistics.cosines(span, mu) for statistics, mu in methods]
        return max(scores, key=lambda one: float(one.max()))

    def oddness(self, model: Model) -> Tensor:
        """How unlike the others the model treats a name, (n,), from its `W'` alone.

        The least change of all else that moves a text is along what the other texts do not explain
        of it. The score of a name is its gain along that unit direction x, `log ||x W'||`, as
        distance from the median of all names. Unlike the length of `h W'` it also betrays a text
        that was sent elsewhere at its own length.
        """
        moved = self.unexplained @ model.projection.double()  # (n, w) @ (w, d)
        gain = moved.norm(dim=1).clamp_min(TINY).log()
        return (gain - gain.median()).abs()
