"""Studies: what each varies, what is measured of its edits, and rows that are not made twice."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch.nn.functional import normalize

from clip.bundle import bundle_path
from experiments.__main__ import cli
from experiments.studies import STUDIES, Inputs, carry_over, main
from forgetting import load_adapter
from tests.conftest import BACKBONE, toy_bundle
from tests.solver_fixtures import normal

SHORT = ["TRAINER.FORGETLORA.STEPS", "200", "TRAINER.FORGETLORA.MAX_TRIALS", "1"]
EXACT = ["--solver", "optimum", "--solver", "constrained"]


def command(features: Path, out: Path, name: str, *more: str) -> list[str]:
    places = ["--features", str(features), "--out", str(out), "--dataset", "ToyAnimals"]
    return [name, *places, "--classes", "2", *more, *SHORT]


def study(features: Path, out: Path, name: str, *more: str) -> pd.DataFrame:
    (path,) = main(command(features, out, name, *more))
    assert path == out / "ViT-B-32" / "ToyAnimals" / f"{name}.csv"
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return pd.read_csv(path).set_index(["trainer", "setting", "mode"]).sort_index()


def inputs(folder: Path, **changes) -> Inputs:
    return Inputs(replace(toy_bundle("ToyAnimals"), **changes), {}, folder, 0)


def names_in(keys: list[str]) -> list[str]:
    """The names of the file that is to be retained."""
    return Path(keys[keys.index("FORGET.RETAIN_NAMES") + 1]).read_text().splitlines()


def test_carry_over_is_the_part_of_the_way_that_the_prompt_goes():
    bundle = toy_bundle("ToyAnimals")
    text = bundle.forget_hidden[1].double()
    prompts = bundle.class_hidden.clone()
    prompts[1] = 0.6 * text.float()
    bundle = replace(bundle, class_hidden=prompts)
    delta = torch.outer(text, normal(16))
    assert carry_over(bundle, ["Dog"], ["Dog"], delta) == pytest.approx(0.6)
    assert carry_over(bundle, ["Dog"], ["a photo of a Dog."], delta) == pytest.approx(1)
    assert carry_over(bundle, ["Dog"], ["Dog"], 0 * delta) is None


def test_similar_names_are_the_nearest_and_dissimilar_the_farthest(tmp_path):
    """Names planted at known angles to the text."""
    text = normalize(toy_bundle("ToyAnimals").forget_hidden[[1]], dim=1)
    beside = normal(30, 24, seed=3).float()
    beside = normalize(beside - (beside @ text.T) * text, dim=1)
    angles = torch.linspace(0.4, 3.0, 30)[:, None]
    one = inputs(tmp_path, retain_hidden=angles.cos() * text + angles.sin() * beside)
    names, table = one.bundle.retain_names, STUDIES["retained"](one, "Dog", "lora")
    picked = {setting: names_in(keys) for setting, keys in table.items() if setting != "none"}
    assert picked["similar"] == names[:15] and picked["dissimilar"] == names[15:]
    assert len(picked["random"]) == 15 and sorted(picked["all"]) == sorted(names)


def test_a_name_that_means_the_class_is_near_to_nothing(tmp_path):
    rows = inputs(tmp_path).bundle.retain_hidden.clone()
    rows[7] = 3 * toy_bundle("ToyAnimals").forget_hidden[0]  # "cat" by another name
    nearest = inputs(tmp_path, retain_hidden=rows).nearest("cat").tolist()
    assert sorted(nearest) == [row for row in range(30) if row not in (0, 7)]


def test_more_names_contain_fewer(tmp_path):
    table = STUDIES["count"](inputs(tmp_path), "C/V", "lora")
    ten, thirty = (names_in(table[size]) for size in ("10", "30"))
    assert list(table) == ["0", "10", "30"] and ten == thirty[:10]
    assert sorted(thirty) == sorted(toy_bundle("ToyAnimals").retain_names) != thirty


def test_terms_and_groups_that_are_off_matter(features, tmp_path):
    rows = study(features, tmp_path, "terms", "--forget", "owl")
    for trainer in ("ForgetLoRA", "ForgetOptimum"):
        line = rows.loc[trainer].droplevel("mode")
        assert line["norm"]["no forget"] == 0 and pd.isna(line["carry"]["no forget"])
        assert line["class after"]["no forget"] == line["class before"]["no forget"] > 90
        assert line["norm"]["all on"] > 0 and line["class after"]["all on"] < 50
        # A change that costs nothing by itself is larger.
        assert line["norm"]["no weight"] > line["norm"]["all on"] > line["norm"]["no preserve"]
    groups = rows.loc["ForgetExact"]
    assert (groups["class after"] < 50).all() and groups["norm"].nunique() == 4


def test_ranks_bind_the_descent_only(features, tmp_path):
    rows = study(features, tmp_path, "rank", "--classes", "3")
    together = rows[rows["forgotten"].str.count(r"\|") == 2]
    assert len(together) == 5 + 5 + 1 and len(rows) == 4 * 11
    # The optimum has no bound on its rank, but the rank's weight term.
    ranks = [f"rank {number}" for number in (1, 2, 5, 10, 50)]
    optimum = together.loc["ForgetOptimum"].droplevel("mode").loc[ranks]
    assert optimum["norm"].is_monotonic_decreasing and optimum["norm"].nunique() == 5
    # The paper's weight would move nothing.
    assert "auto" in STUDIES["rank"](None, "", "lora")["rank 50"]
    for solver, rank in (("lora", 1), ("optimum", 3)):
        folder = tmp_path / "ViT-B-32/ToyAnimals/rank" / solver / "rank 1/seed_0/ToyAnimals"
        (path,) = [p for p in folder.glob("*.safetensors") if len(load_adapter(p).classes) == 3]
        assert torch.linalg.matrix_rank(load_adapter(path).delta()) == rank


def test_the_texts_of_templates_are_forgotten(features, tmp_path):
    rows = study(features, tmp_path, "templates", "--forget", "Dog")
    assert rows.xs("prompt", level="setting")["carry"].tolist() == pytest.approx([1, 1, 1])
    folder = tmp_path / "ViT-B-32/ToyAnimals/templates/constrained/both/seed_0/ToyAnimals"
    adapter = load_adapter(folder / "Dog.safetensors")
    assert adapter.texts == ["Dog", "a photo of a Dog."] and adapter.solver["beta"] == 0


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_from_the_command_line_resumes(name, features, tmp_path, capsys):
    argv = ["studies", *command(features, tmp_path, name, *EXACT)]
    assert cli(argv) == 0
    assert f"{name} on ToyAnimals" in capsys.readouterr().out
    path = tmp_path / "ViT-B-32" / "ToyAnimals" / f"{name}.csv"
    rows, before = pd.read_csv(path), path.read_bytes()
    assert rows["class before"].min() > 90 and (rows["gap"] < 1e-9).all()
    assert set(rows["trainer"]) == {"ForgetOptimum", "ForgetExact"}
    assert cli(argv) == 0 and path.read_bytes() == before, "seconds are those of the first solve"


def test_sets_without_images_are_studied_all_the_same(tmp_path):
    """Text only, no other set: accuracies stay empty, the rest is measured."""
    bundle = toy_bundle("ToyAnimals", images_per_class=0)
    bundle.save(bundle_path(tmp_path / "texts", BACKBONE, "ToyAnimals"))
    (path,) = main(command(tmp_path / "texts", tmp_path, "targets", *EXACT))
    rows = pd.read_csv(path)
    assert len(rows) == 2 * (6 + 7) and (rows["carry"] > 0.5).all()
    assert rows[["class after", "others after"]].isna().all(axis=None)
