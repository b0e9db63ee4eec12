"""Adapters as records, logs.json compiled from them, and create_results on top."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from engine.files import sha256_file
from evaluation.results import Results, add_args, join_label, place, read_logs, split_label
from forgetting import io
from forgetting.errors import ProblemError
from tests.conftest import refuses
from tests.results_fixtures import SETTINGS, adapter, entry, store
from utils import create_results

CHOSEN = {"lamb_forget": 1.3}


def test_logs_are_the_entries_of_the_adapters_in_the_order_of_the_classes(tmp_path):
    third = 1 / 3
    store(tmp_path, "B", "x", entry("B", "x", others=("A",)))
    store(tmp_path, "A", "dog", entry(name="dog"))
    store(tmp_path, "A", "cat|dog", entry(name="dog"))
    store(tmp_path, "A", "cat", entry(before=third))
    logs = read_logs(tmp_path)
    assert list(logs) == ["A", "B"] and list(logs["A"]) == ["settings", "cat", "dog", "cat|dog"]
    path = tmp_path / "A/cat.safetensors"
    named = {"adapter": "A/cat.safetensors", "adapter_sha256": sha256_file(path)}
    expected = entry(before=third)
    assert logs["A"]["cat"] == expected | {"solver": expected["solver"] | named}
    assert logs["A"]["settings"] == SETTINGS | {"kwargs": {}}
    assert not list(tmp_path.rglob(".tmp*"))
    # The adapters are the record: logs.json can be lost, or torn, and nothing else is.
    for text in ("", '{"A": {"ca'):
        (tmp_path / "logs.json").write_text(text)
        Results(tmp_path).compile()
        assert read_logs(tmp_path) == logs
    written = (tmp_path / "logs.json").stat()
    Results(tmp_path).compile()  # nothing is new
    assert (tmp_path / "logs.json").stat().st_mtime_ns == written.st_mtime_ns


def test_what_no_run_wrote_is_no_result(tmp_path):
    """Copies, damaged files, files of others and pipes lie beside the adapters."""
    store(tmp_path, "A", "cat", entry())
    good = (tmp_path / "A/cat.safetensors").read_bytes()
    (tmp_path / "A/copy.safetensors").write_bytes(good)
    (tmp_path / "A/torn.safetensors").write_bytes(good[:200])
    (tmp_path / "A/empty.safetensors").write_bytes(b"")
    (tmp_path / "A/zeros.safetensors").write_bytes(bytes(500))
    (tmp_path / "A/link.safetensors").symlink_to("nowhere")
    os.mkfifo(tmp_path / "A/pipe.safetensors")
    results = Results(tmp_path)
    assert [record.label for record in results.records()] == ["cat"]
    results.compile()
    assert set(read_logs(tmp_path)["A"]) == {"settings", "cat"}


def test_what_comes_while_logs_are_written_is_in_them(tmp_path, monkeypatch):
    store(tmp_path, "A", "cat", entry())
    results, write = Results(tmp_path), io.write_bytes

    def slow(data: bytes, path: Path, **options) -> None:
        if path.name == "logs.json":  # meanwhile another process finishes a class, and stops
            late = tmp_path / "A/dog.safetensors"
            late.exists() or late.write_bytes(adapter("A", "dog", entry(name="dog")))
        write(data, path, **options)

    (tmp_path / "logs.json").unlink()
    monkeypatch.setattr(io, "write_bytes", slow)
    results.compile()
    assert set(read_logs(tmp_path)["A"]) == {"settings", "cat", "dog"}


def test_logs_are_not_written_anew_for_every_class(tmp_path):
    results = Results(tmp_path)
    for name in ("cat", "dog"):
        results.add(adapter("A", name, entry(name=name)), "A", name, CHOSEN)
    assert set(read_logs(tmp_path)["A"]) == {"settings", "cat"}
    results.compile()
    assert set(read_logs(tmp_path)["A"]) == {"settings", "cat", "dog"}


def test_cards_are_compiled_where_they_are_missing(tmp_path):
    path, card = tmp_path / "A/cat.safetensors", tmp_path / "A/cat.safetensors.md"
    for after in (0.25, 0.5):
        store(tmp_path, "A", "cat", entry(after=after))
        assert f"{after:.1%} after" in card.read_text("utf-8")
    for data in (path.read_bytes(), path.read_bytes()[:-1] + b"x"):
        path.write_bytes(data)
        card.unlink(missing_ok=True)  # as a kill leaves it
        Results(tmp_path).compile()
        assert card.exists() == (data[-1:] != b"x"), "a damaged adapter has no card"


@pytest.mark.parametrize("key", ["trainer", "backbone", "precision", "weights"])
def test_results_of_another_kind_are_refused(tmp_path, key):
    kept = SETTINGS | {"precision": "fp32"}
    store(tmp_path, "A", "cat", entry(), kept)
    results = Results(tmp_path)
    results.check("A", kept)
    refuses(f"{key}.*another --output-dir", results.check, "A", kept | {key: "other"})
    if key == "weights":  # a set of its own may be of others
        results.check("B", kept | {key: "other"})
    else:
        refuses("another --output-dir", results.check, "B", kept | {key: "other"})


def test_done_means_an_adapter_with_the_same_settings(tmp_path):
    store(tmp_path, "A", "cat", entry())
    results = Results(tmp_path)
    assert results.is_done("A", "cat", CHOSEN) and not results.is_done("A", "dog", CHOSEN)
    with pytest.raises(ProblemError, match=r"lamb_forget was 1\.3, is now 1\.1.*--overwrite"):
        results.is_done("A", "cat", {"lamb_forget": 1.1})
    store(tmp_path, "A", "dog", entry(name="dog"))
    (tmp_path / "A/cat.safetensors").unlink()
    results = Results(tmp_path)
    results.compile()
    assert not results.is_done("A", "cat", CHOSEN) and results.is_done("A", "dog", CHOSEN)
    assert set(read_logs(tmp_path)["A"]) == {"settings", "dog"}


def test_of_two_runs_with_other_settings_the_first_stays(tmp_path):
    late = Results(tmp_path)  # began when the folder was empty
    store(tmp_path, "A", "cat", entry())
    before = (tmp_path / "A/cat.safetensors").read_bytes()
    data = adapter("A", "cat", entry(settings={"lamb_forget": 1.1}), scale=2.0)
    refuses("--overwrite", late.add, data, "A", "cat", {"lamb_forget": 1.1})
    assert (tmp_path / "A/cat.safetensors").read_bytes() == before
    late.add(data, "A", "cat", None)
    assert Results(tmp_path).is_done("A", "cat", {"lamb_forget": 1.1})


def test_logs_that_were_not_made_from_adapters_are_left_alone(tmp_path):
    path = tmp_path / "logs.json"
    theirs = json.dumps({"A": {"cat": {"final_results": entry()["final_results"]}}})
    for text in (theirs, "[1, 2]", '{"A": 3}', "my notes", "", '{"A": {"cat"'):
        path.write_text(text)
        refuses("another --output-dir", Results, tmp_path)
        if text != theirs:
            refuses(r"logs\.json", read_logs, tmp_path)
        assert path.read_text() == text
    path.unlink()
    os.mkfifo(path)
    for read in (Results, read_logs, create_results):
        with pytest.raises(ProblemError):
            read(tmp_path)


def test_places_are_distinct_short_and_inside():
    names = ["C/V", "..", ".hidden", "a|b", r"a\|b", "x" * 400, "x" * 401, "CON", "naïve", "\ud800"]
    places = [place(name, name) for name in names]
    assert len(set(places)) == len(places)
    for name, text in zip(names, places, strict=True):
        folder, file = text.split("/")
        assert folder == file == place(name) and len(file) < 200 and not file.startswith(".")


@given(st.lists(st.text("ab|\\\n"), min_size=1))
def test_labels_tell_classes_apart(classes):
    assert split_label(join_label(classes)) == classes


def test_args_end_with_the_latest_command_line(tmp_path):
    for line in ("Namespace(a=1)", "Namespace(a=2)", "Namespace(a=2)", "Namespace(a=1)"):
        add_args(tmp_path, line)
    lines = (tmp_path / "args.txt").read_text().splitlines()
    assert lines == ["Namespace(a=1)", "Namespace(a=2)", "Namespace(a=1)"]


def test_reading_results_loads_nothing_heavy():
    code = "import sys, utils; print({'torch', 'matplotlib', 'pandas'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'pandas'}"
