"""Studies: planted answers, and what each study varies."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train
from clip.bundle import FeatureBundle
from experiments import studies
from experiments.measure import carry_over, cells, deciles, random_shares, spectrum_cells
from experiments.solvers import SOLVERS, Answer, paper_problem, together
from experiments.solvers import task as make_task
from experiments.studies import main
from experiments.varied import NEAR, STUDIES
from experiments.world import Task, World
from forgetting import load_adapter, thresholds
from forgetting.problem import Batch
from tests.conftest import BACKBONE, TOY_CLASSES, toy_bundle

SHORT = ["TRAINER.FORGETLORA.STEPS", "200", "TRAINER.FORGETLORA.MAX_TRIALS", "1"]
HIDDEN = ("class_hidden", "forget_hidden", "retain_hidden", "neutral_hidden")
EXACT = ["--solver", "optimum", "--solver", "constrained"]


def world_of(*sets: str, **changes) -> World:
    """A world of toy bundles, the first of them the set to forget from."""
    bundles = {name: toy_bundle(name) for name in sets or tuple(TOY_CLASSES)}
    first = next(iter(bundles))
    own = replace(bundles.pop(first), **changes)
    return World(own, bundles, opts=SHORT)


def changed(world: World, **changes) -> World:
    """The world with another bundle to forget from, alone."""
    return World(replace(world.bundle, **changes), {}, opts=SHORT)


def task(world: World, labels: list[int], solver: str, **more) -> Task:
    """A task of classes that are forgotten by their names."""
    request = world.texts.request([world.bundle.classnames[label] for label in labels])
    return make_task(world, solver, request=request, **more)


def solve(world: World, here: Task) -> Answer:
    """The answer of one task by itself."""
    return SOLVERS[here.solver](world, [here])[0]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures but where a test asks for them."""
    monkeypatch.setattr(studies, "plot", lambda *_: None)


def command(features: Path, out: Path, name: str, *more: str) -> list[str]:
    places = ["--features", str(features), "--out", str(out), "--dataset", "ToyAnimals"]
    return [name, *places, "--classes", "2", *more, *SHORT]


def rows_of(out: Path, name: str, dataset: str = "ToyAnimals") -> pd.DataFrame:
    return pd.read_csv(out / "ViT-B-32" / dataset / f"{name}.csv", keep_default_na=False)


# Spectrum


@given(part=st.integers(0, 9), rank=st.integers(1, 3), seed=st.integers(0, 99))
def test_a_change_along_known_directions_sits_in_their_tenth(part, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(43, 43, generator=generator, dtype=torch.float64)).Q
    places = torch.arange(43).tensor_split(10)[part][:rank]
    right = torch.randn(len(places), 7, generator=generator, dtype=torch.float64)
    shares = deciles(basis, basis[:, places] @ right)
    assert shares[part] == pytest.approx(1) and sum(shares) == pytest.approx(1)


def test_a_random_change_has_the_expected_share_in_every_tenth():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(43, 43, generator=generator, dtype=torch.float64)).Q
    delta = torch.randn(43, 20_000, generator=generator, dtype=torch.float64)
    assert deciles(basis, delta) == pytest.approx(random_shares(43), rel=0.02)
    assert sum(random_shares(43)) == pytest.approx(1)


@pytest.mark.parametrize(("side", "place"), [("left", 0), ("left", 9), ("right", 4)])
def test_sides_of_the_projection_are_told_apart(side, place):
    """A change along two singular directions of W, on the left or on the right."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(4))
    u, v = (torch.linalg.qr(normal(20, 20)).Q for _ in range(2))
    bundle = toy_bundle("ToyAnimals")
    images = torch.nn.functional.normalize(normal(len(bundle.labels), 20), dim=1)
    world = world_of(
        "ToyAnimals",
        text_projection=u @ torch.diag(torch.linspace(3, 1, 20)) @ v.T,
        image_features=images,
        **{name: getattr(bundle, name)[:, :20] for name in HIDDEN},
    )
    basis, other = (u, "right") if side == "left" else (v, "left")
    here, everywhere = basis[:, [2 * place, 2 * place + 1]], normal(2, 20)  # two a tenth
    left, right = (here, everywhere) if side == "left" else (everywhere.T, here.T)
    answer = Answer(left.double(), right.double(), torch.ones(1, 20), 0.0, {})
    cells = spectrum_cells(world, task(world, [0], "optimum"), answer)
    assert cells[f"{side}_{place + 1}"] == pytest.approx(1, abs=1e-5)
    assert max(cells[f"{other}_{number}"] for number in range(1, 11)) < 0.6


def test_a_projection_without_order_has_no_spectrum():
    world = world_of("ToyAnimals")
    world = changed(world, text_projection=torch.eye(24)[:, :16])
    answer = solve(world, task(world, [0], "optimum"))
    cells = spectrum_cells(world, task(world, [0], "optimum"), answer)
    assert cells["left_1"] is None and cells["right_10"] is None
    assert sum(cells[f"gram_{n}"] for n in range(1, 11)) == pytest.approx(1)


def test_a_change_that_retains_nothing_is_held_against_what_is_retained_by_default():
    """Its direction is the forgotten text, whatever the basis."""
    world = world_of()
    here = next(c for c in STUDIES["spectrum"].tasks(world, ["Dog"]) if c.setting != "default")
    answer = solve(world, here)
    vectors = torch.linalg.eigh(world.gram(task(world, [1], "constrained"))).eigenvectors
    text = world.bundle.forget_hidden[1].double()
    expected = deciles(vectors.flip(1), text[:, None])
    cells = spectrum_cells(world, here, answer)
    assert [cells[f"gram_{number}"] for number in range(1, 11)] == pytest.approx(expected)


# What a row says


def test_without_the_forget_term_nothing_moves(features, tmp_path):
    main(command(features, tmp_path, "terms", "--forget", "owl"))
    rows = rows_of(tmp_path, "terms").set_index(["solver", "setting"])
    for solver in ("lora", "optimum"):
        off, on = rows.loc[(solver, "no forget")], rows.loc[(solver, "all on")]
        assert off["norm"] == 0 and off["carry"] == 0
        assert off["forgotten_after"] == off["forgotten_before"] > 0.9
        assert on["norm"] > 0 and on["forgotten_after"] < 0.5
        # A change that costs nothing by itself, or that harms nobody, is larger.
        assert rows.loc[(solver, "no weight")]["norm"] > on["norm"]
        assert rows.loc[(solver, "no preserve")]["norm"] < on["norm"]
    groups = rows.loc["constrained"]
    assert (groups["forgotten_after"] < 0.5).all() and groups["norm"].nunique() == 4
    names = {"all on": 48, "no own": 38, "no vocabulary": 18, "no others": 40}  # texts
    assert groups["retained"].to_dict() == names


def test_a_target_does_not_depend_on_what_is_forgotten_with_it():
    world = world_of()
    alone = [task(world, [n], "constrained") for n in (0, 2)]

    def targets(tasks: list[Task]) -> torch.Tensor:
        requests = Batch([each.request for each in tasks])
        return world.target(tasks[0], requests, *world.retained(tasks, requests))

    expected = torch.cat([targets([each]) for each in alone])
    assert torch.allclose(targets([task(world, [0, 2], "constrained")]), expected)
    assert torch.allclose(targets(alone), expected)


@pytest.mark.parametrize("name", ["count", "terms", "targets"])
def test_a_group_ends_as_each_task_of_it_would_alone(name):
    """Every solver, names that are picked among them."""
    world = world_of()
    tasks = list(STUDIES[name].tasks(world, ["cat", "owl"]))
    groups = together(tasks)
    assert sorted(map(id, tasks)) == sorted(id(each) for group in groups for each in group)
    assert max(map(len, groups)) == 2
    for group in groups:
        answers = SOLVERS[group[0].solver](world, group)
        rows = cells(world, group, answers)
        for here, answer, row in zip(group, answers, rows, strict=True):
            alone = solve(world, here)
            (expected,) = cells(world, [here], [alone])
            # A descent ends in jumps about its minimum; what little differs decides where.
            close = 0.01 if here.solver == "lora" else 1e-9
            assert row["objective"] == pytest.approx(expected["objective"], rel=close)
            assert row["retained"] == expected["retained"]
            if here.solver != "lora":
                assert torch.allclose(answer.delta, alone.delta, atol=close), here.setting


AS_GIVEN = ["TRAINER.FORGETEXACT.MIN_MARGIN", "0", "TRAINER.FORGETEXACT.MIN_DISPLACEMENT", "0"]


@pytest.mark.parametrize(
    ("solver", "trainer", "keys"),
    [
        ("constrained", "ForgetExact", AS_GIVEN),
        ("optimum", "ForgetOptimum", []),
        ("lora", "ForgetLoRA", SHORT),
    ],
)
def test_the_defaults_are_those_of_a_run(features, tmp_path, solver, trainer, keys):
    """Another route to the same change: train.py on the same bundles."""
    world = world_of()
    here = task(world, [2], solver)
    answer = solve(world, here)
    if "lamb_forget" in answer.facts:
        keys = [*keys, "FORGET.LAMB_FORGET", repr(answer.facts["lamb_forget"])]
    places = ["--features", str(features), "--output-dir", str(tmp_path / "run")]
    which = ["--dataset", "ToyAnimals", "--backbone", BACKBONE, "--forget", "sea_horse"]
    train.main([*places, *which, "--trainer", trainer, *keys])
    adapter = load_adapter(tmp_path / "run" / "ToyAnimals" / "sea_horse.safetensors")
    assert torch.allclose(adapter.delta(), answer.delta.float(), atol=1e-6)
    logs = json.loads((tmp_path / "run" / "logs.json").read_text())["ToyAnimals"]["sea_horse"]
    (row,) = cells(world, [here], [answer])
    for side, word in (("zero_shot", "before"), ("final_results", "after")):
        own = logs[side]["ToyAnimals"]["sea_horse"]
        assert row[f"forgotten_{word}"] == own["cls_acc_test"]
        assert row[f"rest_{word}"] == own["no_cls_acc"]
        assert row[f"others_{word}"] == logs[side]["ToyTools"]["all"]["all_ds"]


def test_carry_over_is_the_share_that_the_prompt_makes():
    """A prompt that is 0.6 of the forgotten text and otherwise beside it moves 0.6 of the way."""
    world = world_of("ToyAnimals")
    text = world.bundle.forget_hidden[1]
    beside = torch.randn(24, generator=torch.Generator().manual_seed(1))
    beside -= text * (beside @ text) / (text @ text)
    prompts = world.bundle.class_hidden.clone()
    prompts[1] = 0.6 * text + beside
    world = changed(world, class_hidden=prompts)
    here = task(world, [1], "constrained", pick=torch.empty(0, dtype=torch.int64))
    assert carry_over(world, here, solve(world, here)) == pytest.approx(0.6)


def test_a_weight_below_the_threshold_is_raised_and_said():
    world = world_of("ToyAnimals")
    paper = paper_problem(world, [task(world, [0], "optimum")])
    reach = thresholds(paper.alone(0)).reach
    for lamb_forget, raised in ((0.9 * reach, True), (1.5 * reach, False)):
        weights = ("FORGET.LAMB_PRESERVE", "0.3", "FORGET.LAMB_FORGET", repr(lamb_forget))
        again = World(world.bundle, {}, opts=(*SHORT, *weights))
        for solver in ("lora", "optimum"):
            facts = solve(again, task(again, [0], solver)).facts
            assert facts["auto"] is raised
            expected = 1.001 * reach if raised else lamb_forget
            assert facts["lamb_forget"] == pytest.approx(expected)


# What the studies vary


def test_similar_names_are_the_nearest_and_dissimilar_the_farthest():
    """Names planted at known angles to the text."""
    world = world_of("ToyAnimals")
    text = torch.nn.functional.normalize(world.bundle.forget_hidden[[1]], dim=1)
    beside = torch.randn(30, 24, generator=torch.Generator().manual_seed(3))
    beside = torch.nn.functional.normalize(beside - (beside @ text.T) * text, dim=1)
    angles = torch.linspace(0.4, 3.0, 30)[:, None]
    rows = angles.cos() * text + angles.sin() * beside
    world = changed(world, retain_hidden=rows)
    tasks = {c.setting: c.pick.tolist() for c in STUDIES["retained"].tasks(world, ["Dog"])}
    assert tasks["similar"] == list(range(15)) and sorted(tasks["dissimilar"]) == list(
        range(15, 30)
    )
    assert tasks["none"] == [] and len(tasks["random"]) == 15 <= NEAR
    assert sorted(tasks["all"]) == list(range(30))


def test_a_name_that_means_the_class_is_in_no_pool():
    world = world_of("ToyAnimals")
    assert world.bundle.retain_names[0] == "cat"
    for study in ("retained", "count"):
        cat = [c.pick for c in STUDIES[study].tasks(world, ["cat"])]
        assert not any((pick == 0).any() for pick in cat)
        assert max(len(pick) for pick in cat) == 29
    rows = world.bundle.retain_hidden.clone()
    rows[7] = 3 * world.bundle.forget_hidden[4]  # "owl" by another name
    again = changed(world, retain_hidden=rows)
    assert 7 not in again.pool(again.texts.request(["owl"])).tolist()
    # The set's own classes are different things, however alike their names.
    alike = again.bundle.forget_hidden.clone()
    alike[5] = 1.01 * alike[4]
    twins = changed(again, forget_hidden=alike)
    requests = Batch([twins.texts.request(["owl"])])
    leaving = twins.retain.excluded(requests.same, requests.hidden, requests.owner)[0]
    assert twins.retain.named(leaving) == ["owl", "thing 5"]


def test_more_names_contain_fewer():
    world = world_of("ToyAnimals")
    picks = [c.pick.tolist() for c in STUDIES["count"].tasks(world, ["C/V"]) if c.solver == "lora"]
    assert [len(pick) for pick in picks] == [0, 10, 30]
    assert set(picks[0]) < set(picks[1]) < set(picks[2])


def test_ranks_bind_the_descent_only(features, tmp_path):
    main(command(features, tmp_path, "rank", *EXACT, "--classes", "3"))
    rows = rows_of(tmp_path, "rank")
    together = rows[rows["classes"].str.count(r"\|") == 2]
    assert len(together) == 6 and len(rows) == 4 * 6
    # The optimum has no bound on its rank, but the rank's weight term.
    assert together[together["solver"] == "optimum"]["norm"].is_monotonic_decreasing
    assert together["norm"].nunique() == 6
    world = world_of()
    low = solve(world, task(world, [0, 1, 2], "lora", rank=1))
    assert torch.linalg.matrix_rank(low.delta) == 1
    best = solve(world, task(world, [0, 1, 2], "optimum", rank=1))
    assert torch.linalg.matrix_rank(best.delta) == 3


def with_audit(**lists: str) -> FeatureBundle:
    """ToyAnimals with three further texts for the dog, one for the cat."""
    bundle = toy_bundle("ToyAnimals")
    hidden = torch.randn(4, 24, generator=torch.Generator().manual_seed(5))
    extra = {
        "audit_texts": json.dumps(["an image of a Dog", "a hound", "a tabby", "animal"]),
        "audit_classes": json.dumps(["Dog", "Dog", "cat", "Dog"]),
        "audit_kinds": json.dumps(["template", "synonym", "synonym", "hypernym"]),
    }
    return replace(bundle, extra=extra | lists, extra_tensors={"audit_hidden": hidden})


def test_texts_of_an_audit_are_forgotten_with_the_name():
    world = World(with_audit(), {}, opts=SHORT)
    tasks = {c.setting: c.request.hidden for c in STUDIES["templates"].tasks(world, ["Dog"])}
    hidden = world.bundle.extra_tensors["audit_hidden"]
    assert list(tasks) == ["name", "prompt", "both", "name + template", "name + synonym"]
    assert torch.equal(tasks["name + synonym"][1], hidden[1]) and len(tasks["name + synonym"]) == 2
    prompt = [c for c in STUDIES["templates"].tasks(world, ["Dog"]) if c.setting == "prompt"]
    for each in prompt:  # the prompt itself was forgotten
        assert carry_over(world, each, solve(world, each)) == pytest.approx(1, abs=0.05)


def test_texts_that_repeat_each_other_count_once():
    bundle = toy_bundle("ToyAnimals")
    world = world_of("ToyAnimals", class_hidden=bundle.forget_hidden * (1 + 1e-6))
    tasks = {c.setting: c.request.hidden for c in STUDIES["templates"].tasks(world, ["Dog"])}
    assert len(tasks["both"]) == 1
