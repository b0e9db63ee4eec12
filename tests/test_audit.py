"""The audit of a results folder: its intervals, its models, its findings in words, its files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch.nn.functional import normalize

import train
from clip.bundle import bundle_path, load_bundles
from clip.source import ClipSource
from evaluation.audit import __main__ as audit
from evaluation.audit.case import AuditData, Model
from evaluation.audit.inputs import Places
from evaluation.audit.record import read_audits
from evaluation.audit.run import MEASURES, Results, audit_folder
from evaluation.audit.statistics import accuracy, auc, highest, mean_value
from evaluation.audit.verdict import verdict
from evaluation.rows import read_rows
from evaluation.tables import audit_table
from forgetting.errors import ProblemError
from forgetting.problem import LowRankEdit
from tests.conftest import BACKBONE, toy_bundle

NOTHING = {"names": 0, "attacks": {}, "not_measured": []}  # what undoing may find


# --- statistics


@example(400, 1)
@example(400, 399)
@given(st.integers(1, 400), st.integers(0, 400))
def test_an_interval_is_scipys_holds_its_value_and_narrows_with_images(n, k):
    k = min(k, n)
    found, expected = accuracy(torch.arange(n) < k), binomtest(k, n).proportion_ci()
    assert [found["low"], found["high"]] == pytest.approx([*expected], abs=1e-9)
    assert (found["low"] > 0) == (k > 0) and (found["high"] < 1) == (k < n)
    assert found["n"] == n and found["value"] == k / n
    assert found["low"] <= found["value"] <= found["high"]
    wider = accuracy(torch.arange(4 * n) < 4 * k)
    assert wider["high"] - wider["low"] < found["high"] - found["low"] + 1e-12


def test_statistics_of_few():
    assert accuracy(torch.zeros(100, dtype=torch.bool))["high"] == pytest.approx(0.0362, abs=1e-4)
    nothing = accuracy(torch.zeros(0, dtype=torch.bool))
    assert nothing == {"value": None, "low": None, "high": None, "n": 0}
    assert mean_value([nothing]) is None and mean_value([nothing, {"value": 0.5}]) == 0.5
    # Pairs: won, won, tied, won.
    assert auc(torch.tensor([0.9, 0.4]), torch.tensor([0.4, 0.1])) == 3.5 / 4
    assert auc(-torch.tensor([0.9, 0.4]), -torch.tensor([0.4, 0.1])) == 0.5 / 4
    assert highest(torch.tensor([1.0, 3.0, 1.0, 3.0]), 3).tolist() == [1, 3, 0]


# --- models


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_scores_after_a_change_are_those_of_the_changed_projection(seed, rank):
    """Also of a text that is sent to nearly nothing, and of a removed one."""
    bundle, generator = toy_bundle("ToyAnimals"), torch.Generator().manual_seed(seed)
    w, d = bundle.text_projection.shape
    left = torch.randn(w, rank, generator=generator) / w**0.5
    data = AuditData(bundle)
    model = Model(data, LowRankEdit(left, torch.randn(rank, d, generator=generator)))
    texts = normalize(bundle.class_hidden @ model.projection, dim=1).double()
    assert torch.allclose(model.classes, texts, atol=1e-5)
    assert torch.allclose(model.cosines, data.images @ texts.T, atol=1e-5)
    h = bundle.class_hidden[:1]
    edit = LowRankEdit(h.T / h.square().sum(), -0.999999 * h @ bundle.text_projection)
    vanished = Model(data, edit, (bundle.classnames[1],))
    assert vanished.cosines.abs().max() < 1 + 1e-5
    assert vanished.scores[:, 1].eq(-torch.inf).all()
    assert torch.equal(vanished.scores[:, 2:], vanished.cosines[:, 2:])


def test_what_classes_share_is_computed_once():
    data, calls = AuditData(toy_bundle("ToyAnimals")), []
    assert [data.once(lambda data: len(calls)), data.once(calls.append)] == [0, None]
    data.once(calls.append)
    assert calls == [data]


# --- findings in words


def planted(**changes):
    """An audit in which everything speaks for forgetting, but for `changes`."""

    def share(value):
        return {"value": value, "low": value, "high": value, "n": 50}

    worst = {"text": "pooch", "kind": "synonym", "before": share(0.8), "after": share(0.1)}
    kinds = {"synonym": False, "evaluation": False, "bare": True}
    found = {
        "residue": {
            "zero_shot": {"before": share(0.9), "after": share(0.0)},
            "linear_probe": {"before": share(0.2), "after": share(0.2)},
        },
        "paraphrase": {
            "worst": worst,
            "back": [],
            "prompts": [{"seen": seen, "kind": kind} for kind, seen in kinds.items()],
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
    leak = [("fox", 0.6), ("wolf", 0.9)]
    back["destinations"] = {
        "worst_auc": 0.9,
        "leak": [{"name": name, "auc_before": 0.5, "auc_after": area} for name, area in leak],
    }
    heads = ["comes back under 1 of 1 other text", "its 2 nearest classes change by -25.0 points"]
    heads += ["'wolf', a neighbour, falls from 90.0 % to 30.0 %", "own prompt: 90.0 % -> 0.0 %"]
    heads += ["limit: 1 image brings half of it back", "limit: the full list of scores tells its"]
    heads += ["limit: whoever has the changed weights and the original"]
    lines = verdict(back)
    shown = zip([*lines[:4], *lines[-3:]], heads, strict=True)
    assert all(line.startswith(head) for line, head in shown), lines
    assert "'wolf' in 90 of 100 pairs" in lines[-2]


def test_a_class_that_was_not_forgotten_neither_comes_back_nor_is_relearnt():
    kept = planted(relearning={"methods": {"cache": {"needed": 1}}})
    kept["residue"]["zero_shot"]["after"]["value"] = 0.8
    kept["paraphrase"]["back"] = ["pooch"]
    lines = verdict(kept)
    assert lines[0].startswith("own prompt: 90.0 % -> 80.0 %")
    assert lines[1].startswith("was not forgotten; found by 1 of 1 other text too")
    assert not any("bring" in line or "comes back" in line for line in lines)
    # Absent measures are passed over; what was not measured is reported.
    assert verdict({}) == []
    found = {"paraphrase": {"worst": None, "not_measured": ["no templates"]}}
    assert verdict(found) == ["not measured: no templates"]


# --- a results folder


@pytest.fixture
def results(toy_args, tmp_path) -> Path:
    """ToyAnimals with two classes forgotten by the exact method."""
    train.main([*toy_args[:-10], "--trainer", "ForgetExact", "--forget", "cat", "--forget", "C/V"])
    return tmp_path / "out"


@pytest.fixture
def places(features) -> Places:
    return Places(features=str(features))


def run(folder: Path, features: Path, *argv: str) -> int:
    return audit.cli([str(folder), "--features", str(features), *argv])


def test_from_the_command_line_to_its_own_table(results, features, capsys):
    assert run(results, features) == 0
    printed = capsys.readouterr().out
    assert str(results / "audit.json") in printed and "own prompt" in printed
    audits = read_audits(results)
    assert set(audits["ToyAnimals"]) == {"cat", "C/V"}
    assert (results / "ToyAnimals" / "C%2FV.audit.json").is_file()
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


def test_what_was_audited_is_not_audited_again(results, places, monkeypatch):
    calls = []
    monkeypatch.setitem(MEASURES, "undo", lambda case: calls.append(case.name) or NOTHING)
    audit_folder(results, labels=["cat"], places=places)
    audit_folder(results, places=places)
    assert calls == ["cat", "C/V"]
    # Fewer measures: what is there stays. One that is lacking, or another seed: measured again.
    before = read_audits(results)
    audit_folder(results, without=["undo", "relearning"], places=places)
    assert read_audits(results) == before
    monkeypatch.setitem(MEASURES, "another", lambda case: {"not_measured": [case.name]})
    audit_folder(results, labels=["cat"], places=places)
    found = read_audits(results)["ToyAnimals"]["cat"]["classes"]["cat"]
    assert found["another"] == {"not_measured": ["cat"]}
    assert found["verdict"][-1] == "not measured: cat"
    assert found["paraphrase"] == before["ToyAnimals"]["cat"]["classes"]["cat"]["paraphrase"]
    audit_folder(results, labels=["C/V"], seed=1, places=places)
    assert calls == ["cat", "C/V", "cat", "C/V"]
    other = (results / "ToyAnimals" / "C%2FV.safetensors").read_bytes()
    (results / "ToyAnimals" / "cat.safetensors").write_bytes(other)
    with pytest.raises(ProblemError, match="forgets"):
        audit_folder(results, seed=1, places=places)
    assert len(calls) == 4


def test_an_interrupted_audit_goes_on_where_it_was(results, places, monkeypatch):
    def stopped(case):
        if case.name == "C/V":
            raise KeyboardInterrupt
        return NOTHING

    monkeypatch.setitem(MEASURES, "undo", stopped)
    with pytest.raises(KeyboardInterrupt):
        audit_folder(results, places=places)
    assert set(read_audits(results)["ToyAnimals"]) == {"cat"}
    # A killed audit compiles nothing, and its files are enough.
    (results / "audit.json").unlink()
    calls = []
    monkeypatch.setitem(MEASURES, "undo", lambda case: calls.append(case.name) or NOTHING)
    assert set(audit_folder(results, places=places)["ToyAnimals"]) == {"cat", "C/V"}
    assert calls == ["C/V"]


def test_a_stranger_forgets_none_of_the_classes(results):
    data = AuditData(toy_bundle("ToyAnimals"))

    def stranger(*others: str):
        return Results(results, ["cat", *others], data).stranger("cat", "cat")

    classes, edit = stranger("C/V")
    assert classes == ["C/V"] and edit.left.shape[1] == 1
    assert stranger() is None
    assert stranger("cat|owl", "owl|cat") is None, "it would cancel out"


def test_the_driver_audits(toy_args, tmp_path, capsys):
    train.main([*toy_args, "--forget", "owl", "--audit"])
    assert "own prompt" in capsys.readouterr().out
    assert set(read_audits(tmp_path / "out")["ToyAnimals"]) == {"owl"}


# --- refusals


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset", "ToyAnimal"], "'ToyAnimals'"),
        (["--forget", "cats"], "'cat'"),
        (["--without", "relearn"], "'relearning'"),
        (["--features", "nowhere"], "nowhere"),
        (["--sed", "1"], "--seed"),
    ],
)
def test_mistakes_are_one_line(results, features, capsys, argv, message):
    capsys.readouterr()
    assert run(results, features, *argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error:") and message in lines[0]
    assert not (results / "audit.json").exists()


def test_folders_without_results_and_inputs_that_changed(results, features, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder, message in (
        (tmp_path / "none", "no such folder"),
        (tmp_path / "empty", "logs.json is missing"),
        (results.parent, str(results)),
    ):
        assert run(folder, features) == 2 and message in capsys.readouterr().err
    bundles = load_bundles(features, BACKBONE)
    for name, bundle in bundles.items():
        path = bundle_path(features, BACKBONE, name)
        path.unlink()
        replace(bundle, weights="others").save(path)
    assert run(results, features) == 2
    assert "made with weights 'toy'" in capsys.readouterr().err
    (results / "ToyAnimals" / "cat.safetensors").unlink()
    for name, bundle in bundles.items():
        path = bundle_path(features, BACKBONE, name)
        path.unlink()
        bundle.save(path)
    assert run(results, features) == 2
    assert "missing" in capsys.readouterr().err


def test_no_path_is_taken_from_the_results(results, tmp_path, monkeypatch, capsys):
    """Logs and command lines of somebody else name a model folder and a cache: neither is
    opened."""
    foreign = tmp_path / "foreign"
    path = results / "logs.json"
    logs = json.loads(path.read_text())
    logs["ToyAnimals"]["settings"]["backbone"] = f"hf:{foreign}"
    path.write_text(json.dumps(logs))
    lines = (results / "args.txt").read_text()
    (results / "args.txt").write_text(lines.replace(str(tmp_path / "cache"), str(foreign)))
    monkeypatch.setattr(ClipSource, "__init__", lambda *a, **b: pytest.fail("a model was opened"))
    assert audit.cli([str(results), "--root", str(tmp_path)]) == 2
    assert "--backbone" in capsys.readouterr().err
    assert not foreign.exists()


def test_a_damaged_audit_is_left_as_it_is(results, features, capsys):
    path = results / "ToyAnimals" / "cat.audit.json"
    for text in ('{"format": ', '{"format": "another"}'):
        path.write_text(text)
        assert run(results, features) == 2
        assert str(path) in capsys.readouterr().err and path.read_text() == text
