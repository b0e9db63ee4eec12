"""Many requests: on small bundles, by the command line."""

from argparse import Namespace
from pathlib import Path

import pandas as pd
import pytest
import torch

from clip.bundle import load_bundles
from evaluation.zero_shot import ZeroShot
from experiments import requests
from experiments.__main__ import cli
from forgetting.problem import Batch, LowRankEdit
from tests.conftest import BACKBONE

OWN, ONE = "ToyAnimals", "one after another"
LINE = ["requests", "--features", "features", "--dataset", OWN]


@pytest.fixture
def sets(features: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, ZeroShot]:
    monkeypatch.chdir(features.parent)
    return {name: ZeroShot(each) for name, each in load_bundles("features", BACKBONE).items()}


def test_a_table_and_a_picture_by_the_command_line(sets, figures):
    line = [*LINE, "--unlisted", "ToyTools", "--counts", "1", "3", "9", "--seeds", "2"]
    assert cli([*line, "--methods", "exact", "uce", "--draw", "limits.png"]) == 0
    assert len(figures[0].axes[0].lines) == 6
    table = pd.read_csv("requests/requests.csv")
    assert set(table["count"]) == {1, 3, 5}  # of six
    ways = table.groupby("method")["way"].value_counts().unstack(fill_value=0)
    assert ways.loc["uce"].to_dict() == dict.fromkeys(ways, 0) | {"at once": 6, ONE: 6}
    assert ways.loc["exact"].drop(ONE).eq(6).all() and len(ways.columns) == 5
    assert (table.loc[table["way"].isin(["at once", "composed"]), "left"] == 0).all()


def test_measures_by_hand(sets):
    """An edit that turns two animals' texts around and lets the tools' texts be."""
    animals, tools = sets[OWN], sets["ToyTools"]
    rows = torch.cat([animals.bundle.class_hidden[:2], tools.bundle.class_hidden]).double()
    goal = torch.zeros(len(rows), 16).double()
    goal[:2] = -2 * tools.bundle.embed(rows[:2])
    edit = LowRankEdit(torch.linalg.pinv(rows), goal)
    found = requests.measure(animals, ["cat", "Dog"], edit)
    assert found["left"] == found["worst"] == found["first"] == 0
    assert abs(requests.gain(tools, edit, set())) < 1e-9
    assert requests.gain(animals, edit, {"dog"}) < requests.gain(animals, edit, {"dog", "cat"})
    nothing = requests.measure(animals, ["cat"], LowRankEdit(edit.left, 0 * edit.right))
    assert nothing["first"] > 90 and nothing["rest"] == 0


def test_one_after_another_starts_from_what_the_request_before_left(sets):
    """The second text is then zero, which it is not after the sum of changes of the original."""
    bundles = {name: images.bundle for name, images in sets.items()}
    args = Namespace(features="features", backbone=BACKBONE, out="out")
    trainer, own = requests.make_trainer("zero", args, bundles), bundles[OWN]
    alone = trainer.solve(Batch(trainer.requests([["cat"], ["Dog"]])))
    *_, (way, count, edit) = requests.edits_of(trainer, ["cat", "Dog"], [1, 2])
    assert (way, count) == (ONE, 2)
    assert trainer.bundle.text_projection is trainer.projection  # of which targets are made
    text, w = own.forget_hidden[1].double(), own.text_projection.double()
    assert (text @ (w + edit.delta)).norm() < 1e-3
    assert (text @ (w + requests.summed(alone).delta)).norm() > 0.1


def test_sets_that_are_not_there_are_refused(sets, refused):
    assert "ToyCars" in refused([*LINE, "--unlisted", "ToyCars"], cli)
    assert "--unlisted" in refused([*LINE, "--unlisted", OWN], cli)
