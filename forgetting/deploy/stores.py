"""Files of cached text embeddings, patched: what each kind holds, and the command for it.

A patch starts from what the original model gave, so a file must not be patched twice. A kind that
has a place for it says what was done to it; of others a small file beside it does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from forgetting.adapter import Adapter, load_adapter
from forgetting.checks import HASH, check
from forgetting.deploy.embeddings import Patch
from forgetting.errors import ProblemError, line, shown
from forgetting.io import (
    atomic_path,
    container,
    digest,
    naming,
    need,
    refuse_existing,
    write_bytes,
)
from forgetting.models.checkpoint import read_projection

UNREADABLE = (OSError, SafetensorError, ValueError, TypeError, RuntimeError, AttributeError)

PATCHED = "clip-forget-patched"  # the key, in files that can say so, of what was done to them


def patch_file(
    path: str | Path,
    out: str | Path,
    projection: Tensor,
    change: Adapter,
    key: str | None = None,
    bias: Tensor | None = None,
    normalised: bool = True,
) -> dict[str, Any]:
    """Patch the embeddings in a file; `out` is a new one of the same kind.

    Args:
        path: `.npy`; `.safetensors`, `.pt` or `.pth` (a tensor, or a dictionary of which `key` is
            one); `.parquet`, of which `key` is a column of lists of numbers. Everything else that
            the file holds is kept. Files of the last kind need pyarrow.
        out: `.npy`, `.pt` and `.pth` cannot say that they were patched, so `OUT.patched.json` says
            it of them.
        projection: the original W (w, d), which must be the one that `change` was made for.
        normalised: whether the embeddings are of unit norm.

    Returns:
        `rows`, `dtype`, the `condition` of W, and `error`: by how much an embedding may be off.

    Raises:
        ProblemError: `out` exists; a file that cannot be read, or was patched already, as it or the
            file beside it says; another projection; see also `Patch` and `Patch.apply`.
    """
    path, out = Path(path), Path(out)
    refuse_existing(out)
    kind = path.suffix.lower()
    if kind not in KINDS or out.suffix.lower() != kind:
        wanted = f"{line(out)} must end in {kind} too" if kind in KINDS else line(path)
        raise ProblemError(f"{wanted}: embeddings are read from and written to {', '.join(KINDS)}")
    change.apply(projection)  # refuses another projection
    patcher, report = Patch(projection, change.left, change.right, bias), {}

    def work(embeddings: Tensor) -> Tensor:
        done, error = patcher.apply(embeddings, normalised)
        dtype = str(done.dtype).removeprefix("torch.")
        report.update(rows=len(done), dtype=dtype, condition=patcher.condition, error=error)
        return done

    silent, mark = kind in SILENT, _mark(change)
    if silent:
        refuse_existing(_beside(out))
    with naming(path):
        if not path.is_file():
            raise ProblemError("no such file")
        if silent:
            _unmarked(_said_beside(path), mark)
        KINDS[kind](path, out, key, work, mark)
    if silent:
        said = json.dumps({"sha256": _file_sha256(out), PATCHED: mark})
        write_bytes(said.encode(), _beside(out), overwrite=False)
    return report


def _mark(change: Adapter) -> str:
    """What names a change in a file that it was applied to."""
    return digest({}, {"left": change.left.cpu().float(), "right": change.right.cpu().float()})


Work = Callable[[Tensor], Tensor]


def _npy(path: Path, out: Path, key: str | None, work: Work, mark: str) -> None:
    numpy = need("numpy")
    if key is not None:
        raise ProblemError("a .npy file holds one array: leave the key out")
    try:
        array = numpy.load(path, allow_pickle=False)
        rows = torch.from_numpy(array)
    except (*UNREADABLE, EOFError) as error:
        raise ProblemError(f"not a readable .npy file of numbers ({line(error)})") from error
    done = work(rows).numpy()
    with atomic_path(out, overwrite=False) as temporary, open(temporary, "wb") as file:
        numpy.save(file, done, allow_pickle=False)


def _safetensors(path: Path, out: Path, key: str | None, work: Work, mark: str) -> None:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except UNREADABLE as error:
        raise ProblemError(f"not a readable safetensors file ({line(error)})") from error
    marks = _unmarked(metadata.get(PATCHED, ""), mark)
    name = _one_of(tensors, key)
    tensors[name] = work(tensors[name])
    with atomic_path(out, overwrite=False) as temporary:
        temporary.write_bytes(container(tensors, metadata | {PATCHED: marks}))


def _pt(path: Path, out: Path, key: str | None, work: Work, mark: str) -> None:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader raises whatever foreign bytes lead it to
        reason = line(str(error).partition("\n")[0])
        raise ProblemError(
            f"cannot be read as tensors without running code from it ({reason})"
        ) from error
    if isinstance(held, Tensor):
        if key is not None:
            raise ProblemError("the file holds one tensor: leave the key out")
        held = work(held)
    else:
        held = dict(held) if isinstance(held, dict) else {}
        name = _one_of({k: v for k, v in held.items() if isinstance(v, Tensor)}, key)
        held[name] = work(held[name])
    with atomic_path(out, overwrite=False) as temporary, open(temporary, "wb") as file:
        torch.save(held, file)


def _parquet(path: Path, out: Path, key: str | None, work: Work, mark: str) -> None:
    arrow, parquet = need("pyarrow"), need("pyarrow.parquet", "pyarrow")
    compute = need("pyarrow.compute", "pyarrow")
    try:
        table = parquet.read_table(path, memory_map=True)
    except (*UNREADABLE, arrow.ArrowException) as error:
        raise ProblemError(f"not a readable parquet file ({line(error)})") from error
    metadata = {k: v for k, v in (table.schema.metadata or {}).items() if isinstance(k, bytes)}
    marks = _unmarked(metadata.get(PATCHED.encode(), b"").decode(), mark)
    types = arrow.types
    lists = {
        name: i
        for i, name in enumerate(table.column_names)
        if (kind := table.schema.types[i]) is not None
        and (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))
        and types.is_floating(kind.value_type)
    }
    name = _one_of(lists, key, "column of lists of numbers")
    place = lists[name]
    column, field = table.column(place).combine_chunks(), table.schema.field(place)
    flat = column.flatten()
    lengths = set(compute.list_value_length(column).unique().to_pylist())
    if column.null_count or flat.null_count or len(lengths) != 1:
        raise ProblemError(
            f"column {shown(name)} has rows without an embedding, or of another length"
        )
    (d,) = lengths
    done = work(torch.tensor(flat.to_numpy(zero_copy_only=False)).reshape(-1, d))
    values = arrow.array(done.numpy().reshape(-1), type=field.type.value_type)
    if types.is_fixed_size_list(field.type):
        column = arrow.FixedSizeListArray.from_arrays(values, type=field.type)
    else:
        form = arrow.LargeListArray if types.is_large_list(field.type) else arrow.ListArray
        offsets = arrow.array(
            range(0, len(values) + 1, d),
            type=arrow.int64() if form is arrow.LargeListArray else arrow.int32(),
        )
        column = form.from_arrays(offsets, values, type=field.type)
    table = table.set_column(place, field, column)
    table = table.replace_schema_metadata(metadata | {PATCHED.encode(): marks.encode()})
    with atomic_path(out, overwrite=False) as temporary:
        parquet.write_table(table, temporary)


KINDS = {
    ".npy": _npy,
    ".safetensors": _safetensors,
    ".pt": _pt,
    ".pth": _pt,
    ".parquet": _parquet,
}
SILENT = (".npy", ".pt", ".pth")  # kinds that have no place for a mark


def _beside(path: Path) -> Path:
    """The file that says of a file of a `SILENT` kind that it was patched."""
    return path.with_name(f"{path.name}.patched.json")


def _said_beside(path: Path) -> str:
    """The mark of a file by the one beside it; "" if there is none, or it is of other contents."""
    beside = _beside(path)
    if not beside.is_file():
        return ""
    try:
        found = json.loads(beside.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ProblemError(f"{line(beside.name)} cannot be read ({line(error)})") from error
    check(found, {"sha256": HASH, PATCHED: HASH}, line(beside.name))
    return found[PATCHED] if found["sha256"] == _file_sha256(path) else ""


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unmarked(marks: str, mark: str) -> str:
    """The marks of a file with one more; ProblemError if it was there."""
    if marks:
        same = "this change" if mark in marks.split() else "another change"
        raise ProblemError(
            f"was patched already, by {same}: a patch starts from what the original model gave"
        )
    return mark


def _one_of(held: dict[Any, Any], key: str | None, what: str = "tensor") -> Any:
    """The name to work on: `key`, or the only one."""
    names = ", ".join(map(shown, held)) or "none"
    if key is None and len(held) == 1:
        return next(iter(held))
    if key is None:
        raise ProblemError(f"name the {what} to patch (--key), one of: {names}")
    if key not in held:
        raise ProblemError(f"no {what} is called {shown(key)}; there is: {names}")
    return key


def add_patch(parser: argparse.ArgumentParser) -> None:
    """The arguments of `clip-forget patch`."""
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter file of what was forgotten")
    parser.add_argument("embeddings", metavar="FILE", help=f"cached texts: {', '.join(KINDS)}")
    parser.add_argument("--base", required=True, help="the original checkpoint, file or folder")
    parser.add_argument("--out", required=True, help="file to write; must not exist")
    parser.add_argument("--key", help="tensor or column, where the file holds several")
    parser.add_argument(
        "--unnormalised",
        action="store_true",
        help="the embeddings are as the projection gave them, not of length 1",
    )


def run_patch(args: argparse.Namespace) -> str:
    """`clip-forget patch`: what to say of it, in one line."""
    refuse_existing(args.out)
    adapter = load_adapter(args.adapter)
    projection, bias = read_projection(args.base, adapter)
    report = patch_file(
        args.embeddings, args.out, projection, adapter, args.key, bias, not args.unnormalised
    )
    return (
        f"{line(args.out)}: {report['rows']} {report['dtype']} embeddings patched; condition of "
        f"the projection {report['condition']:.3g}, each right to {report['error']:.1e}"
    )
