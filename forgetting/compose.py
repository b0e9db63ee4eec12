"""Forget A now and B next week, give A back later: unions solved again, from adapters alone.

    clip-forget compose A.safetensors B.safetensors --out AB.safetensors
    clip-forget compose AB.safetensors --without A.safetensors --out B.safetensors

Adding two changes is wrong: each moves the other's texts. `K_0 = G + mu I` is the same for every
request, so an adapter that keeps `K_0^-1 h` of its texts can be solved again with any other,
without G and without W (`forgetting.solvers.constrained.solve_constraints`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from forgetting.adapter import Adapter
from forgetting.errors import ProblemError, line, shown
from forgetting.recipe import EXCLUDED, TEXTS, Part, Recipe, rows_of
from forgetting.solvers.constrained import solve_constraints

# Relative differences. Encoded twice, on other threads or another machine, hidden states differ by
# 2e-6, and with them targets and ridge.
SAME_TARGET = 1e-3
SAME_RIDGE = 1e-3
REFINEMENTS = 8  # steps, each of which gains three digits or more where recipes differ by 1e-3
MISSED = 1e-6  # of the way to the targets: an answer beyond this is none


def compose(
    adapters: Mapping[str, Adapter], without: Mapping[str, Adapter] | None = None
) -> Adapter:
    """One adapter that forgets what all `adapters` forget, less what those in `without` forget.

    Both are named by where they come from, for messages. A class that two adapters forget stays
    forgotten until it was given back twice. The answer reaches the targets; that no other change
    costs less is not proved, which would take the retained names.

    Raises:
        ProblemError: no recipe; adapters that do not belong together; a class to be given back
            that is not there; nothing is left.
    """
    everyone = dict(adapters) | dict(without or {})
    (first_where, first), *others = everyone.items()
    recipes = {where: _recipe(adapter, where) for where, adapter in everyone.items()}
    for where, adapter in others:
        _check_fit(first, first_where, adapter, where)
    recipe = reduce(union, (recipes[where] for where in adapters))
    for where in without or {}:
        recipe = difference(recipe, recipes[where], where)
    if not recipe.parts:
        raise ProblemError("nothing is left to forget: use the original projection")
    left, right, residual = solve(recipe)
    settings = [adapter.settings for adapter in adapters.values()]
    made = replace(
        first,
        left=left.float(),
        right=right.float(),
        dataset=" + ".join(dict.fromkeys(part.dataset for part in recipe.parts)),
        classes=list(dict.fromkeys(part.name for part in recipe.parts)),
        settings={
            key: value
            for key, value in first.settings.items()
            if all(key in other and other[key] == value for other in settings)
        },
        recipe=recipe,
        changed_sha256=[],  # which takes W
    )
    note = f"a union: its texts miss their targets by {residual:.1e} of the way"
    solver = {"name": "compose", "texts": made.texts, "residual": residual, "notes": [note]}
    return replace(made, record={"solver": solver})


def solve(recipe: Recipe) -> tuple[Tensor, Tensor, float]:
    """The change that forgets all classes of a recipe at once.

    Returns:
        left (w, p) orthonormal, right (p, d), float64, and the residual: by how much of the way
        the texts miss their targets.

    Raises:
        ProblemError: the targets are missed.
    """
    h, gone = (x.double()[None] for x in (recipe.hidden, recipe.excluded_hidden))
    base, gone_base = (x.double()[None] for x in (recipe.base, recipe.excluded_base))
    d, weight = recipe.displacement.double()[None], recipe.excluded_weight.double()[None]
    right, missed = torch.zeros_like(d), d
    try:
        # Rows of recipes from two machines are of a K_0 that differs in its last digits.
        for _ in range(REFINEMENTS):
            left, step = solve_constraints(h, base, gone, gone_base, weight, missed)
            rest = d - h @ left @ (right + step)
            if not rest.norm() < missed.norm():
                break
            right, missed = right + step, rest
    except torch.linalg.LinAlgError as error:
        raise ProblemError("the recipes hold numbers too large to solve") from error
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


def union(a: Recipe, b: Recipe) -> Recipe:
    """The classes of both. A text or name of both has the rows that it has in `a`.

    Raises:
        ProblemError: a text with two targets.
    """
    shared = [text for text in b.texts if text in set(a.texts)]
    ours, theirs = (x.displacement[rows_of(x.texts, shared)].double() for x in (a, b))
    apart = (ours - theirs).norm(dim=1) > SAME_TARGET * theirs.norm(dim=1)
    for text, differs in zip(shared, apart.tolist(), strict=True):
        if differs:
            raise ProblemError(f"{text!r} is sent to different targets; forget it again in one way")
    return _joined(a, b, [*a.parts, *b.parts])


def difference(recipe: Recipe, given_back: Recipe, where: str) -> Recipe:
    """A recipe without the classes of another; `where` names that in messages.

    Raises:
        ProblemError: a class that is not there, or was forgotten in another way.
    """
    parts = list(recipe.parts)
    for part in given_back.parts:
        named = [p for p in parts if (p.dataset, p.name) == (part.dataset, part.name)]
        same = [p for p in named if _same(p, recipe, part, given_back)]
        if same:
            parts.remove(same[0])
        elif named:
            raise ProblemError(
                f"{where}: {part.name!r} was forgotten in another way there (other texts or "
                "another target) than in the adapters that it is to be taken out of"
            )
        else:
            left = ", ".join(repr(p.name) for p in parts) or "nothing"
            raise ProblemError(
                f"{where}: forgets {part.name!r}, but what is composed forgets {left}"
            )
    return _joined(recipe, recipe, parts)


def _joined(a: Recipe, b: Recipe, parts: list[Part]) -> Recipe:
    """The recipe of some parts of two, with no rows but theirs."""
    rows: dict[str, Any] = {}
    for attribute, names in (("texts", TEXTS), ("excluded", EXCLUDED)):
        wanted = list(dict.fromkeys(item for part in parts for item in getattr(part, attribute)))
        known = [*getattr(a, attribute), *getattr(b, attribute)]
        first: dict[Any, int] = {}
        for i, item in enumerate(known):
            first.setdefault(item, i)
        chosen = [first[item] for item in wanted]
        rows[attribute] = wanted
        rows |= {n: torch.cat([getattr(a, n), getattr(b, n)])[chosen] for n in names}
    return replace(a, parts=parts, **rows)


def _same(a: Part, a_recipe: Recipe, b: Part, b_recipe: Recipe) -> bool:
    """Whether two parts forget one class by the same texts, with the same targets and names."""
    if set(a.texts) != set(b.texts) or set(a.excluded) != set(b.excluded):
        return False
    ours, theirs = (
        recipe.displacement[rows_of(recipe.texts, a.texts)].double()
        for recipe in (a_recipe, b_recipe)
    )
    return bool(((ours - theirs).norm(dim=1) <= SAME_TARGET * theirs.norm(dim=1)).all())


def _recipe(adapter: Adapter, where: str) -> Recipe:
    if adapter.recipe is None:
        raise ProblemError(
            f"{where}: adapters of {line(adapter.trainer)} cannot be composed; forget the classes "
            "again with ForgetExact, or with forget()"
        )
    return adapter.recipe


def _check_fit(a: Adapter, a_where: str, b: Adapter, b_where: str) -> None:
    """Refuse two adapters that are not of one model, one set of retained names, and one ridge."""
    assert a.recipe is not None and b.recipe is not None
    compared = [(n, getattr(a, n), getattr(b, n)) for n in ("backbone", "projection_sha256")]
    for name in ("encoder", "weights", "retain", "mu"):
        compared.append((WORDS[name], getattr(a.recipe, name), getattr(b.recipe, name)))
    for name, ours, theirs in compared:
        if name == WORDS["mu"] and abs(ours - theirs) <= SAME_RIDGE * ours:
            continue
        if ours != theirs:
            raise ProblemError(
                f"{name} differs: {shown(ours)} in {line(a_where)}, {shown(theirs)} in "
                f"{line(b_where)}; only adapters of one model, made in the same way, compose"
            )


WORDS = {
    "encoder": "the text encoder (or its prompts)",
    "retain": "the set of retained names",
    "weights": "the weights of the retained groups",
    "mu": "the ridge",
}
