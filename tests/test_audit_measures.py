"""Neighbours, destinations, confusion, examples: worlds with a planted answer and their controls.

The edges of all measures stand here too."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import normalize

from evaluation.audit import confusion, destinations, examples, neighbours
from evaluation.audit.names import ATTACKERS, MEASURES, RELEARNING
from evaluation.audit.run import audit_class
from evaluation.audit.statistics import accuracy
from forgetting.problem import LowRankEdit
from tests.audit_fixtures import (
    EDGES,
    case,
    edge,
    gone,
    hidden_mark,
    move,
    only,
    opposite,
    text,
    world,
)

NEAR = {1: 0.9, 2: 0.8, 3: 0.6}  # cosines with the text of class 0
NOTHING = {"value": None, "low": None, "high": None, "n": 0}


def values(entries: list[dict], key: str) -> list[float]:
    return [entry[key]["value"] for entry in entries]


# --- neighbours


def test_nearest_classes_are_those_of_highest_text_cosine():
    found = neighbours.measure(gone(world(similar=NEAR)))
    assert [entry["name"] for entry in found["classes"][:3]] == ["class 1", "class 2", "class 3"]
    cosines = [entry["similarity"] for entry in found["classes"]]
    assert cosines == pytest.approx([0.9, 0.8, 0.6] + [0.0] * 7, abs=1e-6)
    assert len({entry["name"] for entry in found["classes"]} - {"class 0"}) == 10
    # Negative control: by the text of another class the same classes are far.
    other = neighbours.measure(gone(world(similar=NEAR), "class 7"))
    assert max(entry["similarity"] for entry in other["classes"]) == pytest.approx(0, abs=1e-6)


def test_neighbours_that_suffer_and_neighbours_that_stay():
    bundle = world(similar=NEAR)
    found = neighbours.measure(case(bundle, edit=opposite(bundle, "class 0", "class 2")))
    assert values(found["classes"], "before") == [1.0] * 10
    assert values(found["classes"], "after") == [1.0, 0.0] + [1.0] * 8
    assert found["classes"][1]["after"] == accuracy(torch.zeros(20, dtype=torch.bool))
    assert found["mean_before"] == 1.0 and found["mean_after"] == pytest.approx(0.9)
    worst = found["moved"]["worst"][0]
    assert (worst["text"], worst["group"]) == ("class 2", "class")
    assert worst["cosine"] == pytest.approx(-1, abs=1e-5)
    # 11 classes and 24 words are retained; class 1 was nearest (0.72) and now is last of 34.
    assert worst["nearest_before"] == "class 1" and worst["rank_after"] == 34
    assert found["moved"]["count"] == 35
    assert found["moved"]["mean_cosine"] == pytest.approx(33 / 35, abs=1e-5)
    control = neighbours.measure(gone(bundle))
    assert values(control["classes"], "after") == values(control["classes"], "before")
    assert control["moved"]["mean_cosine"] == pytest.approx(1)
    assert control["moved"]["nearest_kept"] == 1 and control["not_measured"] == []


def moved(before: Tensor, after: Tensor) -> dict:
    """The entry "moved" of texts that are embedded at `before` (n, d) and at `after` (n, d); a
    class beside them is forgotten."""
    n, d = before.shape
    bundle = replace(
        world(classes=n + 1, images=0, words=0),
        image_features=torch.zeros(0, d),
        class_hidden=torch.eye(n + 1),
        forget_hidden=torch.eye(n + 1),
        retain_hidden=torch.zeros(0, n + 1),
        text_projection=torch.cat([before, torch.ones(1, d)]),
        classnames=[*map(str, range(n)), "gone"],
    )
    edit = LowRankEdit(torch.eye(n + 1)[:, :n], after - before)
    return neighbours.measure(case(bundle, "gone", edit))["moved"]


@pytest.mark.parametrize("block", [5, 1024])
@pytest.mark.parametrize("sample", [25, 1000])
def test_places_against_lists_sorted_by_hand(monkeypatch, block, sample):
    monkeypatch.setattr(neighbours, "BLOCK", block)
    monkeypatch.setattr(neighbours, "SAMPLE", sample)
    generator = torch.Generator().manual_seed(3)
    before = normalize(torch.randn(40, 6, generator=generator), dim=1)
    after = normalize(before + 0.4 * torch.randn(40, 6, generator=generator), dim=1)
    ranks, overlaps = [], []
    for row in range(40):
        old, new = (
            sorted(set(range(40)) - {row}, key=lambda i, x=x: -float(x[row] @ x[i]))
            for x in (before, after)
        )
        ranks.append(new.index(old[0]) + 1)
        overlaps.append(len(set(old[:10]) & set(new[:10])) / 10)
    found = moved(before, 3 * after)
    generator = case(world()).data.generator("watched")  # of this seed and data set
    drawn = torch.randperm(41, generator=generator)[:sample] if sample < 41 else torch.arange(41)
    drawn = drawn[drawn < 40].numpy()
    assert found["nearest_kept"] == pytest.approx(np.mean(np.array(ranks)[drawn] == 1))
    assert 0 < found["nearest_kept"] < 1  # so that neither all nor none would pass
    assert found["top10_overlap"] == pytest.approx(np.mean(np.array(overlaps)[drawn]))
    assert all(ranks[int(e["text"])] == e["rank_after"] for e in found["worst"])
    cosines = [entry["cosine"] for entry in found["worst"]]
    assert cosines == sorted(cosines) and len(cosines) == 10
    assert cosines[0] == pytest.approx(float((before * after).sum(dim=1).min()), abs=1e-6)


def test_copies_of_a_text_stay_nearest_to_each_other():
    """Three copies: each is nearest to the others, whichever comes first."""
    x = torch.eye(4)[[0, 0, 0, 1, 2]]
    noise = 1e-8 * torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    assert moved(x, x + noise)["nearest_kept"] == 1


def test_names_that_mean_the_class_are_not_retained_texts():
    names = ["osteospermum", "snapdragon", "rose"]
    words = ["african daisy", "Snapdragon", "allium"]  # the first is marked as osteospermum
    bundle = replace(world(classes=3, words=3), classnames=names, retain_names=words)
    flowers = replace(bundle, dataset="OxfordFlowers")
    other = replace(bundle, classnames=["tulip", "African_daisy", "rose"])

    def texts(bundle, *forgotten: str) -> list[str]:
        subject = case(bundle, forgotten[0], forgotten=list(forgotten), others={"Other": other})
        names, *_ = subject.data.once(neighbours.text_names)
        stay = neighbours.retained_texts(subject).tolist()
        return [name for name, stays in zip(names, stay, strict=True) if stays]

    kept = ["snapdragon", "rose", "Snapdragon", "allium", "tulip", "rose"]
    assert texts(flowers, "osteospermum") == kept
    assert "Snapdragon" not in texts(flowers, "snapdragon")
    assert texts(flowers, "snapdragon", "osteospermum") == ["rose", "allium", "tulip", "rose"]
    # Negative control: a set whose vocabulary marks nothing keeps it.
    assert "african daisy" in texts(bundle, "osteospermum")


def test_texts_of_other_sets_and_classes_forgotten_together():
    bundle, other = world(similar=NEAR), world(dataset="Elsewhere")
    other = replace(other, classnames=[f"elsewhere {i}" for i in range(12)])
    found = neighbours.measure(gone(bundle, others={"Elsewhere": other}))
    worst = found["moved"]["worst"][0]  # its text is that of the forgotten class, its name is not
    assert (worst["text"], worst["group"]) == ("elsewhere 0", "Elsewhere")
    assert found["moved"]["count"] == 11 + 24 + 12
    both = ["class 0", "class 1"]
    found = neighbours.measure(case(bundle, edit=opposite(bundle, *both), forgotten=both))
    assert found["classes"][0]["name"] == "class 2" and found["mean_after"] == 1.0
    assert found["moved"]["count"] == 34 and found["moved"]["nearest_kept"] == 1


# --- destinations


def test_images_that_surely_go_to_one_class_leak_by_their_looks():
    """Images that lean to class 5 go there, but their scores are not those of class 5."""
    found = destinations.measure(gone(world(lean={0: [5]})))
    assert found["images"] == 20
    assert found["before"] == [{"name": "class 0", "count": 20, "share": 1.0}]
    assert found["after"] == [{"name": "class 5", "count": 20, "share": 1.0}]
    assert found["entropy_bits_before"] == found["entropy_bits_after"] == 0
    assert found["leak"] == [{"name": "class 5", "images": 20, "auc_before": 1.0, "auc_after": 1.0}]
    assert found["worst_auc"] == 1.0
    # Control: images that are those of class 5 do not.
    bundle = world(copies={0: 5})
    found = destinations.measure(case(bundle, edit=opposite(bundle, "class 0")))
    assert found["after"][0] == {"name": "class 5", "count": 20, "share": 1.0}
    assert max(found["leak"][0]["auc_before"], found["worst_auc"]) < 0.6


def test_images_that_spread():
    found = destinations.measure(gone(world(lean={0: [3, 4, 5, 6]})))
    assert sorted(entry["name"] for entry in found["after"]) == [f"class {i}" for i in (3, 4, 5, 6)]
    assert {entry["share"] for entry in found["after"]} == {0.25}
    assert found["entropy_bits_after"] == pytest.approx(2)
    uneven = destinations.measure(gone(world(lean={0: [3, 3, 3, 4]})))
    assert [entry["count"] for entry in uneven["after"]] == [15, 5]
    assert uneven["entropy_bits_after"] == pytest.approx(0.8112781)
    # Negative control: nothing changed.
    same = destinations.measure(case(world(lean={0: [3, 4, 5, 6]})))
    assert same["after"] == same["before"] and same["leak"] == []
    assert same["not_measured"] == ["leak: no image goes to another class"]
    many = destinations.measure(gone(world(classes=14, images=26, lean={0: list(range(1, 14))})))
    assert len(many["after"]) == 10 and sum(e["count"] for e in many["after"]) == 20
    assert [e["name"] for e in many["leak"]] == [e["name"] for e in many["after"][:5]]
    assert many["worst_auc"] == max(entry["auc_after"] for entry in many["leak"])


def test_a_leak_through_the_forgotten_text_ends_where_its_name_is_removed():
    """A text sent to its opposite still answers to its images; a removed one has no score."""
    bundle = hidden_mark()
    edit = opposite(bundle, "class 0")

    def leak(removed: tuple[str, ...] = (), seed: int = 0) -> dict:
        return destinations.measure(case(bundle, edit=edit, removed=removed, seed=seed))["leak"][0]

    kept, removed = leak(), leak(("class 0",))
    assert kept["name"] == "class 1" and min(kept["auc_before"], kept["auc_after"]) > 0.95
    assert removed["auc_before"] == kept["auc_before"]
    assert 0.3 < removed["auc_after"] < 0.65
    # The same in every run, and another for another seed.
    assert leak(("class 0",)) == removed
    assert any(leak(("class 0",), seed) != removed for seed in (1, 2))


def test_too_few_images_for_a_leak_are_reported():
    bundle = world(lean={0: [5]})
    for label, count in ((0, 3), (5, 0), (5, 3)):
        few = only(bundle, (bundle.labels != label) | (torch.arange(240) % 20 < count))
        found = destinations.measure(gone(few))
        assert found["leak"] == [] and found["worst_auc"] is None
        assert found["not_measured"] == [f"leak: class {label} has {count} of at least 4 images"]


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.integers(4, 12), st.integers(4, 12), st.integers(2, 30))
def test_a_separation_is_that_of_a_pipeline_of_scikit_learn(seed, first, second, classes):
    """More or fewer scores than images, an outlier and a score that says nothing."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(first + second, classes, generator=generator).double()
    scores[:first, 0] += 1.5
    scores[0] *= 1000
    scores[:, -1] = 0.25
    truth = np.repeat([True, False], [first, second])
    folds = StratifiedKFold(min(5, first, second), shuffle=True, random_state=seed)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000, tol=1e-9))
    areas = []
    for train, test in folds.split(scores, truth):
        decided = classifier.fit(scores[train], truth[train]).decision_function(scores[test])
        areas.append(roc_auc_score(truth[test], decided))
    assert destinations.separation(scores, first, seed) == pytest.approx(np.mean(areas), abs=1e-9)


def test_images_that_all_look_the_same_are_not_told_apart():
    scores = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)).repeat(10, 1)
    assert destinations.separation(scores, 5, 0) == 0.5


# --- confusion


def test_confusion_counts_against_a_loop():
    near = {1: 0.3, 2: 0.2, 3: 0.1}
    bundle = world(classes=20, similar=near, noise=0.1, lean={0: [15, 16, 16]}, words=4)
    subject = case(bundle, edit=opposite(bundle, "class 0", "class 2"))
    found = confusion.measure(subject)
    names = found["names"]
    assert names[:4] == ["class 0", "class 1", "class 2", "class 3"]
    assert 12 <= len(names) == len(set(names)) <= 16 and {"class 15", "class 16"} <= set(names)
    for side, model in (("before", subject.before), ("after", subject.after)):
        expected = [[0] * (len(names) + 1) for _ in names]
        for label, guess in zip(bundle.labels.tolist(), model.predicted.tolist(), strict=True):
            true, predicted = bundle.classnames[label], bundle.classnames[guess]
            if true in names:
                column = names.index(predicted) if predicted in names else len(names)
                expected[names.index(true)][column] += 1
        assert found[side] == expected
    assert sum(row[-1] for row in found["after"]) > 0 and found["before"] != found["after"]
    many = confusion.measure(gone(world(classes=24, images=23, lean={0: list(range(1, 24))})))
    assert len(many["names"]) == 16 and many["after"][0][-1] == 23 - 15


# --- examples


def test_pictures_of_the_class_are_spaced_and_named_as_the_model_predicts():
    subject = gone(world(images=20, lean={0: [3, 5]}))
    own = examples.measure(subject)["classes"][0]
    assert (own["name"], own["before"]["value"], own["after"]["value"]) == ("class 0", 1.0, 0.0)
    assert [one["row"] for one in own["pictures"]] == [0, 5, 10, 15]
    names = subject.bundle.classnames
    for picture in own["pictures"]:
        for side, model in (("before", subject.before), ("after", subject.after)):
            scores = model.scores[picture["row"]].tolist()
            order = sorted(range(len(names)), key=lambda column, x=scores: -x[column])
            assert picture[side] == [names[column] for column in order[:5]]
        assert picture["before"][0] == "class 0" and picture["after"][0] in ("class 3", "class 5")


def test_those_that_lost_most_are_shown_by_what_they_lost():
    bundle = world(noise=0.05)
    away = {f"class {c}": -text(bundle, f"class {c}") for c in (0, 3)}
    half = text(bundle, "class 5") + 1.1 * text(bundle, "class 6")  # some of its images go there
    subject = case(bundle, edit=move(bundle, away | {"class 6": half, "class 5": half}))
    lost = {
        name: subject.before.accuracy(c)["value"] - subject.after.accuracy(c)["value"]
        for c, name in enumerate(bundle.classnames)
        if name != "class 0"
    }
    most = sorted((name for name in lost if lost[name] > 0), key=lambda name: -lost[name])
    assert most  # else nothing is tested
    harmed = examples.measure(subject)["classes"][1:]
    assert [one["name"] for one in harmed] == most[:2]
    for one in harmed:
        assert 0 < len(one["pictures"]) <= 2
        for picture in one["pictures"]:
            assert bundle.classnames[bundle.labels[picture["row"]]] == one["name"]
            assert picture["before"][0] == one["name"] != picture["after"][0]
    # Controls: nobody lost, or who lost was forgotten too.
    assert len(examples.measure(case(bundle))["classes"]) == 1
    both = ["class 0", "class 1"]
    together = case(bundle, edit=opposite(bundle, *both), forgotten=both)
    assert "class 1" not in [one["name"] for one in examples.measure(together)["classes"]]


def test_a_removed_name_is_given_to_no_picture():
    pictures = examples.measure(case(world(classes=4), removed=("class 0",)))["classes"][0]
    for one in pictures["pictures"]:
        assert len(one["before"]) == 4 and len(one["after"]) == 3 and "class 0" not in one["after"]


# --- edges


@pytest.mark.parametrize("name", EDGES)
def test_edges_are_measured_or_reported(name):
    """Plain JSON everywhere, and each gap of the measures of images has its line."""
    subject = edge(name)
    found = audit_class(subject)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert list(found) == [*MEASURES, "seconds", "verdict"]
    images = ("neighbours", "destinations", "residue", "retrieval")
    assert {line for key in images for line in found[key]["not_measured"]} == EDGES[name]
    assert tuple(found["undo"]["attacks"]) == tuple(ATTACKERS)
    assert found["undo"]["attacks"]["original_known"]["places"] == [1] * len(subject.forgotten)
    assert tuple(found["relearning"]["methods"]) == tuple(RELEARNING)
    for curves in found["relearning"]["methods"].values():
        points = [point for curve, part in curves.items() if curve != "needed" for point in part]
        assert len(points) == 20
        assert all(p == NOTHING or p["low"] <= p["value"] <= p["high"] for p in points)
    again = audit_class(edge(name))
    assert all(again[key] == found[key] for key in MEASURES)


def test_values_of_edges():
    bare = audit_class(edge("no image of the class"))
    assert bare["residue"]["linear_probe"] == {"before": NOTHING, "after": NOTHING, "auc": None}
    assert bare["residue"]["zero_shot"]["after"] == NOTHING
    assert bare["retrieval"]["text_to_image"]["forgotten"]["before"]["1"] == NOTHING
    assert bare["neighbours"]["mean_after"] == 1.0  # the others are there
    one = audit_class(edge("one image of the class"))["residue"]
    assert one["linear_probe"]["after"] == one["nearest_neighbours"]["after"] == NOTHING
    assert one["zero_shot"]["before"]["n"] == 1
    empty = audit_class(edge("no image at all"))
    assert empty["neighbours"]["mean_after"] is None
    assert empty["confusion"]["after"] == [[0] * 12 for _ in range(11)]
    pair = audit_class(edge("two classes"))["retrieval"]["image_to_text"]["forgotten"]["after"]
    assert pair["1"]["value"] == 0.0 and pair["5"] == NOTHING
    several = audit_class(edge("several, removed"))
    assert several["confusion"]["names"][0] == "class 3"
    assert several["retrieval"]["image_to_text"]["retained"]["after"]["1"]["n"] == 54
    assert several["residue"]["zero_shot"]["after"]["value"] == 0.0
