"""The audit of a results folder: its intervals, its models, its findings in words, its files."""

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
from engine.cli import run
from evaluation.audit import __main__ as audit
from evaluation.audit.case import AuditData, Model, accuracy
from evaluation.audit.inputs import Places
from evaluation.audit.record import read_audits
from evaluation.audit.run import MEASURES, audit_folder, cases_of
from evaluation.audit.verdict import verdict
from evaluation.rows import read_rows
from evaluation.tables import audit_table
from forgetting.adapter import load_adapter, save_adapter
from forgetting.problem import LowRankEdit
from tests.conftest import BACKBONE, refuses, toy_bundle


@example(400, 1)
@example(400, 399)
@given(st.integers(1, 400), st.integers(0, 400))
def test_an_interval_is_scipys_holds_its_value_and_narrows_with_images(n, k):
    k = min(k, n)
    found, expected = accuracy(k, n), binomtest(k, n).proportion_ci()
    assert [found["low"], found["high"]] == pytest.approx([*expected], abs=1e-9)
    assert (found["low"] > 0) == (k > 0) and (found["high"] < 1) == (k < n)
    assert found["n"] == n and found["value"] == k / n
    assert found["low"] <= found["value"] <= found["high"]
    wider = accuracy(4 * k, 4 * n)
    assert wider["high"] - wider["low"] < found["high"] - found["low"] + 1e-12
    assert accuracy(0, 0) == {"value": None, "low": None, "high": None, "n": 0}


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
    assert torch.allclose(model.cosines, data.images @ texts.T, atol=1e-5)
    h = bundle.class_hidden[:1]
    edit = LowRankEdit(h.T / h.square().sum(), -0.999999 * h @ bundle.text_projection)
    vanished = Model(data, edit, (1,))
    assert vanished.cosines.abs().max() < 1 + 1e-5
    assert vanished.scores[:, 1].eq(-torch.inf).all()
    assert torch.equal(vanished.scores[:, 2:], vanished.cosines[:, 2:])


def sides(before: float, after: float) -> dict:
    return {"before": accuracy(round(50 * before), 50), "after": accuracy(round(50 * after), 50)}


def planted() -> dict:
    """An audit in which everything speaks for forgetting."""
    kinds = {"synonym": False, "evaluation": False, "bare": True}
    prompts = [{"seen": seen, "kind": kind} for kind, seen in kinds.items()]
    worst = {"text": "pooch", "kind": "synonym", **sides(0.8, 0.1)}
    methods = {name: {"forgotten": [0.1], "needed": None} for name in ("cache", "refit")}
    return {
        "residue": {"zero_shot": sides(0.9, 0), "linear_probe": sides(0.48, 0.48)},
        "paraphrase": {"worst": worst, "back": [], "prompts": prompts},
        "neighbours": {"classes": [{"name": "wolf", **sides(0.8, 0.8)}]},
        "relearning": {"methods": methods},
        "undo": {"names": 900, "attacks": {"alone": {"place": 6}}},
    }


def test_the_verdict_has_bad_news_first():
    assert verdict(planted()) == [
        "own prompt: 90.0 % -> 0.0 % of 50 images (95 % interval 0.0 to 7.1 %)",
        "found by 0 of 1 other texts; most by 'pooch' (synonym): 80.0 % -> 10.0 %",
        "its 1 nearest classes change by +0.0 points",
        "no number of images that was tried brings half of it back",
        "a classifier trained on images (linear probe) finds 48.0 % of its images",
        "whoever has the changed weights alone finds its name in place 6 of 900",
    ]
    bad = planted()
    bad["paraphrase"]["back"] = ["pooch"]
    bad["neighbours"]["classes"][0] |= sides(0.9, 0.68)
    bad["neighbours"]["classes"].append({"name": "fox", **sides(0.7, 0.84)})
    bad["residue"]["linear_probe"] = sides(0.52, 0.52)
    areas = {"auc_before": 0.5, "auc_after": 0.6}
    leak = [{"name": "fox", **areas}, {"name": "wolf", **areas, "auc_after": 0.82}]
    bad["destinations"] = {"leak": leak}
    bad["relearning"]["methods"] = {"cache": {"needed": 8}, "refit": {"needed": 1}}
    bad["undo"]["attacks"] = {"original_known": {"place": 5}, "alone": {"place": None}}
    heads = ["found by 1 of 1", "its 2 nearest classes change by -4.0 points"]
    heads += ["'wolf', a neighbour, falls from 90.0 % to 68.0 %", "own prompt: 90.0 % -> 0.0 %"]
    heads += ["limit: half of it comes back with 1 of its images"]
    heads += ["limit: the full list of scores tells its images from those of 'wolf' in 82 of 100"]
    heads += ["limit: a classifier", "limit: whoever has the changed weights and the original"]
    pairs = zip(verdict(bad), heads, strict=True)
    assert all(line.startswith(head) for line, head in pairs), verdict(bad)


def test_a_class_that_was_not_forgotten_is_not_relearnt_and_absent_measures_are_passed_over():
    kept = planted()
    kept["relearning"]["methods"]["cache"]["needed"] = 1
    kept["residue"]["zero_shot"] = sides(0.9, 0.8)
    lines = verdict(kept)
    assert lines[0].startswith("own prompt: 90.0 % -> 80.0 %") and "not forgotten" in lines[0]
    assert not any("comes back" in line for line in lines)
    assert verdict({}) == [] and verdict({"paraphrase": {"worst": None}}) == []


@pytest.fixture
def results(toy_args, tmp_path) -> Path:
    """ToyAnimals with two classes forgotten by the exact method."""
    train.main([*toy_args[:-10], "--trainer", "ForgetExact", "--forget", "cat", "--forget", "C/V"])
    return tmp_path / "out"


def audited(folder: Path, features: Path) -> int:
    return run(audit.main, [str(folder), "--features", str(features)])


def test_from_the_command_line_to_its_own_table(results, features, capsys):
    assert audited(results, features) == 0
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


def test_an_interrupted_audit_goes_on_and_nothing_is_audited_twice(results, features, monkeypatch):
    calls, places = [], Places(features=str(features))

    def undo(case):
        calls.append(case.name)
        if calls == ["cat", "C/V"]:
            raise KeyboardInterrupt
        return {}

    monkeypatch.setitem(MEASURES, "undo", undo)
    with pytest.raises(KeyboardInterrupt):
        audit_folder(results, places=places)
    assert set(read_audits(results)["ToyAnimals"]) == {"cat"}
    # A killed audit compiles nothing, and its files are enough.
    (results / "audit.json").unlink()
    assert set(audit_folder(results, places=places)["ToyAnimals"]) == {"cat", "C/V"}
    assert calls == ["cat", "C/V", "C/V"]
    # Fewer measures: what is there stays. One that is lacking, or another seed: measured again.
    before = read_audits(results)
    audit_folder(results, without=["undo", "relearning"], places=places)
    assert read_audits(results) == before
    monkeypatch.setitem(MEASURES, "another", lambda case: {"not_measured": [case.name]})
    audit_folder(results, labels=["cat"], places=places)
    found = read_audits(results)["ToyAnimals"]["cat"]["classes"]["cat"]
    assert found["another"] == {} and found["verdict"][-1] == "not measured: another: cat"
    audit_folder(results, labels=["C/V"], seed=1, places=places)
    assert calls[3:] == ["cat", "C/V"]


def test_an_adapter_of_another_projection_is_refused(results, tmp_path):
    adapter = load_adapter(results / "ToyAnimals" / "cat.safetensors")
    path = tmp_path / "cat.safetensors"
    save_adapter(replace(adapter, projection_sha256="0" * 64), path)
    refuses("another text projection", cases_of, path, AuditData(toy_bundle("ToyAnimals")))


def test_folders_without_results_and_inputs_that_changed(results, features, tmp_path, capsys):
    for folder, message in ((tmp_path / "none", "logs.json"), (results.parent, str(results))):
        assert audited(folder, features) == 2 and message in capsys.readouterr().err
    (results / "ToyAnimals" / "cat.safetensors").unlink()
    assert audited(results, features) == 2 and "cat.safetensors" in capsys.readouterr().err
    for name, bundle in load_bundles(features, BACKBONE).items():
        path = bundle_path(features, BACKBONE, name)
        path.unlink()
        replace(bundle, weights="others").save(path)
    assert audited(results, features) == 2
    assert "made with weights 'toy'" in capsys.readouterr().err


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
    assert run(audit.main, [str(results), "--root", str(tmp_path)]) == 2
    assert "--backbone" in capsys.readouterr().err
    assert not foreign.exists()
