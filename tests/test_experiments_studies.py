"""Studies: planted answers, what each study varies, rows that are never made twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train
from clip.bundle import FeatureBundle, bundle_path
from experiments import studies
from experiments.__main__ import cli
from experiments.studies import (
    KEY,
    NEAR,
    STUDIES,
    carry_over,
    cells,
    main,
    read_rows,
    spectrum_cells,
    tenths_of,
)
from experiments.study_data import StudyAnswer, StudyData, Task
from forgetting import load_adapter, thresholds
from forgetting.errors import ProblemError
from forgetting.problem import LowRankEdit
from tests.conftest import BACKBONE, REPOSITORY, TOY_CLASSES, toy_bundle

SHORT = ["TRAINER.FORGETLORA.STEPS", "200", "TRAINER.FORGETLORA.MAX_TRIALS", "1"]
HIDDEN = ("class_hidden", "forget_hidden", "retain_hidden", "neutral_hidden")
EXACT = ["--solver", "optimum", "--solver", "constrained"]


def data_of(*sets: str, **changes) -> StudyData:
    """Toy bundles, the first of them the set to forget from."""
    bundles = {name: toy_bundle(name) for name in sets or tuple(TOY_CLASSES)}
    first = next(iter(bundles))
    own = replace(bundles.pop(first), **changes)
    return StudyData(own, bundles, opts=SHORT)


def changed(data: StudyData, **changes) -> StudyData:
    """The data with another bundle to forget from, alone."""
    return StudyData(replace(data.bundle, **changes), {}, opts=SHORT)


def task(data: StudyData, labels: list[int], solver: str, **more) -> Task:
    """A task of classes that are forgotten by their names."""
    request = data.texts.request([data.bundle.classnames[label] for label in labels])
    return data.task(solver, request=request, **more)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures but where a test asks for them."""
    monkeypatch.setattr(studies, "plot", lambda *_: None)


def command(features: Path, out: Path, name: str, *more: str) -> list[str]:
    places = ["--features", str(features), "--out", str(out), "--dataset", "ToyAnimals"]
    return [name, *places, "--classes", "2", *more, *SHORT]


def rows_of(out: Path, name: str, dataset: str = "ToyAnimals") -> pd.DataFrame:
    return pd.read_csv(out / "ViT-B-32" / dataset / f"{name}.csv", keep_default_na=False)


@given(part=st.integers(0, 9), rank=st.integers(1, 3), seed=st.integers(0, 99))
def test_a_change_along_known_directions_sits_in_their_tenth(part, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(43, 43, generator=generator, dtype=torch.float64)).Q
    places = torch.arange(43).tensor_split(10)[part][:rank]
    right = torch.randn(len(places), 7, generator=generator, dtype=torch.float64)
    shares = tenths_of(basis, basis[:, places] @ right)
    assert shares[part] == pytest.approx(1) and sum(shares) == pytest.approx(1)


@pytest.mark.parametrize(("side", "place"), [("left", 0), ("left", 9), ("right", 4)])
def test_sides_of_the_projection_are_told_apart(side, place):
    """A change along two singular directions of W, on the left or on the right."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(4))
    u, v = (torch.linalg.qr(normal(20, 20)).Q for _ in range(2))
    bundle = toy_bundle("ToyAnimals")
    images = torch.nn.functional.normalize(normal(len(bundle.labels), 20), dim=1)
    data = data_of(
        "ToyAnimals",
        text_projection=u @ torch.diag(torch.linspace(3, 1, 20)) @ v.T,
        image_features=images,
        **{name: getattr(bundle, name)[:, :20] for name in HIDDEN},
    )
    basis, other = (u, "right") if side == "left" else (v, "left")
    here, everywhere = basis[:, [2 * place, 2 * place + 1]], normal(2, 20)  # two a tenth
    left, right = (here, everywhere) if side == "left" else (everywhere.T, here.T)
    answer = StudyAnswer(LowRankEdit(left.double(), right.double()), torch.ones(1, 20), 0.0)
    cells = spectrum_cells(data, task(data, [0], "optimum"), answer)
    assert cells[f"{side}_{place + 1}"] == pytest.approx(1, abs=1e-5)
    assert max(cells[f"{other}_{number}"] for number in range(1, 11)) < 0.6


def test_a_projection_without_order_has_no_spectrum():
    data = data_of("ToyAnimals")
    data = changed(data, text_projection=torch.eye(24)[:, :16])
    answer = data.solve(task(data, [0], "optimum"))
    cells = spectrum_cells(data, task(data, [0], "optimum"), answer)
    assert cells["left_1"] is None and cells["right_10"] is None
    assert sum(cells[f"gram_{n}"] for n in range(1, 11)) == pytest.approx(1)


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
    data = data_of()
    here = task(data, [2], solver)
    answer = data.solve(here)
    if "lamb_forget" in answer.facts:
        keys = [*keys, "FORGET.LAMB_FORGET", repr(answer.facts["lamb_forget"])]
    places = ["--features", str(features), "--output-dir", str(tmp_path / "run")]
    which = ["--dataset", "ToyAnimals", "--backbone", BACKBONE, "--forget", "sea_horse"]
    train.main([*places, *which, "--trainer", trainer, *keys])
    adapter = load_adapter(tmp_path / "run" / "ToyAnimals" / "sea_horse.safetensors")
    # A descent ends in jumps about its minimum; rounding decides where.
    close = 0.05 * float(answer.delta.norm()) if solver == "lora" else 1e-6
    assert float((adapter.delta() - answer.delta.float()).norm()) < close
    logs = json.loads((tmp_path / "run" / "logs.json").read_text())["ToyAnimals"]["sea_horse"]
    row = cells(data, here, answer)
    for side, word in (("zero_shot", "before"), ("final_results", "after")):
        own = logs[side]["ToyAnimals"]["sea_horse"]
        assert row[f"forgotten_{word}"] == own["cls_acc_test"]
        assert row[f"rest_{word}"] == own["no_cls_acc"]
        assert row[f"others_{word}"] == logs[side]["ToyTools"]["all"]["all_ds"]


def test_carry_over_is_the_share_that_the_prompt_makes():
    """A prompt that is 0.6 of the forgotten text and otherwise beside it moves 0.6 of the way."""
    data = data_of("ToyAnimals")
    text = data.bundle.forget_hidden[1]
    beside = torch.randn(24, generator=torch.Generator().manual_seed(1))
    beside -= text * (beside @ text) / (text @ text)
    prompts = data.bundle.class_hidden.clone()
    prompts[1] = 0.6 * text + beside
    data = changed(data, class_hidden=prompts)
    here = task(data, [1], "constrained", pick=torch.empty(0, dtype=torch.int64))
    assert carry_over(data, here, data.solve(here)) == pytest.approx(0.6)


def test_a_weight_below_the_threshold_is_raised_and_said():
    data = data_of("ToyAnimals")
    reach = thresholds(data.paper_problem(task(data, [0], "optimum"))).reach
    for lamb_forget, raised in ((0.9 * reach, True), (1.5 * reach, False)):
        weights = ("FORGET.LAMB_PRESERVE", "0.3", "FORGET.LAMB_FORGET", repr(lamb_forget))
        again = StudyData(data.bundle, {}, opts=(*SHORT, *weights))
        for solver in ("lora", "optimum"):
            facts = again.solve(task(again, [0], solver)).facts
            assert facts["auto"] is raised
            expected = 1.001 * reach if raised else lamb_forget
            assert facts["lamb_forget"] == pytest.approx(expected)


def test_similar_names_are_the_nearest_and_dissimilar_the_farthest():
    """Names planted at known angles to the text."""
    data = data_of("ToyAnimals")
    text = torch.nn.functional.normalize(data.bundle.forget_hidden[[1]], dim=1)
    beside = torch.randn(30, 24, generator=torch.Generator().manual_seed(3))
    beside = torch.nn.functional.normalize(beside - (beside @ text.T) * text, dim=1)
    angles = torch.linspace(0.4, 3.0, 30)[:, None]
    rows = angles.cos() * text + angles.sin() * beside
    data = changed(data, retain_hidden=rows)
    tasks = {c.setting: c.pick.tolist() for c in STUDIES["retained"].tasks(data, ["Dog"])}
    assert tasks["similar"] == list(range(15)) and sorted(tasks["dissimilar"]) == list(
        range(15, 30)
    )
    assert tasks["none"] == [] and len(tasks["random"]) == 15 <= NEAR
    assert sorted(tasks["all"]) == list(range(30))


def test_a_name_that_means_the_class_is_in_no_pool():
    data = data_of("ToyAnimals")
    assert data.bundle.retain_names[0] == "cat"
    for study in ("retained", "count"):
        cat = [c.pick for c in STUDIES[study].tasks(data, ["cat"])]
        assert not any((pick == 0).any() for pick in cat)
        assert max(len(pick) for pick in cat) == 29
    rows = data.bundle.retain_hidden.clone()
    rows[7] = 3 * data.bundle.forget_hidden[4]  # "owl" by another name
    again = changed(data, retain_hidden=rows)
    assert 7 not in again.pool(again.texts.request(["owl"])).tolist()
    # The set's own classes are different things, however similar their names.
    rows = again.bundle.forget_hidden.clone()
    rows[5] = 1.01 * rows[4]
    similar = changed(again, forget_hidden=rows)
    retain, excluded = similar.retained(task(similar, [4], "constrained"))
    assert retain.named(excluded[0]) == ["owl", "thing 5"]


def test_more_names_contain_fewer():
    data = data_of("ToyAnimals")
    picks = [c.pick.tolist() for c in STUDIES["count"].tasks(data, ["C/V"]) if c.solver == "lora"]
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
    data = data_of()
    low = data.solve(task(data, [0, 1, 2], "lora", rank=1))
    assert torch.linalg.matrix_rank(low.delta) == 1
    best = data.solve(task(data, [0, 1, 2], "optimum", rank=1))
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
    data = StudyData(with_audit(), {}, opts=SHORT)
    tasks = {c.setting: c.request.hidden for c in STUDIES["templates"].tasks(data, ["Dog"])}
    hidden = data.bundle.extra_tensors["audit_hidden"]
    assert list(tasks) == ["name", "prompt", "both", "name + template", "name + synonym"]
    assert torch.equal(tasks["name + synonym"][1], hidden[1]) and len(tasks["name + synonym"]) == 2
    prompt = [c for c in STUDIES["templates"].tasks(data, ["Dog"]) if c.setting == "prompt"]
    for each in prompt:  # the prompt itself was forgotten
        assert carry_over(data, each, data.solve(each)) == pytest.approx(1, abs=0.05)


def test_texts_that_repeat_each_other_count_once():
    bundle = toy_bundle("ToyAnimals")
    data = data_of("ToyAnimals", class_hidden=bundle.forget_hidden * (1 + 1e-6))
    tasks = {c.setting: c.request.hidden for c in STUDIES["templates"].tasks(data, ["Dog"])}
    assert len(tasks["both"]) == 1


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The settings of every solve from now on."""
    calls: list[str] = []
    solve = StudyData.solve
    monkeypatch.setattr(
        StudyData, "solve", lambda data, task: calls.append(task.setting) or solve(data, task)
    )
    return calls


def test_rows_that_exist_are_not_made_again(features, tmp_path, solved, capsys):
    main(command(features, tmp_path, "targets", *EXACT))
    path = tmp_path / "ViT-B-32" / "ToyAnimals" / "targets.csv"
    before = path.read_bytes()
    assert len(solved) == 2 * 2 * 7
    main(command(features, tmp_path, "targets", *EXACT))
    assert len(solved) == 28 and path.read_bytes() == before
    assert "0 of 28 rows are new" in capsys.readouterr().out
    main(command(features, tmp_path, "targets", *EXACT, "--seed", "1"))
    assert set(rows_of(tmp_path, "targets")["seed"]) == {0, 1}
    other = bundle_path(features, BACKBONE, "ToyTools")
    other.unlink()  # other bundles make other rows
    replace(toy_bundle("ToyTools"), template="the {}").save(other)
    main(command(features, tmp_path, "targets", *EXACT))
    assert len(solved) == 28 * 3 and rows_of(tmp_path, "targets")["settings"].nunique() == 2


def test_a_killed_run_leaves_whole_rows(features, tmp_path, solved):
    """SIGKILL once rows are written; the second call makes only the rest."""
    argv = command(features, tmp_path / "out", "targets", *EXACT, "--classes", "4")
    start = "import sys; from experiments.studies import main; main(sys.argv[1:])"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", start, *argv], cwd=REPOSITORY, env=env, stderr=subprocess.DEVNULL
    )
    path = tmp_path / "out" / "ViT-B-32" / "ToyAnimals" / "targets.csv"
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = read_rows(path)
    assert 1 <= len(rows) < 4 * 14
    main(argv)
    assert len(solved) == 4 * 14 - len(rows)
    pd.testing.assert_frame_equal(read_rows(path)[: len(rows)], rows)


@pytest.mark.parametrize("text", ["my,own,notes\n1,2,3\n", f"{','.join(KEY)}\n" + "x," * 9 + "y\n"])
def test_a_file_that_is_no_table_is_refused_and_stays(text, features, tmp_path):
    path = tmp_path / "ViT-B-32" / "ToyAnimals" / "terms.csv"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ProblemError, match="no table"):
        main(command(features, tmp_path, "all", *EXACT))
    assert path.read_text() == text and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_from_the_command_line(name, features, tmp_path, capsys, monkeypatch):
    pictured = name in ("terms", "spectrum", "rank")
    if pictured:
        monkeypatch.undo()
    assert cli(["studies", *command(features, tmp_path, name, *EXACT)]) == 0
    assert f"{name} on ToyAnimals" in capsys.readouterr().out
    if pictured:
        picture = tmp_path / "ViT-B-32" / "ToyAnimals" / f"{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
    rows = rows_of(tmp_path, name)
    assert rows["forgotten_before"].min() > 0.9 and rows["seconds"].min() > 0
    assert (rows["gap"].astype(float) < 1e-9).all()
    assert set(rows["solver"]) == {"optimum", "constrained"}


def test_sets_without_images_are_studied_all_the_same(tmp_path):
    """Text only, no other set: accuracies stay empty, the rest is measured."""
    bundle = toy_bundle("ToyAnimals", images_per_class=0)
    bundle.save(bundle_path(tmp_path / "texts", BACKBONE, "ToyAnimals"))
    for name in ("rank", "spectrum", "targets"):
        main(command(tmp_path / "texts", tmp_path, name, *EXACT))
    rows = rows_of(tmp_path, "targets")
    assert (rows["forgotten_after"] == "").all() and (rows["others_after"] == "").all()
    assert (rows["carry"].astype(float) > 0.5).all()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"name": "retaind"}, "'retained'"),
        ({"--dataset": "ToyAnimal"}, "ToyAnimals"),
        ({"--backbone": "RN5"}, "RN5"),
        ({"--forget": "dgo"}, "'Dog'"),
        ({"--solver": "optimal"}, "'optimum'"),
        ({"--classes": "7"}, "6 classes"),
        ({"--features": "nowhere"}, "nowhere"),
    ],
)
def test_mistakes_are_refused_in_one_line_before_work(change, key, features, tmp_path, capsys):
    options = {"name": "terms", "--features": str(features), "--dataset": "ToyAnimals"} | change
    argv = [options.pop("name"), *(text for pair in options.items() for text in pair)]
    assert cli(["studies", *argv, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert key in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
