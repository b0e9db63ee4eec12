"""What is kept of a forgotten class: a few kilobytes of factors and what they belong to."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from forgetting.problem import ProblemError

FORMAT = "clip-forget-adapter/1"


def projection_sha256(projection: Tensor) -> str:
    """SHA-256 of a projection's float32 little-endian bytes, row by row: its name in an adapter."""
    array = projection.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4")
    return hashlib.sha256(array.tobytes()).hexdigest()


@dataclass(frozen=True)
class Adapter:
    """A low-rank change of one particular text projection: `W' = W + left @ right`.

    Attributes:
        left: (w, r) and right: (r, d), float32.
        projection_sha256: names the `W` that it was made for, see `projection_sha256`.
        backbone, weights: architecture and SHA-256 (or origin) of the checkpoint that holds `W`.
        dataset, classes: what was forgotten.
        trainer: the method; settings and solver: its constants and its report, JSON values only.
        recipe, tensors: what `forgetting.compose` needs to solve again together with other
            adapters, JSON values and tensors of any dtype; empty if the method cannot.
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
    recipe: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def delta(self) -> Tensor:
        """The change itself, (w, d) float32."""
        return self.left @ self.right  # (w, r) @ (r, d) -> (w, d)

    def apply(self, projection: Tensor) -> Tensor:
        """`W + Delta` as a new tensor, in the dtype and on the device of `projection` (w, d).

        Raises:
            ProblemError: the projection is not the one that the adapter was made for.
        """
        if projection_sha256(projection) != self.projection_sha256:
            raise ProblemError(
                f"this adapter belongs to another text projection (of {self.backbone}, weights "
                f"{self.weights[:12]}, projection {self.projection_sha256[:12]}), not to the given "
                f"one ({projection_sha256(projection)[:12]})"
            )
        return projection + self.delta().to(projection)


# Everything but the tensors travels as metadata; JSON keeps lists and dictionaries whole.
_METADATA = (
    "projection_sha256",
    "backbone",
    "weights",
    "dataset",
    "classes",
    "trainer",
    "settings",
    "solver",
)


# What further tensors are called in the file: apart from `left` and `right`, whatever their name.
_PREFIX = "recipe."


def write_tensors(tensors: dict[str, Tensor], metadata: dict[str, str], path: str | Path) -> None:
    """Write a safetensors file, which appears whole or not at all; missing folders are made.

    Raises:
        ProblemError: the place cannot be written.
    """
    path = Path(path)
    # Made neither by tempfile nor by safetensors' save_file: their files are private (0600).
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}.safetensors")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(save(tensors, metadata=metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise ProblemError(f"cannot write {path} ({error})") from error
    finally:
        with suppress(OSError):  # gone already, or in a folder that is none
            temporary.unlink()


def save_adapter(adapter: Adapter, path: str | Path) -> None:
    """Write an adapter as safetensors; the file appears whole or not at all."""
    metadata = {name: json.dumps(getattr(adapter, name)) for name in _METADATA}
    tensors = {
        name: getattr(adapter, name).detach().to("cpu", torch.float32).contiguous()
        for name in ("left", "right")
    }
    if adapter.recipe:
        metadata["recipe"] = json.dumps(adapter.recipe)
        for name, tensor in adapter.tensors.items():
            # A copy of its own: safetensors refuses tensors that share memory.
            tensors[_PREFIX + name] = tensor.detach().cpu().clone().contiguous()
    write_tensors(tensors, {"format": FORMAT, **metadata}, path)


def load_adapter(path: str | Path) -> Adapter:
    """Read an adapter.

    Raises:
        ProblemError: no such file, or not an adapter; the message names the file and what is wrong.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ProblemError(
                    f"{path}: not an adapter (format {metadata.get('format')!r}, "
                    f"expected {FORMAT!r})"
                )
            tensors = {name: file.get_tensor(name) for name in ("left", "right")}
            fields = {name: json.loads(metadata[name]) for name in _METADATA}
            recipe = json.loads(metadata.get("recipe", "{}"))
            further = {
                name.removeprefix(_PREFIX): file.get_tensor(name)
                for name in list(file.keys())
                if name.startswith(_PREFIX)
            }
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ProblemError(f"{path}: not a readable adapter ({error})") from error
    left, right = tensors["left"], tensors["right"]
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ProblemError(
            f"{path}: factors of shapes {tuple(left.shape)}, {tuple(right.shape)} do not multiply"
        )
    if not all(torch.isfinite(tensor).all() for tensor in (left, right, *further.values())):
        raise ProblemError(f"{path}: the factors or the recipe hold NaN or infinite values")
    return Adapter(left=left, right=right, recipe=recipe, tensors=further, **fields)
