"""Hide and restore images where their vectors are: files, FAISS, Qdrant, PostgreSQL.

A kind of store is one function. It reads batches, always in the same order, and says which rows are
hidden; `Pass` changes the others, and the store writes them. A mark says what is hidden, and by
which adapter. It is about a content, not a place: about a file with this checksum, or a row with
this vector. So it is written before what it is about, or with it; one that is too early or too late
is about nothing, and a run that was killed is continued by running it again.
"""

import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from forgetting.adapter import Adapter
from forgetting.api import one_thread
from forgetting.deploy.databases import INSTALL, postgres, qdrant
from forgetting.deploy.embeddings import ARRAYS, IndexEdit, index_edit
from forgetting.errors import ProblemError, line, number, unknown
from forgetting.io import atomic_path, digest, foreign, naming, need, refuse_existing, write_bytes

LOSS = 0.05  # of a vector's length: what is restored no better is not hidden
FLAT = ("IndexFlat", "IndexFlatIP", "IndexFlatL2")


def checksum(vectors: np.ndarray, before: int = 0) -> int:
    """CRC-32 of each vector's sum of its numbers as integers, after that of `before`."""
    sums = vectors.view(f"u{vectors.itemsize}").sum(axis=1, dtype=np.uint64)
    return zlib.crc32(sums.data, before)


@dataclass
class Pass:
    """One pass over a store: what it does with each batch, and what it counted."""

    edit: IndexEdit = field(repr=False)
    hide: bool
    normalised: bool
    dry: bool
    size: int | None
    mark: str  # the adapter's digest, whether vectors are normalised, and what is forgotten
    bar: tqdm = field(repr=False)
    where: str = ""  # where the result is
    rows: int = 0
    changed: int = 0
    before: int = 0  # checksum of all vectors
    after: int = 0
    error: float = 0.0  # by how much of its length a restored vector may be off
    length: float = 0.0  # how far from 1 a vector's length is, which is lost

    def begin(self, where: str, rows: int, size: int, dtype: str) -> int:
        """Say what is changed, and its dtype; returns how many rows to read at once, `size` if
        nobody said. ProblemError for what could not be restored."""
        self.where, self.error = line(where), self.edit.restored_to(getattr(torch, dtype))
        if self.hide and self.error > LOSS:
            raise ProblemError(
                f"{self.where} is of {dtype}, and restoring it would be off by {self.error:.0%}: "
                "hide in vectors of float32, or choose another target or beta"
            )
        self.bar.reset(total=rows)
        return number("batch", self.size or size, low=1, whole=True)

    def __call__(self, vectors: np.ndarray, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The vectors (n, d) as they are to be, and which rows (k,) are others now. `hidden` (n,)
        says which are hidden already."""
        self.before = checksum(vectors, self.before)
        if self.normalised:
            wide = np.promote_types(vectors.dtype, np.float32)
            sizes = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=wide))
            far = np.abs(sizes[sizes > 0] - 1).max(initial=0)
            self.length = max(self.length, float(far))
        rows, made = np.flatnonzero(hidden != self.hide), vectors
        with naming(f"{self.where}, after row {self.rows}"):
            if len(rows) == len(vectors):
                made = self.edit(vectors, self.normalised)
            elif len(rows):
                made = vectors.copy()
                made[rows] = self.edit(vectors[rows], self.normalised)
        self.after = checksum(made, self.after)
        rows = np.flatnonzero((made != vectors).any(axis=1))
        self.rows += len(vectors)
        self.changed += len(rows)
        self.bar.update(len(vectors))
        return made, rows

    def whole(self, vectors: np.ndarray) -> np.ndarray:
        """The same of a file, in which all rows are hidden or none is."""
        return self(vectors, np.full(len(vectors), not self.hide))[0]

    def check(self, where: str, mark: str) -> None:
        """ProblemError if rows have another mark."""
        if mark != self.mark:
            raise ProblemError(
                f"{line(where)} is hidden by adapter {line(mark)}, this one is {line(self.mark)}: "
                "restore with that one first; to hide what both forget, compose them"
            )


def change_store(
    adapter: Adapter,
    store: str | Path,
    hide: bool,
    projection: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    normalised: bool = True,
    batch: int | None = None,
    dry_run: bool = False,
    progress: bool = True,
    **options: Any,
) -> Pass:
    """Hide what an adapter forgets in a store of image vectors, or restore it.

    Args:
        store: `*.npy`, `*.parquet`, `*.faiss` or `*.index`, of which a new file is made; or
            `qdrant:FOLDER`, `qdrant:http://HOST:6333` or `postgresql://...`, changed in place.
        hide: False to restore; projection, bias: see `index_edit`.
        normalised: whether vectors are, and stay, of length 1.
        batch: rows at once; dry_run: read and compute, and change nothing.
        options: `out` and `overwrite` of files; `column` of parquet; `collection` and `vector` (its
            name, if it has one) of Qdrant; `table`, `column` and `key` of PostgreSQL.

    Raises:
        ProblemError: a store that cannot be read, or holds no plain vectors; one that is hidden by
            another adapter; see also `index_edit`.
    """
    store, edit = str(store), index_edit(adapter, projection, bias)
    kind = next((k for k in STORES if store.startswith(k) or store.endswith(k)), None)
    if kind is None:
        raise unknown("kind of store", store, STORES)
    given = {option: value for option, value in options.items() if value}
    takes = list(signature(STORES[kind]).parameters.values())[2:]
    for option in sorted({x.name for x in takes if x.default is x.empty} - given.keys()):
        raise ProblemError(f"a store {kind} needs --{option}")
    for option in sorted(given.keys() - {x.name for x in takes}):
        raise ProblemError(f"a store {kind} takes no --{option}")
    factors = {"left": adapter.left.float(), "right": adapter.right.float()}
    mark = digest({"projection": adapter.projection_sha256}, factors)[:32]
    mark += "" if normalised else "-unnormalised"
    mark += f" ({shorten(', '.join(adapter.classes), 60)})"
    with one_thread(), tqdm(unit="row", disable=not progress, leave=False, delay=0.5) as bar:
        run = Pass(edit if hide else edit.inverse, hide, normalised, dry_run, batch, mark, bar)
        STORES[kind](store, run, **given)
    run.error += run.length
    return run


def _marks(path: str) -> tuple[Path, dict[str, str | None]]:
    """The file of marks beside a file, and what it says: of the content with a checksum, by which
    adapter it is hidden; None where it is not."""
    marks = Path(f"{os.path.realpath(path)}.hidden.json")
    with naming(marks), foreign("not readable"):
        known = json.loads(marks.read_bytes()) if marks.exists() else {}
        if type(known) is not dict or not all(isinstance(x, str | None) for x in known.values()):
            raise ProblemError("no marks of clip-forget index")
    return marks, known


@contextmanager
def _new_file(path: str, run: Pass, out: str | None, overwrite: bool) -> Iterator[Path]:
    """Where to write the file that becomes `out`."""
    if not Path(path).is_file():
        raise ProblemError(f"no such file {line(path)}")
    marks, known = _marks(path)
    if not run.hide and not known:
        raise ProblemError(f"{line(marks)} is missing: put it back, or use restore_index")
    opened = nullcontext(Path(os.devnull))
    if not run.dry:
        if out is None or Path(out).suffix != Path(path).suffix:
            raise ProblemError(f"name the new file (--out), {Path(path).suffix} as this one is")
        refuse_existing(out, overwrite)
        opened, (_, replaced) = atomic_path(out, overwrite), _marks(out)
    with foreign(f"{line(path)} cannot be changed"), opened as temporary:
        yield temporary
        before, after = (f"{x:08x}" for x in (run.before, run.after))
        if known and before not in known:
            raise ProblemError(
                f"{line(path)} was changed since it was hidden; if it was made anew, and none of "
                f"it is hidden, remove {line(marks)}"
            )
        mark = known.get(before)
        for record in () if known else marks.parent.glob("*.hidden.json"):  # of what was copied
            mark = mark or _marks(str(record).removesuffix(".hidden.json"))[1].get(before)
        if mark:
            run.check(path, mark)
        if run.hide == bool(mark):
            raise ProblemError(f"{line(marks)} says that it is {'' if mark else 'not '}hidden")
        run.where = line(path if run.dry else out)
        if not run.dry:
            replaced |= {before: mark, after: run.mark if run.hide else None}
            write_bytes(json.dumps(replaced).encode(), f"{out}.hidden.json")
    if not run.hide and not run.dry:
        Path(f"{out}.hidden.json").unlink(missing_ok=True)


def _npy(path: str, run: Pass, out: str | None = None, overwrite: bool = False) -> None:
    """A `.npy` file (n, d), memory-mapped."""
    with _new_file(path, run, out, overwrite) as temporary, open(temporary, "wb") as file:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.ndim != 2 or array.dtype not in ARRAYS:
            found = f"{array.shape} of {array.dtype.str}"
            raise ProblemError(
                f"{line(path)} must hold (n, d) of this machine's floats, not {found}"
            )
        header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
        np.lib.format.write_array_header_1_0(file, header)
        size = run.begin(path, len(array), 1024, array.dtype.name)
        with ThreadPoolExecutor(1) as pool:  # writes while the next rows are computed
            written = pool.submit(int)
            for start in range(0, len(array), size):
                changed = run.whole(np.ascontiguousarray(array[start : start + size]))
                written.result()
                written = pool.submit(file.write, changed.data)
            written.result()


def _parquet(
    path: str, run: Pass, out: str | None = None, overwrite: bool = False, column: str = ""
) -> None:
    """A column of lists of numbers; all others, and the schema, are kept."""
    arrow, parquet = need("pyarrow", INSTALL), need("pyarrow.parquet", INSTALL)
    lists = (arrow.ListType, arrow.LargeListType, arrow.FixedSizeListType)
    with _new_file(path, run, out, overwrite) as new, parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        fields = [field for field in schema if isinstance(field.type, lists)]
        names = [x.name for x in fields if arrow.types.is_floating(x.type.value_type)]
        column = names[0] if not column and len(names) == 1 else column
        if column not in names:
            raise unknown("column of vectors (--column)", column, names)
        at, kind = schema.get_field_index(column), schema.field(column).type
        codec = file.metadata.row_group(0).column(0).compression if file.num_row_groups else "NONE"
        codec = codec.replace("UNCOMPRESSED", "NONE")
        dtype = np.dtype(kind.value_type.to_pandas_dtype()).name
        size = run.begin(path, file.metadata.num_rows, 8192, dtype)
        with parquet.ParquetWriter(new, schema, compression=codec) as writer:
            for batch in file.iter_batches(size):
                values = batch.column(at)
                if len(values.value_lengths().unique()) > 1:
                    raise ProblemError(f"{column}: rows without a vector, or of several sizes")
                vectors = values.flatten().to_numpy(zero_copy_only=False)
                made = arrow.array(list(run.whole(vectors.reshape(len(batch), -1))), type=kind)
                writer.write_batch(batch.set_column(at, schema.field(at), made))


def _faiss(path: str, run: Pass, out: str | None = None, overwrite: bool = False) -> None:
    """Flat, with ids or without, and IVF-flat. Vectors are added anew, and go to the lists of the
    centroids that are there, so that a search finds them where it looks."""
    faiss = need("faiss", INSTALL)
    view = faiss.rev_swig_ptr
    with _new_file(path, run, out, overwrite) as temporary:
        index = faiss.read_index(path)
        mapped = isinstance(index, faiss.IndexIDMap)
        inner = faiss.downcast_index(index.index) if mapped else index
        inverted = type(inner) is faiss.IndexIVFFlat and not mapped
        lists = faiss.downcast_InvertedLists(inner.invlists) if inverted else None
        simple = type(inner).__name__ in FLAT or isinstance(lists, faiss.ArrayInvertedLists)
        if not simple or inner.metric_type not in (faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT):
            raise ProblemError(
                f"{line(path)} is {type(inner).__name__}, and keeps codes, or a graph over vectors "
                "(Flat, IVF-Flat do not): hide in the vectors it was built from, and build it again"
            )
        if inner.metric_type == faiss.METRIC_L2 and not run.normalised:
            raise ProblemError(f"{line(path)} compares by L2: its vectors must be of length 1")
        if inverted:  # in the order of ids, whatever list they are in
            read = need("faiss.contrib.inspect_tools").get_invlist
            parts = (read(lists, part) for part in range(lists.nlist))
            ids, codes = (np.concatenate(x) for x in zip(*parts, strict=True))
            vectors = codes.view(np.float32)
            order = np.argsort(ids, kind="stable")
        else:
            ids = faiss.vector_to_array(index.id_map) if mapped else None  # (n,)
            vectors, order = view(inner.get_xb(), index.ntotal * inner.d), np.arange(index.ntotal)
        vectors, done = vectors.reshape(-1, inner.d), faiss.clone_index(index)
        done.reset()
        if inverted:
            done.set_direct_map_type(faiss.DirectMap.NoMap)  # takes no ids
        size = run.begin(path, index.ntotal, 8192, "float32")
        for start in range(0, index.ntotal, size):
            some = order[start : start + size]
            changed = run.whole(vectors[some])
            done.add(changed) if ids is None else done.add_with_ids(changed, ids[some])
        if inverted:
            done.set_direct_map_type(inner.direct_map.type)
        faiss.write_index(done, str(temporary))


STORES = {
    "qdrant:": qdrant,
    "postgresql:": postgres,
    "postgres:": postgres,
    ".npy": _npy,
    ".parquet": _parquet,
    ".faiss": _faiss,
    ".index": _faiss,
}
