"""What an adapter keeps of each class, so that it can be solved again together with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from forgetting.adapter import Adapter
from forgetting.constrained import Ridge
from forgetting.problem import ProblemError

# Every tensor of a recipe: which rows it has, and its width (None: a vector).
COLUMNS = {
    "forget_hidden": ("forget", "w"),
    "displacement": ("forget", "d"),
    "leaving_hidden": ("leaving", "w"),
    "shares": ("leaving", None),
}
BASE_COLUMNS = {"forget_base": ("forget", "w"), "leaving_base": ("leaving", "w")}
# What two recipes must have in common, apart from the base model and the method.
SHARED = {
    "constrained": ("statistics", "weights", "mu"),
    "paper": (
        *("statistics", "weights", "lamb_forget", "lamb_preserve", "lamb_weight", "rank", "alpha"),
    ),
}


@dataclass(frozen=True)
class Part:
    """One class as it was forgotten: the grain in which requests are joined and given back.

    Attributes:
        dataset, name: of the class; tensors: see `recipe_tensors`.
    """

    dataset: str
    name: str
    tensors: dict[str, Tensor]


def recipe_tensors(
    ridge: Ridge | None,
    forget_hidden: Tensor,
    displacement: Tensor,
    leaving: Tensor | None = None,
    shares: Tensor | None = None,
) -> dict[str, Tensor]:
    """What an adapter keeps of one class.

    Texts are kept in float32, which is what CLIP made; the columns of `K_0^-1` and the
    displacements in float64: with several prompts a class `H_f K^-1 H_f^T` is nearly singular, and
    float32 would change the composed answer by 5e-6 (columns) or 1e-6 (displacements, which should
    be computed in float64 as well). P is `displacement + H_f W`.

    Args:
        ridge: the constrained form's `K_0`; None for the paper's objective, which keeps no columns.
        forget_hidden: `H_f`, (k, w), the class's texts; displacement: `D = P - H_f W`, (k, d).
        leaving: (n, w), the texts in the retain statistics that leave them with this class, every
            copy listed (also one that another class takes out too); shares: (n,), what each weighs
            in G (`RetainStatistics.share`; 1 in the paper's unweighted sum).
    """
    h_f = forget_hidden.detach().cpu().float()
    leaving = h_f[:0] if leaving is None else leaving.detach().cpu().float()
    shares = h_f.new_zeros(0) if shares is None else shares.detach().cpu()
    tensors = {
        "forget_hidden": h_f,
        "displacement": displacement.detach().cpu().double(),
        "leaving_hidden": leaving,
        "shares": shares.double(),
    }
    if len(h_f) != len(displacement) or len(leaving) != len(shares):
        raise ProblemError(
            f"{len(h_f)} texts with {len(displacement)} displacements and {len(leaving)} leaving "
            f"texts with {len(shares)} shares make no recipe"
        )
    if ridge is not None:
        for rows, name in ((h_f, "forget_base"), (leaving, "leaving_base")):
            tensors[name] = ridge.solve(rows.to(ridge.gram.device)).T.cpu()  # (n, w) float64
    return tensors


def with_recipe(adapter: Adapter, shared: dict[str, Any], parts: Sequence[Part]) -> Adapter:
    """The adapter with its recipe.

    Args:
        shared: `objective` ("constrained" or "paper") and that objective's keys in `SHARED`:
            `statistics` is the SHA-256 of the retain statistics, `weights` their group weights
            (None: the unweighted sum), `lamb_forget` a number or "auto".
        parts: at least one, a class each; their order is kept.
    """
    index = [
        {
            "dataset": part.dataset,
            "class": part.name,
            "forget": len(part.tensors["forget_hidden"]),
            "leaving": len(part.tensors["leaving_hidden"]),
        }
        for part in parts
    ]
    recipe = {key: shared[key] for key in ("objective", *SHARED[shared["objective"]])}
    tensors = {name: torch.cat([p.tensors[name] for p in parts]) for name in parts[0].tensors}
    return replace(adapter, recipe=recipe | {"parts": index}, tensors=tensors)


def read_parts(adapter: Adapter, where: str) -> list[Part]:
    """The classes of an adapter's recipe; `where` names the adapter in messages.

    Raises:
        ProblemError: the adapter has no recipe, or one that does not fit together.
    """
    if not adapter.recipe:
        raise ProblemError(
            f"{where}: an adapter of {adapter.trainer} without a recipe, which cannot be composed; "
            "forget its classes again with TRAINER=ForgetExact"
        )
    try:
        columns = COLUMNS | (BASE_COLUMNS if adapter.recipe["objective"] == "constrained" else {})
        index = adapter.recipe["parts"]
        totals = {kind: sum(part[kind] for part in index) for kind in ("forget", "leaving")}
        widths = {"w": adapter.left.shape[0], "d": adapter.right.shape[1]}
        for name, (kind, width) in columns.items():
            expected = (totals[kind], *([widths[width]] if width else []))
            if tuple(adapter.tensors[name].shape) != expected:
                raise ValueError(f"{name}: {tuple(adapter.tensors[name].shape)}, not {expected}")
        missing = [key for key in SHARED[adapter.recipe["objective"]] if key not in adapter.recipe]
        if missing or not index:
            raise ValueError(f"missing: {', '.join(missing or ['parts'])}")
        pieces = {
            name: adapter.tensors[name].split([part[kind] for part in index])
            for name, (kind, _) in columns.items()
        }
        return [
            Part(part["dataset"], part["class"], {name: pieces[name][i] for name in columns})
            for i, part in enumerate(index)
        ]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ProblemError(f"{where}: a recipe that does not fit together ({error})") from error
