"""The paper's numbers against configs, lists and documents, and its experiments in one command."""

import json
import re
from collections.abc import Iterator
from functools import partial
from operator import attrgetter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import datasets
from engine.cli import run
from engine.config import paper_weights, settings
from evaluation.results import read_logs
from evaluation.rows import Change, Row
from experiments import reproduce
from experiments.reproduce import PAPER, PUBLISHED, WHOLE, compare, whole_set
from forget_cls import all_ds, forget_classes_all
from forgetting.solvers.lora import LoraSettings
from tests.clip_fixtures import picture, reduce_depth, save_openai
from tests.conftest import REPOSITORY
from tests.test_datasets import FORGOTTEN

DOCUMENT = (REPOSITORY / "docs" / "paper.md").read_text(encoding="utf-8")
CONSTANTS = {
    **{"FORGET.ALPHA": 1, "FORGET.RANK": 5, "FORGET.LAMB_WEIGHT": 1, "FORGET.NOISE_STD": 0.5},
    **{"TRAINER.FORGETLORA.LR": 0.01, "TRAINER.FORGETLORA.STEPS": 2000},
    **{"TRAINER.FORGETLORA.REDUCTION": 0.7, "TRAINER.FORGETLORA.LAMB_FORGET_STEP": 0.05},
    "TRAINER.FORGETLORA.MAX_TRIALS": 100,
}


def data_sets() -> Iterator[tuple[str, float, list[tuple[str, float]], list[str]]]:
    """Rows of the document: a set, its accuracy, its classes with theirs, and the loss weights."""
    _, _, text = DOCUMENT.partition("\n## Constants and data sets\n")
    table = re.search(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)[0]
    for line in table.splitlines()[2:]:
        dataset, whole, classes, *weights = (cell.strip() for cell in line.strip("|").split("|"))
        pairs = [pair.rsplit(" ", 1) for pair in classes.split(", ")]
        yield dataset, float(whole), [(name, float(number)) for name, number in pairs], weights


def test_constants_of_configs_are_the_papers():
    cfg = settings("ForgetLoRA", "StanfordDogs")
    assert {key: attrgetter(key)(cfg) for key in CONSTANTS} == CONSTANTS
    chosen = {key.lower(): value for key, value in cfg.TRAINER.FORGETLORA.items()}
    assert LoraSettings(**chosen) == LoraSettings(), "the API's defaults are the same"


def test_weights_of_configs_are_the_papers():
    shown = {dataset: cells for dataset, _, _, cells in data_sets()}
    assert set(shown) == set(all_ds)
    for dataset, cells in shown.items():
        places = [(b, several) for b in ("RN50", "ViT-B/16") for several in ("False", "True")]
        for (backbone, several), cell in zip(places, cells, strict=True):
            opts = ("FORGET.MULTICLASS", several)
            weights = paper_weights(settings("ForgetLoRA", dataset, backbone, opts))
            pair = weights["lamb_preserve"], weights["lamb_forget"]
            assert tuple(map(float, cell.split("/"))) == pair


def test_lists_and_templates_are_the_papers():
    assert {name: forget_classes_all[name] for name in all_ds} == FORGOTTEN
    flowers = {"OxfordFlowers": "a photo of a {}, a type of flower."}
    for dataset, _, classes, _ in data_sets():
        assert [name for name, _ in classes] == FORGOTTEN[dataset]
        template = datasets.spec(dataset).template
        assert template == flowers.get(dataset, "a photo of a {}.")
        assert f"`{template}`" in " ".join(DOCUMENT.split())


def test_accuracies_that_reproduce_compares_with_are_those_of_the_document():
    assert set(PAPER) == {"RN50"}
    shown = {name: {WHOLE: whole, **dict(classes)} for name, whole, classes, _ in data_sets()}
    assert shown == PAPER["RN50"]


def test_numbers_of_others_are_those_of_the_document():
    text = " ".join(DOCUMENT.split())
    for name in ("OxfordFlowers", "StanfordCars"):
        forgotten, rest = PUBLISHED["ViT-B/16"][name]["DIET"]
        assert f"{forgotten:.2f} / {rest:.2f} on {name}" in text


def test_every_check_that_the_document_names_exists():
    sources = "".join(path.read_text() for path in (REPOSITORY / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", DOCUMENT))
    assert len(named) == 8
    assert all(f"def {name}(" in sources for name in named)


QUICK = ["TRAINER.FORGETLORA.STEPS", "5", "TRAINER.FORGETLORA.MAX_TRIALS", "1"]
OTHERS = ["something else", "another thing"]


def image_root(root: Path, names: list[str]) -> None:
    """Sets in CoOp's layout with their published split files; a few images of noise."""
    for name in names:
        row, entries = datasets.spec(name), []
        for label, title in enumerate([*forget_classes_all[name], *OTHERS]):
            for number in range(2):
                path = f"class_{label}/image_{number}.jpg"
                picture(root / row.folder / row.image_folder / path, 2 * label + number)
                entries.append([path, label, title])
        split = {"train": [], "val": [], "test": entries}
        (root / row.folder / row.split_file).write_text(json.dumps(split))


def command(tmp_path: Path, *more: str) -> list[str]:
    return [
        *("--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")),
        *("--cache", str(tmp_path / "cache"), *more, *QUICK),
    ]


def test_one_backbone_on_tiny_images(tmp_path, monkeypatch, capsys, refused):
    """In process with one layer a stage; then again, which skips all, then one set is lost."""
    names, out = ["StanfordCars", "OxfordFlowers"], tmp_path / "out"
    reduce_depth(monkeypatch, tmp_path, "RN50")
    image_root(tmp_path / "data", names)
    save_openai("RN50", tmp_path / "weights.pt")
    options = ["--datasets", ",".join(names), "--backbones", "RN50"]
    options += ["--weights", f"RN50={tmp_path / 'weights.pt'}"]
    monkeypatch.setitem(PUBLISHED, "RN50", {"OxfordFlowers": {"a method of others": [1.5, 62.5]}})
    before = reproduce.main(command(tmp_path, *options))
    printed = capsys.readouterr().out
    assert "== OxfordFlowers, RN50, ForgetLoRA, at once, seed 0: done (4 of 4" in printed
    assert "0.6606" in printed and "not the paper's settings" in printed
    assert "average gain" in printed.partition("After, in percent; ")[2].partition("\n")[2]
    # Measured numbers everywhere, the paper's beside them; means after forgetting.
    assert len(before) == 2 * (1 + 3) and before["ours"].between(0, 1).all()
    assert np.allclose(before["difference"], before["ours"] - before["paper"])
    pd.testing.assert_frame_equal(pd.read_csv(out / "reproduce/paper.csv"), before)
    after = pd.read_csv(out / "reproduce/sweep.csv")
    assert sorted(after["data set"]) == sorted([*names, "all of them"] * 2)
    assert set(after["mode"]) == {"alone", "at once"} and after["average gain"].notna().all()
    # Others' numbers where there are any, and ours once: of classes forgotten alone.
    others = printed.partition("as others print it")[2].partition("Before")[0]
    others = " ".join(others.split())
    ours = after.set_index(["data set", "mode"]).loc[("OxfordFlowers", "alone")]
    assert "RN50 OxfordFlowers a method of others 1.50 62.50" in others
    assert f"ForgetLoRA, here {ours['class after']:.2f} {ours['rest after']:.2f}" in others
    assert others.count(", here") == 1 and "StanfordCars" not in others
    logs = read_logs(out / "reproduce/RN50/ForgetLoRA/seed_0")
    assert {len(logs[name]) for name in names} == {1 + 3 + 1}  # settings, alone, at once
    ours = before.set_index(["data set", "class"])["ours"]
    for name, other in (names, names[::-1]):  # what the runs on the other set logged for this one
        entry = logs[other][forget_classes_all[other][0]]["zero_shot"]
        assert ours[name, WHOLE] == pytest.approx(entry[name]["all"]["all_ds"])
    monkeypatch.delitem(PUBLISHED, "RN50")
    pd.testing.assert_frame_equal(reproduce.main(command(tmp_path, *options)), before)
    assert "as others print it" not in capsys.readouterr().out
    (tmp_path / "data/oxford_flowers/jpg").rename(tmp_path / "gone")
    line = refused(command(tmp_path, *options), partial(run, reproduce.main))
    assert "OxfordFlowers: no image folder" in line


def row(name: str, before: float | None, rest: float, label: str = "") -> Row:
    own, others = Change(before, 0.2), Change(rest, 0.45)
    return Row("StanfordDogs", label or name, name, 1, own, others, {})


def test_numbers_side_by_side():
    """Ten test images of Pekinese, 30 of toy poodle, 60 of others: 8 + 45 of 100 are right."""
    rows = [row("Pekinese", 0.8, 0.5), row("toy_poodle", 0.6, 0.5)]
    images = {"StanfordDogs": {"Pekinese": 10, "toy_poodle": 30, "other": 60}}
    table = compare("RN50", rows, images)
    numbers = table.set_index("class")[["paper", "ours", "difference"]]
    assert numbers.loc[WHOLE].tolist() == pytest.approx([0.5168, 0.53, 0.53 - 0.5168])
    # the split's own spelling, found under the paper's
    assert numbers.loc["toy_poodle"].tolist() == pytest.approx([0.574, 0.6, 0.026])
    other = compare("ViT-B/16", rows, images)
    assert other["paper"].isna().all() and other["ours"].equals(table["ours"])
    assert compare("RN50", rows, {"Caltech101": {"x": 9}}).empty
    several = [row("Pekinese", 1.0, 0.4, "both"), row("toy_poodle", None, 0.4, "both")]
    assert whole_set(several, images["StanfordDogs"]) == pytest.approx((10 + 0.4 * 60) / 100)
