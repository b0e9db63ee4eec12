"""Attacks by other words: at hand in planted bundles, and searched out on `mini`."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch.nn.functional import normalize

from clip.bundle import bundle_path
from datasets import mini
from experiments import attack, hide
from experiments.__main__ import cli
from tests.audit_fixtures import planted
from tests.conftest import BACKBONE, REPOSITORY, refuses


def test_a_word_that_does_not_move_with_the_name_still_finds_the_class(tmp_path, capsys):
    bundle = planted(classes=6, similar={2: 0.5})
    apart = torch.eye(bundle.text_projection.shape[0])[-1:] * 10  # no name has it
    own = bundle.labels == 2
    x = bundle.image_features + 0.8 * own[:, None] * normalize(bundle.embed(apart))
    words = {"other": apart, "name": bundle.forget_hidden[[2]]}
    lists = {"texts": [*words], "classes": ["class 2"] * 2, "kinds": ["word"] * 2}
    bare = str(tmp_path / "bare")
    replace(bundle, backbone=BACKBONE).save(bundle_path(bare, BACKBONE, "Planted"))
    refuses("no class with texts", attack.main, ["--features", bare])
    bundle = replace(
        bundle,
        image_features=normalize(x),
        backbone=BACKBONE,
        extra={f"audit_{key}": json.dumps(values) for key, values in lists.items()},
        extra_tensors={"audit_hidden": torch.cat([*words.values()])},
    )
    bundle.save(bundle_path(tmp_path, BACKBONE, "Planted"))
    assert cli(["attack", "--features", str(tmp_path), "--out", str(tmp_path)]) == 0
    assert "ratio: AUC 1.000" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "attack.csv").set_index("text")
    assert (table["before"] == 1).all() and table["after"].to_dict() == {"other": 1, "name": 0}
    assert abs(table["ratio"]["name"] - 1) < 1e-6 > abs(table["ratio"]["other"])
    assert table["margin"]["other"] < 0 < table["margin"]["name"]


def test_texts_that_are_searched_out_on_mini(tmp_path, monkeypatch):
    """A training that is said to lack two classes, and is the embedded one, fares as it does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hide, "MINI", ["MiniDigits"])
    monkeypatch.setattr(mini, "TEST_IMAGES", 6)
    for name, value in {"IMAGES": (2,), "STEPS": 30, "LISTED": 4}.items():
        monkeypatch.setattr(attack, name, value)
    names = ["digit two", "digit seven"]
    monkeypatch.setattr(attack, "TRAININGS", {"a": (0, names), "full": (1, [])})
    refuses("experiments gold makes it", attack.main, [])
    Path("gold").mkdir()
    shutil.copy(REPOSITORY / "clip/mini.safetensors", "gold/a.safetensors")
    assert cli(["attack"]) == 0
    table = pd.read_csv("attack/attack.csv")
    assert set(table["class"]) == set(names)
    found = table.pivot_table("success", "attack", "model")
    assert found["never learnt"].equals(found["untouched"].rename("never learnt"))
    assert found["forgotten"]["its name"] == 0
    assert (found[["untouched", "another is forgotten"]] > 70).all(axis=None)
    assert found["forgotten"]["gradient"] > 0
