"""What forgetting does not touch, and search: probes on image embeddings, recall at K."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import RidgeClassifier
from torch.nn.functional import normalize

from clip.bundle import load_bundle
from evaluation.audit import residue, retrieval
from evaluation.audit.statistics import accuracy
from tests.audit_fixtures import (
    case,
    gone,
    move,
    only,
    text,
    world,
)
from tests.conftest import REPOSITORY, whole_set

REAL_CLIP = REPOSITORY.parent / "shared" / "real_clip"


# --- residue


def test_a_probe_that_surely_finds_the_class():
    found = residue.measure(gone())
    for probe in ("linear_probe", "nearest_neighbours"):
        assert found[probe]["before"] == found[probe]["after"]
        assert found[probe]["before"] == accuracy(torch.ones(20, dtype=torch.bool))
    assert found["linear_probe"]["auc"] == 1.0 and found["nearest_neighbours"]["k"] == 5
    assert found["zero_shot"]["before"]["value"] == 1 and found["zero_shot"]["after"]["value"] == 0
    assert residue.measure(case(world()))["zero_shot"]["after"]["value"] == 1  # nothing changed


def test_a_probe_that_surely_cannot_find_the_class():
    found = residue.measure(gone(world(classes=2, copies={0: 1})))
    assert found["linear_probe"]["before"]["value"] < 0.6 and found["linear_probe"]["auc"] < 0.6
    assert found["nearest_neighbours"]["before"]["value"] < 0.5


def test_probes_do_not_see_the_image_that_they_judge():
    """Labels without meaning: who learns from the images that it judges finds all of them."""
    generator = torch.Generator().manual_seed(5)
    x = normalize(torch.randn(60, 64, generator=generator), dim=1)
    labels = torch.arange(60) % 2
    linear = residue.probe(x, labels, 2, seed=0).argmax(dim=1) == labels
    nearest = residue.vote(x, labels)[0] == labels
    assert float(linear.double().mean()) < 0.7 and float(nearest.double().mean()) < 0.7
    seen = residue._discriminants(x.double(), labels, 2, x.double()).argmax(dim=1) == labels
    assert float(seen.double().mean()) > 0.9  # the control: it can learn them by heart


def test_the_linear_probe_is_sklearns_discriminant_analysis():
    """Adding the mean eigenvalue to the covariance gives twice that of a shrinkage of one half."""
    bundle = world(classes=6, noise=0.25)
    keep = torch.rand(120, generator=torch.Generator().manual_seed(2)) < 0.7  # uneven classes
    x, labels = bundle.image_features[keep].double(), bundle.labels[keep]
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.5, priors=np.full(6, 1 / 6))
    new = bundle.image_features[~keep].double()
    found = residue._discriminants(x, labels, 7, new)  # the seventh has no image to learn from
    reference.fit(x.numpy(), labels.numpy())
    expected = reference.predict_log_proba(new.numpy())
    assert (2 * found).log_softmax(dim=1)[:, :6].numpy() == pytest.approx(expected, abs=1e-4)
    assert found.exp().sum(dim=1).numpy() == pytest.approx(1)
    assert found[:, 6].eq(-torch.inf).all()


def test_the_nearest_decide_between_equally_many_votes():
    angles = torch.tensor([0.0, 0.3, 0.1, 0.35])
    x = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([0, 1, 2, 1])
    predicted, k = residue.vote(x, labels)
    assert k == 3 and predicted.tolist()[0] == 1  # two votes against one nearer
    assert residue.vote(x[[0, 1, 2]], labels[[0, 1, 2]])[0].tolist() == [2, 2, 0]
    assert residue.vote(x[:2], labels[:2])[0].tolist() == [1, 0]
    assert residue.vote(-x[:1], labels[:1]) == (torch.tensor([-1]), 0)
    # Cosines below 0 count for their class, not for a class that nobody voted for.
    x = torch.tensor([[1.0, 0, 0], [-0.5, 0.75**0.5, 0], [-0.5, -(0.75**0.5), 0]])
    assert residue.vote(x, torch.tensor([1, 1, 1]))[0].tolist() == [1, 1, 1]


def test_every_class_is_learnt_from_in_every_fold():
    labels = torch.tensor([0, 0, 1, 1, 1, *([2] * 11)])
    for seed in range(20):
        fold = residue._folds(labels, seed)
        for column in range(3):
            counts = torch.bincount(fold[labels == column], minlength=5)
            assert counts.max() - counts.min() <= 1
    assert not torch.equal(residue._folds(labels, 0), residue._folds(labels, 1))


# --- retrieval


def test_search_for_a_class_that_is_gone():
    found = retrieval.measure(gone())
    for direction, forgotten, retained in (
        ("image_to_text", 20, 220),
        ("text_to_image", 1, 11),
    ):
        for k in ("1", "5", "10"):
            for group, n, after in (("forgotten", forgotten, 0.0), ("retained", retained, 1.0)):
                entry = found[direction][group]
                assert entry["before"][k] == accuracy(torch.ones(n, dtype=torch.bool))
                assert entry["after"][k]["value"] == after and entry["after"][k]["n"] == n
    assert found["not_measured"] == []
    # Negative control: nothing changed.
    same = retrieval.measure(case(world()))
    assert same["image_to_text"]["forgotten"]["after"]["1"]["value"] == 1.0


def test_search_that_finds_the_class_in_fourth_place():
    """Images of class 0 lean towards three classes; its text keeps a tenth of its direction."""
    bundle = world(noise=0.001)
    x = bundle.image_features.clone()
    mine = bundle.labels == 0
    directions = bundle.text_projection[:4]
    x[mine] = normalize(torch.tensor([0.8, 0.5, 0.4, 0.3]) @ directions, dim=0)
    bundle = replace(bundle, image_features=x)
    target = 0.1 * directions[0] + bundle.text_projection[-1]
    found = retrieval.measure(case(bundle, edit=move(bundle, {"class 0": target})))
    forgotten = found["image_to_text"]["forgotten"]
    assert [forgotten["before"][k]["value"] for k in ("1", "5", "10")] == [1.0, 1.0, 1.0]
    assert [forgotten["after"][k]["value"] for k in ("1", "5", "10")] == [0.0, 1.0, 1.0]


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_recall_against_sorted_lists(seed):
    """Noisy worlds, three classes forgotten, a removed name, a class without images."""
    bundle = world(images=4, noise=0.4, seed=seed)
    bundle = only(bundle, bundle.labels != 7)
    forgotten = ["class 0", "class 1", "class 2"]
    edit = move(bundle, {n: text(bundle, n).roll(1) for n in forgotten})
    removed = ("class 1",)
    subject = case(bundle, "class 0", edit, forgotten=forgotten, removed=removed)
    found = retrieval.measure(subject)
    labels = bundle.labels.tolist()
    for side, model, gone_columns in (
        ("before", subject.before, []),
        ("after", subject.after, [1]),
    ):
        cosines = (bundle.image_features.double() @ model.classes.T).tolist()
        texts = [c for c in range(12) if c not in gone_columns]
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


def test_a_removed_name_is_not_found_but_can_be_typed():
    found = retrieval.measure(case(world(), "class 3", removed=("class 3",)))
    assert found["image_to_text"]["forgotten"]["after"]["10"]["value"] == 0.0
    assert found["text_to_image"]["forgotten"]["after"]["1"]["value"] == 1.0
    assert found["image_to_text"]["retained"]["after"]["1"]["value"] == 1.0


def test_equal_cosines_rank_in_the_order_of_the_list():
    """Two classes with one text: the images of the second are never first, as for zero-shot."""
    bundle = world(words=4, copies={1: 0})
    hidden = bundle.class_hidden.clone()
    hidden[1] = hidden[0]
    subject = case(replace(bundle, class_hidden=hidden), "class 1")
    found = retrieval.measure(subject)["image_to_text"]["forgotten"]["before"]
    assert found["1"]["value"] == 0.0 and found["5"]["value"] == 1.0


def test_equal_cosines_rank_in_the_order_of_the_images():
    """The images of class 1 are copies of those of class 0, which stand before them."""
    bundle = world(classes=4, images=3, words=4)
    axes = torch.eye(bundle.text_projection.shape[0])  # cosines are then 0 or 1 to the last digit
    x = axes[bundle.labels.where(bundle.labels != 1, 0)]
    bundle = replace(bundle, image_features=x, text_projection=axes)
    for name, first in (("class 0", 1.0), ("class 1", 0.0)):
        found = retrieval.measure(case(bundle, name))["text_to_image"]["forgotten"]["before"]
        assert found["1"]["value"] == first and found["5"]["value"] == 1.0


# --- real features


@pytest.mark.skipif(not REAL_CLIP.is_dir(), reason="needs bundles of real CLIP features")
def test_first_place_of_real_images_is_their_zero_shot_class():
    bundle = load_bundle(REAL_CLIP, "ViT-B/32", "CaltechNature")
    found = retrieval.measure(case(bundle, "dalmatian"))["image_to_text"]
    first = [found[group]["before"]["1"] for group in ("forgotten", "retained")]
    hits = sum(entry["value"] * entry["n"] for entry in first)
    assert hits / len(bundle.labels) == pytest.approx(whole_set(bundle))


@pytest.mark.skipif(not REAL_CLIP.is_dir(), reason="needs bundles of real CLIP features")
def test_the_linear_probe_finds_more_real_cars_than_ridge_regression():
    bundle = load_bundle(REAL_CLIP, "ViT-B/32", "StanfordCars")
    x, labels = bundle.image_features, bundle.labels
    test = residue._folds(labels, 0) == 0
    ridge = RidgeClassifier(alpha=0.3, class_weight="balanced")  # the best of 0.1, 0.3, 1, 3
    ridge.fit(x[~test].numpy(), labels[~test].numpy())
    theirs = torch.from_numpy(ridge.predict(x[test].numpy())) == labels[test]
    ours = residue.probe(x, labels, 196, 0)[test].argmax(dim=1) == labels[test]
    assert float(ours.double().mean()) > float(theirs.double().mean()) + 0.03
