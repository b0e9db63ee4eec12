"""What is stored of forgotten classes: one low-rank change, what it belongs to, and its recipe."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgetting.errors import ProblemError, shown
from forgetting.io import FLOATS, matrix, naming, pack, raw, tensor, unpack, write_bytes
from forgetting.recipe import TENSORS, Recipe

FORMAT = "clip-forget-adapter/3"
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class ModelIdentity:
    """Where a projection is in a model, and what else that model holds.

    Attributes:
        projection: name of its tensor; transposed: whether it holds `W^T`, as a torch.nn.Linear.
        bias: name of the bias's tensor, if there is one.
        others_sha256: of the names and contents of all other tensors.
    """

    projection: str
    transposed: bool
    bias: str | None
    others_sha256: str


@dataclass(frozen=True)
class Adapter:
    """A low-rank change of one particular text projection: `W' = W + left @ right`.

    Attributes:
        left: (w, r) and right: (r, d), stored in float32.
        projection_sha256: of the `W` that it was made for, see `projection_sha256`.
        backbone, weights: architecture and SHA-256 (or origin) of the checkpoint that holds `W`.
        dataset, classes: what was forgotten; trainer: the method; settings: its constants.
        record: the entry of logs.json: accuracies (none by the library), and `solver`, the
            solver's report. JSON values only.
        recipe: what composing needs; None if the method cannot.
        model: where it is in a model; None if it was not made from one.
        changed_sha256: of the tensor that holds `W'` in that model: in the dtype of W, and rounded
            as a file in half precision rounds it, if W came from one. Empty if that is not known.

    Raises:
        ProblemError: a field of another type, or factors that do not fit or are not finite.
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
    record: dict[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None
    model: ModelIdentity | None = None
    changed_sha256: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, kind in FIELDS.items():
            if type(value := getattr(self, name)) is not kind:
                raise ProblemError(f"{name} must be {kind.__name__}, not {shown(value)}")
        if not self.classes or not all(type(name) is str for name in self.classes):
            raise ProblemError(f"classes must be names, not {shown(self.classes)}")
        r = tensor("left", self.left, FLOATS, (None, None)).shape[1]
        tensor("right", self.right, FLOATS, (r, None))
        # What bounds the numbers of the change, in the precision in which it is stored.
        if not float(self.left.double().norm() * self.right.double().norm()) < LARGEST:
            raise ProblemError("the factors left and right are too large: their product overflows")

    @property
    def solver(self) -> dict[str, Any]:
        """The solver's report."""
        found = self.record.get("solver")
        return found if isinstance(found, dict) else {}

    @property
    def texts(self) -> list[str]:
        """By which texts: the names, their other words, and paraphrases that were added."""
        if self.recipe is not None:
            return list(self.recipe.texts)
        found = self.solver.get("texts")
        return [str(text) for text in found] if isinstance(found, list) else list(self.classes)

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

    def changed(self, projection: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """`W + Delta` like `projection` (w, d), whatever that is, or in another `dtype`: summed in
        float64 on the CPU and rounded once, so that it is the same bits everywhere."""
        delta = self.left.cpu().double() @ self.right.cpu().double()  # (w, r) @ (r, d) -> (w, d)
        changed = projection.detach().cpu().double() + delta
        return changed.to(projection.device, dtype or projection.dtype)


FIELDS = {
    **dict.fromkeys(("projection_sha256", "backbone", "weights", "dataset", "trainer"), str),
    **{"changed_sha256": list, "classes": list, "settings": dict, "record": dict},
}


def projection_sha256(projection: Tensor) -> str:
    """SHA-256 of a projection's float32 little-endian bytes, row by row: its name in an adapter.

    One in float64 that float32 cannot hold exactly is hashed as it is: two projections of one name
    are equal.
    """
    projection = matrix("projection", projection).cpu()
    single = projection.float()
    exact = projection.dtype != torch.float64 or torch.equal(single.double(), projection)
    return hashlib.sha256(raw(single if exact else projection)).hexdigest()


def save_adapter(adapter: Adapter, path: str | Path, overwrite: bool = True) -> None:
    """Write an adapter; the file appears whole or not at all.

    Raises:
        ProblemError: the place cannot be written, or is taken and `overwrite` is False.
    """
    write_bytes(adapter_bytes(adapter), path, overwrite)


def adapter_bytes(adapter: Adapter) -> bytes:
    """An adapter as the content of its file; the same adapter gives the same bytes."""
    fields = {name: getattr(adapter, name) for name in FIELDS}
    fields["model"] = None if adapter.model is None else asdict(adapter.model)
    fields["recipe"] = None if adapter.recipe is None else adapter.recipe.fields()
    tensors = {"left": adapter.left.float(), "right": adapter.right.float()}
    if adapter.recipe is not None:
        tensors |= {f"recipe.{name}": getattr(adapter.recipe, name) for name in TENSORS}
    return pack(FORMAT, fields, tensors)


def load_adapter(path: str | Path) -> Adapter:
    """Read an adapter, which is as it was written.

    Raises:
        ProblemError: no such file, no adapter, one of an older format, or one that is damaged or
            was changed; the message names the file and what is wrong.
    """
    fields, tensors = unpack(path, FORMAT)
    with naming(path):
        model, recipe = fields.pop("model", None), fields.pop("recipe", None)
        try:
            factors = {name: tensors.pop(name) for name in ("left", "right")}
            fields["model"] = None if model is None else ModelIdentity(**model)
            adapter = Adapter(**factors, **fields)
        except (TypeError, KeyError) as error:
            raise ProblemError(f"an adapter that does not fit together ({error})") from error
        if recipe is None:
            return adapter
        rows = {name.removeprefix("recipe."): x for name, x in tensors.items()}
        w, d = len(adapter.left), adapter.right.shape[1]
        object.__setattr__(adapter, "recipe", Recipe.read(recipe, rows, w, d))
        return adapter
