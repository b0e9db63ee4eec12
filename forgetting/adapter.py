"""What is kept of a forgotten class: a few kilobytes of factors, what they belong to, and a recipe.

The recipe is what `forgetting.compose` needs to solve a class again together with others.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from forgetting.checks import ProblemError, matrix
from forgetting.constrained import Ridge

FORMAT = "clip-forget-adapter/1"


def projection_sha256(projection: Tensor) -> str:
    """SHA-256 of a projection's float32 little-endian bytes, row by row: its name in an adapter."""
    projection = matrix("projection", projection)
    array = projection.to("cpu", torch.float32).contiguous().numpy().astype("<f4")
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


def write_bytes(data: bytes, path: str | Path, durable: bool = True) -> None:
    """Write a file, which appears whole or not at all; missing folders are made.

    Args:
        durable: wait until the disk has it, and remove what killed processes left beside it.
            Without that a power cut may leave an empty file, which whoever keeps its digest
            elsewhere will notice.

    Raises:
        ProblemError: the place cannot be written.
    """
    path = Path(path)
    # Made neither by tempfile nor by safetensors' save_file: their files are private (0600).
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}.safetensors")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".tmp-{16 * '[0-9a-f]'}.safetensors") if durable else ():
            with suppress(OSError), open(left) as file:
                if _lock(file, wait=False):  # whoever was writing it is gone
                    left.unlink()
        with open(temporary, "wb") as file:
            _lock(file)
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        raise ProblemError(f"cannot write {path} ({error.strerror})") from error
    finally:
        with suppress(OSError):  # gone already, or in a folder that is none
            temporary.unlink()


def _lock(file: IO, wait: bool = True) -> bool:
    """Lock a file until it is closed; whether that could be done."""
    try:
        import fcntl  # not on every system; without it nothing is removed

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError):
        return False
    return True


def write_tensors(tensors: dict[str, Tensor], metadata: dict[str, str], path: str | Path) -> None:
    """Write a safetensors file, which appears whole or not at all; missing folders are made."""
    write_bytes(save(tensors, metadata=metadata), path)


def save_adapter(adapter: Adapter, path: str | Path) -> None:
    """Write an adapter as safetensors; the file appears whole or not at all."""
    write_bytes(adapter_bytes(adapter), path)


def adapter_bytes(adapter: Adapter) -> bytes:
    """An adapter as the content of a safetensors file; the same adapter gives the same bytes."""
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
    data = save(tensors, metadata={"format": FORMAT, **metadata})
    # The library orders its header by chance. Sorted and padded to 8 bytes it means the same.
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:start]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[start:]


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
    forget_hidden, displacement, owner, rows, shares, leaving = (
        x.detach().cpu() for x in (forget_hidden, displacement, owner, rows, shares, leaving)
    )
    if not len(forget_hidden) == len(displacement) == len(owner) or len(rows) != len(shares):
        raise ProblemError(
            f"{len(forget_hidden)} texts with {len(displacement)} displacements and {len(rows)} "
            f"leaving texts with {len(shares)} shares make no recipe"
        )
    leaving = leaving & (shares > 0)
    used = leaving.any(dim=0)
    rows, shares, leaving = rows[used].float(), shares[used].double(), leaving[:, used]
    texts, displacement = forget_hidden.float(), displacement.double()
    base = [] if ridge is None else [ridge.solve(x.to(ridge.gram)).cpu() for x in (texts, rows)]
    parts = []
    for i, (dataset, name) in enumerate(names):
        mine, gone = owner == i, leaving[i]
        tensors = {
            "forget_hidden": texts[mine],
            "displacement": displacement[mine],
            "leaving_hidden": rows[gone],
            "shares": shares[gone],
        }
        if base:
            tensors |= {"forget_base": base[0][mine], "leaving_base": base[1][gone]}
        parts.append(Part(dataset, name, tensors))
    return parts


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
