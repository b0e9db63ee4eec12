"""Adapters as records, logs.json compiled from them, and create_results on top."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from engine.files import sha256_file
from evaluation.results import Results, add_args, join_label, place, read_logs, split_label
from forgetting import io
from forgetting.errors import ProblemError
from tests.results_fixtures import SETTINGS, adapter, ended, entry, fork, store
from utils import compute_avg_gain, create_results

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
    for text in (None, "", '{"A": {"ca'):
        (tmp_path / "logs.json").unlink() if text is None else (tmp_path / "logs.json").write_text(
            text
        )
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


def test_processes_that_write_at_once_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.results.INTERVAL", 0.0)  # each writes logs.json often
    monkeypatch.setattr("evaluation.results.PATIENCE", 0)

    def write(dataset: str, start: int) -> None:
        results = Results(tmp_path)
        for number in range(start, start + 25):
            name = f"c{number}"
            results.add(adapter(dataset, name, entry(dataset, name)), dataset, name, None)
        results.compile()

    children = [
        fork(lambda pair=pair: write(*pair)) for pair in (("A", 0), ("A", 20), ("B", 0), ("B", 10))
    ]
    assert list(map(ended, children)) == [0] * 4
    logs = read_logs(tmp_path)
    assert len(logs["A"]) == 46 and len(logs["B"]) == 36


@pytest.mark.parametrize("key", ["trainer", "backbone", "precision", "weights"])
def test_results_of_another_kind_are_refused(tmp_path, key):
    kept = SETTINGS | {"precision": "fp32"}
    store(tmp_path, "A", "cat", entry(), kept)
    results = Results(tmp_path)
    results.check("A", kept)
    with pytest.raises(ProblemError, match=f"{key}.*another ATTEMPT"):
        results.check("A", kept | {key: "other"})
    if key == "weights":  # a set of its own may be of others
        results.check("B", kept | {key: "other"})
    else:
        with pytest.raises(ProblemError, match="another ATTEMPT"):
            results.check("B", kept | {key: "other"})
    for name in ("logs.json", "args.txt", "audit.csv"):
        with pytest.raises(ProblemError, match="rename the data set"):
            results.check(name, kept)


def test_done_means_an_adapter_with_the_same_settings(tmp_path):
    store(tmp_path, "A", "cat", entry())
    results = Results(tmp_path)
    assert results.is_done("A", "cat", CHOSEN) and not results.is_done("A", "dog", CHOSEN)
    with pytest.raises(ProblemError, match=r"lamb_forget 1\.3 -> 1\.1.*--overwrite"):
        results.is_done("A", "cat", {"lamb_forget": 1.1})
    # With --save-model the model and its config are part of what is done.
    assert not results.is_done("A", "cat", CHOSEN, model=True)
    (tmp_path / "A/cat.pt").write_text("model")
    assert not results.is_done("A", "cat", CHOSEN, model=True)
    (tmp_path / "A/cat.json").write_text("config")
    assert results.is_done("A", "cat", CHOSEN, model=True)
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
    with pytest.raises(ProblemError, match="--overwrite"):
        late.add(data, "A", "cat", {"lamb_forget": 1.1})
    assert (tmp_path / "A/cat.safetensors").read_bytes() == before
    late.add(data, "A", "cat", None)
    assert Results(tmp_path).is_done("A", "cat", {"lamb_forget": 1.1})


def test_logs_that_were_not_made_from_adapters_are_left_alone(tmp_path):
    path = tmp_path / "logs.json"
    theirs = json.dumps({"A": {"cat": {"final_results": entry()["final_results"]}}})
    for text in (theirs, "[1, 2]", '{"A": 3}', "my notes"):
        path.write_text(text)
        with pytest.raises(ProblemError, match="another ATTEMPT"):
            Results(tmp_path)
        assert path.read_text() == text
    path.unlink()
    os.mkfifo(path)
    for read in (Results, read_logs, create_results):
        with pytest.raises(ProblemError):
            read(tmp_path)


@pytest.mark.parametrize("text", ['{"A": {"cat"', "", "[1, 2]", '{"A": 3}'])
def test_logs_that_cannot_be_read_are_one_line(tmp_path, text):
    (tmp_path / "logs.json").write_text(text)
    with pytest.raises(ProblemError, match=r"logs\.json"):
        read_logs(tmp_path)
    assert (tmp_path / "logs.json").read_text() == text  # reading changes nothing


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


def test_a_class_with_a_bar_and_two_classes_at_once(tmp_path):
    assert join_label(["a", "b"]) == "a|b" and join_label(["a|b"]) == r"a\|b"
    one, two = join_label(["a|b"]), join_label(["a", "b"])
    both = entry(name="a")
    for side in ("final_results", "zero_shot"):
        both[side]["A"]["b"] = both[side]["A"]["a"]
    store(tmp_path, "A", one, entry(name="a|b"))
    store(tmp_path, "A", two, both)
    results = Results(tmp_path)
    assert all(results.is_done("A", label, CHOSEN) for label in (one, two))
    assert create_results(tmp_path)[0].name.tolist() == [one]
    assert create_results(tmp_path, multiclass=True)[0].name.tolist() == [two]


def test_args_end_with_the_latest_command_line(tmp_path):
    for line in ("Namespace(a=1)", "Namespace(a=2)", "Namespace(a=2)", "Namespace(a=1)"):
        add_args(tmp_path, line)
    lines = (tmp_path / "args.txt").read_text().splitlines()
    assert lines == ["Namespace(a=1)", "Namespace(a=2)", "Namespace(a=1)"]


@pytest.fixture
def folder(tmp_path):
    store(tmp_path, "A", "cat", entry())
    store(tmp_path, "B", "x", entry("B", "x", 1.0, 0.0, others=("A",)))
    both = entry()
    for side, value in (("final_results", 0.3), ("zero_shot", 0.5)):
        both[side]["A"]["dog"] = {"cls_acc_test": value, "no_cls_acc": 0.7, "acc_train": None}
    store(tmp_path, "A", "cat|dog", both)
    add_args(tmp_path, "Namespace(backbone='mini', seed=0, forget=['a', 'b'])")
    return tmp_path


def test_create_results_columns_and_values(folder):
    df, args = create_results(folder)
    assert list(df.columns) == [
        *("ds", "name", "full_Noforget", "cls_Noforget", "cls_forget", "full_forget"),
        *("res_B", "full_B", "res_A", "full_A"),
    ]
    row = df.set_index("name").loc["cat"]
    assert row.tolist()[:5] == ["A", 0.8, 0.9, 0.1, 0.7]
    assert (row.res_B, row.full_B) == (0.5, 0.6) and math.isnan(row.res_A)
    assert args.backbone == "mini" and args.seed == 0 and args.forget == ["a", "b"]


def test_create_results_of_multiclass(folder):
    df, _, logs = create_results(folder, multiclass=True, return_logs=True)
    assert df.name.tolist() == ["cat|dog"] and set(logs) == {"A", "B"}
    row = df.iloc[0]
    assert row.cls_forget == pytest.approx(0.2) and row.cls_Noforget == pytest.approx(0.7)
    assert row.cls_forget_all == {"cat": 0.1, "dog": 0.3}


def test_create_results_takes_any_spelling_of_the_folder(folder, monkeypatch):
    expected, _ = create_results(folder)
    monkeypatch.chdir(folder.parent)
    for spelling in (f"{folder}/", str(folder), folder.name, f"./{folder.name}/"):
        assert create_results(spelling)[0].equals(expected)


def test_wrong_rn_is_a_warning_with_the_right_one(folder):
    with pytest.warns(UserWarning, match="rn=False is right"):
        create_results(folder, rn=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_results(folder, rn=False)


@pytest.mark.parametrize("multiclass", [False, True])
def test_logs_of_the_papers_public_code(tmp_path, multiclass):
    """No zero_shot, no solver, no settings; args.txt is the text of a Namespace."""
    label = "Pekinese|toy poodle" if multiclass else "Pekinese"
    own = {
        name: {"cls_acc_test": acc, "no_cls_acc": 0.5, "acc_train": None}
        for name, acc in zip(label.split("|"), (0.1, 0.3), strict=False)
    }
    results = {"StanfordDogs": own, "Caltech101": {"all": {"all_ds": 0.85}}}
    logs = {"StanfordDogs": {label: {"final_results": results}}}
    (tmp_path / "logs.json").write_text(json.dumps(logs))
    (tmp_path / "args.txt").write_text("Namespace(backbone_arch='RN50', seed=0, lora_r=5)")
    with pytest.warns(UserWarning, match="before forgetting"):
        df, args = create_results(tmp_path, rn=True, multiclass=multiclass)
    assert df.cls_forget[0] == pytest.approx(0.2 if multiclass else 0.1)
    assert df.full_forget[0] == 0.5 and df.res_Caltech101[0] == 0.85
    assert df[["full_Noforget", "cls_Noforget", "full_Caltech101"]].isna().all().all()
    assert args.lora_r == 5


@pytest.mark.parametrize(
    ("content", "multiclass", "message"),
    [
        (None, False, "run forget_clip.sh"),
        (
            {"A": {"settings": {}, "cat": {"final_results": {"A": {"cat": {}}}}}},
            True,
            "no multiclass",
        ),
        ({"A": {"settings": {}}}, False, "no single-class"),
    ],
)
def test_a_folder_without_such_results_is_one_line(tmp_path, content, multiclass, message):
    if content is not None:
        (tmp_path / "logs.json").write_text(json.dumps(content))
    with pytest.raises(ProblemError, match=message):
        create_results(tmp_path, multiclass=multiclass)


def test_args_are_read_and_never_run(folder):
    (folder / "args.txt").write_text("Namespace(a=__import__('os').system('touch owned'))")
    with pytest.raises(ProblemError, match=r"args\.txt"):
        create_results(folder)
    assert not (folder / "owned").exists()


def test_avg_gain_is_the_mean_of_the_papers_five_numbers():
    import pandas as pd

    df = pd.DataFrame(
        {
            "ds": ["A"],
            "name": ["cat"],
            "full_Noforget": [0.8],
            "cls_Noforget": [0.5],
            "cls_forget": [0.1],  # a fifth is left
            "full_forget": [0.6],  # a quarter is lost
            "res_B": [0.5],
            "full_B": [0.4],  # a gain counts as 0
            "res_C": [0.45],
            "full_C": [0.5],  # a tenth is lost
            "res_D": [0.3],
            "full_D": [0.3],
        }
    )
    assert compute_avg_gain(df).tolist() == pytest.approx([(0.2 + 0.25 + 0 + 0.1 + 0) / 5])


def test_avg_gain_works_for_any_sets(folder):
    df, _ = create_results(folder)
    cat = (0.1 / 0.9 + 0.1 / 0.8 + 0.1 / 0.6) / 3
    x = (0 + 0.1 / 0.8 + 0.1 / 0.6) / 3
    assert compute_avg_gain(df).tolist() == pytest.approx([cat, x])


def test_reading_results_loads_nothing_heavy():
    code = "import sys, utils; print({'torch', 'matplotlib', 'pandas'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'pandas'}"
