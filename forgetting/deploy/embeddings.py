"""Cached text embeddings, changed as the projection was, without the model.

An embedding is `x = h W`, or `x = h W + b`; what is cached is `e = x / |x|`. After the change it is
`x' = h (W + Delta)`, so what has to be known of h is `h Delta`.

**When x determines it.** x determines `h Delta` for every h exactly if whatever W sends to 0, Delta
sends to 0: the left null space of W must lie in that of Delta. For every Delta that holds exactly
if W (w, d) has full row rank, `rank W = w <= d`. (Full column rank does not help: with w > d every
W has a left null space.) Then `W W^+ = I`, so `h = x W^+` and

    x' = x + h Delta = x (I + W^+ Delta) =: x M

A positive factor passes through M, so `e' = normalise(e M)` is exact for unit-norm embeddings. Of a
W without full row rank the condition may still hold for a particular Delta; in the float32 in which
changes are stored that look like one that nearly holds, so such a W is refused.

**With a bias** `x' = (x - b) M + b`. A unit-norm embedding is x over an unknown length, so `x - b`
is not known: such embeddings can only be patched before they are normalised.

**How exact.** Rounding an embedding by `u` (half the machine epsilon of its dtype) moves x' by at
most `u |M|`, and `|M| <= 1 + condition(W) |Delta| / |W|` (largest singular values). The arithmetic
is float64; its error grows with the condition of W, and is what counts where M is nearly 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import normalize

from forgetting.adapter import Adapter
from forgetting.errors import ProblemError, line, shown
from forgetting.io import (
    FLOATS,
    atomic_path,
    container,
    matrix,
    naming,
    need,
    refuse_existing,
    tensor,
)

CHUNK = 65536  # rows that are in float64 at one time
UNIT = 1e-2  # how far from 1 the length of a unit-norm embedding may be: float16 sums are rough
INSIDE = 2e-2  # the part of an embedding that may lie outside of W's rows, for the same reason
UNCERTAIN = 0.1  # a direction that rounding may turn by more than this is no answer
PATCHED = "clip-forget-patched"  # the metadata entry of a patched file: by which adapter


def condition(projection: Tensor) -> float:
    """Largest over smallest singular value of W (w, d); infinite without full row rank.

    The rank is judged in float32, in which projections are stored: a singular value below four
    machine epsilons of the largest one counts as 0 (rounding a matrix that lacks a rank leaves
    1e-8). numpy's rule, `max(w, d)` epsilons, comes near to refusing real models: the condition
    of OpenAI's ViT-B/16 is 6,391.
    """
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


class Patch:
    """The map from embeddings to embeddings that a change of one projection means.

    Args:
        projection: W (w, d), the original one, of full row rank.
        left, right: (w, r) and (r, d), `Delta = left @ right`.
        bias: (d,) of a projection that has one.

    Attributes:
        condition: of W; norm: the largest singular value of M, by which errors grow at most;
            arithmetic: how far float64 may be off, relative to an embedding's length.

    Raises:
        ProblemError: shapes that do not fit, values that are not finite, a W without full row rank.
    """

    def __init__(
        self, projection: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None
    ) -> None:
        w, d = matrix("projection", projection).shape
        left = matrix("left", left, count=w).double().cpu()
        right = matrix("right", right, d, left.shape[1]).double().cpu()
        self.condition = condition(projection)
        if math.isinf(self.condition):
            why = f"w = {w} > d = {d}" if w > d else f"its rank is less than w = {w}"
            raise ProblemError(
                f"the projection has no full row rank ({why}), so embeddings do not determine how "
                "they change: encode the texts again with the changed model"
            )
        # W^T = Q R, so W^+ left = Q R^-T left; Q (d, w) is an orthonormal basis of W's rows.
        self._rows, triangle = torch.linalg.qr(projection.detach().double().cpu().T)
        inner = torch.linalg.solve_triangular(triangle.T, left, upper=False)
        self._left, self._right = self._rows @ inner, right  # (d, r), (r, d)
        eye, eps = torch.eye(d, dtype=torch.float64), torch.finfo(torch.float64).eps
        self.norm = float(torch.linalg.matrix_norm(eye + self._left @ self._right, 2))
        size = float(self._left.norm() * right.norm())
        self.arithmetic = 8 * eps * (1 + self.condition * size) * math.sqrt(d)
        self._bias = None if bias is None else tensor("bias", bias, FLOATS, (d,)).double().cpu()

    def apply(self, embeddings: Tensor, normalised: bool = True) -> tuple[Tensor, float]:
        """Patch a matrix of embeddings.

        Args:
            embeddings: (n, d), of unit norm if `normalised`; else as the projection gave them.

        Returns:
            The patched ones, likewise, in the same dtype and on the same device; and by how much
            any of them may be wrong, relative to its length, since the cached ones were rounded.

        Raises:
            ProblemError: another shape; not of unit norm; not within the rows of W, where w < d
                (image embeddings, or another model's); unit norm and a bias; a text of which so
                little is left that rounding decides its direction.
        """
        embeddings = tensor("embeddings", embeddings, FLOATS, (None, self._right.shape[1]))
        done, worst = torch.empty_like(embeddings), 0.0
        for start in range(0, len(embeddings), CHUNK):
            rows = embeddings[start : start + CHUNK].double().cpu()
            patched, error = self._chunk(rows, normalised, start, embeddings.dtype)
            done[start : start + CHUNK] = patched.to(done)
            worst = max(worst, error)
        return done, worst

    def _chunk(
        self, rows: Tensor, normalised: bool, start: int, dtype: torch.dtype
    ) -> tuple[Tensor, float]:
        """`apply` for some rows (n, d) float64, the first of which is row `start`."""

        def refuse(wrong: Tensor, message: str, values: Tensor) -> None:
            if wrong.any():
                i = int(wrong.nonzero()[0])
                raise ProblemError(f"row {start + i} {message.format(float(values[i]))}")

        sizes = rows.norm(dim=1)
        far = (sizes - 1).abs() > UNIT
        if self._bias is not None and (normalised or not far.any()):
            raise ProblemError(
                "this projection has a bias, and a unit-norm embedding does not tell how much of "
                "it the bias is: patch embeddings that are not normalised, or encode again"
            )
        if normalised:
            not_unit = (
                "has the length {:.3g}, not 1: pass one embedding a row, and say so if they are "
                "not normalised (normalised=False, --unnormalised)"
            )
            refuse(far, not_unit, sizes)
        x = rows if self._bias is None else rows - self._bias
        outside = (x - x @ self._rows @ self._rows.T).norm(dim=1)
        foreign = (
            "is no text embedding of this projection: {:.2g} of it lies outside of what the "
            "projection can give (an image's, another model's, or patched already)"
        )
        refuse(outside > INSIDE * sizes, foreign, outside)
        x = x + (x @ self._left) @ self._right  # (n, d) @ (d, r) @ (r, d) -> (n, d)
        x = x if self._bias is None else x + self._bias
        unit, left = rounding(dtype, rows.shape[1]), x.norm(dim=1)
        moved = (unit * self.norm + self.arithmetic) * sizes
        # |a/|a| - b/|b|| <= 2 |a - b| / (|a| + |b|), with |b| >= |a| - |a - b|
        error = torch.where(2 * left > moved, 2 * moved / (2 * left - moved), math.inf) + unit
        error = error.where(sizes > 0, unit)  # nothing stays nothing
        if normalised:
            lost = (
                "keeps only {:.1e} of its length, so that rounding would decide its direction: "
                "take this text out of the cache, or encode it again"
            )
            refuse(error > UNCERTAIN, lost, left)
        return (normalize(x, dim=1) if normalised else x), float(error.max())


def patch(
    embeddings: Any,
    projection: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    normalised: bool = True,
) -> Any:
    """Text embeddings as they are after `W' = W + left @ right`: `normalise(e (I + W^+ Delta))`.

    Args:
        embeddings: (..., d), a torch tensor or a numpy array, of unit norm if `normalised`.
        projection: the original W (w, d); bias: (d,) if the projection has one.
        left, right: (w, r) and (r, d).

    Returns:
        The same kind of thing, shape and dtype; the arithmetic is float64.

    Raises:
        ProblemError: see `Patch` and `Patch.apply`.
    """
    given = isinstance(embeddings, Tensor) or not hasattr(embeddings, "__array__")
    try:
        rows = embeddings if given else torch.tensor(embeddings)
    except (TypeError, ValueError, RuntimeError) as error:  # an array of texts, say
        raise ProblemError(f"embeddings hold no numbers ({line(error)})") from error
    shape = rows.shape if isinstance(rows, Tensor) else ()
    if len(shape) != 2 and shape:
        rows = rows.reshape(math.prod(shape[:-1]), shape[-1])  # -1 is ambiguous for none
    done = Patch(projection, left, right, bias).apply(rows, normalised)[0].reshape(shape)
    return done if given else done.numpy()


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
    """Patch the embeddings in a file; `out` is a new one of the same kind.

    Args:
        path: `.npy`; `.safetensors`, of which `key` is a tensor; `.parquet` (needs pyarrow), of
            which `key` is a column of lists of numbers. Everything else in the file is kept. A
            `.npy` file has no place to say that it was patched.
        projection: the original W (w, d), which must be the one that `adapter` was made for.
        normalised: whether the embeddings are of unit norm.
        overwrite: whether `out` may be replaced.

    Returns:
        `rows`, `dtype`, the `condition` of W, and `error`: by how much an embedding may be off.

    Raises:
        ProblemError: `out` exists; a file that cannot be read, or says that it was patched already;
            another projection; see also `Patch` and `Patch.apply`.
    """
    path, out = Path(path), Path(out)
    refuse_existing(out, overwrite)
    kind = path.suffix.lower()
    if kind not in KINDS or out.suffix.lower() != kind:
        wanted = f"{line(out)} must end in {kind} too" if kind in KINDS else line(path)
        raise ProblemError(f"{wanted}: embeddings are read from and written to {', '.join(KINDS)}")
    adapter.apply(projection)  # refuses another projection
    patcher = Patch(projection, adapter.left, adapter.right, bias)
    with naming(path):
        if not path.is_file():
            raise ProblemError("no such file")
        rows, write = KINDS[kind](path, key, ", ".join(adapter.classes))
        done, error = patcher.apply(rows, normalised)
        with atomic_path(out, overwrite) as temporary:
            write(done, temporary)
    dtype = str(done.dtype).removeprefix("torch.")
    return {"rows": len(done), "dtype": dtype, "condition": patcher.condition, "error": error}


Write = Callable[[Tensor, Path], object]  # of what was patched, to a place


def _npy(path: Path, key: str | None, mark: str) -> tuple[Tensor, Write]:
    if key is not None:
        raise ProblemError("a .npy file holds one array: leave the key out")
    try:
        rows = torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, TypeError, EOFError, SyntaxError) as error:
        raise ProblemError(f"not a readable .npy file of numbers ({line(error)})") from error
    return rows, lambda done, out: np.save(out, done.numpy(), allow_pickle=False)


def _safetensors(path: Path, key: str | None, mark: str) -> tuple[Tensor, Write]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise ProblemError(f"not a readable safetensors file ({line(error)})") from error
    _refuse_patched(metadata)
    name = _one_of(list(tensors), key, "tensor")

    def write(done: Tensor, out: Path) -> None:
        data = container(tensors | {name: done}, metadata | {PATCHED: mark})
        out.write_bytes(data)

    return tensors[name], write


def _parquet(path: Path, key: str | None, mark: str) -> tuple[Tensor, Write]:
    arrow, parquet = need("pyarrow"), need("pyarrow.parquet", "pyarrow")
    compute, types = need("pyarrow.compute", "pyarrow"), arrow.types
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError, TypeError, arrow.ArrowException) as error:
        raise ProblemError(f"not a readable parquet file ({line(error)})") from error
    metadata = {k.decode(): v for k, v in (table.schema.metadata or {}).items()}
    _refuse_patched(metadata)
    lists = [
        field.name
        for field in table.schema
        if (types.is_list(field.type) or types.is_large_list(field.type)
            or types.is_fixed_size_list(field.type))
        and types.is_floating(field.type.value_type)
    ]  # fmt: skip
    name = _one_of(lists, key, "column of lists of numbers")
    place = table.column_names.index(name)
    column, field = table.column(place).combine_chunks(), table.schema.field(place)
    flat = column.flatten()
    lengths = set(compute.list_value_length(column).unique().to_pylist())
    if column.null_count or flat.null_count or len(lengths) != 1:
        raise ProblemError(
            f"column {shown(name)} has rows without an embedding, or of another length"
        )
    rows = torch.tensor(flat.to_numpy(zero_copy_only=False)).reshape(len(column), lengths.pop())

    def write(done: Tensor, out: Path) -> None:
        changed = table.set_column(place, field, arrow.array(list(done.numpy()), type=field.type))
        parquet.write_table(changed.replace_schema_metadata(metadata | {PATCHED: mark}), out)

    return rows, write


KINDS = {".npy": _npy, ".safetensors": _safetensors, ".parquet": _parquet}


def _refuse_patched(metadata: dict[str, Any]) -> None:
    if PATCHED in metadata:
        raise ProblemError("was patched already: a patch starts from what the original model gave")


def _one_of(held: list[str], key: str | None, what: str) -> str:
    """The name to work on: `key`, or the only one."""
    names = ", ".join(map(shown, held)) or "none"
    if key is None and len(held) == 1:
        return held[0]
    if key is None:
        raise ProblemError(f"name the {what} to patch (--key), one of: {names}")
    if key not in held:
        raise ProblemError(f"no {what} is called {shown(key)}; there is: {names}")
    return key
