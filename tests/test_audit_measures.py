"""Neighbours, destinations, confusion: worlds with a planted answer, each beside its control.

The edges of all five measures of images stand here too."""

from __future__ import annotations

import json
from dataclasses import replace
from unittest.mock import patch

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

from evaluation.audit import confusion, destinations, neighbours, residue, retrieval
from evaluation.audit.case import Common
from evaluation.audit.interval import accuracy
from evaluation.audit.texts import Moved, Texts
from tests.audit_fixtures import (
    EDGES,
    case,
    edge,
    gone,
    hidden_mark,
    only,
    opposite,
    world,
)

MEASURES = {
    "neighbours": neighbours,
    "destinations": destinations,
    "confusion": confusion,
    "residue": residue,
    "retrieval": retrieval,
}
NEAR = {1: 0.9, 2: 0.8, 3: 0.6}  # cosines with the text of class 0


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


def test_neighbours_that_suffer_are_seen():
    bundle = world(similar=NEAR)
    found = neighbours.measure(case(bundle, factors=opposite(bundle, "class 0", "class 2")))
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


def test_neighbours_that_do_not_suffer_stay():
    found = neighbours.measure(gone(world(similar=NEAR)))
    assert values(found["classes"], "after") == values(found["classes"], "before")
    moved = found["moved"]
    assert moved["mean_cosine"] == pytest.approx(1) and moved["nearest_kept"] == 1
    assert min(entry["cosine"] for entry in moved["worst"]) == pytest.approx(1)
    assert found["not_measured"] == []


def moved(names: list[str], before: Tensor, after: Tensor) -> dict:
    """The entry "moved" of classes that are embedded at `before` (n, d) and at `after` (n, d)."""
    d = before.shape[1]
    bundle = replace(
        world(classes=len(names), images=0, words=0),
        image_features=torch.zeros(0, d),
        class_hidden=before,
        forget_hidden=before,
        retain_hidden=before[:0],
        text_projection=torch.eye(d),
        classnames=names,
    )
    watch = neighbours.watch(Common(bundle))
    everything = torch.ones(len(names), dtype=torch.bool)
    change = Moved(watch.texts, after - before, before, torch.eye(d))
    return neighbours._moved(watch, [everything], [change])[0]


@pytest.mark.parametrize("block", [5, 1024])
@pytest.mark.parametrize("watched", [25, 1000])
@pytest.mark.parametrize(("near", "far"), [(10, 1), (15, 5), (64, 64)])
def test_places_against_lists_sorted_by_hand(monkeypatch, block, watched, near, far):
    for name, value in {"BLOCK": block, "WATCHED": watched, "NEAR": near, "FAR": far}.items():
        monkeypatch.setattr(neighbours, name, value)
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
    found = moved([str(i) for i in range(40)], before, after)
    generator = Common(world()).generator("watched")  # of this seed and data set
    drawn = torch.randperm(40, generator=generator)[:watched].numpy()
    assert found["nearest_kept"] == pytest.approx(np.mean(np.array(ranks)[drawn] == 1))
    assert 0 < found["nearest_kept"] < 1  # so that neither all nor none would pass
    assert found["top10_overlap"] == pytest.approx(np.mean(np.array(overlaps)[drawn]))
    assert [ranks[int(e["text"])] for e in found["worst"]] == [
        e["rank_after"] for e in found["worst"]
    ]
    cosines = [entry["cosine"] for entry in found["worst"]]
    assert cosines == sorted(cosines) and len(cosines) == 10
    assert cosines[0] == pytest.approx(float((before * after).sum(dim=1).min()))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.floats(0.01, 0.4))
def test_only_a_few_texts_need_to_be_looked_at(seed, rank, size):
    """What is found among the near and the far ones is what all of them say; and hardly ever do all
    have to be looked at where a change is small."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(20, 16, generator=generator)
    embedded = centres[torch.arange(400) % 20] + 0.8 * torch.randn(400, 16, generator=generator)
    texts, stay = Texts(embedded, embedded), torch.rand(400, generator=generator) < 0.95
    left = torch.randn(16, rank, generator=generator) / 16
    right = size * torch.randn(rank, 16, generator=generator)
    row = embedded[:1]  # a text that nearly vanishes
    change = left - row.T @ (row @ left) / row.square().sum(), right
    gone = torch.cat([change[0], row.T / row.square().sum()], 1), torch.cat([right, -0.98 * row])
    names = neighbours.Names([*map(str, range(400))], ["class"] * 400, {})
    for factors in (change, gone):
        (moved,) = texts.moved([factors])
        after = normalize(moved.embedded(slice(None)), dim=1)
        before, now = normalize(embedded, dim=1) @ normalize(embedded, dim=1).T, after @ after.T
        every = torch.arange(400)
        assert torch.allclose(moved.cosines(before, every, slice(None)), now, atol=1e-5)
        assert torch.allclose(moved.lengths, moved.embedded(slice(None)).norm(dim=1), rtol=1e-4)
        limit = before.fill_diagonal_(-1).quantile(0.8, dim=1)
        rows, others = every[1:100], every[100:]
        most = now[1:100, 100:].masked_fill(before[1:100, 100:] > limit[1:100, None], -1)
        assert (most.amax(dim=1) <= moved.limit(limit[1:100], rows, others) + 1e-5).all()
        found = []
        for near, far in ((40, 10), (399, 400)):
            with patch.multiple(neighbours, NEAR=near, FAR=far):
                watch = neighbours.watching(texts, names, torch.arange(0, 400, 2))
                found.append(neighbours._moved(watch, [stay], [moved])[0])
        assert found[0] == found[1]


def test_all_texts_are_looked_at_only_where_the_change_is_large(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    embedded = torch.randn(400, 64, generator=generator)
    texts, looked = Texts(embedded, embedded), []
    names = neighbours.Names([*map(str, range(400))], ["class"] * 400, {})
    watch, others = neighbours.watching(texts, names, torch.arange(400)), neighbours._others

    def counted(cosines: Tensor, *rest: Tensor) -> Tensor:
        looked.append(len(cosines))
        return others(cosines, *rest)

    monkeypatch.setattr(neighbours, "_others", counted)
    everything = torch.ones(400, dtype=torch.bool)
    for size in (0.01, 3.0):
        looked.clear()
        factors = torch.randn(64, 1, generator=generator) / 64, size * embedded[:1]
        neighbours._neighbourhoods(watch, everything, *texts.moved([factors]))
        assert sum(looked) == 0 if size < 1 else sum(looked) > 50


def test_texts_that_are_the_same_do_not_fall_behind_each_other():
    """Three copies of a text: each is nearest to the others, whichever comes first."""
    x = torch.eye(4)[[0, 0, 0, 1, 2]]
    turned = x + 1e-8 * torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    assert moved(list("abcde"), x, turned)["nearest_kept"] == 1


def test_names_that_mean_the_class_are_not_retained_texts():
    names = ["osteospermum", "snapdragon", "rose"]
    words = ["african daisy", "Snapdragon", "allium"]  # the first is marked as osteospermum
    bundle = replace(world(classes=3, words=3), classnames=names, retain_names=words)
    flowers = replace(bundle, dataset="OxfordFlowers")
    other = replace(bundle, classnames=["tulip", "African_daisy", "rose"])

    def texts(bundle, *forgotten: str) -> list[tuple[str, str]]:
        asked = case(bundle, forgotten[0], forgotten=list(forgotten), others={"Other": other})
        found, stay = asked.common.once(neighbours.names_of), neighbours.retained_texts(asked)
        named = zip(found.names, found.groups, stay.tolist(), strict=True)
        return [(name, group) for name, group, stays in named if stays]

    kept = texts(flowers, "osteospermum")
    assert kept == [
        *(("snapdragon", "class"), ("rose", "class")),
        *(("Snapdragon", "vocabulary"), ("allium", "vocabulary")),
        *(("tulip", "Other"), ("rose", "Other")),
    ]
    assert ("Snapdragon", "vocabulary") not in texts(flowers, "snapdragon")
    both = [name for name, group in texts(flowers, "snapdragon", "osteospermum")]
    assert both == ["rose", "allium", "tulip", "rose"]
    # Negative control: a set whose vocabulary marks nothing keeps it.
    assert ("african daisy", "vocabulary") in texts(bundle, "osteospermum")


def test_texts_of_other_sets_are_watched():
    bundle, other = world(), world(classes=12, seed=0, dataset="Elsewhere")
    other = replace(other, classnames=[f"elsewhere {i}" for i in range(12)])
    found = neighbours.measure(gone(bundle, others={"Elsewhere": other}))
    worst = found["moved"]["worst"][0]  # its text is that of the forgotten class, its name is not
    assert (worst["text"], worst["group"]) == ("elsewhere 0", "Elsewhere")
    assert found["moved"]["count"] == 11 + 24 + 12


def test_classes_forgotten_together_are_no_neighbours():
    bundle = world(similar=NEAR)
    both = ["class 0", "class 1"]
    found = neighbours.measure(case(bundle, factors=opposite(bundle, *both), forgotten=both))
    assert found["classes"][0]["name"] == "class 2" and found["mean_after"] == 1.0
    assert found["moved"]["count"] == 34 and found["moved"]["nearest_kept"] == 1


# --- destinations


def test_images_that_surely_go_to_one_class():
    found = destinations.measure(gone(world(lean={0: [5]})))
    assert found["images"] == 20
    assert found["before"] == [{"name": "class 0", "count": 20, "share": 1.0}]
    assert found["after"] == [{"name": "class 5", "count": 20, "share": 1.0}]
    assert found["entropy_bits_before"] == found["entropy_bits_after"] == 0
    assert [entry["name"] for entry in found["leak"]] == ["class 5"]


def test_images_that_spread_evenly():
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


def test_only_ten_classes_are_listed_and_five_compared():
    found = destinations.measure(gone(world(classes=14, images=26, lean={0: list(range(1, 14))})))
    assert len(found["after"]) == 10 and sum(e["count"] for e in found["after"]) == 20
    assert found["entropy_bits_after"] == pytest.approx(np.log2(13))
    assert [e["name"] for e in found["leak"]] == [e["name"] for e in found["after"][:5]]
    assert found["worst_auc"] == max(entry["auc_after"] for entry in found["leak"])


def test_a_class_with_looks_of_its_own_leaks():
    """Images that lean to class 5 land there, but their logits are not those of class 5."""
    found = destinations.measure(gone(world(lean={0: [5]})))
    assert found["leak"] == [{"name": "class 5", "images": 20, "auc_before": 1.0, "auc_after": 1.0}]
    assert found["worst_auc"] == 1.0


def test_a_class_that_looks_like_another_does_not_leak():
    bundle = world(copies={0: 5})
    found = destinations.measure(case(bundle, factors=opposite(bundle, "class 0")))
    assert found["after"][0] == {"name": "class 5", "count": 20, "share": 1.0}
    assert max(found["leak"][0]["auc_before"], found["worst_auc"]) < 0.6


def test_a_leak_through_the_forgotten_text_ends_where_its_name_is_removed():
    """The text that was turned round still answers to its images; a removed one has no logit."""
    bundle = hidden_mark()
    factors = opposite(bundle, "class 0")
    kept = destinations.measure(case(bundle, factors=factors))["leak"][0]
    assert kept["name"] == "class 1" and min(kept["auc_before"], kept["auc_after"]) > 0.95
    removed = destinations.measure(case(bundle, factors=factors, removed=("class 0",)))["leak"][0]
    assert removed["auc_before"] == kept["auc_before"]
    assert 0.3 < removed["auc_after"] < 0.65


def test_too_few_images_for_a_leak_are_said():
    bundle = world(lean={0: [5]})
    few = only(bundle, (bundle.labels != 0) | (torch.arange(len(bundle.labels)) < 3))
    found = destinations.measure(gone(few))
    assert found["images"] == 3 and found["leak"] == [] and found["worst_auc"] is None
    assert found["not_measured"] == ["leak: class 0 has 3 of at least 4 images"]
    for count in (0, 3):
        few = only(bundle, (bundle.labels != 5) | (torch.arange(len(bundle.labels)) < 100 + count))
        found = destinations.measure(gone(few))
        assert found["after"][0]["count"] == 20 and found["leak"] == []
        assert found["not_measured"] == [f"leak: class 5 has {count} of at least 4 images"]


def test_a_leak_is_the_same_in_every_run_and_follows_the_seed():
    bundle = hidden_mark()
    factors = opposite(bundle, "class 0")

    def leak(seed: int) -> list[dict]:
        asked = case(bundle, factors=factors, removed=("class 0",), seed=seed)
        return destinations.measure(asked)["leak"]

    first = leak(0)
    assert leak(0) == first
    others = [leak(seed) for seed in (1, 2)]
    assert any(other != first for other in others)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 12), st.integers(4, 12), st.integers(2, 30))
def test_a_separation_is_that_of_scikit_learn(seed, first, second, classes):
    """Two models, more or fewer logits than images, an outlier and a logit that says nothing."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, first + second, classes, generator=generator)
    logits[:, :first, 0] += 1.5
    logits[1, 0] *= 1000
    logits[1, :, -1] = 0.25
    truth = np.repeat([1, 0], [first, second])
    folds = StratifiedKFold(min(5, first, second), shuffle=True, random_state=seed)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000, tol=1e-9))
    expected = []
    for rows in logits.double().numpy():
        found = []
        for train, test in folds.split(rows, truth):
            decided = classifier.fit(rows[train], truth[train]).decision_function(rows[test])
            found.append(roc_auc_score(truth[test], decided))
        expected.append(np.mean(found))
    assert destinations.separation(logits, first, seed) == pytest.approx(expected, abs=1e-9)


def test_images_that_all_look_the_same_are_not_told_apart():
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)).repeat(10, 1)[None]
    assert destinations.separation(logits, 5, 0) == [0.5]


# --- confusion


def test_confusion_counts_against_a_loop():
    near = {1: 0.3, 2: 0.2, 3: 0.1}
    bundle = world(classes=20, similar=near, noise=0.1, lean={0: [15, 16, 16]}, words=4)
    asked = case(bundle, factors=opposite(bundle, "class 0", "class 2"))
    found = confusion.measure(asked)
    names = found["names"]
    assert names[:4] == ["class 0", "class 1", "class 2", "class 3"]
    assert 12 <= len(names) == len(set(names)) <= 16 and {"class 15", "class 16"} <= set(names)
    for side, model in (("before", asked.before), ("after", asked.after)):
        expected = [[0] * (len(names) + 1) for _ in names]
        for label, guess in zip(bundle.labels.tolist(), model.predicted.tolist(), strict=True):
            true, predicted = bundle.classnames[label], bundle.classnames[guess]
            if true in names:
                column = names.index(predicted) if predicted in names else len(names)
                expected[names.index(true)][column] += 1
        assert found[side] == expected
        assert [sum(row) for row in found[side]] == [20] * len(names)
    assert sum(row[-1] for row in found["after"]) > 0
    assert found["before"] != found["after"]


def test_confusion_of_a_class_that_goes_to_one_other():
    found = confusion.measure(gone(world(lean={0: [11]})))
    assert found["names"][0] == "class 0" and "class 11" in found["names"]
    column = found["names"].index("class 11")
    assert found["before"][0][0] == 20 and found["after"][0][column] == 20
    # Negative control: the rest of both tables is the diagonal.
    for row in range(1, len(found["names"])):
        assert found["before"][row][row] == found["after"][row][row] == 20


def test_confusion_shows_at_most_fifteen_others():
    found = confusion.measure(gone(world(classes=24, images=23, lean={0: list(range(1, 24))})))
    assert len(found["names"]) == 16 and len(found["after"][0]) == 17
    assert found["after"][0][-1] == 23 - 15


# --- edges


SHAPES = {
    "neighbours": {"classes", "mean_before", "mean_after", "moved", "not_measured"},
    "destinations": {
        *("images", "before", "after", "entropy_bits_before", "entropy_bits_after"),
        *("leak", "worst_auc", "not_measured"),
    },
    "confusion": {"names", "before", "after"},
    "residue": {"linear_probe", "nearest_neighbours", "zero_shot", "not_measured"},
    "retrieval": {"image_to_text", "text_to_image", "not_measured"},
}


@pytest.mark.parametrize("name", EDGES)
def test_edges_are_measured_or_said(name):
    """Plain JSON of the agreed shape everywhere, and every gap has its line."""
    asked, said = edge(name), set()
    for key, measure in MEASURES.items():
        found = measure.measure(asked)
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert set(found) == SHAPES[key]
        said |= set(found.get("not_measured", []))
    assert said == EDGES[name]


def test_values_of_edges():
    nothing = {"value": None, "low": None, "high": None, "n": 0}
    bare = edge("no image of the class")
    found = residue.measure(bare)
    assert found["linear_probe"] == {"before": nothing, "after": nothing, "auc": None}
    assert found["zero_shot"]["after"] == nothing
    assert retrieval.measure(bare)["text_to_image"]["forgotten"]["before"]["1"] == nothing
    assert neighbours.measure(bare)["mean_after"] == 1.0  # the others are there
    one = residue.measure(edge("one image of the class"))
    assert one["linear_probe"]["after"] == one["nearest_neighbours"]["after"] == nothing
    assert one["zero_shot"]["before"]["n"] == 1
    empty = edge("no image at all")
    assert neighbours.measure(empty)["mean_after"] is None
    assert confusion.measure(empty)["after"] == [[0] * 12 for _ in range(11)]
    pair = retrieval.measure(edge("two classes"))["image_to_text"]["forgotten"]["after"]
    assert pair["1"]["value"] == 0.0 and pair["5"] == nothing
    several = edge("several, removed")
    assert confusion.measure(several)["names"][0] == "class 3"
    assert retrieval.measure(several)["image_to_text"]["retained"]["after"]["1"]["n"] == 54
    assert residue.measure(several)["zero_shot"]["after"]["value"] == 0.0
