"""Hide and restore images where their vectors are: files, FAISS, Qdrant, PostgreSQL.

A kind of store is one function. It reads batches, always in the same order, and says which rows are
hidden; `Pass` changes the others, and the store writes them. What is hidden is marked with the
adapter's digest: of a file in a second one beside it, in Qdrant in the payload, in PostgreSQL in a
table of its own. A vector and its mark are written together or not at all, so that a run that was
killed is continued by running it again.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from forgetting.adapter import Adapter
from forgetting.deploy.embeddings import IndexEdit, index_edit
from forgetting.errors import ProblemError, line, number, reason, unknown
from forgetting.io import atomic_path, digest, naming, need, read_bytes, write_bytes

INSTALL = "clip-forgetting[index]"
MARK = "clip_forget_hidden"  # key in a payload, name of a table
FLOATS = ("float16", "float32", "float64")
FLAT = ("IndexFlat", "IndexFlatIP", "IndexFlatL2")
PGVECTOR = {"vector": "f4", "halfvec": "f2"}
COLUMN = """SELECT n.nspname, c.relname, t.typname, t.typsend::text FROM pg_class c
    JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid
    JOIN pg_type t ON t.oid = a.atttypid WHERE c.oid = to_regclass(%s) AND a.attname = %s"""
MARKS = """CREATE TABLE IF NOT EXISTS {marks}
    (place text, id text, adapter text, md5 text, PRIMARY KEY (place, id))"""
MARKED = """{table} t LEFT JOIN {marks} m ON m.place = %(place)s AND m.id = t.{id}::text
    AND m.md5 = md5({send}(t.{column}))"""  # a vector that was replaced since is not hidden
OTHERS = f"SELECT m.adapter FROM {MARKED} WHERE m.adapter <> %(mark)s LIMIT 1"
ROWS = f"""SELECT t.{{id}}, t.{{column}}, coalesce(m.adapter = %(mark)s, false)
    FROM {MARKED} WHERE t.{{column}} IS NOT NULL AND {{after}} ORDER BY t.{{id}} LIMIT %(size)s"""
CHANGE = """WITH changed AS (UPDATE {table} SET {column} = %b WHERE {id} = %s
    RETURNING {id}::text, md5({send}({column})))
    INSERT INTO {marks} (id, md5, place, adapter) SELECT *, %s, %s FROM changed
    ON CONFLICT (place, id) DO UPDATE SET adapter = excluded.adapter, md5 = excluded.md5"""


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
    mark: str  # the adapter's digest, and whether vectors are normalised
    names: list[str]
    bar: tqdm = field(repr=False)
    where: str = ""  # where the result is
    rows: int = 0
    changed: int = 0
    before: int = 0  # checksum of all vectors
    after: int = 0
    error: float = 0.0  # by how much of its length a restored vector may be off

    def begin(self, where: str, rows: int, size: int) -> int:
        """Say what is changed; returns how many rows to read at once, `size` if nobody said."""
        self.where = line(where)
        self.bar.reset(total=rows)
        return number("batch", self.size or size, low=1, whole=True)

    def __call__(self, vectors: np.ndarray, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The vectors (n, d) as they are to be, and which rows (k,) changed, of those that are
        `hidden` (n,) or not."""
        self.before = checksum(vectors, self.before)
        self.error = self.edit.restored_to(getattr(torch, vectors.dtype.name))
        rows = np.flatnonzero(hidden != self.hide)
        with naming(f"{self.where}, after row {self.rows}"):
            if len(rows) == len(vectors):
                vectors = self.edit(vectors, self.normalised)
            elif len(rows):
                vectors[rows] = self.edit(vectors[rows], self.normalised)
        self.after = checksum(vectors, self.after)
        self.rows += len(vectors)
        self.changed += len(rows)
        self.bar.update(len(vectors))
        return vectors, rows

    def whole(self, vectors: np.ndarray) -> np.ndarray:
        """The same of a file, in which all rows are hidden or none is."""
        return self(vectors, np.full(len(vectors), not self.hide))[0]

    def check(self, where: str, mark: str) -> None:
        """ProblemError if rows have another mark."""
        if mark != self.mark:
            raise ProblemError(
                f"{line(where)} is hidden by adapter {line(mark)}, this one is {self.mark}: "
                "restore with that one first; to hide what both forget, compose them"
            )


def change_store(
    adapter: Adapter,
    store: str | Path,
    hide: bool,
    projection: Tensor | None = None,
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
        hide: False to restore; projection: see `index_edit`.
        normalised: whether vectors are, and stay, of length 1.
        batch: rows at once; dry_run: read and compute, and change nothing.
        options: `out` and `overwrite` of files; `column` of parquet; `collection` and `vector` (its
            name, if it has one) of Qdrant; `table`, `column` and `id` of PostgreSQL.

    Raises:
        ProblemError: a store that cannot be read, or holds no plain vectors; one that is hidden by
            another adapter; see also `index_edit`.
    """
    store, edit = str(store), index_edit(adapter, projection)
    kind = next((k for k in STORES if store.startswith(k) or store.endswith(k)), None)
    if kind is None:
        raise unknown("kind of store", store, STORES)
    given = {option: value for option, value in options.items() if value}
    factors = {"left": adapter.left.float(), "right": adapter.right.float()}
    mark = digest({"projection": adapter.projection_sha256}, factors)
    mark += "" if normalised else "-unnormalised"
    with tqdm(unit="row", disable=not progress, leave=False) as bar:
        edit, names = edit if hide else edit.inverse, adapter.classes
        run = Pass(edit, hide, normalised, dry_run, batch, mark, names, bar)
        try:
            call = signature(STORES[kind]).bind(store, run, **given)
        except TypeError as error:
            raise ProblemError(f"options of a {kind} store: {error}") from error
        STORES[kind](*call.args, **call.kwargs)
    return run


@contextmanager
def _saying(where: str, *errors: type[Exception]) -> Iterator[None]:
    """Make one line of what a library raises."""
    try:
        yield
    except ProblemError:
        raise
    except errors as error:
        raise ProblemError(f"{line(where)}: {reason(error)}") from error


@contextmanager
def _new_file(path: str, run: Pass, out: str | None, overwrite: bool) -> Iterator[Path]:
    """Where to write the file that becomes `out`. Another one beside it says that it is hidden. It
    is written before it and removed after it: it may be there too early, never too late."""
    marks, new_marks = Path(f"{path}.hidden.json"), Path(f"{out}.hidden.json")
    with naming(marks), _saying("not readable", ValueError):
        known = json.loads(read_bytes(marks)) if marks.exists() else None
    if run.hide == bool(known):
        raise ProblemError(f"{line(marks)} {'says that it is hidden' if known else 'is missing'}")
    if known:
        run.check(path, known["adapter"])
    if out is None and not run.dry:
        raise ProblemError("name the new file (--out): this one is not changed")
    opened = nullcontext(Path(os.devnull)) if run.dry else atomic_path(out, overwrite)
    with _saying(path, OSError, ValueError, RuntimeError), opened as temporary:
        yield temporary
        if known and run.before != known["after"]:
            raise ProblemError(f"{line(path)} was changed since it was hidden: nothing is restored")
        run.where = line(path if run.dry else out)
        if run.hide and not run.dry:
            names = ("names", "rows", "before", "after")
            content = {"adapter": run.mark} | {name: getattr(run, name) for name in names}
            write_bytes(json.dumps(content).encode(), new_marks)
    if not run.hide and not run.dry:
        new_marks.unlink(missing_ok=True)


def _npy(path: str, run: Pass, out: str | None = None, overwrite: bool = False) -> None:
    """A `.npy` file (n, d), memory-mapped."""
    with _new_file(path, run, out, overwrite) as temporary, open(temporary, "wb") as file:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.ndim != 2 or array.dtype.name not in FLOATS:
            raise ProblemError(f"{line(path)} must hold (n, d) of {', '.join(FLOATS)}")
        header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
        np.lib.format.write_array_header_1_0(file, header)
        size = run.begin(path, len(array), 1024)
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
        size = run.begin(path, file.metadata.num_rows, 8192)
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
                "(Flat and IVF-Flat do not): hide in what it was made of, and make it anew"
            )
        if inverted:  # in the order of ids, whatever list they are in
            counts = [(part, lists.list_size(part)) for part in range(lists.nlist)]
            ids = [view(lists.get_ids(part), n) for part, n in counts if n]
            codes = [view(lists.get_codes(part), 4 * inner.d * n) for part, n in counts if n]
            ids, vectors = np.concatenate(ids), np.concatenate(codes).view(np.float32)
            order = np.argsort(ids, kind="stable")
        else:
            ids = faiss.vector_to_array(index.id_map) if mapped else None  # (n,)
            vectors, order = view(inner.get_xb(), index.ntotal * inner.d), np.arange(index.ntotal)
        vectors, done = vectors.reshape(-1, inner.d), faiss.clone_index(index)
        done.reset()
        if inverted:
            done.set_direct_map_type(faiss.DirectMap.NoMap)  # takes no ids
        size = run.begin(path, index.ntotal, 8192)
        for start in range(0, index.ntotal, size):
            some = order[start : start + size]
            changed = run.whole(vectors[some])
            done.add(changed) if ids is None else done.add_with_ids(changed, ids[some])
        if inverted:
            done.set_direct_map_type(inner.direct_map.type)
        faiss.write_index(done, str(temporary))


def _qdrant(store: str, run: Pass, collection: str, vector: str = "") -> None:
    """A collection, in a folder or behind a URL (with the key QDRANT_API_KEY). Points are written
    whole, with the mark in the payload."""
    qdrant, models = need("qdrant_client", INSTALL), need("qdrant_client.models", INSTALL)
    errors = need("qdrant_client.http.exceptions").ApiException, ValueError, RuntimeError
    name = store.removeprefix("qdrant:")
    where, is_url = f"collection {collection} of {name}", "://" in name
    if not is_url and not (Path(name) / "meta.json").is_file():  # the library would make one
        raise ProblemError(f"{line(name)} is neither a folder of Qdrant nor a URL")
    place = {"path": name}
    if is_url:
        place = {"url": name, "api_key": os.environ.get("QDRANT_API_KEY"), "timeout": 60}
    with _saying(where, *errors), closing(qdrant.QdrantClient(**place)) as client:
        specs = client.get_collection(collection).config.params.vectors or {}
        specs = specs if isinstance(specs, dict) else {"": specs}
        vector = next(iter(specs)) if len(specs) == 1 and not vector else vector
        if vector not in specs:
            raise unknown("vector (--vector)", vector, specs)
        if specs[vector].multivector_config or specs[vector].datatype == models.Datatype.UINT8:
            raise ProblemError(f"{where}: several vectors a point, or whole numbers")
        ours = models.FieldCondition(key=MARK, match=models.MatchValue(value=run.mark))
        unmarked = models.IsEmptyCondition(is_empty=models.PayloadField(key=MARK))
        for other in client.scroll(collection, models.Filter(must_not=[ours, unmarked]), 1)[0]:
            run.check(where, other.payload[MARK])
        size, offset, last = run.begin(where, client.count(collection).count, 256), None, False
        while not last:
            page = {"limit": size, "offset": offset, "with_vectors": True}
            records, offset = client.scroll(collection, **page)
            last, points = offset is None, []
            for record in records:
                held = record.vector if isinstance(record.vector, dict) else {"": record.vector}
                if held.get(vector):
                    point = {"id": record.id, "vector": held, "payload": record.payload or {}}
                    points.append(models.PointStruct(**point))
            if not points:
                continue
            vectors = np.array([point.vector[vector] for point in points], np.float32)
            hidden = np.array([point.payload.pop(MARK, "") == run.mark for point in points])
            vectors, rows = run(vectors, hidden)
            for row in rows:
                points[row].vector[vector] = vectors[row].tolist()
                points[row].payload |= {MARK: run.mark} if run.hide else {}
            if len(rows) and not run.dry:
                client.upsert(collection, [points[row] for row in rows], wait=True)


def _postgres(store: str, run: Pass, table: str, column: str, id: str) -> None:
    """A column of pgvector. Its table of marks knows what the vectors became."""
    psycopg, sql = need("psycopg", INSTALL), need("psycopg.sql", INSTALL)
    where = f"table {table}"
    with _saying(where, psycopg.Error, ValueError), psycopg.connect(store) as connection:
        found = connection.execute(COLUMN, (table, column)).fetchone()
        if found is None or found[2] not in PGVECTOR:
            raise ProblemError(f"{where} has no column {line(column)} of {' or '.join(PGVECTOR)}")
        schema, relation, kind, send = found
        values = {"mark": run.mark, "place": f"{schema}.{relation}.{column}"}
        name, plain = sql.Identifier, sql.SQL
        words = {"table": name(schema, relation), "marks": name(schema, MARK), "id": name(id)}
        words |= {"column": name(column), "send": plain(send), "after": plain("true")}

        def query(text: str) -> list[tuple]:
            cursor = connection.execute(plain(text).format(**words), values, binary=True)
            return cursor.fetchall() if cursor.description else []

        if not query("SELECT pg_try_advisory_lock(hashtext(%(place)s))")[0][0]:
            raise ProblemError(f"{where} is being changed by another run")
        query(MARKS)
        for (other,) in query(OTHERS):
            run.check(where, other)
        ((count, keys),) = query("SELECT count(*), count(DISTINCT {id}) FROM {table}")
        if keys < count:
            raise ProblemError(f"{where}: {count} rows have {keys} values of {id}, which is no key")
        values["size"] = run.begin(where, count, 1024)
        select = ROWS if run.dry else f"{ROWS} FOR UPDATE OF t"
        dtype, change = PGVECTOR[kind], plain(CHANGE).format(**words)
        while rows := query(select):
            ids, sent, hidden = zip(*rows, strict=True)
            vectors = np.frombuffer(b"".join(sent), f">{dtype}").reshape(len(ids), -1)
            vectors = vectors[:, 4 // vectors.itemsize :].astype(dtype)  # after the size
            vectors, changed = run(vectors, np.array(hidden))
            words["after"] = plain("t.{id} > %(last)s").format(**words)
            values["last"] = ids[-1]
            if not run.dry:
                rest = values["place"], run.mark if run.hide else None
                new = [(vectors[i].tolist(), ids[i], *rest) for i in changed]
                connection.cursor().executemany(change, new)
                connection.commit()
        if run.dry:
            connection.rollback()
        else:
            query("DELETE FROM {marks} WHERE adapter IS NULL")


STORES = {
    "qdrant:": _qdrant,
    "postgresql:": _postgres,
    "postgres:": _postgres,
    ".npy": _npy,
    ".parquet": _parquet,
    ".faiss": _faiss,
    ".index": _faiss,
}
