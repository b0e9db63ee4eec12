"""What still finds a hidden class: on small bundles, by the command line."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from clip.bundle import load_bundles
from datasets import mini
from evaluation.zero_shot import ZeroShot
from experiments import hide
from experiments.__main__ import cli
from forgetting import hide_in_index
from forgetting.adapter import Adapter, projection_sha256
from tests.conftest import BACKBONE, TOY_CLASSES, toy_bundle


@pytest.fixture
def index(features: Path, monkeypatch: pytest.MonkeyPatch) -> hide.Index:
    """Two sets, and a broader name for three classes of the first."""
    monkeypatch.chdir(features.parent)
    monkeypatch.setitem(hide.BROADER, "thing 1", ["cat", "Dog", "sea horse"])
    return hide.Index(load_bundles("features", BACKBONE))


def test_a_table_by_the_command_line(index, capsys):
    assert cli(["hide", "--features", "features", "--classes", "2"]) == 0
    assert "min of each group" in capsys.readouterr().out
    table = pd.read_csv("hide/hide.csv").set_index(["data set", "class", "way"])
    assert len(table) == 2 * 2 * 10
    for (dataset, name), rows in table.groupby(level=[0, 1]):
        bundle, rows = index.bundles[dataset], rows.droplevel([0, 1])
        own = ZeroShot(bundle).correct_before[bundle.labels == bundle.classnames.index(name)]
        assert rows.loc["nothing", "left"] == 100 * float(own.double().mean()) > 90
        assert not rows.loc["nothing", ["rest", "searches", "worst search"]].any()
        for way in ("text edit", "index edit", "index edit, dot product"):
            assert rows.loc[way, "left"] == 0
        assert rows.loc["query 3q - 2n", "left"] > 90  # 3n - 2n is the name itself


def test_ways_are_what_they_are_called(index):
    """The index edit is the library's. Left unnormalised it ranks images as the text edit in the
    space of embeddings does."""
    ((text, vectors),) = hide.in_both_spaces(index, "ToyAnimals", ["cat"])
    left, right = vectors.edit.left, vectors.edit.right
    ways, queries = hide.ways(index, 0, text.edit, vectors.edit), index.embed(index.prompts)
    adapter = Adapter(left, right, projection_sha256(torch.eye(16)), "", "", "", ["cat"], "")
    assert torch.allclose(ways["index edit"].images, hide_in_index(index.images, adapter))
    scores = index.images @ (queries + (queries @ left) @ right).T
    assert torch.allclose(ways["index edit, dot product"].scores(queries), scores)
    assert not torch.allclose(index.plain.scores(queries), scores, atol=0.1)
    name = index.embed(index.bundles["ToyAnimals"].forget_hidden[:1])
    expected = hide.unit(3 * queries - 2 * name)
    assert torch.allclose(ways["query 3q - 2n"].query(index.prompts), expected)
    assert (ways["projected off the name"].images @ name.T).abs().max() < 1e-9


def test_measures_by_hand(monkeypatch):
    """Classes a, b of one set and c, d of another, whose texts are the axes: a digit is a score.
    Images of a (4; the third is flagged), b (3), c and d (2)."""
    monkeypatch.setitem(hide.BROADER, "letter", ["a", "b"])
    monkeypatch.setattr(hide, "FIRST", 10)
    eye, bundles = torch.eye(4), {}
    both = {"ab": [0, 0, 0, 0, 1, 1, 1], "cd": [0, 1, 1]}
    for name, own, (letters, labels) in zip(TOY_CLASSES, eye.split(2), both.items(), strict=True):
        images = {"image_features": own[labels], "labels": torch.tensor(labels)}
        texts = {"class_hidden": own, "classnames": list(letters), "text_projection": eye}
        broader = {"retain_names": ["letter"], "retain_hidden": eye[:1] + eye[1:2]}
        bundles[name] = replace(toy_bundle(name), **images, **texts, **broader)
    index = hide.Index(bundles)
    table = ["9000", "0105", "8900", "8600", "0800", "7500", "0700", "0034", "0056", "0072"]
    scores = torch.tensor([list(map(float, row)) for row in table]).double()
    search = hide.Search(scores, index.embed, torch.arange(10) == 2)
    percent = {
        "left": 2 / 4,
        "words": (2 / 4 + 1 / 4) / 2,  # a itself, and d
        "worst word": 2 / 4,
        "rest": -1 / 3,
        "searches": (-1 / 12 - 2 / 3 - 1 / 4) / 3,  # b: 1, 1, 3/4; c: third; d: 1, 2/4
        "worst search": -2 / 3,
        "similar": (5 / 9 + 5 / 36 + 13 / 18 + 3 / 10) / 4,
        "mean": 1 / 2,  # the second is nearest to b's mean, the fourth to a's
        "letter": (1 / 2 + 2 / 4 + 3 / 5) / 3,
    }
    counts = {"letter 10": 3, "harmed": "c"}
    found = hide.measure(index, 0, eye[[0, 3]], search)
    assert found == pytest.approx({k: 100 * x for k, x in percent.items()} | counts)


def test_the_picture_frames_the_class(tmp_path, monkeypatch, figures):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hide, "MINI", ["MiniShapes"])
    monkeypatch.setattr(mini, "TEST_IMAGES", 6)
    monkeypatch.setattr(hide, "generic_names", lambda: ["dog", "house"])
    assert cli(["hide", "--draw", "search.png"]) == 0 and Path("search.png").stat().st_size
    framed = [sum(x.spines["top"].get_visible() for x in row.axes) for row in figures[0].subfigs]
    titles = [row.get_suptitle() for row in figures[0].subfigs]
    assert all(f"({n} of 12)" in title for n, title in zip(framed, titles, strict=True))
    assert framed[0] > framed[2] == 0
