"""What still finds a hidden class: on small bundles, by the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from clip.bundle import bundle_path, load_bundles
from datasets import mini
from evaluation.zero_shot import ZeroShot
from experiments import hide
from experiments.__main__ import cli
from forgetting import Adapter, hide_in_index, projection_sha256
from tests.conftest import BACKBONE, TOY_CLASSES, toy_bundle


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> hide.Index:
    """Two sets, and a broader name for three classes of the first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(hide.BROADER, "animal", ["cat", "Dog", "sea horse"])
    row = toy_bundle("ToyAnimals").forget_hidden[:3].mean(dim=0, keepdim=True)
    for bundle in map(toy_bundle, TOY_CLASSES):
        names, rows = [*bundle.retain_names, "animal"], torch.cat([bundle.retain_hidden, row])
        bundle = replace(bundle, retain_names=names, retain_hidden=rows)
        bundle.save(bundle_path("toys", BACKBONE, bundle.dataset))
    return hide.Index(load_bundles("toys", BACKBONE))


def test_a_table_by_the_command_line(index, capsys):
    assert cli(["hide", "--features", "toys", "--classes", "2"]) == 0
    assert "most that is lost" in capsys.readouterr().out
    table = pd.read_csv("hide/hide.csv").set_index(["data set", "class", "way"])
    assert len(table) == 2 * 2 * 10
    for (dataset, name), rows in table.groupby(level=[0, 1]):
        bundle, rows = index.bundles[dataset], rows.droplevel([0, 1])
        own = ZeroShot(bundle).correct_before[bundle.labels == bundle.classnames.index(name)]
        assert rows.loc["nothing", "left"] == 100 * float(own.double().mean()) > 90
        assert not rows.loc["nothing", ["rest", "others", "searches", "worst search"]].any()
        for way in ("text edit", "index edit", "index edit, dot product"):
            assert rows.loc[way, "left"] == 0 and rows.loc[way, "own"] < 50
        assert rows.loc["query 3q - 2n", "left"] > 90  # 3n - 2n is the name itself


def test_ways_are_what_they_are_called(index):
    """The index edit is the library's. Left unnormalised it ranks images as the text edit in the
    space of embeddings does."""
    (edits,) = hide.both_edits(index, "ToyAnimals", ["cat"])
    left, right = edits[1].left, edits[1].right
    ways, queries = hide.ways(index, "ToyAnimals", 0, *edits), index.embed(index.prompts)
    adapter = Adapter(left, right, projection_sha256(torch.eye(16)), "", "", "", ["cat"], "")
    assert torch.allclose(ways["index edit"].images, hide_in_index(index.images, adapter))
    scores = index.images @ (queries + (queries @ left) @ right).T
    assert torch.allclose(ways["index edit, dot product"].scores(queries), scores)
    assert not torch.allclose(index.plain.scores(queries), scores, atol=0.1)
    name = index.embed(index.bundles["ToyAnimals"].forget_hidden[:1])
    expected = hide.unit(3 * queries - 2 * name)
    assert torch.allclose(ways["query 3q - 2n"].query(index.prompts), expected)
    assert (ways["projected off the name"].images @ name.T).abs().max() < 1e-9


def test_a_flag_that_is_always_right(index):
    words = index.bundles["ToyAnimals"].class_hidden[:1]
    found = hide.measure(index, 0, words, index.plain)
    assert found["animal 10"] > 0 and found["words"] == found["left"] > 90
    hidden = hide.measure(index, 0, words, index.plain._replace(flagged=index.labels == 0))
    assert hidden["animal 10"] == hidden["own"] == hidden["left"] == hidden["similar"] == 0
    assert hidden["animal"] > found["animal"] > 0 and hidden["rest"] == 0


def test_the_picture_frames_the_class(tmp_path, monkeypatch, figures):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hide, "MINI", ["MiniShapes"])
    monkeypatch.setattr(mini, "TEST_IMAGES", 6)
    monkeypatch.setattr(hide, "generic_names", lambda: ["dog", "house"])
    assert cli(["hide", "--draw", "search.png"]) == 0 and Path("search.png").stat().st_size
    framed = [sum(x.spines["top"].get_visible() for x in row.axes) for row in figures[0].subfigs]
    shown = [
        f"({count} of 12)" in figures[0].subfigs[i].get_suptitle() for i, count in enumerate(framed)
    ]
    assert all(shown) and framed[0] > framed[2] == 0
