"""Many requests: on small bundles, by the command line."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from clip.bundle import load_bundles
from evaluation.zero_shot import ZeroShot
from experiments import requests
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
    table = pd.read_csv("requests/requests.csv")
    assert set(table["count"]) == {1, 3}  # six are all there are
    ways = table.groupby(["method", "way"]).size().to_dict()
    exact = {("exact", way): 4 for way in ("at once", "added", "composed")}
    assert ways == exact | {("uce", way): 4 for way in ("at once", "one after another")}
    assert (table.loc[table["way"] != "added", "left"] == 0).all()
    assert [axis.get_title() for axis in figures[0].axes] == list(requests.DRAWN.values())
    assert len(figures[0].axes[0].lines) == 5


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
    lengths = [
        float((text @ (own.text_projection.double() + each.left @ each.right)).norm())
        for each in (edit, requests.summed(alone))
    ]
    assert lengths[0] < 1e-3 < 0.1 < lengths[1]


def test_an_unknown_name_is_refused(sets, refused):
    line = ["requests", "--features", "features", "--dataset", OWN]
    assert "ToyAnimal" in refused([*line[:-1], "ToyAnimal"], cli)
    assert "ToyCars" in refused([*line, "--unlisted", "ToyCars"], cli)
    assert "--counts" in refused([*line, "--counts", "6"], cli)
