"""Embeddings that are stored: cached texts, changed as the projection was, and indexes of images,
in which what was forgotten is hidden.

**Texts.** The embedding `x = h W` becomes `x' = h (W + Delta)`. It determines `h Delta` for every h
and Delta exactly if W (w, d) has full row rank, `rank W = w <= d`. Then `W W^+ = I`, and

    x' = x + h Delta = x (I + W^+ Delta) =: x M

A positive factor passes through M, so `e' = normalise(e M)` is exact for unit-norm embeddings. With
a bias `x' = (x - b) M + b`, so embeddings can only be patched before they are normalised.

**Images.** The score of a text x with an image y is `x M y^T` after the change, so it is that of
the unchanged text with the image `y M^T`: an index of images can be changed in place of the text
encoder, and the certificate holds for it. Where the index is of unit norm, so is the result. Under
OpenAI's own W the condition of M is 4e5, which ruins other images' scores; so an adapter for an
index is made in the space of embeddings (`TextEmbeddings`): W = I, and the condition is about 20.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from forgetting.adapter import Adapter
from forgetting.errors import ProblemError, line, shown
from forgetting.io import (
    FLOATS,
    atomic_path,
    container,
    foreign,
    matrix,
    naming,
    read_bytes,
    read_safetensors,
    tensor,
)
from forgetting.models.checkpoint import read_projection

UNIT = 1e-2  # how far from 1 the length of a unit-norm embedding may be: float16 sums are rough
INSIDE = 2e-2  # the part of an embedding that may lie outside of W's rows, for the same reason
ROWS = 256  # vectors of an index that are changed at once: larger blocks fetch new memory each time
# Condition of a change of an index, at most: of embeddings, so that it can be restored; of a text
# projection, whose pseudo-inverse ruins the searches for other things from about 100 on.
RESTORABLE, STRETCHED = 1000, 100
Vectors = TypeVar("Vectors", Tensor, np.ndarray)  # of images, (n, d)
ARRAYS = (np.float16, np.float32, np.float64)
UNCERTAIN = 0.1  # a direction that rounding may turn by more than this is no answer
PATCHED = "clip-forget-patched"  # the metadata entry of a patched file: by which adapter

NOT_UNIT = (
    "is not of length 1: say so if they are not normalised (normalised=False, --unnormalised)"
)
ENCODE_AGAIN = "encode the texts again with the changed model"
OF_EMBEDDINGS = "make an adapter of embeddings for an index (TextEmbeddings, --embeddings)"


def condition(projection: Tensor) -> float:
    """Largest over smallest singular value of W (w, d); infinite without full row rank: where the
    smallest is below four machine epsilons of float32, in which projections are stored. (By numpy's
    `max(w, d)` epsilons OpenAI's ViT-B/16, with 6,391, would nearly be refused.)"""
    w, d = matrix("projection", projection).shape
    if not 0 < w <= d:
        return math.inf
    values = torch.linalg.svdvals(projection.detach().double())
    least, most = float(values[-1]), float(values[0])
    return most / least if least > 4 * torch.finfo(torch.float32).eps * most else math.inf


def rounding(dtype: torch.dtype, d: int) -> float:
    """How far rounding to `dtype` moves a vector (d,) of length 1, at most."""
    info = torch.finfo(dtype)
    return info.eps / 2 * (1 + info.smallest_normal * math.sqrt(d))


def patch(
    embeddings: Tensor,
    projection: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    normalised: bool = True,
) -> tuple[Tensor, float]:
    """Text embeddings after `W' = W + left @ right`, and how exact that is. ProblemError for a W
    without full row rank, embeddings of something else, and texts of which so little is left that
    rounding decides their direction.

    Args:
        embeddings: (n, d), of unit norm if `normalised`; else as the projection gave them.
        projection: the original W (w, d), of full row rank; bias: (d,) if the projection has one.
        left, right: (w, r) and (r, d).

    Returns:
        The patched ones, likewise, in the same dtype and on the same device; and by how much any of
        them may be wrong, relative to its length, since the cached ones were rounded.
    """
    w, d = matrix("projection", projection).shape
    left = matrix("left", left, count=w).double().cpu()
    right = matrix("right", right, d, left.shape[1]).double().cpu()
    given = tensor("embeddings", embeddings, FLOATS, (None, d))
    rows = given.double().cpu()
    sizes = rows.norm(dim=1)
    far = (sizes - 1).abs() > UNIT
    if bias is not None and (normalised or (len(rows) and not far.any())):
        raise ProblemError(
            "this projection has a bias, and a unit-norm embedding does not tell how much of it "
            "that is: patch embeddings that are not normalised, or encode again"
        )
    if normalised:
        _refuse(far, NOT_UNIT)
    basis, left, worst = _inverse(projection, left, ENCODE_AGAIN)
    b = 0 if bias is None else tensor("bias", bias, FLOATS, (d,)).double().cpu()
    x = rows - b
    outside = (x - x @ basis @ basis.T).norm(dim=1)
    _refuse(
        outside > INSIDE * sizes,
        "is no text embedding of this projection (but an image's, another's, or patched already)",
    )
    x = x + (x @ left) @ right + b  # (n, d) @ (d, r) @ (r, d) -> (n, d)
    norm = float(torch.linalg.matrix_norm(torch.eye(d).double() + left @ right, 2))  # |M|
    size = float(left.norm() * right.norm())
    arithmetic = 8 * torch.finfo(torch.float64).eps * (1 + worst * size) * math.sqrt(d)
    unit, lengths = rounding(given.dtype, d), x.norm(dim=1)
    moved = (unit * norm + arithmetic) * sizes
    # |a/|a| - b/|b|| <= 2 |a - b| / (|a| + |b|), with |b| >= |a| - |a - b|
    error = torch.where(2 * lengths > moved, 2 * moved / (2 * lengths - moved), math.inf) + unit
    error = error.where(sizes > 0, unit)  # nothing stays nothing
    if normalised:
        _refuse(error > UNCERTAIN, "keeps so little that rounding would decide: take this text out")
        x = normalize(x, dim=1)
    return x.to(given), max(error.tolist(), default=0.0)


def _inverse(projection: Tensor, left: Tensor, instead: str) -> tuple[Tensor, Tensor, float]:
    """An orthonormal basis of the rows of W, (d, w), `W^+ left`, (d, r), and the condition of W:
    W^T = Q R, so that W^+ left = Q R^-T left. Without full row rank do `instead`."""
    if math.isinf(worst := condition(projection)):
        raise ProblemError(
            f"the projection {tuple(projection.shape)} has no full row rank, so embeddings do not "
            f"tell how they change: {instead}"
        )
    basis, triangle = torch.linalg.qr(projection.detach().double().cpu().T)
    return basis, basis @ torch.linalg.solve_triangular(triangle.T, left, upper=False), worst


@dataclass(frozen=True)
class IndexEdit:
    """A change of vectors (n, d): `y M^T = y + (y @ down) @ up`. `index_edit` makes one."""

    down: Tensor  # (d, r) float64
    up: Tensor  # (r, d) float64
    condition: float  # of M: by this factor rounding grows at most in vectors that are restored

    def __call__(self, vectors: Tensor | np.ndarray, normalised: bool = True) -> Any:
        """Changed vectors (n, d), of the same kind, dtype and device; of unit norm again if
        `normalised`. Nothing stays nothing. The arithmetic is that of the dtype, float32 at least.
        ProblemError for what is no such matrix, or a row that is not of unit norm, if it should be.
        """
        is_array = isinstance(vectors, np.ndarray) and vectors.dtype in ARRAYS
        if not (is_array or isinstance(vectors, Tensor)) or vectors.shape[1:] != self.up.shape[1:]:
            shape = f"(n, {self.up.shape[1]}), not {tuple(getattr(vectors, 'shape', ()))}"
            raise ProblemError(f"vectors must be a tensor or an array of 16, 32 or 64 bits {shape}")
        made = np.empty_like(vectors) if is_array else torch.empty_like(vectors)
        for start in range(0, max(1, len(vectors)), ROWS):
            block = vectors[start : start + ROWS]
            block = torch.from_numpy(np.array(block)) if is_array else block
            block = tensor("vectors", block, FLOATS, (None, len(self.down)))
            block = block.to("cpu", torch.promote_types(block.dtype, torch.float32))
            if normalised:
                sizes = block.norm(dim=1)
                _refuse(((sizes - 1).abs() > UNIT) & (sizes > 0), NOT_UNIT, start)
            down, up = self.down.to(block), self.up.to(block)
            block = torch.addmm(block, block @ down, up)  # (b, d) + (b, r) @ (r, d) -> (b, d)
            block = normalize(block, dim=1) if normalised else block
            made[start : start + ROWS] = block.numpy() if is_array else block.to(made)
        return made

    @property
    def inverse(self) -> IndexEdit:
        """The change back, by Woodbury's formula: `(I + D U)^-1 = I - D (I + U D)^-1 U`."""
        small = torch.eye(len(self.up)).double() + self.up @ self.down  # (r, r)
        return IndexEdit(self.down, -torch.linalg.solve(small, self.up), self.condition)

    def restored_to(self, dtype: torch.dtype) -> float:
        """By how much a vector of `dtype` that was hidden and restored may be off, relative to its
        length: the rounding of what is stored and of the arithmetic, which grows by `condition`."""
        eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        size = torch.linalg.matrix_norm(self.down, 2) * torch.linalg.matrix_norm(self.up, 2)
        stored = rounding(dtype, len(self.down))
        return (self.condition + 1) * (stored + 2 * eps * (1 + float(size)))


def projection_of(adapter: Adapter, base: str | Path | None = None) -> tuple[Tensor, Tensor | None]:
    """W (w, d) and the bias (d,) of what an adapter changes: of the checkpoint `base`, a file or
    folder; the identity and None for an adapter of embeddings. ProblemError if `base` is missing,
    not needed, or not what the adapter was made for."""
    if adapter.of_embeddings:
        if base is not None:
            raise ProblemError("an adapter of embeddings needs no checkpoint (--base)")
        return torch.eye(adapter.right.shape[1]), None
    if base is None:
        raise ProblemError(
            "this adapter changes a text projection: name its checkpoint (--base); or for an index "
            "make one of embeddings (clip-forget forget --embeddings)"
        )
    return read_projection(base, adapter)


def index_edit(
    adapter: Adapter, projection: Tensor | None = None, bias: Tensor | None = None
) -> IndexEdit:
    """What an adapter does to an index of images. `projection`: the original W (w, d) of an adapter
    of a text projection, and its bias (d,); None for one of embeddings, whose W is the identity.
    ProblemError for a W that is missing, another or without full row rank; for a bias b, which adds
    -b W^+ Delta y^T to the scores of an image y, as no vector can; and for an M nearly singular.
    """
    if not isinstance(adapter, Adapter):
        raise ProblemError(f"an adapter (answer.adapter), not {shown(adapter)}")
    left, right = adapter.left.double().cpu(), adapter.right.double().cpu()
    limit, instead = RESTORABLE, "choose another target or beta"
    if not adapter.of_embeddings:
        limit, instead = STRETCHED, OF_EMBEDDINGS
        if projection is None:
            raise ProblemError(f"this adapter changes a text projection: {OF_EMBEDDINGS}")
        if bias is not None or (adapter.model is not None and adapter.model.bias is not None):
            raise ProblemError(f"the projection has a bias, which an index lacks: {OF_EMBEDDINGS}")
        adapter.apply(projection)  # refuses another projection
        left = _inverse(projection, left, OF_EMBEDDINGS)[1]
    both = torch.linalg.qr(torch.cat([left, right.T], dim=1))[0]  # M is the identity beside these
    change = (both.T @ left) @ (right @ both)  # (2r, 2r)
    values = torch.linalg.svdvals(torch.eye(len(change)).double() + change)
    condition = max(1.0, float(values[0])) / min(1.0, float(values[-1]) or math.ulp(0.0))
    if condition > limit:
        raise ProblemError(
            f"this change stretches images {condition:.3g} times as much in one direction as in "
            f"another, and would ruin an index: {instead}"
        )
    u, sizes, v = torch.linalg.svd(change)  # factors of one size round least
    rank = left.shape[1]
    scale = sizes[:rank].sqrt()
    return IndexEdit(both @ v[:rank].T * scale, (both @ u[:, :rank] * scale).T, condition)


def hide_in_index(
    vectors: Vectors,
    adapter: Adapter,
    projection: Tensor | None = None,
    normalised: bool = True,
) -> Vectors:
    """Vectors of images (n, d) in which no text finds what was forgotten, a tensor or an array as
    they came; see `IndexEdit` and `index_edit` for the arguments and what is refused. Whether they
    are changed already cannot be seen in them: `clip-forget index` keeps account of that."""
    return index_edit(adapter, projection)(vectors, normalised)


def restore_index(
    vectors: Vectors,
    adapter: Adapter,
    projection: Tensor | None = None,
    normalised: bool = True,
) -> Vectors:
    """The vectors that `hide_in_index` was given, to `IndexEdit.restored_to` of their dtype."""
    return index_edit(adapter, projection).inverse(vectors, normalised)


def _refuse(wrong: Tensor, message: str, start: int = 0) -> None:
    if wrong.any():
        raise ProblemError(f"row {start + int(wrong.nonzero()[0])} {message}")


def patch_file(
    path: str | Path,
    out: str | Path,
    projection: Tensor,
    adapter: Adapter,
    key: str | None = None,
    bias: Tensor | None = None,
    normalised: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Patch the embeddings in a file, see `patch`; `out` is a new one of the same kind.

    Args:
        path: `.npy`, or `.safetensors`, of which `key` names the tensor, all others are kept, and
            the metadata say that it was patched, so that it is refused another time.

    Returns:
        `rows`, the `condition` of W, and `error`: by how much an embedding may be off.
    """
    path, out = Path(path), Path(out)
    if path.suffix not in (".npy", ".safetensors") or out.suffix != path.suffix:
        raise ProblemError(f"{line(path)} and {line(out)} must both end in .npy or in .safetensors")
    adapter.apply(projection)  # refuses another projection
    with atomic_path(out, overwrite) as temporary, naming(path):
        if path.suffix == ".npy":
            with foreign("not a readable .npy file of numbers"):
                array = np.load(io.BytesIO(read_bytes(path)), allow_pickle=False)
                name, metadata, tensors = key, {}, {None: torch.from_numpy(array)}
        else:
            metadata, tensors = read_safetensors(path)
            name = next(iter(tensors)) if key is None and len(tensors) == 1 else key
        if PATCHED in metadata:
            raise ProblemError("was patched already: patch what the original model gave")
        if name not in tensors:
            held = ", ".join(map(shown, sorted(tensors)))
            raise ProblemError(f"name the tensor to patch (--key), one of: {held}")
        change = projection, adapter.left, adapter.right
        done, error = patch(tensors[name], *change, bias, normalised)
        if path.suffix == ".npy":
            np.save(temporary, done.numpy(), allow_pickle=False)
        else:
            metadata |= {PATCHED: ", ".join(adapter.classes)}
            temporary.write_bytes(container(tensors | {name: done}, metadata))
    return {"rows": len(done), "condition": condition(projection), "error": error}
