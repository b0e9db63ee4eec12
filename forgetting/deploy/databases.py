"""Image vectors in Qdrant and PostgreSQL, see `stores`: changed in place, a batch at a time."""

from __future__ import annotations

import os
from contextlib import closing
from hashlib import md5
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forgetting.errors import ProblemError, line, unknown
from forgetting.io import foreign, need

if TYPE_CHECKING:
    from forgetting.deploy.stores import Pass

INSTALL = "clip-forgetting[index]"
MARK = "clip_forget_hidden"  # name of a table, end of the name of a collection
SAME = 1e-6  # by how much Qdrant may change a number when it normalises again
PGVECTOR = {"vector": "f4", "halfvec": "f2"}
COLUMN = """SELECT n.nspname, c.relname, t.typname, t.typsend::text,
    (SELECT min(schemaname) FROM pg_tables WHERE tablename = %s)
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    JOIN pg_attribute a ON a.attrelid = c.oid JOIN pg_type t ON t.oid = a.atttypid
    WHERE c.oid = to_regclass(%s) AND a.attname = %s"""
MARKS = "CREATE TABLE {marks} (md5 text PRIMARY KEY, adapter text NOT NULL)"
NO_MARKS = "(SELECT '' AS md5, '' AS adapter WHERE false)"
MARKED = "{table} t LEFT JOIN {marks} m ON m.md5 = md5({send}(t.{column}))"
OTHERS = f"SELECT m.adapter FROM {MARKED} WHERE m.adapter <> %(mark)s LIMIT 1"
ROWS = f"""SELECT t.{{key}}, {{send}}(t.{{column}}), coalesce(m.adapter = %(mark)s, false)
    FROM {MARKED} WHERE t.{{column}} IS NOT NULL AND {{after}} ORDER BY t.{{key}} LIMIT %(size)s"""
KEYS = """SELECT count(*), count(DISTINCT {key}),
    count(*) FILTER (WHERE octet_length({send}({column})) <> %(bytes)s) FROM {table}"""
CHANGE = "UPDATE {table} SET {column} = %b WHERE {key} = %s"
CHANGED = """SELECT count(*) FROM {table} WHERE {key} = ANY(%(ids)s)
    AND md5({send}({column})) = ANY(%(sums)s)"""
ADD = """INSERT INTO {marks} SELECT unnest(%(new)s::text[]), %(mark)s
    ON CONFLICT (md5) DO UPDATE SET adapter = excluded.adapter"""


def qdrant(store: str, run: Pass, collection: str, vector: str = "") -> None:
    """A collection, in a folder or behind a URL (with the key QDRANT_API_KEY). What its vectors
    become is kept in a second one, so that it goes through the same normalisation and rounding."""
    library, models = need("qdrant_client", INSTALL), need("qdrant_client.models", INSTALL)
    name = store.removeprefix("qdrant:")
    where, is_url = f"collection {collection} of {name}", "://" in name
    if not is_url and not (Path(name) / "meta.json").is_file():  # the library would make one
        raise ProblemError(f"{line(name)} is neither a folder of Qdrant nor a URL")
    place = {"path": name}
    if is_url:
        place = {"url": name, "api_key": os.environ.get("QDRANT_API_KEY"), "timeout": 60}
    with foreign(line(where)), closing(library.QdrantClient(**place)) as client:
        aliases = {x.alias_name: x.collection_name for x in client.get_aliases().aliases}
        collection = aliases.get(collection, collection)
        specs = client.get_collection(collection).config.params.vectors or {}
        specs = specs if isinstance(specs, dict) else {"": specs}
        vector = next(iter(specs)) if len(specs) == 1 and not vector else vector
        if vector not in specs:
            raise unknown("vector (--vector)", vector, specs)
        spec = specs[vector]
        if spec.multivector_config or spec.datatype == models.Datatype.UINT8:
            raise ProblemError(f"{where}: several vectors a point, or whole numbers")
        dtype = "float16" if spec.datatype == models.Datatype.FLOAT16 else "float32"
        size = run.begin(where, client.count(collection).count, 256, dtype)
        marks = ".".join(x for x in (collection, vector, MARK) if x)
        marked = client.collection_exists(marks)
        if marked:
            ours = models.FieldCondition(key=MARK, match=models.MatchValue(value=run.mark))
            for other in client.scroll(marks, models.Filter(must_not=[ours]), limit=1)[0]:
                run.check(where, other.payload[MARK])
        elif run.hide and not run.dry:
            more = {"on_disk": True, "hnsw_config": models.HnswConfigDiff(m=0)}  # not searched
            marked = client.create_collection(marks, spec.model_copy(update=more))
        offset, last, names = None, False, [vector] if vector else True
        while not last:
            records, offset = client.scroll(
                collection, limit=size, offset=offset, with_vectors=names, with_payload=False
            )
            last = offset is None
            held = {
                x.id: x.vector if isinstance(x.vector, dict) else {"": x.vector} for x in records
            }
            held = {at: named[vector] for at, named in held.items() if named.get(vector)}
            if not held:
                continue
            known = client.retrieve(marks, list(held), with_vectors=True) if marked else []
            became = {x.id: x.vector for x in known}
            vectors = np.array(list(held.values()), np.float32)  # (n, d)
            after = np.array([became.get(x, [np.inf] * spec.size) for x in held], np.float32)
            hidden = (np.abs(vectors - after) <= SAME).all(axis=1)
            vectors, rows = run(vectors.astype(dtype), hidden)
            if not len(rows) or run.dry:
                continue
            new = [(list(held)[row], vectors[row].tolist()) for row in rows]
            if run.hide:
                payload = {MARK: run.mark}
                points = [models.PointStruct(id=x, vector=v, payload=payload) for x, v in new]
                client.upsert(marks, points, wait=True)
            named = [(x, {vector: v} if vector else v) for x, v in new]
            points = [models.PointVectors(id=x, vector=v) for x, v in named]
            client.update_vectors(collection, points, wait=True)
        if marked and not run.hide and not run.dry:
            client.delete_collection(marks)


def _sums(vectors: np.ndarray) -> set[str]:
    """The MD5 of what PostgreSQL sends of the vectors (n, d), their size and numbers, in each of
    its types: a column that is made `halfvec` is known again."""
    head = vectors.shape[1].to_bytes(2, "big") + bytes(2)
    with np.errstate(over="ignore"):
        kinds = [vectors.astype(f">{dtype}") for dtype in PGVECTOR.values()]
    rows = (head + row.tobytes() for kind in kinds for row in kind)
    return {md5(row, usedforsecurity=False).hexdigest() for row in rows}


def postgres(store: str, run: Pass, table: str, column: str, key: str) -> None:
    """A column of pgvector. A table of marks knows what the vectors became, in both types."""
    psycopg, sql = need("psycopg", INSTALL), need("psycopg.sql", INSTALL)
    where = f"table {table}"
    with foreign(line(where)), psycopg.connect(store) as connection:
        found = connection.execute(COLUMN, (MARK, table, column)).fetchone()
        if found is None or found[2] not in PGVECTOR:
            raise ProblemError(f"{where} has no column {line(column)} of {' or '.join(PGVECTOR)}")
        schema, relation, kind, send, there = found
        dtype, width = PGVECTOR[kind], len(run.edit.down)
        values = {"mark": run.mark, "name": MARK, "bytes": 4 + np.dtype(dtype).itemsize * width}

        def name(*names: str) -> Any:
            return sql.Identifier(*(x.replace("%", "%%") for x in names))

        words = {"table": name(schema, relation), "column": name(column), "key": name(key)}
        words |= {"send": sql.SQL(send), "after": sql.SQL("true")}

        def query(text: str) -> list[tuple]:
            cursor = connection.execute(sql.SQL(text).format(**words), values, binary=True)
            return cursor.fetchall() if cursor.description else []

        if not query("SELECT pg_try_advisory_lock(hashtext(%(name)s))")[0][0]:
            raise ProblemError(f"{where}: another run is changing this database")
        words["marks"] = name(there or schema, MARK)
        if not there and run.dry:
            words["marks"] = sql.SQL(NO_MARKS)
        elif not there:
            query(MARKS)
        for (other,) in query(OTHERS):
            run.check(where, other)
        ((count, keys, odd),) = query(KEYS)
        if keys < count:
            raise ProblemError(
                f"{where}: {count} rows have {keys} values of {key}, which is no key"
            )
        if odd:
            raise ProblemError(f"{where}: {odd} vectors are not of {width} numbers")
        values["size"] = run.begin(where, count, 1024, np.dtype(dtype).name)
        select = ROWS if run.dry else f"{ROWS} FOR UPDATE OF t"
        change = sql.SQL(CHANGE).format(**words)
        while rows := query(select):
            ids, sent, hidden = zip(*rows, strict=True)
            old = np.stack([np.frombuffer(x, f">{dtype}", offset=4) for x in sent]).astype(dtype)
            new, changed = run(old, np.array(hidden))
            words["after"] = sql.SQL("t.{key} > %(last)s").format(**words)
            values |= {"last": ids[-1], "ids": [ids[i] for i in changed]}
            if run.dry or not len(changed):
                continue
            old, new = old[changed], new[changed]
            pairs = zip(new.tolist(), values["ids"], strict=True)
            connection.cursor().executemany(change, list(pairs))
            values |= {"sums": list(_sums(new)), "new": list(_sums(new) - _sums(old))}
            if query(CHANGED)[0][0] < len(changed):
                raise ProblemError(f"{where}: a trigger or a policy keeps rows from being changed")
            if run.hide:
                query(ADD)
            connection.commit()
        if run.dry:
            connection.rollback()
