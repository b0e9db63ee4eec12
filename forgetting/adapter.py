"""What is stored of forgotten classes: one low-rank change, what it belongs to, and its recipe."""

import hashlib
import os
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgetting.errors import ProblemError, shown
from forgetting.io import FLOATS, foreign, matrix, naming, pack, raw, tensor, unpack, write_bytes

FORMAT = "clip-forget-adapter/4"
ADAPTER = "adapter.safetensors"  # in a folder that is shared

Excluded = tuple[str, str, int]  # a retained name: its group, the name, and which of its prompts


@dataclass(frozen=True)
class ModelIdentity:
    """Where a projection is in a model, and what else that model holds."""

    projection: str  # name of its tensor
    transposed: bool  # whether that holds W^T, as a torch.nn.Linear
    bias: str | None  # name of the bias's tensor, if there is one
    others_sha256: str  # of the names and contents of all other tensors


@dataclass(frozen=True, eq=False)
class Part:
    """One class of a recipe, with its rows of `K_0^-1` for `K_0 = G + mu I`."""

    dataset: str
    name: str
    texts: list[str]  # K, by which it is forgotten
    excluded: list[Excluded]  # E names that are not retained with it
    hidden: Tensor  # (K, w) float32, hidden states h of the texts
    base: Tensor  # (K, w) float64, h K_0^-1
    displacement: Tensor  # (K, d) float64, from each text to its target
    excluded_hidden: Tensor  # (E, w) float32
    excluded_base: Tensor  # (E, w) float64
    excluded_weight: Tensor  # (E,) float64, the weight of each name in G


TEXTS = ("hidden", "base", "displacement")  # tensors of a part with a row for each text
EXCLUDED = ("excluded_hidden", "excluded_base", "excluded_weight")  # and for each excluded name


@dataclass(frozen=True)
class Recipe:
    """What composing needs. Texts and names are known by their strings: the hidden states of one
    text differ in their last digits from machine to machine."""

    encoder: str  # digest of what a hidden state depends on beside its text
    retain: str  # digest of all retained names, their groups and weights
    mu: float  # the ridge
    parts: list[Part]  # the classes, in the order in which they came


@dataclass(frozen=True)
class Adapter:
    """A low-rank change of one particular text projection: `W' = W + left @ right`. ProblemError
    for no class, or factors that do not fit or are not finite."""

    left: Tensor  # (w, r), stored in float32
    right: Tensor  # (r, d), stored in float32
    projection_sha256: str  # of the W that it was made for, see `projection_sha256`
    backbone: str  # architecture
    weights: str  # SHA-256 (or origin) of the checkpoint that holds W
    dataset: str
    classes: list[str]  # what was forgotten
    trainer: str  # the method
    settings: dict[str, Any] = field(default_factory=dict)  # its constants
    # As in logs.json: accuracies (none by the library), the `solver`'s report; an `audit`'s lines.
    record: dict[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None  # None if the method does not compose
    model: ModelIdentity | None = None  # None if it was not made from one
    # Of the tensor that holds W' in that model: in the dtype of W, and rounded as a file in half
    # precision rounds it, if W came from one. Empty if that is not known.
    changed_sha256: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if type(self.classes) is not list or not self.classes:
            raise ProblemError(f"classes must be a list of names, not {shown(self.classes)}")
        r = tensor("left", self.left, FLOATS, (None, None)).shape[1]
        tensor("right", self.right, FLOATS, (r, None))

    @property
    def solver(self) -> dict[str, Any]:
        """The solver's report."""
        return self.record.get("solver", {})

    @property
    def of_embeddings(self) -> bool:
        """Whether what it changes are embeddings as they are: its projection is the identity."""
        return self.projection_sha256 == _identity_sha256(self.right.shape[1])

    @property
    def texts(self) -> list[str]:
        """By which texts: the names, their other words, and paraphrases that were added."""
        return list(self.solver.get("texts", self.classes))

    def delta(self) -> Tensor:
        """The change itself, (w, d) float32."""
        return self.left.float() @ self.right.float()  # (w, r) @ (r, d) -> (w, d)

    def apply(self, projection: Tensor) -> Tensor:
        """`W + Delta` as a new tensor, in the dtype and on the device of `projection` (w, d);
        ProblemError if that is not the one that the adapter was made for."""
        if projection_sha256(projection) != self.projection_sha256:
            raise ProblemError(
                f"this adapter belongs to another text projection (of {self.backbone}, weights "
                f"{self.weights[:12]}, projection {self.projection_sha256[:12]}); of a "
                "torch.nn.Linear, which holds it transposed, pass weight.T"
            )
        return self.changed(projection)

    def changed(self, projection: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """`W + Delta` like `projection` (w, d), whatever that is, or in another `dtype`: summed in
        float64 on the CPU and rounded once, so that it is the same bits everywhere."""
        delta = self.left.cpu().double() @ self.right.cpu().double()  # (w, r) @ (r, d) -> (w, d)
        changed = projection.detach().cpu().double() + delta
        return changed.to(projection.device, dtype or projection.dtype)


def projection_sha256(projection: Tensor) -> str:
    """SHA-256 of a projection's float32 little-endian bytes, row by row: its name in an adapter."""
    return hashlib.sha256(raw(matrix("projection", projection).float())).hexdigest()


@cache
def _identity_sha256(size: int) -> str:
    return projection_sha256(torch.eye(size))


def save_adapter(adapter: Adapter, path: str | Path, overwrite: bool = True) -> None:
    """Write an adapter, whole or not at all; ProblemError if the place cannot be written, or is
    taken and `overwrite` is False."""
    write_bytes(adapter_bytes(adapter), path, overwrite)


def adapter_bytes(adapter: Adapter) -> bytes:
    """An adapter as the content of its file; the same adapter gives the same bytes."""
    fields = {k: v for k, v in vars(adapter).items() if k not in ("left", "right")}
    tensors = {"left": adapter.left.float(), "right": adapter.right.float()}
    if adapter.model is not None:
        fields["model"] = asdict(adapter.model)
    if adapter.recipe is not None:
        parts = [dict(vars(part)) for part in adapter.recipe.parts]
        for i, part in enumerate(parts):
            tensors |= {f"{i}.{name}": part.pop(name) for name in TEXTS + EXCLUDED}
        fields["recipe"] = vars(adapter.recipe) | {"parts": parts}
    return pack(FORMAT, fields, tensors)


def load_adapter(path: str | Path) -> Adapter:
    """Read an adapter, which is as it was written, or that of a folder of `save_pretrained`.
    ProblemError for another file, an older format, or one that is damaged or was changed."""
    path = Path(path, ADAPTER) if os.path.isdir(path) else path  # which no odd name stops
    fields, tensors = unpack(path, FORMAT)
    with naming(path), foreign("an adapter that does not fit together"):
        if (model := fields["model"]) is not None:
            fields["model"] = ModelIdentity(**model)
        if (recipe := fields["recipe"]) is not None:
            parts = []
            for i, part in enumerate(recipe["parts"]):
                excluded = [(group, name, row) for group, name, row in part["excluded"]]
                rows = {name: tensors[f"{i}.{name}"] for name in TEXTS + EXCLUDED}
                parts.append(Part(**part | rows | {"excluded": excluded}))
            fields["recipe"] = Recipe(**recipe | {"parts": parts})
        return Adapter(tensors["left"], tensors["right"], **fields)
