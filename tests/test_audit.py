"""The audit of a results folder: its intervals, its findings in words, its file, its refusals."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch.nn.functional import normalize

import train
from clip.bundle import bundle_path, load_bundles
from evaluation.audit import __main__ as audit
from evaluation.audit import record
from evaluation.audit.case import Block, Common, Model
from evaluation.audit.interval import accuracy, mean_value
from evaluation.audit.order import highest
from evaluation.audit.record import merge_audits, read_audits
from evaluation.audit.run import MEASURES, _Results, audit_folder
from evaluation.audit.verdict import verdict
from evaluation.results import read_logs
from evaluation.rows import read_rows
from evaluation.tables import audit_table
from forgetting.errors import ProblemError
from tests.conftest import BACKBONE, toy_bundle

NOTHING = {"names": 0, "attacks": {}, "not_measured": []}  # what undoing may find


@given(st.integers(1, 400), st.data())
def test_an_interval_holds_its_value_and_narrows_with_images(n, data):
    k = data.draw(st.integers(0, n))
    found = accuracy(torch.arange(n) < k)
    assert found["n"] == n and found["value"] == k / n
    assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1
    wider = accuracy(torch.arange(4 * n) < 4 * k)
    assert wider["high"] - wider["low"] < found["high"] - found["low"] + 1e-12


@given(st.integers(1, 200), st.data())
def test_the_interval_is_scipys(n, data):
    k = data.draw(st.integers(0, n))
    found, expected = accuracy(torch.arange(n) < k), binomtest(k, n).proportion_ci()
    assert [found["low"], found["high"]] == pytest.approx([*expected], abs=1e-9)


def test_where_all_images_agree_the_interval_is_not_a_point():
    assert accuracy(torch.zeros(100, dtype=torch.bool))["high"] == pytest.approx(0.0362, abs=1e-4)
    assert accuracy(torch.ones(100, dtype=torch.bool))["low"] == pytest.approx(0.9638, abs=1e-4)
    nothing = accuracy(torch.zeros(0, dtype=torch.bool))
    assert nothing == {"value": None, "low": None, "high": None, "n": 0}
    assert mean_value([nothing]) is None and mean_value([nothing, {"value": 0.5}]) == 0.5


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_scores_after_a_change_are_those_of_the_changed_projection(seed, rank):
    """Also of a text that is sent to nearly nothing, and of a removed one."""
    bundle, generator = toy_bundle("ToyAnimals"), torch.Generator().manual_seed(seed)
    w, d = bundle.text_projection.shape
    left = torch.randn(w, rank, generator=generator) / w**0.5
    model = Model(Common(bundle), (left, torch.randn(rank, d, generator=generator)))
    texts = normalize(bundle.class_hidden @ model.projection, dim=1)
    assert torch.allclose(model.classes, texts, atol=1e-5)
    assert torch.allclose(model.cosines, bundle.image_features @ texts.T, atol=1e-5)
    h = bundle.class_hidden[:1]
    factors = h.T / h.square().sum(), -0.999999 * h @ bundle.text_projection
    vanished = Model(Common(bundle), factors, (bundle.classnames[1],))
    assert vanished.cosines.abs().max() < 1 + 1e-5
    assert vanished.scores[:, 1].eq(-torch.inf).all()
    assert torch.equal(vanished.scores[:, 2:], vanished.cosines[:, 2:])


def test_what_classes_have_in_common_is_found_once():
    common, calls = Common(toy_bundle("ToyAnimals")), []

    def find(asked: Common) -> str:
        calls.append(asked)
        return "found"

    assert [common.once(find), common.once(find)] == ["found"] * 2 and calls == [common]


def test_what_a_block_shares_is_found_once_and_keeps_nobody_alive():
    common, block, calls = Common(toy_bundle("ToyAnimals")), Block(), []
    models = [Model(common, None, (), block) for _ in range(3)]

    def find(asked: list[Model]) -> list[int]:
        calls.append(len(asked))
        return [models.index(model) for model in asked]

    assert [block.once(find, model) for model in models] == [0, 1, 2] and calls == [3]
    late = Model(common, None, (), block)
    models.append(late)
    assert block.once(find, late) == 3 and calls == [3, 1]
    gone = weakref.ref(models.pop(0))
    assert gone() is None
    # No more of them at once than memory has room for.
    w, d = common.bundle.text_projection.shape
    wide, change = Block(), (torch.zeros(w, 50), torch.zeros(50, d))
    models[:] = [Model(common, change, (), wide) for _ in range(6)]
    calls.clear()
    assert [wide.once(find, model) for model in models] == list(range(6)) and calls == [2, 2, 2]
    assert wide.full and not block.full


@given(st.lists(st.integers(-3, 3), max_size=20), st.integers(0, 25))
def test_the_highest_are_those_of_a_stable_sort(values, count):
    x = torch.tensor(values, dtype=torch.float32)
    assert highest(x, count).tolist() == x.argsort(descending=True, stable=True)[:count].tolist()


def planted(**changes):
    """An audit in which everything speaks for forgetting, but for `changes`."""

    def share(value):
        return {"value": value, "low": value, "high": value, "n": 50}

    found = {
        "residue": {
            "zero_shot": {"before": share(0.9), "after": share(0.0)},
            "linear_probe": {"before": share(0.2), "after": share(0.2)},
        },
        "paraphrase": {
            "worst": {
                "text": "pooch",
                "kind": "synonym",
                "before": share(0.8),
                "after": share(0.1),
            },
            "back": [],
            "prompts": [
                {"seen": False, "kind": "synonym"},
                {"seen": False, "kind": "evaluation"},
                {"seen": True, "kind": "bare"},
            ],
        },
        "neighbours": {
            "classes": [{"name": "wolf", "before": share(0.8), "after": share(0.8)}],
            "mean_before": 0.8,
            "mean_after": 0.8,
        },
        "relearning": {"methods": {"cache": {"needed": None}, "probe": {"needed": None}}},
        "undo": {"names": 900, "attacks": {"alone": {"place": 400}}},
    }
    return found | changes


def test_the_verdict_has_bad_news_first():
    good = verdict(planted())
    assert good[0].startswith("own prompt: 90.0 % -> 0.0 %")
    assert not any(line.startswith("limit") for line in good)
    assert any("stays away under 1 other text; most by" in line for line in good)
    back = planted(relearning={"methods": {"cache": {"needed": 8}, "probe": {"needed": 1}}})
    back["paraphrase"]["worst"]["after"]["value"] = 0.7
    back["paraphrase"]["back"] = ["pooch"]
    back["undo"]["attacks"] = {"original_known": {"place": 1}, "alone": None}
    back["neighbours"] = {
        "classes": [
            {"name": "wolf", "before": {"value": 0.9}, "after": {"value": 0.3}},
            {"name": "fox", "before": {"value": 0.7}, "after": {"value": 0.8}},
        ],
        "mean_before": 0.8,
        "mean_after": 0.55,
    }
    lines = verdict(back)
    assert lines[:4] == [
        "comes back under 1 of 1 other text; most by 'pooch' (synonym): 70.0 %, before 80.0 %",
        "its 2 nearest classes change by -25.0 points",
        "'wolf', a neighbour, falls from 90.0 % to 30.0 %",
        "own prompt: 90.0 % -> 0.0 % of 50 images (95 % interval 0.0 % to 0.0 %)",
    ]
    assert lines[-2:] == [
        "limit: 1 image brings half of it back (a classifier on top)",
        "limit: whoever has the changed weights and the original finds its name in place 1 of 900",
    ]


def test_a_class_that_was_not_forgotten_neither_comes_back_nor_is_relearnt():
    kept = planted(relearning={"methods": {"cache": {"needed": 1}}})
    kept["residue"]["zero_shot"]["after"]["value"] = 0.8
    kept["paraphrase"]["back"] = ["pooch"]
    lines = verdict(kept)
    assert lines[0].startswith("own prompt: 90.0 % -> 80.0 %")
    assert lines[1].startswith("was not forgotten; found by 1 of 1 other text too")
    assert not any("bring" in line or "comes back" in line for line in lines)


def test_a_verdict_says_what_was_not_measured_and_survives_absent_measures():
    assert verdict({}) == []
    found = {"paraphrase": {"worst": None, "not_measured": ["no templates"]}}
    assert verdict(found) == ["not measured: no templates"]


@pytest.fixture
def results(toy_args, tmp_path):
    """ToyAnimals with two classes forgotten by the exact method."""
    train.main([*toy_args[:-10], "--trainer", "ForgetExact", "--forget", "cat", "--forget", "C/V"])
    return tmp_path / "out"


def run(*argv: str) -> int:
    return audit.cli([*map(str, argv)])


def test_from_the_command_line_to_its_own_table(results, capsys):
    assert run(results) == 0
    printed = capsys.readouterr().out
    assert str(results / "audit.json") in printed and "own prompt" in printed
    audits = read_audits(results)
    assert set(audits["ToyAnimals"]) == {"cat", "C/V"}
    found = audits["ToyAnimals"]["cat"]["classes"]["cat"]
    assert set(MEASURES) <= set(found) and found["verdict"]
    assert set(found["seconds"]) == set(MEASURES)
    logs = json.loads((results / "logs.json").read_text())["ToyAnimals"]["cat"]
    for side, key in (("before", "zero_shot"), ("after", "final_results")):
        value = found["residue"]["zero_shot"][side]["value"]
        assert value == pytest.approx(logs[key]["ToyAnimals"]["cat"]["cls_acc_test"])
    table = audit_table(read_rows(results))
    assert table["class"].tolist() == ["cat", "C/V"] and (table["before"] > 80).all()
    assert (results / "audit.csv").read_text().count("\n") == 3
    json.dumps(audits, allow_nan=False)


def test_what_was_audited_is_not_audited_again(results, monkeypatch):
    calls = []
    monkeypatch.setitem(MEASURES, "undo", lambda case: calls.append(case.name) or NOTHING)
    audit_folder(results, labels=["cat"])
    audit_folder(results)
    assert calls == ["cat", "C/V"]
    # Less is asked for: what is there stays. Then one measure is lacking, and is made alone.
    before = read_audits(results)
    audit_folder(results, without=["undo", "relearning"])
    assert read_audits(results) == before
    monkeypatch.setitem(MEASURES, "another", lambda case: {"not_measured": [case.name]})
    audit_folder(results, labels=["cat"])
    found = read_audits(results)["ToyAnimals"]["cat"]["classes"]["cat"]
    assert found["another"] == {"not_measured": ["cat"]}
    assert found["verdict"][-1] == "not measured: cat"
    assert found["paraphrase"] == before["ToyAnimals"]["cat"]["classes"]["cat"]["paraphrase"]
    assert calls == ["cat", "C/V"]
    audit_folder(results, seed=1)
    assert calls == ["cat", "C/V", "cat", "C/V"]
    adapter = next((results / "ToyAnimals").glob("cat.safetensors"))
    other = next((results / "ToyAnimals").glob("C*V.safetensors"))
    keep = adapter.read_bytes()
    adapter.write_bytes(other.read_bytes())
    with pytest.raises(ProblemError, match="forgets"):
        audit_folder(results, seed=1)
    adapter.write_bytes(keep)
    assert calls[4:] == []


def test_classes_that_are_audited_together_are_found_as_alone(results, monkeypatch):
    def audits() -> dict:
        (results / "audit.json").unlink(missing_ok=True)
        found = audit_folder(results)["ToyAnimals"]
        return {
            label: {
                name: {key: value for key, value in measures.items() if key != "seconds"}
                for name, measures in entry["classes"].items()
            }
            for label, entry in found.items()
        }

    def near(one: object, other: object) -> bool:
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(near(one[key], other[key]) for key in one)
        if isinstance(one, list):
            return len(one) == len(other) and all(map(near, one, other))
        return one == (pytest.approx(other, abs=1e-6) if isinstance(one, float) else other)

    together = audits()
    monkeypatch.setattr(Block, "SIZE", 1)
    assert len(together) == 2 and near(audits(), together)


def test_a_record_keeps_what_others_write_meanwhile(tmp_path, monkeypatch):
    def entry(number: int) -> dict:
        return {"adapter_sha256": str(number), "settings": {"é\udc80": 0.1}, "classes": {}}

    merge_audits(tmp_path, [("A", "a", entry(1))])
    known = record._growing.cache_info()
    monkeypatch.setattr(record, "_growing", record._growing.__wrapped__)  # another process
    merge_audits(tmp_path, [("A", "b", entry(2)), ("B", "a", entry(3))])
    monkeypatch.undo()
    merge_audits(tmp_path, [("A", "a", entry(4))])
    assert record._growing.cache_info().hits == known.hits + 1
    assert read_audits(tmp_path) == {"A": {"a": entry(4), "b": entry(2)}, "B": {"a": entry(3)}}


def test_a_stranger_forgets_none_of_the_classes(results):
    logs = read_logs(results)["ToyAnimals"]
    common = Common(toy_bundle("ToyAnimals"))

    def stranger(*others: dict[str, dict]):
        there = _Results(results, {"cat": logs["cat"]} | dict(*others), common)
        return there.with_stranger("cat", there.cases("cat", None)["cat"]).stranger

    classes, (left, _) = stranger({"C/V": logs["C/V"]})
    assert classes == ["C/V"] and left.shape[1] == 1
    assert stranger() is None
    with_cat = {"final_results": {"ToyAnimals": {"cat": {}, "owl": {}}}}
    assert stranger({"cat|owl": with_cat, "owl|cat": with_cat}) is None, "it would cancel out"


def test_a_broken_off_audit_keeps_what_it_found(results, monkeypatch):
    def stopped(case):
        if case.name == "C/V":
            raise KeyboardInterrupt
        return NOTHING

    monkeypatch.setitem(MEASURES, "undo", stopped)
    with pytest.raises(KeyboardInterrupt):
        audit_folder(results)
    assert set(read_audits(results)["ToyAnimals"]) == {"cat"}


def test_the_driver_audits(toy_args, tmp_path, capsys):
    train.main([*toy_args, "--forget", "owl", "--audit"])
    assert "own prompt" in capsys.readouterr().out
    assert set(read_audits(tmp_path / "out")["ToyAnimals"]) == {"owl"}


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--dataset", "ToyAnimal"], "did you mean 'ToyAnimals'"),
        (["--forget", "cats"], "did you mean 'cat'"),
        (["--without", "relearn"], "did you mean 'relearning'"),
        (["--features", "nowhere"], "nowhere"),
        (["--sed", "1"], "--seed"),
    ],
)
def test_mistakes_are_one_line(results, capsys, argv, message):
    capsys.readouterr()
    assert run(results, *argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error:") and message in lines[0]
    assert not (results / "audit.json").exists()


def test_a_folder_without_results_and_inputs_that_changed(results, features, tmp_path, capsys):
    assert run(tmp_path / "empty") == 2
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty") == 2
    assert "logs.json is missing" in capsys.readouterr().err
    assert run(results.parent) == 2
    assert f"did you mean {results}?" in capsys.readouterr().err
    bundles = load_bundles(features, BACKBONE)

    def save(weights: str, *names: str) -> None:
        for name in names:
            path = bundle_path(features, BACKBONE, name)
            path.unlink()
            replace(bundles[name], weights=weights).save(path)

    save("others", "ToyAnimals")
    assert run(results) == 2
    assert "made with different weights" in capsys.readouterr().err
    save("others", *bundles)
    assert run(results) == 2
    assert "made with weights 'toy'" in capsys.readouterr().err
    (results / "ToyAnimals" / "cat.safetensors").unlink()
    save("toy", *bundles)
    assert run(results) == 2
    assert "is gone" in capsys.readouterr().err


def test_a_torn_audit_is_left_as_it_is(results, capsys):
    (results / "audit.json").write_text('{"format": ')
    assert run(results) == 2
    assert "is not JSON" in capsys.readouterr().err
    assert (results / "audit.json").read_text() == '{"format": '
