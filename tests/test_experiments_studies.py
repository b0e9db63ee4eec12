"""Studies: which names and texts they choose, and that their settings have the effect they name."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch.nn.functional import normalize

from clip.bundle import bundle_path
from experiments.__main__ import cli
from experiments.studies import STUDIES, Inputs, count, main, retained
from forgetting import load_adapter
from tests.conftest import BACKBONE, toy_bundle
from tests.solver_fixtures import normal

SHORT = ["TRAINER.FORGETLORA.STEPS", "200", "TRAINER.FORGETLORA.MAX_TRIALS", "1"]
EXACT = ["--solver", "optimum", "--solver", "constrained"]


def command(features: Path, out: Path, name: str, *more: str) -> list[str]:
    places = ["--features", str(features), "--out", str(out), "--dataset", "ToyAnimals"]
    return [name, *places, "--classes", "2", *more, *SHORT]


def study(*arguments) -> pd.DataFrame:
    (table,) = main(command(*arguments))
    return table.set_index("method")


def inputs(folder: Path, **changes) -> Inputs:
    return Inputs(replace(toy_bundle("ToyAnimals"), **changes), folder, 0)


def names_in(sweep: dict) -> dict[str, list[str]]:
    """Setting -> the names of the file that is to be retained."""
    files = {name: keys.get("FORGET.RETAIN_NAMES") for name, keys in sweep["settings"].items()}
    return {
        name: Path(file).read_text().splitlines() if file else [] for name, file in files.items()
    }


def test_similar_names_are_the_nearest_and_dissimilar_the_farthest(tmp_path):
    """Names planted at known angles to the text."""
    text = normalize(toy_bundle("ToyAnimals").forget_hidden[[1]], dim=1)
    beside = normal(30, 24, seed=3).float()
    beside = normalize(beside - (beside @ text.T) * text, dim=1)
    angles = torch.linspace(0.4, 3.0, 30)[:, None]
    one = inputs(tmp_path, retain_hidden=angles.cos() * text + angles.sin() * beside)
    names = one.bundle.retain_names
    shared, own = retained(one, ["Dog"])
    assert own["classes"] == ["Dog"]
    assert names_in(own) == {"similar": names[:15], "dissimilar": names[15:]}
    picked = names_in(shared)
    assert picked["none"] == [] and sorted(picked["all"]) == sorted(names)
    assert len(picked["random"]) == 15 and picked["random"] not in names_in(own).values()


def test_a_name_that_means_the_class_is_near_to_nothing(tmp_path):
    rows = inputs(tmp_path).bundle.retain_hidden.clone()
    rows[7] = 3 * toy_bundle("ToyAnimals").forget_hidden[0]  # "cat" by another name
    nearest = inputs(tmp_path, retain_hidden=rows).nearest("cat").tolist()
    assert sorted(nearest) == [row for row in range(30) if row not in (0, 7)]


def test_more_names_contain_fewer(tmp_path):
    (sweep,) = count(inputs(tmp_path), ["C/V"])
    none, ten, thirty = names_in(sweep).values()
    assert not none and len(ten) == 10 and ten == thirty[:10]
    assert sorted(thirty) == sorted(toy_bundle("ToyAnimals").retain_names) != thirty


def test_terms_and_groups_that_are_off_matter(features, tmp_path):
    rows = study(features, tmp_path, "terms", "--forget", "owl")
    for trainer in ("ForgetLoRA", "ForgetOptimum"):
        left = {name: rows.loc[f"{trainer} {name}"] for name in ("all on", "no forget")}
        assert left["no forget"]["class after"] == left["no forget"]["class before"] > 90
        assert left["all on"]["class after"] < 50
        objectives = rows["objective"][rows.index.str.startswith(trainer)]
        assert objectives.iloc[0] == objectives.max() and objectives.nunique() == 4
    groups = rows[rows.index.str.startswith("ForgetExact")]
    assert (groups["class after"] < 50).all() and groups["objective"].nunique() == 4


def test_ranks_bind_the_descent_only(features, tmp_path):
    rows = study(features, tmp_path, "rank", "--classes", "3")
    assert rows["mode"].value_counts().to_dict() == {"alone": 11, "at once": 11}
    for trainer, rank in (("ForgetLoRA", 1), ("ForgetOptimum", 3)):
        folder = tmp_path / "rank/ViT-B-32" / f"{trainer} rank 1/seed_0/ToyAnimals"
        (path,) = [p for p in folder.glob("*.safetensors") if len(load_adapter(p).classes) == 3]
        assert torch.linalg.matrix_rank(load_adapter(path).delta()) == rank


def test_the_texts_of_templates_are_forgotten(features, tmp_path):
    study(features, tmp_path, "templates", "--forget", "Dog", "--solver", "constrained")
    folder = tmp_path / "templates/ViT-B-32/ForgetExact both/seed_0/ToyAnimals"
    adapter = load_adapter(folder / "Dog.safetensors")
    assert adapter.texts == ["Dog", "a photo of a Dog."] and adapter.solver["beta"] == 0


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_from_the_command_line_resumes(name, features, tmp_path, capsys):
    argv = ["studies", *command(features, tmp_path, name, *EXACT)]
    assert cli(argv) == 0
    assert "average gain" in capsys.readouterr().out
    path = tmp_path / name / "sweep.csv"
    rows, before = pd.read_csv(path), path.read_bytes()
    assert rows["class before"].min() > 90 and (rows["gap"] < 1e-8).all()
    assert set(rows["method"].str.split(" ").str[0]) == {"ForgetOptimum", "ForgetExact"}
    assert (rows["classes"] == rows["mode"].map({"alone": 2, "at once": 1})).all()
    assert cli(argv) == 0 and path.read_bytes() == before, "seconds are those of the first solve"


def test_sets_without_images_are_studied_all_the_same(tmp_path):
    """Text only, no other set: accuracies stay empty, the rest is measured."""
    bundle = toy_bundle("ToyAnimals", images_per_class=0)
    bundle.save(bundle_path(tmp_path / "texts", BACKBONE, "ToyAnimals"))
    rows = study(tmp_path / "texts", tmp_path, "targets", *EXACT)
    assert len(rows) == 6 + 7 and (rows["objective"] > 0).all()
    assert rows[["class after", "others after"]].isna().all(axis=None)
