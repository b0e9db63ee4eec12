"""The methods to compare with: does each do what its nature says, and nothing else? Then the
functions behind them by their defining properties, without a trainer."""

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

import train
from evaluation.results import read_logs
from forgetting import baselines, erasers
from forgetting.adapter import load_adapter
from forgetting.baselines import EditInputs, uce
from tests.conftest import accuracies, toy_bundle, toy_line, whole_set
from tests.solver_fixtures import normal
from trainers import METHODS
from utils import create_results

RANKS = {  # of an adapter for one class by two texts; None: that of the turn
    **dict.fromkeys(("ForgetNothing", "ForgetName"), 0),
    **dict.fromkeys(("ForgetLEACE", "ForgetSPLINCE"), 1),
    **dict.fromkeys(("ForgetNoise", "ForgetZero", "ForgetUCE", "ForgetNullSpace", "ForgetCCUP"), 2),
    **dict.fromkeys(("ForgetPOUR", "ForgetDP", "ForgetSPEED"), 2),
    "ForgetOCE": None,
}
BASELINES = [  # with one of your own
    name for name in METHODS if name not in ("ForgetLoRA", "ForgetOptimum", "ForgetExact")
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


def inputs(hidden, retained=None, w=None, displacement=None, **more) -> EditInputs:
    """What a method sees; a target at zero, and each text a class of its own, by default."""
    w = torch.eye(hidden.shape[1], dtype=torch.float64) if w is None else w
    given = {"labels": torch.arange(len(hidden))} | more
    return EditInputs(
        hidden,
        w,
        hidden[:0] if retained is None else retained,
        -hidden @ w if displacement is None else displacement,
        **{"neutral": hidden[:1] * 0 + 1} | given,
    )


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


@pytest.mark.parametrize("name", [*RANKS, "ForgetExact"])
def test_given_texts_are_what_is_forgotten(name, method, tmp_path):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"owl": ["{}", "a photo of a {}."]}))
    folder = method(name, "--forget", "all", "FORGET.PROMPTS", str(prompts))
    logs = read_logs(folder)["ToyAnimals"]
    assert logs["owl"]["solver"]["texts"] == ["owl", "a photo of a owl."]
    adapter = load_adapter(folder / "ToyAnimals/owl.safetensors")
    rank = RANKS.get(name, 2)
    assert rank is None or adapter.left.shape[1] == rank
    left = create_results(folder)[0].set_index("name").cls_forget
    assert (left.mean() > 0.5) == (name in ("ForgetNothing", "ForgetNoise"))
    if name in ("ForgetName", "ForgetZero", "ForgetNullSpace", "ForgetUCE", "ForgetExact"):
        assert left["owl"] == 0


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


@pytest.mark.parametrize("name", ["ForgetLEACE", "ForgetSPLINCE"])
def test_erasers_see_the_evaluation_prompt_as_well(name, method):
    solver = read_logs(method(name, "--forget", "owl"))["ToyAnimals"]["owl"]["solver"]
    assert solver["texts"] == ["owl", "a photo of a owl."] and solver["apart"] < 1e-9


def test_methods_need_something_to_retain(tmp_path, refused):
    lonely = replace(
        BUNDLE,
        **{key: getattr(BUNDLE, key)[:1] for key in ("class_hidden", "forget_hidden")},
        **{key: getattr(BUNDLE, key)[:12] for key in ("image_features", "labels")},
        retain_hidden=BUNDLE.retain_hidden[:0],
        classnames=["cat"],
        retain_names=[],
    )
    lonely.save(tmp_path / "features" / "ViT-B-32" / "ToyAnimals.safetensors")
    argv = toy_line(tmp_path, "--trainer", "ForgetUCE", "--forget", "cat")
    assert "no name is left" in refused(argv)


@given(st.integers(1, 4), st.floats(1e-2, 1e4), st.floats(1e-2, 10), st.integers(0, 99))
def test_uce_is_where_its_objective_is_stationary(k, erase, lam, seed):
    h_f, h_r, d = normal(k, 9, seed=seed), normal(14, 9, seed=seed + 1), normal(k, 5, seed=seed + 2)
    delta = uce(inputs(h_f, h_r, displacement=d), baselines.UceSettings(erase, lam)).delta
    slope = erase * h_f.T @ (h_f @ delta - d) + h_r.T @ h_r @ delta + lam * delta
    assert float(slope.norm()) <= 1e-9 * erase * float((h_f.T @ d).norm())


NARROW = normal(6, 4) @ normal(4, 10, seed=1)  # retained texts that leave six directions free
CROWDED = normal(40, 10, seed=4)


def test_the_null_space_moves_a_text_and_leaves_what_is_retained():
    h_f, d = normal(2, 10, seed=2), normal(2, 3, seed=3)
    settings = baselines.NullSpaceSettings(1e-9)
    delta = baselines.null_space(inputs(h_f, NARROW, displacement=d), settings).delta
    assert torch.allclose(h_f @ delta, d, atol=1e-9) and float((NARROW @ delta).norm()) < 1e-6
    assert baselines.null_space(inputs(h_f, CROWDED, displacement=d), settings).left.eq(0).all()


@given(st.integers(1, 4), st.integers(0, 99))
def test_zero_is_the_least_change_that_zeroes(k, seed):
    h_f, w = normal(k, 8, seed=seed), normal(8, 5, seed=seed + 1)
    b = normal(5, seed=seed + 3)
    for bias in (torch.zeros_like(b), b):
        edit = baselines.zero(inputs(h_f, w=w, displacement=-h_f @ w - bias))
        least = -torch.linalg.pinv(h_f) @ (h_f @ w + bias) * (1 + baselines.BEYOND)
        assert edit.left.shape[1] == k and torch.allclose(edit.delta, least, atol=1e-9)
    repeated = baselines.zero(inputs(torch.cat([h_f, h_f.sum(dim=0, keepdim=True)]), w=w))
    assert repeated.left.shape[1] == k
    assert torch.allclose(repeated.delta, baselines.zero(inputs(h_f, w=w)).delta, atol=1e-9)


def labelled() -> tuple[EditInputs, Tensor, Tensor]:
    """Texts of two classes and retained ones; all texts (n, w), their class (n, 2)."""
    retained, shift = normal(200, 20), 2 * normal(2, 20, seed=2)
    hidden = torch.cat([retained[:3] + shift[0], retained[3:8] + shift[1]])
    labels = torch.tensor([4, 4, 4, 1, 1, 1, 1, 1])
    x = torch.cat([hidden, retained[8:]])
    z = torch.zeros(len(x), 2, dtype=torch.float64)
    z[:3, 0] = z[3:8, 1] = 1.0
    return inputs(hidden, retained[8:], labels=labels), x, z


def traced(x: Tensor, z: Tensor) -> Tensor:
    """Cross-covariance of texts and labels."""
    return (x - x.mean(dim=0)).T @ (z - z.mean(dim=0)) / len(x)


def test_leace_and_splince_leave_no_linear_trace_and_splince_keeps_a_covariance():
    given, x, z = labelled()
    cosines = normalize(given.retained, dim=1) @ normalize(given.hidden, dim=1).mean(dim=0)
    y = torch.zeros(len(x), 4, dtype=torch.float64)
    y[len(given.hidden) + cosines.topk(4).indices, range(4)] = 1.0
    assert float(traced(x, z).norm()) > 0.01
    moved = []
    for edit in (erasers.leace(given), erasers.splince(given, erasers.SplinceSettings(4))):
        assert edit.left.shape == (20, 2) and edit.report["apart"] < 1e-9
        assert float(traced(x + x @ edit.delta, z).norm()) < 1e-9
        moved.append(float(traced(x @ edit.delta, y).norm() / traced(x, y).norm()))
    assert moved[0] > 1e-3 and moved[1] < 1e-9


def test_leace_is_its_authors_and_erases_a_few_texts_among_very_many():
    """Negative control: the package alone, with indicators of 0 and 1, erases nothing there."""
    from concept_erasure import LeaceFitter

    options = {"affine": False, "constrain_cov_trace": False}
    given, x, z = labelled()
    theirs = LeaceFitter.fit(x, z / z.std(dim=0), **options).eraser
    assert torch.allclose(erasers.leace(given).delta, theirs.P.T - torch.eye(20), atol=1e-9)
    retained, text = normal(30_000, 6), normal(1, 6, seed=1) + 2
    edit = erasers.leace(inputs(text, retained))
    assert edit.report["apart"] < 1e-9 and float((text @ edit.delta).norm()) > 0.1
    x, z = torch.cat([text, retained]), torch.zeros(30_001, 1, dtype=torch.float64)
    z[0] = 1.0
    assert float((LeaceFitter.fit(x, z, **options).eraser(text) - text).norm()) < 1e-9


def test_ccup_and_pour_take_one_direction_from_every_embedding():
    """CCUP the text's, as a vector store without it; POUR that from the mean of the others."""
    h_f, h_r, w = normal(1, 10), normal(30, 10, seed=1), normal(10, 6, seed=2)
    given, unit = inputs(h_f, h_r, w), normalize(h_f @ w, dim=1)
    others = h_r @ w
    after = h_r @ (w + erasers.ccup(given, erasers.ProjectionSettings()).delta)
    assert torch.allclose(after, others - (others @ unit.T) * unit)
    half = h_r @ (w + erasers.ccup(given, erasers.ProjectionSettings(0.5)).delta)
    assert torch.allclose(half, (others + after) / 2)
    off = normalize(unit - normalize(others, dim=1).mean(dim=0), dim=1)
    change = erasers.pour(given, erasers.ProjectionSettings()).delta
    assert float(((w + change) @ off.T).norm()) < 1e-9 < float(((w + change) @ unit.T).norm())


def test_double_projection_sends_a_text_to_its_proxy_and_leaves_what_is_retained():
    h_f, w = normal(2, 10, seed=2), normal(10, 5, seed=3)
    settings = erasers.DoubleProjectionSettings(1e-9)
    delta = erasers.double_projection(inputs(h_f, NARROW, w), settings).delta
    proxy = h_f @ torch.linalg.pinv(NARROW) @ NARROW
    assert torch.allclose(h_f @ (w + delta), proxy @ w, atol=1e-9)
    assert float((NARROW @ delta).norm()) < 1e-9 < float((h_f @ delta).norm())
    assert erasers.double_projection(inputs(h_f, CROWDED, w), settings).left.shape[1] == 0


def test_oce_turns_embeddings_and_does_nothing_without_a_reason():
    h_f, h_r, w = normal(1, 10), normal(30, 10, seed=1), normal(10, 6, seed=2)
    for erase in (1e-12, 1e4):
        changed = w + erasers.oce(inputs(h_f, h_r, w), erasers.OceSettings(erase=erase)).delta
        turn = torch.linalg.pinv(w) @ changed  # W' = W Q^T
        assert torch.allclose(turn @ turn.T, torch.eye(6, dtype=turn.dtype), atol=1e-5)
        assert float(torch.linalg.det(turn)) == pytest.approx(1, abs=1e-5)
        cosine = torch.cosine_similarity(h_f @ changed, h_f @ w)
        assert cosine > 0.999 if erase < 1 else cosine < 0


def test_speed_lands_in_the_null_space_of_the_texts_that_it_would_move():
    h_f, d, w = normal(1, 10, seed=2), normal(1, 3, seed=3), normal(10, 3, seed=4)
    far = normal(20, 10, seed=5)
    far = far - (far @ h_f.T) * h_f / h_f.square().sum()  # an edit for the text does not move them
    given = inputs(h_f, torch.cat([NARROW, far]), w, d)
    settings = erasers.SpeedSettings(threshold=1e-9, ridge=1e-4, augment=0)
    edit = erasers.speed(given, settings)
    assert edit.report["influenced"] <= len(NARROW) and float((far @ edit.delta).norm()) > 0.01
    moved = (NARROW @ h_f.T)[:, 0].abs()
    held = NARROW[moved > torch.cat([moved, torch.zeros(20)]).mean()]
    assert torch.allclose(h_f @ edit.delta, d, atol=1e-3)
    assert float((torch.cat([held, given.neutral]) @ edit.delta).norm()) < 1e-6
    copies = erasers.speed(given, replace(settings, augment=5, threshold=1e-3))
    least = torch.linalg.svd(w, full_matrices=False).U[:, -1]
    assert float((least @ copies.delta).norm()) < 0.2 * float((least @ edit.delta).norm())
