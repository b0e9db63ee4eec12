"""The distance to gold: tiny trainings by the command line, and its measures by hand."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from clip import train_mini
from clip.architectures import architecture
from datasets import mini
from experiments import gold
from experiments.__main__ import cli
from experiments.hide import Index
from tests.conftest import refuses, toy_bundle
from trainers import methods


def test_by_the_command_line(tmp_path, monkeypatch, capsys):
    """Every training is made once; a run of other steps must not take it."""
    few = {name: x for name, x in gold.TRAININGS.items() if name not in ("full-2", "full-3")}
    for name, value in {"SHOTS": (1, 3), "DRAWS": 2, "TRAININGS": few}.items():
        monkeypatch.setattr(gold, name, value)
    torch.manual_seed(0)
    monkeypatch.setattr(train_mini, "train", lambda *_: architecture("mini").build().eval())
    monkeypatch.setattr(mini, "TEST_IMAGES", 4)
    monkeypatch.setattr(methods, "generic_names", lambda: ["dog", "house"])
    monkeypatch.chdir(tmp_path)
    assert cli(["gold", "--steps", "1", "--method", "name", "--method", "exact-specific"]) == 0
    assert "sum of its parts: AUC" in capsys.readouterr().out
    table = pd.read_csv("gold/gold.csv")
    ways = ["nothing", "name", "exact-specific", gold.ALONE, "another seed", "gold", gold.FULLS]
    assert list(table["way"].unique()) == ways and set(table["class"]) == set(gold.LEFT_OUT)
    assert set(table[table["way"] == gold.ALONE]["class"]) == {"digit two"}
    of_two = table[(table["way"] == "gold") & (table["group"] != gold.STILL)]
    assert of_two.groupby("measure")["ratio"].mean().dropna().to_numpy() == pytest.approx(1)
    assert Path("gold/truth.png").stat().st_size
    Path("gold/b-1.safetensors").unlink()
    made, main = [], train_mini.main
    monkeypatch.setattr(train_mini, "main", lambda argv: made.append(argv) or main(argv))
    monkeypatch.setattr(gold, "Training", str)  # nothing is encoded again
    assert set(gold.trainings(Path("gold"), 1)) == set(few)
    assert [f"--without={name}" for name in gold.GROUPS["b"]] == made.pop()[:4] and not made
    refuses("choose another --out", gold.main, ["--steps", "2"])


def test_distances_by_hand():
    p, q = torch.eye(2).double(), torch.eye(2).double().flip(0)
    assert gold.distance(p, p) == 0 and gold.distance(p, q) == pytest.approx(math.log(2))
    assert gold.distance(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4])) == pytest.approx(1 / 3)
    assert gold.distance(torch.tensor([0.5, 1.0]), torch.tensor([1.0, 1.0])) == 0.25


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> gold.Training:
    """Two sets as a training, whose classes "red cat" and "saw" are left out together."""
    animals = ["red cat", "red dog", "red owl", "sea cat", "sea ox", "ant"]
    monkeypatch.setattr(gold, "GROUPS", {"a": ["red cat", "saw"]})
    bundles = {name: toy_bundle(name) for name in ("ToyAnimals", "ToyTools")}
    own = bundles["ToyAnimals"] = replace(bundles["ToyAnimals"], classnames=animals)
    training = gold.Training.__new__(gold.Training)
    Index.__init__(training, bundles, lambda texts: own.class_hidden[: len(texts)])
    training.scale, training.data = 20.0, [gold.AuditData(b) for b in bundles.values()]
    training.noisy, training.noisy_labels = training.images, training.labels
    return training


def test_a_profile_by_hand(toy):
    near = gold.beside(toy, 0)
    assert near["siblings"].nonzero()[:, 0].tolist() == [1, 2, 3]  # red, red, cat
    assert near["neighbours"].sum() == gold.NEAREST and not near["neighbours"][0]
    projection = toy.bundles["ToyAnimals"].text_projection.double()
    before = gold.profile(toy, 0, near)
    assert before["own probability"] > 0.9
    assert [len(before[x]) for x in ("own", "siblings", "rest", "others")] == [12, 36, 60, 36]
    assert not before["others"][:, 7].any()  # left out together: neither image nor name
    assert not before["own"][:, 6:].any()  # names of the other set
    off = toy.changed(projection)
    off.removed = ["red cat"]
    after = gold.profile(off, 0, near)
    assert after["own probability"] == 0 and after["name"] == before["name"]
    assert gold.distance(after["others"], before["others"]) == 0
    text = toy.prompts[:1].double()
    moved = projection - 2 * torch.linalg.pinv(text) @ (text @ projection)  # to its opposite
    opposite = gold.profile(toy.changed(moved), 0, near)
    assert float(opposite["name"]) == pytest.approx(-float(before["name"]))
    assert opposite["both 1"] < 0.2 < 0.9 < opposite["images 1"] == before["images 1"]
    assert (opposite["perturbed"] != 0).all() and opposite["perturbed accuracy"] == 0


def test_names_of_parts_from_text():
    """`red cat` as the sum of what holds its words, beside the others, which are random."""
    red, sea, cat, dog, ant, random = torch.randn(6, 24, generator=torch.manual_seed(0)) * 4
    rows = {"red cat": red + cat, "red dog": red + dog, "sea cat": sea + cat, "sea dog": sea + dog}
    rows |= {"ant": ant, "red ant": random}
    names = list(rows)
    bundle = SimpleNamespace(retain_names=names, retain_hidden=torch.stack(list(rows.values())))
    full = SimpleNamespace(bundles={"x": bundle}, names=names, sets=["x"] * 6)
    found = gold.from_text(full, {"red cat": 0.9, "red ant": 0.1}).set_index("class")
    assert found["sum of its parts"]["red cat"] > 0.5 > found["sum of its parts"]["red ant"]
    assert found["gold"]["red ant"] == 0.1
