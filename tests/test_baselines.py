"""The baselines: does each do what its nature says, and nothing else? Then their closed forms and
ascent by planted answers, without a trainer."""

import json
import re
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train
import trainers
from clip.retain import GROUPS, retain_set
from engine import TRAINER_REGISTRY
from engine.config import declared
from evaluation.results import read_logs
from forgetting import load_adapter
from forgetting.baselines import LOGIT_SCALE, ascend, leace, noise, null_space, uce, zeroing
from forgetting.problem import Request
from forgetting.settings import setting
from tests.conftest import accuracies, toy_bundle, toy_line, whole_set
from tests.solver_fixtures import normal
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


@given(st.integers(1, 4), st.floats(1e-2, 1e4), st.floats(1e-2, 10), st.integers(0, 99))
def test_uce_is_where_its_objective_is_stationary(k, erase, lam, seed):
    h_f, h_r, d = normal(k, 9, seed=seed), normal(14, 9, seed=seed + 1), normal(k, 5, seed=seed + 2)
    delta = uce(h_f, h_r.T @ h_r, erase, lam) @ d
    slope = erase * h_f.T @ (h_f @ delta - d) + h_r.T @ h_r @ delta + lam * delta
    assert float(slope.norm()) <= 1e-9 * erase * float((h_f.T @ d).norm())


def test_the_null_space_moves_a_text_and_leaves_what_is_retained():
    h_r, h_f, d = normal(6, 4) @ normal(4, 10, seed=1), normal(2, 10, seed=2), normal(2, 3, seed=3)
    delta = null_space(h_f, h_r.T @ h_r, 6, 0.0, 1e-9) @ d
    assert torch.allclose(h_f @ delta, d, atol=1e-9) and float((h_r @ delta).norm()) < 1e-6
    crowded = normal(40, 10, seed=4)
    assert null_space(h_f, crowded.T @ crowded, 40, 0.0, 1e-9).eq(0).all()


@given(st.integers(1, 4), st.integers(0, 99))
def test_zeroing_is_the_least_change_that_zeroes(k, seed):
    h_f, w = normal(k, 8, seed=seed), normal(8, 5, seed=seed + 1)
    left, right = zeroing(h_f, w)
    delta = left @ right
    assert left.shape[1] == k and float((h_f @ (w + delta)).norm()) < 1e-10
    b = normal(5, seed=seed + 3)
    biased = torch.mm(*zeroing(h_f, w, b))
    assert torch.allclose(biased, -torch.linalg.pinv(h_f) @ (h_f @ w + b), atol=1e-9)
    assert torch.allclose(delta, -torch.linalg.pinv(h_f) @ h_f @ w, atol=1e-9)
    again, right = zeroing(torch.cat([h_f, h_f.sum(dim=0, keepdim=True)]), w)
    assert again.shape == left.shape and torch.allclose(again @ right, delta, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_noise_moves_a_text_as_full_noise_of_its_norm_does(rank):
    generator, h = torch.Generator().manual_seed(0), normal(1, 12)
    moved = []
    for _ in range(4000):
        left, right = noise(12, 9, rank, 5.0, generator)
        assert float((left @ right).norm()) == pytest.approx(5.0)
        moved.append(float((h @ left @ right).square().sum()))
    assert sum(moved) / len(moved) == pytest.approx(float(h.square().sum()) * 25 / 12, rel=0.1)


def test_leace_leaves_no_linear_trace_of_its_classes():
    retained, w = normal(200, 20), normal(20, 6, seed=1)
    shift = 2 * normal(2, 20, seed=2)
    texts = [retained[:3] + shift[0], retained[3:8] + shift[1]]
    left, right, apart = leace(texts, retained[8:], w)
    assert left.shape == (20, 2) and right.shape == (2, 6) and apart < 1e-9
    x = torch.cat([*texts, retained[8:]])
    z = torch.zeros(len(x), 2, dtype=torch.float64)
    z[:3, 0] = z[3:8, 1] = 1.0
    for y, traced in ((x @ w, True), (x @ w + (x @ left) @ right, False)):
        covariance = (y - y.mean(dim=0)).T @ (z - z.mean(dim=0)) / len(y)
        assert (float(covariance.norm()) > 0.01) == traced


def test_leace_erases_a_few_texts_among_very_many():
    """Negative control: the package alone, with indicators of 0 and 1, erases nothing there."""
    from concept_erasure import LeaceFitter

    retained, text = normal(30_000, 6), normal(1, 6, seed=1) + 2
    left, right, apart = leace([text], retained, torch.eye(6, dtype=torch.float64))
    assert apart < 1e-9 and float((text @ left @ right).norm()) > 0.1
    x = torch.cat([text, retained])
    z = torch.zeros(len(x), 1, dtype=torch.float64)
    z[0] = 1.0
    alone = LeaceFitter.fit(x, z, affine=False).eraser
    assert float((alone(text) - text).norm()) < 1e-9


def test_ascent_is_gradient_ascent_on_the_projection():
    """Against autograd on the whole matrix, two texts of one class and one of another."""
    h, w, own = normal(3, 8), normal(8, 6, seed=1), torch.tensor([0, 0, 2])
    names = torch.nn.functional.normalize(torch.cat([h @ w, normal(2, 6, seed=2)]), dim=1)
    names = names[[0, 3, 2, 4]]
    b = 0.1 * normal(6, seed=3)
    found = ascend(h, w, names, own, lr=1e-3, steps=4, limit=1e-12, bias=b)
    rate = 1e-3 * float((h @ w + b).square().sum() / h.square().sum())
    matrix = w.clone().requires_grad_()
    for _ in range(4):
        logits = LOGIT_SCALE * torch.nn.functional.normalize(h @ matrix + b, dim=1) @ names.T
        mine = torch.nn.functional.one_hot(own, 4).bool()
        odds = logits.masked_fill(mine, -torch.inf).logsumexp(dim=1) - logits[mine]
        (odds,) = torch.autograd.grad(odds.sum(), matrix)
        matrix = (matrix + rate * odds).detach().requires_grad_()
    assert found.steps == 4 and not found.reached
    assert torch.allclose(w + found.left @ found.right, matrix.detach(), atol=1e-9)


def test_ascent_stops_as_soon_as_every_text_is_below_the_limit():
    h, w = normal(2, 8), normal(8, 6, seed=1)
    names = torch.nn.functional.normalize(torch.cat([h @ w, normal(3, 6, seed=2)]), dim=1)
    problem = (h, w, names, torch.tensor([0, 1]), 1e-3)
    found = ascend(*problem, steps=500, limit=0.2)
    assert found.reached and (found.before > 0.2).all() and (found.after < 0.2).all()
    short = ascend(*problem, steps=found.steps - 1, limit=0.2)
    assert not short.reached and (short.after >= 0.2).any()
    still = ascend(*problem, steps=500, limit=1.1)
    assert still.steps == 0 and still.right.eq(0).all()
    # The first text has a target that it is not on, and rests while the second moves.
    resting = ascend(*problem[:3], torch.tensor([4, 1]), 1e-3, steps=3, limit=0.2)
    assert resting.right[0].eq(0).all() and resting.right[1].ne(0).any()
