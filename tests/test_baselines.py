"""The baselines: does each do what its nature says, and nothing else?"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, replace

import pytest
import torch

import train
import trainers
from clip.retain import GROUPS, retain_set
from engine import TRAINER_REGISTRY
from engine.config import declared
from evaluation.results import read_logs
from forgetting import load_adapter
from forgetting.baselines import uce
from forgetting.problem import Request
from forgetting.settings import setting
from tests.conftest import accuracies, toy_bundle, toy_line, whole_set
from trainers.base import Solved, register
from trainers.baselines import RetainingTrainer
from utils import create_results

BASELINES = [
    name for name in trainers.SETTINGS if name not in ("ForgetLoRA", "ForgetOptimum", "ForgetExact")
]
BUNDLE = toy_bundle("ToyAnimals")


@pytest.fixture
def method(features, tmp_path):
    """Run a method on ToyAnimals and return the folder of its results."""

    def run(name: str, *options: str, out: str = "out"):
        place = "--output-dir", str(tmp_path / out / name)
        return train.main(toy_line(tmp_path, *place, "--trainer", name, *options))

    return run


def landed(adapter, row: torch.Tensor) -> torch.Tensor:
    """The embedding of a hidden state under the changed projection, float64."""
    delta = adapter.left.double() @ adapter.right.double()
    return row.double() @ (BUNDLE.text_projection.double() + delta)


def test_a_new_method_is_one_class(method):
    """It is in Dassl's registry, and its settings on the command line; nothing else is needed."""
    declared.cache_clear()

    @dataclass(frozen=True)
    class MeanSettings:
        erase: float = setting(1000.0, "weight of a forgotten text", above=0)

    @register
    class ForgetMean(RetainingTrainer):
        """A text goes to the mean of the retained ones."""

        settings_type = MeanSettings

        def solve_one(self, request: Request) -> Solved:
            rows, report, notes = self.retained_beside(request)
            left = uce(request.hidden.double(), rows.T @ rows, self.settings.erase, 0.5)
            right = (rows.mean(dim=0) - request.hidden.double()) @ self.projection.double()
            return Solved(left.float(), right.float(), report | {"texts": request.texts}, notes)

    try:
        assert TRAINER_REGISTRY.get("ForgetMean") is ForgetMean
        folder = method("ForgetMean", "--forget", "all", "TRAINER.FORGETMEAN.ERASE", "500")
        assert create_results(folder)[0].cls_forget.mean() < 0.3
        assert read_logs(folder)["ToyAnimals"]["owl"]["solver"]["settings"]["erase"] == 500
    finally:
        del trainers.SETTINGS["ForgetMean"]
        declared.cache_clear()


@pytest.mark.parametrize("name", BASELINES)
def test_the_adapter_gives_the_logged_accuracies(name, method):
    """One class, several at once, and again from scratch."""
    several = ["--forget", "owl", "--forget", "cat", "--multiclass"]
    folder = method(name, "--forget", "owl")
    method(name, *several)
    logs = read_logs(folder)["ToyAnimals"]
    for label, file in (("owl", "owl"), ("owl|cat", "owl%7Ccat")):
        adapter = load_adapter(folder / f"ToyAnimals/{file}.safetensors")
        solver, after = logs[label]["solver"], logs[label]["final_results"]
        assert adapter.classes == label.split("|") and solver["texts"][: len(adapter.classes)]
        removed = solver.get("removed_names", [])
        assert after["ToyAnimals"] == accuracies(BUNDLE, adapter.classes, adapter, removed)
        tools = whole_set(toy_bundle("ToyTools"), adapter)
        assert after["ToyTools"]["all"]["all_ds"] == tools
    again = method(name, *several, out="again") / "ToyAnimals/owl%7Ccat.safetensors"
    same = load_adapter(again)
    assert torch.equal(same.left, adapter.left) and torch.equal(same.right, adapter.right)


@pytest.mark.parametrize("name", [*BASELINES, "ForgetExact"])
def test_given_texts_are_what_is_forgotten(name, method, tmp_path):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"owl": ["{}", "a photo of a {}."]}))
    folder = method(name, "--forget", "all", "FORGET.PROMPTS", str(prompts))
    logs = read_logs(folder)["ToyAnimals"]
    assert logs["owl"]["solver"]["texts"] == ["owl", "a photo of a owl."]
    adapter = load_adapter(folder / "ToyAnimals/owl.safetensors")
    if name not in ("ForgetName", "ForgetNothing", "ForgetLEACE"):
        assert adapter.left.shape[1] == 2
    left = create_results(folder)[0].set_index("name").cls_forget
    if name in [f"Forget{each}" for each in ("Name", "Zero", "NullSpace", "UCE", "Exact")]:
        assert left["owl"] == 0
    elif name == "ForgetLEACE":
        assert left.mean() < 0.5
    else:
        assert left.mean() > 0.5


def test_nothing_changes_nothing(method):
    folder = method("ForgetNothing", "--forget", "all")
    for name, entry in read_logs(folder)["ToyAnimals"].items():
        if name != "settings":
            assert entry["final_results"] == entry["zero_shot"]
    adapter = load_adapter(folder / "ToyAnimals/owl.safetensors")
    assert adapter.left.shape == (24, 0) and adapter.right.shape == (0, 16)
    assert torch.equal(adapter.apply(BUNDLE.text_projection), BUNDLE.text_projection)


def test_a_name_that_left_the_list_is_still_known_in_other_words(method):
    folder = method("ForgetName", "--forget", "owl")
    entry = read_logs(folder)["ToyAnimals"]["owl"]
    own, before = (entry[side]["ToyAnimals"]["owl"] for side in ("final_results", "zero_shot"))
    assert own["cls_acc_test"] == 0.0 and before["cls_acc_test"] > 0.9
    assert entry["final_results"]["ToyTools"] == entry["zero_shot"]["ToyTools"]
    assert entry["solver"]["removed_names"] == ["owl"]
    adapter = load_adapter(folder / "ToyAnimals/owl.safetensors")
    assert adapter.solver["removed_names"] == ["owl"] and adapter.left.shape[1] == 0
    names = ["Strix" if name == "owl" else name for name in BUNDLE.classnames]
    renamed = replace(BUNDLE, classnames=names)
    assert accuracies(renamed, ["Strix"], adapter)["Strix"] == before


def test_zero_leaves_a_millionth_on_the_far_side(method):
    folder = method("ForgetZero", "--forget", "owl")
    adapter, h = load_adapter(folder / "ToyAnimals/owl.safetensors"), BUNDLE.forget_hidden[4]
    start, end = h.double() @ BUNDLE.text_projection.double(), landed(adapter, h)
    assert float(end.norm() / start.norm()) < 2e-5
    assert float(torch.cosine_similarity(end, start, dim=0)) < -0.9


def test_noise_has_the_size_of_the_exact_answer_and_forgets_nothing(method):
    options = ["--forget", "owl", "--forget", "cat"]
    adapters = {}
    for key, name, seed in (("exact", "Exact", 0), ("noise", "Noise", 0), ("other", "Noise", 1)):
        folder = method(f"Forget{name}", *options, "--seed", str(seed), out=key)
        adapters[key] = load_adapter(folder / "ToyAnimals/owl.safetensors")
    exact, random, other = (adapter.delta() for adapter in adapters.values())
    for delta in (random, other):
        assert float(delta.norm()) == pytest.approx(float(exact.norm()), rel=1e-5)
        assert abs(float((delta * exact).sum() / exact.square().sum())) < 0.3
    assert not torch.allclose(random, other)
    assert len({adapter.left.shape for adapter in adapters.values()}) == 1
    assert adapters["exact"].recipe and not adapters["noise"].recipe


@pytest.mark.parametrize("name", ["ForgetUCE", "ForgetNullSpace"])
def test_edits_land_on_their_target_and_spare_what_is_retained(name, method):
    folder = method(name, "--forget", "owl", "--beta", "0.3")
    adapter, h = load_adapter(folder / "ToyAnimals/owl.safetensors"), BUNDLE.forget_hidden[4]
    solver = read_logs(folder)["ToyAnimals"]["owl"]["solver"]
    assert solver["residual"] < 0.01 and solver["settings"]["target"] == "opposite"
    assert solver["retained"] == 30 + 6 + 4 - 1 and solver["excluded"] == ["owl"]
    end = -0.3 * h @ BUNDLE.text_projection
    assert float((landed(adapter, h) - end).norm() / end.norm()) < 0.05
    # By the way that the text goes: the least change that knows no retained text moves them more.
    least = load_adapter(method("ForgetZero", "--forget", "owl") / "ToyAnimals/owl.safetensors")
    shares = [
        (BUNDLE.retain_hidden @ a.delta()).norm() / (h @ a.delta()).norm() for a in (adapter, least)
    ]
    assert shares[0] < 0.95 * shares[1]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("ForgetUCE", ["TRAINER.FORGETUCE.ERASE", "1e-3"]),
        ("ForgetNullSpace", ["TRAINER.FORGETNULLSPACE.DAMPING", "1e5"]),
        ("ForgetNullSpace", ["TRAINER.FORGETNULLSPACE.THRESHOLD", "1e-9"]),
    ],
)
def test_edits_that_hardly_move_say_so(name, keys, method, capsys):
    solver = read_logs(method(name, "--forget", "owl", *keys))["ToyAnimals"]["owl"]["solver"]
    out = capsys.readouterr().out
    assert re.search(r"the texts go \d\.\d% of their way", out) and "not forgotten" in out
    assert solver["residual"] > 0.9
    if "THRESHOLD" in keys[0]:
        assert solver["free"] == 0 and "0 of 24 directions" in out


def test_leace_sends_the_class_to_the_mean_of_the_rest(method):
    folder = method("ForgetLEACE", "--forget", "owl")
    adapter = load_adapter(folder / "ToyAnimals/owl.safetensors")
    solver = read_logs(folder)["ToyAnimals"]["owl"]["solver"]
    assert solver["texts"] == ["owl", "a photo of a owl."] and solver["apart"] < 1e-9
    retain = retain_set(BUNDLE, [toy_bundle("ToyTools")], dict.fromkeys(GROUPS), 0.95)
    stay = retain.rows[torch.arange(len(retain.names)) != 4]
    texts = torch.stack([BUNDLE.forget_hidden[4], BUNDLE.class_hidden[4]])
    ends = landed(adapter, texts.mean(dim=0)), landed(adapter, stay.mean(dim=0))
    assert torch.allclose(*ends, atol=1e-4)


def test_ascent_reports_what_it_reached(method, capsys):
    folder = method("ForgetAscent", "--forget", "owl")
    solver = read_logs(folder)["ToyAnimals"]["owl"]["solver"]
    assert solver["reached"] and solver["probability_after"][0] < 1 / 6
    keys = ["TRAINER.FORGETASCENT.STEPS", "1"]
    folder = method("ForgetAscent", "--forget", "owl", *keys, out="short")
    assert not read_logs(folder)["ToyAnimals"]["owl"]["solver"]["reached"]
    assert "warning: not below 0.167 after 1 steps" in capsys.readouterr().out


def test_methods_need_their_package_and_something_to_retain(tmp_path, refused, monkeypatch):
    lonely = replace(
        BUNDLE,
        **{key: getattr(BUNDLE, key)[:1] for key in ("class_hidden", "forget_hidden")},
        **{key: getattr(BUNDLE, key)[:12] for key in ("image_features", "labels")},
        retain_hidden=BUNDLE.retain_hidden[:0],
        classnames=["cat"],
        retain_names=[],
    )
    lonely.save(tmp_path / "features" / "ViT-B-32" / "ToyAnimals.safetensors")
    monkeypatch.setitem(sys.modules, "concept_erasure", None)
    for name, message in (
        ("ForgetUCE", "no name is left"),
        ("ForgetAscent", "has one class"),
        ("ForgetLEACE", "pip install 'concept-erasure'"),
    ):
        assert message in refused(toy_line(tmp_path, "--trainer", name, "--forget", "cat"))
