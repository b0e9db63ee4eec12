"""What is kept of a forgotten class: a few kilobytes of factors, what they belong to, and a recipe.

The recipe is what `forgetting.compose` needs to solve a class again together with others. What an
adapter may hold is written down here once, and checked whenever one is made, also from a file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from forgetting.checks import (
    FLOATS,
    HASH,
    OBJECT,
    POSITIVE,
    TEXT,
    WEIGHT,
    Rule,
    check,
    check_tensors,
    either,
    matrix,
    whole,
)
from forgetting.errors import ProblemError, line
from forgetting.io import naming, pack, raw, unpack, write_bytes
from forgetting.problem import NUMBERS
from forgetting.solvers.constrained import Ridge

if TYPE_CHECKING:
    from forgetting.context import Answer, ForgetContext

FORMAT = "clip-forget-adapter/2"

# Everything but the tensors.
FIELDS = {
    "projection_sha256": HASH,
    "backbone": TEXT,
    "weights": TEXT,
    "dataset": TEXT,
    "classes": [TEXT, ...],
    "trainer": TEXT,
    "settings": OBJECT,
    "solver": OBJECT,
    "record": OBJECT,
    "recipe": OBJECT,
}
_GROUPS: Rule = (
    lambda x: isinstance(x, dict) and all(type(k) is str and WEIGHT[0](v) for k, v in x.items()),
    "an object with 0 or more for each group",
)
# Of each objective what its recipes hold, and must have in common to be joined.
SHARED = {
    "constrained": {"statistics": HASH, "weights": _GROUPS, "mu": POSITIVE},
    "paper": {
        "statistics": HASH,
        "weights": either(None, _GROUPS),
        **dict.fromkeys(NUMBERS, (lambda x: True, "")),
    },
}
PARTS = [{"dataset": TEXT, "class": TEXT, "forget": whole(1), "leaving": whole(0)}, ...]

FACTORS = {"left": (FLOATS, ("w", "r")), "right": (FLOATS, ("r", "d"))}
# The tensors of a recipe; `forget` and `leaving` are the rows of all its parts.
COLUMNS = {
    "forget_hidden": ((torch.float32,), ("forget", "w")),
    "displacement": ((torch.float64,), ("forget", "d")),
    "leaving_hidden": ((torch.float32,), ("leaving", "w")),
    "shares": ((torch.float64,), ("leaving",)),
}
BASE_COLUMNS = {
    "forget_base": ((torch.float64,), ("forget", "w")),
    "leaving_base": ((torch.float64,), ("leaving", "w")),
}
_PREFIX = "recipe."  # of their names in a file
LARGEST = torch.finfo(torch.float32).max


def projection_sha256(projection: Tensor) -> str:
    """SHA-256 of a projection's float32 little-endian bytes, row by row: its name in an adapter."""
    projection = matrix("projection", projection)
    return hashlib.sha256(raw(projection.to("cpu", torch.float32))).hexdigest()


@dataclass(frozen=True)
class Adapter:
    """A low-rank change of one particular text projection: `W' = W + left @ right`.

    Attributes:
        left: (w, r) and right: (r, d), stored in float32.
        projection_sha256: names the `W` that it was made for, see `projection_sha256`.
        backbone, weights: architecture and SHA-256 (or origin) of the checkpoint that holds `W`.
        dataset, classes: what was forgotten.
        trainer: the method; settings and solver: its constants and its report, JSON values only.
        record: what a run measured of it, see `evaluation.results`; empty of an adapter of no run.
        recipe, tensors: what `forgetting.compose` needs to solve again together with other
            adapters (`SHARED`, `PARTS`; `COLUMNS`, `BASE_COLUMNS`); empty if the method cannot.

    Raises:
        ProblemError: a value that is not what the tables of this module say, or is not finite.
    """

    left: Tensor
    right: Tensor
    projection_sha256: str
    backbone: str
    weights: str
    dataset: str
    classes: list[str]
    trainer: str
    settings: dict[str, Any] = field(default_factory=dict)
    solver: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise ProblemError unless everything is what the tables of this module say."""
        for name, shape in FIELDS.items():
            check(getattr(self, name), shape, name)
        check_tensors({"left": self.left, "right": self.right}, FACTORS)
        table, sizes = {}, {"w": self.left.shape[0], "d": self.right.shape[1]}
        if self.recipe:
            objective = self.recipe.get("objective")
            if not isinstance(objective, str) or objective not in SHARED:
                raise ProblemError(f"recipe.objective must be one of {', '.join(SHARED)}")
            check(self.recipe, {"objective": TEXT, **SHARED[objective], "parts": PARTS}, "recipe")
            table, parts = columns(objective), self.recipe["parts"]
            sizes |= {rows: sum(part[rows] for part in parts) for rows in ("forget", "leaving")}
        check_tensors(self.tensors, table, sizes)
        # What bounds the numbers of the change, in the precision in which it is stored.
        if not float(self.left.double().norm() * self.right.double().norm()) < LARGEST:
            raise ProblemError("the factors left and right are too large: their product overflows")
        if self.recipe and not (self.tensors["shares"] > 0).all():
            raise ProblemError("shares must be positive")

    @property
    def texts(self) -> list[str]:
        """By which texts: the names, their other words, and wordings that hardly followed."""
        return list(check(self.solver.get("texts", self.classes), [TEXT, ...], "solver.texts"))

    def delta(self) -> Tensor:
        """The change itself, (w, d) float32."""
        return self.left.float() @ self.right.float()  # (w, r) @ (r, d) -> (w, d)

    def apply(self, projection: Tensor) -> Tensor:
        """`W + Delta` as a new tensor, in the dtype and on the device of `projection` (w, d).

        Raises:
            ProblemError: the projection is not the one that the adapter was made for, or is that
                one transposed, (d, w), as a torch.nn.Linear holds it; the message says which.
        """
        if (given := projection_sha256(projection)) != self.projection_sha256:
            if projection_sha256(projection.T) == self.projection_sha256:
                raise ProblemError(
                    "the projection is the one that this adapter was made for, but transposed "
                    f"{tuple(projection.shape)}, as a torch.nn.Linear holds it: pass weight.T, "
                    "and write the answer's .T back"
                )
            raise ProblemError(
                f"this adapter belongs to another text projection (of {self.backbone}, weights "
                f"{self.weights[:12]}, projection {self.projection_sha256[:12]}), not to the given "
                f"one ({given[:12]})"
            )
        return self.changed(projection)

    def changed(self, projection: Tensor) -> Tensor:
        """`W + Delta` like `projection` (w, d), whatever that is: summed in float64 on the CPU and
        rounded once, so that it is the same bits everywhere."""
        delta = self.left.cpu().double() @ self.right.cpu().double()  # (w, r) @ (r, d) -> (w, d)
        return (projection.detach().cpu().double() + delta).to(projection)


def save_adapter(adapter: Adapter, path: str | Path, overwrite: bool = True) -> None:
    """Write an adapter; the file appears whole or not at all.

    Raises:
        ProblemError: the place cannot be written, or is taken and `overwrite` is False.
    """
    write_bytes(adapter_bytes(adapter), path, overwrite)


def adapter_bytes(adapter: Adapter) -> bytes:
    """An adapter as the content of its file; the same adapter gives the same bytes."""
    tensors = {name: getattr(adapter, name).float() for name in FACTORS}
    tensors |= {_PREFIX + name: tensor for name, tensor in adapter.tensors.items()}
    return pack(FORMAT, {name: getattr(adapter, name) for name in FIELDS}, tensors)


def load_adapter(path: str | Path) -> Adapter:
    """Read an adapter, which is as it was written.

    Raises:
        ProblemError: no such file, no adapter, or one that is damaged or was changed; the message
            names the file and what is wrong.
    """
    fields, tensors = unpack(path, FORMAT)
    factors = {name: tensors.pop(name, None) for name in FACTORS}
    kept = {name.removeprefix(_PREFIX): x for name, x in tensors.items()}
    with naming(path):  # an older file may lack fields, which is said as what they must be
        return Adapter(**factors, **dict.fromkeys(FIELDS) | fields, tensors=kept)


@dataclass(frozen=True)
class Part:
    """One class as it was forgotten: the grain in which requests are joined and given back.

    Attributes:
        dataset, name: of the class; tensors: see `recipe_parts`.
    """

    dataset: str
    name: str
    tensors: dict[str, Tensor]


def recipe_parts(
    ridge: Ridge | None,
    forget_hidden: Tensor,
    displacement: Tensor,
    owner: Tensor,
    names: Sequence[tuple[str, str]],
    rows: Tensor,
    shares: Tensor,
    leaving: Tensor,
) -> list[Part]:
    """What adapters keep of C classes.

    Texts are kept in float32, which is what CLIP made; the rows of `K_0^-1` and the displacements
    in float64: with several prompts a class `H_f K^-1 H_f^T` is nearly singular, and float32 would
    change the composed answer by 5e-6 (rows) or 1e-6 (displacements, which should be computed in
    float64 as well). P is `displacement + H_f W`.

    Args:
        ridge: the constrained form's `K_0`; None for the paper's objective, which keeps no rows.
        forget_hidden: (k, w), the classes' texts; displacement: (k, d), `D = P - H_f W`.
        owner: (k,) int64, the class of each text; names: C pairs of data set and class.
        rows: (n, w), retained texts; shares: (n,), what each weighs in G; leaving: (C, n) bool,
            which leave the statistics with a class (also one that another class takes out too).
    """
    texts, displacement, owner, rows, shares, leaving = (
        x.detach().cpu() for x in (forget_hidden, displacement, owner, rows, shares, leaving)
    )
    if not len(texts) == len(displacement) == len(owner) or len(rows) != len(shares):
        raise ProblemError(
            f"{len(texts)} texts with {len(displacement)} displacements and {len(rows)} "
            f"leaving texts with {len(shares)} shares make no recipe"
        )
    leaving = leaving & (shares > 0)
    used = leaving.any(dim=0)
    leaving = leaving[:, used]
    forget = {"forget_hidden": texts.float(), "displacement": displacement.double()}
    gone = {"leaving_hidden": rows[used].float(), "shares": shares[used].double()}
    if ridge is not None:
        for kept, name in ((forget, "forget"), (gone, "leaving")):
            base = ridge.solve(kept[f"{name}_hidden"].to(ridge.gram))
            kept[f"{name}_base"] = base.cpu()
    return [
        Part(
            *name,
            {key: x[owner == i] for key, x in forget.items()}
            | {key: x[leaving[i]] for key, x in gone.items()},
        )
        for i, name in enumerate(names)
    ]


def recipe_fields(shared: dict[str, Any], parts: Sequence[Part]) -> dict[str, Any]:
    """The fields `recipe` and `tensors` of an adapter.

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
    return {"recipe": recipe | {"parts": index}, "tensors": joined(parts)}


def constrained_recipe(
    context: ForgetContext, answer: Answer, dataset: str
) -> tuple[dict[str, Any], list[Part]]:
    """What composing needs of one answer: what all adapters of its retain set share, and a part for
    each class."""
    retain, request = context.retain, answer.request
    shared = {
        "objective": "constrained",
        "statistics": retain.sha256,
        "weights": retain.weights,
        "mu": answer.mu,
    }
    parts = recipe_parts(
        context.ridge,
        request.hidden,
        answer.displacement,
        torch.tensor(request.owner),
        [(dataset, name) for name in request.classes],
        retain.rows,
        retain.name_weights,
        answer.excluded,
    )
    return shared, parts


def joined(parts: Sequence[Part]) -> dict[str, Tensor]:
    """The tensors of all parts, one below the other."""
    return {name: torch.cat([p.tensors[name] for p in parts]) for name in parts[0].tensors}


def read_parts(adapter: Adapter, where: str) -> list[Part]:
    """The classes of an adapter's recipe; `where` names the adapter in messages.

    Raises:
        ProblemError: the adapter has no recipe, or one that does not fit together.
    """
    if not adapter.recipe:
        raise ProblemError(
            f"{where}: an adapter of {line(adapter.trainer)} without a recipe that can be "
            "relied on, which cannot be composed; forget its classes again with TRAINER=ForgetExact"
        )
    try:
        adapter.check()  # what is in its dictionaries may have been changed since
    except ProblemError as error:
        raise ProblemError(f"{where}: a recipe that does not fit together ({error})") from None
    index = adapter.recipe["parts"]
    pieces = {
        name: adapter.tensors[name].split([part[rows] for part in index])
        for name, (_, (rows, *_)) in columns(adapter.recipe["objective"]).items()
    }
    return [
        Part(part["dataset"], part["class"], {name: pieces[name][i] for name in pieces})
        for i, part in enumerate(index)
    ]


def columns(objective: str) -> dict[str, Any]:
    """The tensors of an objective's recipes."""
    return COLUMNS | (BASE_COLUMNS if objective == "constrained" else {})
