"""What forgetting does not touch, and search: probes on image embeddings, recall at K."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import RidgeClassifier
from torch.nn.functional import normalize

from clip.bundle import load_bundle
from evaluation.audit import residue, retrieval
from evaluation.audit.case import accuracy
from tests.audit_fixtures import case, gone, move, only, text, world
from tests.conftest import REPOSITORY, whole_set

REAL_CLIP = REPOSITORY.parent / "shared" / "real_clip"
real = pytest.mark.skipif(not REAL_CLIP.is_dir(), reason="needs bundles of real CLIP features")


# --- residue


def test_probes_that_surely_find_the_class_and_that_surely_cannot():
    found = residue.measure(gone())
    for probe in ("linear_probe", "nearest_neighbours"):
        assert found[probe]["before"] == found[probe]["after"] == accuracy(20, 20)
    assert found["zero_shot"]["before"]["value"] == 1 and found["zero_shot"]["after"]["value"] == 0
    assert found["nearest_neighbours"]["k"] == 5
    assert residue.measure(case(world()))["zero_shot"]["after"]["value"] == 1  # nothing changed
    found = residue.measure(gone(world(classes=2, copies={0: 1})))
    assert found["linear_probe"]["before"]["value"] < 0.6
    assert found["nearest_neighbours"]["before"]["value"] < 0.5


def test_probes_do_not_see_the_image_that_they_judge():
    """Labels without meaning: who learns from the images that it judges finds all of them."""
    generator = torch.Generator().manual_seed(5)
    x = normalize(torch.randn(60, 64, generator=generator), dim=1)
    labels = torch.arange(60) % 2
    for predicted in (residue.probe(x, labels, seed=0), residue.vote(x, labels)):
        assert float((predicted == labels).double().mean()) < 0.7
    # The control: with each image there five times, its copies give it away.
    copies = residue.probe(x.repeat(5, 1), labels.repeat(5), seed=0)
    assert float((copies == labels.repeat(5)).double().mean()) > 0.9


def test_the_linear_probe_weighs_classes_equally_and_reports_what_it_cannot_learn():
    """By their numbers the few would be called by the other's name in every fourth case."""
    bundle = world(classes=2, images=200, noise=0.4)
    few = only(bundle, (bundle.labels > 0) | (torch.arange(400) < 20))
    predicted = residue.probe(few.image_features, few.labels, 0)
    assert float((predicted == few.labels)[few.labels == 0].double().mean()) >= 0.85
    assert not torch.equal(predicted, residue.probe(few.image_features, few.labels, 1))
    x = torch.eye(3)
    assert residue.probe(x, torch.tensor([0, 1, 2]), 0).tolist() == [-1] * 3
    assert residue.probe(x, torch.tensor([0, 0, 0]), 0).tolist() == [-1] * 3


def test_the_nearest_decide_between_equally_many_votes():
    angles = torch.tensor([0.0, 0.3, 0.1, 0.35])
    x = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([0, 1, 2, 1])
    assert residue.vote(x, labels)[0] == 1  # two votes against one nearer
    assert residue.vote(x[[0, 1, 2]], labels[[0, 1, 2]]).tolist() == [2, 2, 0]
    assert residue.vote(x[:2], labels[:2]).tolist() == [1, 0]
    # Cosines below 0 count for their class, not for a class that nobody voted for.
    x = torch.tensor([[1.0, 0, 0], [-0.5, 0.75**0.5, 0], [-0.5, -(0.75**0.5), 0]])
    assert residue.vote(x, torch.tensor([1, 1, 1])).tolist() == [1, 1, 1]


@real
def test_the_linear_probe_finds_more_real_cars_than_ridge_regression():
    bundle = load_bundle(REAL_CLIP, "ViT-B/32", "StanfordCars")
    x, labels = bundle.image_features, bundle.labels
    ours = (residue.probe(x, labels, 0) == labels).double().mean()
    test = torch.arange(len(labels)) % 5 == 0
    ridge = RidgeClassifier(alpha=0.3, class_weight="balanced")  # the best of 0.1, 0.3, 1, 3
    ridge.fit(x[~test].numpy(), labels[~test].numpy())
    theirs = torch.from_numpy(ridge.predict(x[test].numpy())) == labels[test]
    assert float(ours) > float(theirs.double().mean()) + 0.03


# --- retrieval


def test_search_for_a_class_that_is_gone():
    found = retrieval.measure(gone())
    for direction, forgotten, retained in (("image_to_text", 20, 220), ("text_to_image", 1, 11)):
        for group, n, after in (("forgotten", forgotten, 0), ("retained", retained, retained)):
            for k in ("1", "5", "10"):
                sides = {"before": accuracy(n, n), "after": accuracy(after, n)}
                assert {side: found[direction][group][side][k] for side in sides} == sides
    assert found["not_measured"] == []
    # A removed name is not found, but can be typed.
    removed = retrieval.measure(case(world(), "class 3", removed=("class 3",)))
    assert removed["image_to_text"]["forgotten"]["after"]["10"]["value"] == 0.0
    assert removed["text_to_image"]["forgotten"]["after"]["1"]["value"] == 1.0


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_recall_against_sorted_lists(seed):
    """Noisy worlds, three classes forgotten, a removed name, a class without images."""
    bundle = world(images=4, noise=0.4, seed=seed)
    bundle = only(bundle, bundle.labels != 7)
    forgotten = ["class 0", "class 1", "class 2"]
    edit = move(bundle, {n: text(bundle, n).roll(1) for n in forgotten})
    subject = case(bundle, "class 0", edit, forgotten=forgotten, removed=("class 1",))
    found = retrieval.measure(subject)
    labels = bundle.labels.tolist()
    for side, model, off in (("before", subject.before, []), ("after", subject.after, [1])):
        cosines = (bundle.image_features.double() @ model.classes.T).tolist()
        texts = [c for c in range(12) if c not in off]
        by_image = [sorted(texts, key=lambda c, row=row: -row[c]) for row in cosines]
        by_text = [sorted(range(44), key=lambda i, c=c: -cosines[i][c]) for c in range(12)]
        for k in (1, 5, 10):
            for group, columns in (("forgotten", [0]), ("retained", list(range(3, 12)))):
                hits = [y in best[:k] for y, best in zip(labels, by_image, strict=True)]
                hits = [hit for hit, y in zip(hits, labels, strict=True) if y in columns]
                entry = found["image_to_text"][group][side][str(k)]
                assert entry["n"] == len(hits) and entry["value"] == pytest.approx(np.mean(hits))
                hits = [any(labels[i] == c for i in by_text[c][:k]) for c in columns if c in labels]
                entry = found["text_to_image"][group][side][str(k)]
                assert entry["n"] == len(hits) and entry["value"] == pytest.approx(np.mean(hits))


@real
def test_first_place_of_real_images_is_their_zero_shot_class():
    bundle = load_bundle(REAL_CLIP, "ViT-B/32", "CaltechNature")
    found = retrieval.measure(case(bundle, "dalmatian"))["image_to_text"]
    first = [found[group]["before"]["1"] for group in ("forgotten", "retained")]
    hits = sum(entry["value"] * entry["n"] for entry in first)
    assert hits / len(bundle.labels) == pytest.approx(whole_set(bundle))
