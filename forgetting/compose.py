"""Forget A now and B next week, give A back later: unions solved again, from adapters alone.

Adding two changes is wrong: each moves the other's texts. `K_0 = G + mu I` is the same for every
request, so an adapter that keeps `K_0^-1 h` of its texts can be solved again with any other,
without G and without W (`forgetting.solvers.constrained.solve_constraints`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from forgetting.adapter import EXCLUDED, TEXTS, Adapter, Part, Recipe
from forgetting.context import Answer, ForgetContext
from forgetting.errors import ProblemError, line, shown
from forgetting.solvers.constrained import Excluded, downdate, solve_constraints

# Relative differences. Encoded twice, on other threads or another machine, hidden states differ by
# 2e-6, and with them targets and ridge.
SAME_TARGET = 1e-3
SAME_RIDGE = 1e-3
REFINEMENTS = 8  # steps, each of which gains three digits or more where recipes differ by 1e-3
MISSED = 1e-6  # of the way to the targets: an answer beyond this is none


def make_recipe(context: ForgetContext, answer: Answer, dataset: str, encoder: str) -> Recipe:
    """The recipe of an answer; `dataset`: of the request's classes, `encoder`: see `Recipe`."""
    retain, ridge, request = context.retain, context.ridge, answer.request
    hidden, gram = request.hidden.float(), ridge.gram
    base = ridge.solve(hidden.to(gram)).cpu()
    parts = []
    for i, name in enumerate(request.classes):
        own = [row for row, owner in enumerate(request.owner) if owner == i]
        used = answer.excluded[i].nonzero()[:, 0].tolist()
        rows = retain.rows[used].float()
        parts.append(
            Part(
                dataset,
                name,
                texts=[request.texts[row] for row in own],
                excluded=[retain.ids[j] for j in used],
                hidden=hidden[own].cpu(),
                base=base[own],
                displacement=answer.displacement[own].double().cpu(),
                excluded_hidden=rows.cpu(),
                excluded_base=ridge.solve(rows.to(gram)).cpu(),
                excluded_weight=retain.name_weights[used].double().cpu(),
            )
        )
    return Recipe(encoder, retain.sha256, ridge.mu, parts)


def compose(
    adapters: Mapping[str, Adapter], without: Mapping[str, Adapter] | None = None
) -> Adapter:
    """One adapter that forgets what all `adapters` forget, less what those in `without` forget.

    Both are named by where they come from. A class that two adapters forget stays forgotten until
    it was given back twice. That no other change costs less is not proved.

    Raises ProblemError: no recipe; adapters that do not belong together; a text with two targets; a
    class to be given back that is not there; nothing is left.
    """
    everyone = [*adapters.items(), *(without or {}).items()]
    first_path, first = everyone[0]
    for path, adapter in everyone:
        _check_fit(first, first_path, adapter, path)
    parts = [part for adapter in adapters.values() for part in adapter.recipe.parts]
    for path, adapter in (without or {}).items():
        for part in adapter.recipe.parts:
            same = [other for other in parts if _is_same(part, other)]
            if not same:
                names = ", ".join(repr(other.name) for other in parts) or "nothing"
                raise ProblemError(
                    f"{path}: forgets {part.name!r}, and what is composed forgets {names}, or that "
                    "in another way (other texts or another target)"
                )
            parts.remove(same[0])
    if not parts:
        raise ProblemError("nothing is left to forget: use the original projection")
    left, right, residual = solve(parts)
    others = [adapter.settings for adapter in adapters.values()]
    same = {k: v for k, v in first.settings.items() if all(x.get(k) == v for x in others)}
    texts = list(dict.fromkeys(text for part in parts for text in part.texts))
    note = f"a union: its texts miss their targets by {residual:.1e} of the way"
    solver = {"name": "compose", "texts": texts, "residual": residual, "notes": [note]}
    return replace(
        first,
        left=left.float(),
        right=right.float(),
        dataset=" + ".join(dict.fromkeys(part.dataset for part in parts)),
        classes=list(dict.fromkeys(part.name for part in parts)),
        settings=same,
        record={"solver": solver},
        recipe=replace(first.recipe, parts=parts),
        changed_sha256=[],  # which takes W
    )


def solve(parts: Sequence[Part]) -> tuple[Tensor, Tensor, float]:
    """The change that forgets all parts: left (w, p) orthonormal, right (p, d), float64, and by how
    much of the way the texts miss their targets; ProblemError if they do, or a text has two. It is
    the same bytes in whatever order the parts come."""
    parts = sorted(parts, key=lambda part: (part.dataset, part.name, part.texts))
    targets: dict[str, Tensor] = {}
    for part in parts:
        for text, target in zip(part.texts, part.displacement, strict=True):
            if not _is_near(targets.setdefault(text, target), target):
                raise ProblemError(f"{text!r} is sent to different targets; forget it in one way")
    h, base, d = _rows(parts, "texts", TEXTS)
    excluded = Excluded(*_rows(parts, "excluded", EXCLUDED))
    right, missed = torch.zeros_like(d), d
    # Rows of recipes from two machines are of a K_0 that differs in its last digits.
    for _ in range(REFINEMENTS):
        left, step = solve_constraints(h, downdate(h, base, excluded), missed)
        rest = d - h @ left @ (right + step)
        if not rest.norm() < missed.norm():
            break
        right, missed = right + step, rest
    size, rest = float(d.norm()), float(missed.norm())
    residual = rest / size if size else rest
    if not residual <= MISSED:  # NaN neither
        raise ProblemError(
            f"the answer misses its targets by {residual:.1e} of the way (at most {MISSED:.0e}): "
            "nearly equal texts have different targets"
        )
    # Orthonormal columns lose nothing that matters when the factors are rounded to float32.
    left, rotation = torch.linalg.qr(left[0])
    return left, rotation @ right[0], residual


def _rows(parts: Sequence[Part], key: str, names: Sequence[str]) -> list[Tensor]:
    """Tensors of all parts, (1, n, ...) float64; of a text or name of several the first row."""
    first: dict[object, int] = {}
    for i, item in enumerate(item for part in parts for item in getattr(part, key)):
        first.setdefault(item, i)
    rows = list(first.values())
    return [torch.cat([getattr(p, n) for p in parts])[rows].double()[None] for n in names]


def _is_near(a: Tensor, b: Tensor) -> bool:
    """Whether displacements (..., d) are the same but for where they were computed."""
    return bool(((a - b).norm(dim=-1) <= SAME_TARGET * b.norm(dim=-1)).all())


def _is_same(a: Part, b: Part) -> bool:
    """Whether two parts forget one class by the same texts, with the same targets."""
    if (a.dataset, a.name, set(a.texts)) != (b.dataset, b.name, set(b.texts)):
        return False
    order = [a.texts.index(text) for text in b.texts]
    return _is_near(b.displacement, a.displacement[order])


def _check_fit(a: Adapter, a_path: str, b: Adapter, b_path: str) -> None:
    """Refuse two adapters that are not of one model, one set of retained names, and one ridge."""
    if b.recipe is None:
        why = f"adapters of {line(b.trainer)} do not compose, those of ForgetExact and forget() do"
        raise ProblemError(f"{b_path}: {why}")
    for name, ours, theirs in (
        ("backbone", a.backbone, b.backbone),
        ("projection_sha256", a.projection_sha256, b.projection_sha256),
        ("the text encoder (or its prompts)", a.recipe.encoder, b.recipe.encoder),
        ("the set of retained names, or their weights", a.recipe.retain, b.recipe.retain),
        ("the ridge", a.recipe.mu, b.recipe.mu),
    ):
        is_near = name == "the ridge" and abs(ours - theirs) <= SAME_RIDGE * ours
        if ours != theirs and not is_near:
            sides = f"{shown(ours)} in {line(a_path)}, {shown(theirs)} in {line(b_path)}"
            again = "forget one again with the other's names to retain and protect, and settings"
            raise ProblemError(f"{name} differs: {sides}; {again}")
