"""Many requests: on small bundles, by the command line."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from clip.bundle import load_bundles
from evaluation.zero_shot import ZeroShot
from experiments import name, requests
from experiments.__main__ import cli
from forgetting.problem import Batch, LowRankEdit
from tests.conftest import BACKBONE, toy_bundle

OWN = "ToyAnimals"


@pytest.fixture
def sets(features: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, ZeroShot]:
    monkeypatch.chdir(features.parent)
    return {name: ZeroShot(each) for name, each in load_bundles("features", BACKBONE).items()}


def test_a_table_and_a_picture_by_the_command_line(sets, capsys, figures):
    line = ["requests", "--features", "features", "--dataset", OWN, "--unlisted", "ToyTools"]
    line += ["--counts", "1", "3", "6", "--seeds", "2", "--methods", "exact", "uce"]
    assert cli([*line, "--draw", "limits.png"]) == 0 and Path("limits.png").stat().st_size
    assert "one after another" in capsys.readouterr().out
    table = pd.concat(map(pd.read_csv, sorted(Path("requests").glob("*.csv"))))
    assert set(table["count"]) == {1, 3}  # six are all there are
    ways = table.groupby(["method", "way"]).size().to_dict()
    names = {"exact": ["at once", "at once, soft", "added", "composed"]}
    names["uce"] = ["at once", "one after another"]
    assert ways == {(method, way): 4 for method in names for way in names[method]}
    assert (table.loc[table["way"].isin(["at once", "composed"]), "left"] == 0).all()
    assert [axis.get_title() for axis in figures[0].axes] == list(requests.DRAWN.values())
    assert len(figures[0].axes[0].lines) == 6


def test_measures_by_hand(sets):
    """An edit that turns two animals' texts around and lets the tools' texts be."""
    tools = sets["ToyTools"].bundle
    rows = torch.cat([toy_bundle(OWN).class_hidden[:2], tools.forget_hidden, tools.class_hidden])
    goal = torch.zeros(len(rows), 16)
    goal[:2] = -2 * tools.embed(rows[:2])
    edit = LowRankEdit(torch.linalg.pinv(rows.double()), goal.double())
    found = requests.measure(sets, "ToyTools", ["cat", "Dog"], edit)
    assert found["left"] == found["worst"] == found["first"] == 0
    assert abs(found["unlisted"]) < 1e-9 and found["moved"] < 1e-3
    nothing = requests.measure(sets, "ToyTools", ["cat"], LowRankEdit(edit.left, 0 * edit.right))
    assert nothing["first"] > 90 and nothing["rest"] == nothing["moved"] == 0


def test_one_after_another_starts_from_what_the_request_before_left(sets):
    """The second text is then zero, which it is not after the sum of changes of the original."""
    bundles = {name: images.bundle for name, images in sets.items()}
    options = ["--features", "features", "--backbone", BACKBONE, "--dataset", OWN]
    trainer, own = requests.make_trainer("zero", bundles, options), bundles[OWN]
    alone = trainer.solve(Batch(trainer.requests([["cat"], ["Dog"]])))
    *_, (way, count, edit) = requests.edits_of(trainer, ["cat", "Dog"], [1, 2])
    assert (way, count) == ("one after another", 2)
    text = own.forget_hidden[1].double()
    w, added = own.text_projection.double(), requests.summed(alone)
    assert (text @ (w + edit.left @ edit.right)).norm() < 1e-3
    assert (text @ (w + added.left @ added.right)).norm() > 0.1


def test_a_name_hides_among_what_is_forgotten_with_it(sets, monkeypatch):
    """One of 1 + n that share the change; names that go half of the way do not hide it."""
    ways = {"alone": 0, "decoys": 4, "half": 4}
    rows = {way: ("exact", "decoys", n, 0.5 if way == "half" else 1.0) for way, n in ways.items()}
    monkeypatch.setattr(name, "WAYS", rows)
    assert cli(["name", "--features", "features", "--classes", "3"]) == 0
    table = pd.read_csv("name/name.csv").groupby("way").mean(numeric_only=True)
    assert table.loc["alone", ["left", "moved"]].tolist() == [0, 1] and table["known"]["alone"] < 2
    assert table["known"]["decoys"] >= 3 and table["moved"]["decoys"] > 1 == table["moved"]["half"]


def test_an_unknown_name_is_refused(sets, refused):
    line = ["requests", "--features", "features", "--dataset", OWN]
    assert "ToyAnimal" in refused([*line[:-1], "ToyAnimal"], cli)
    assert "ToyCars" in refused([*line, "--unlisted", "ToyCars"], cli)
    assert "--counts" in refused([*line, "--counts", "6"], cli)
