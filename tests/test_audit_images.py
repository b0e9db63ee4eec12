"""What images bring back: probes, search, relearning."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from clip.bundle import FeatureBundle
from evaluation.audit import relearning, residue, retrieval
from evaluation.audit.case import AuditData, Case, accuracy
from evaluation.audit.relearning import METHODS, REPEATS, SHOTS
from tests.audit_fixtures import LENGTH, WIDTH, case, gone, move, only, planted, text


def test_a_probe_that_surely_finds_the_class_and_one_that_surely_cannot():
    found = residue.measure(gone())
    assert found["linear_probe"] == {"before": accuracy(20, 20), "after": accuracy(20, 20)}
    assert found["zero_shot"]["before"]["value"] == 1 and found["zero_shot"]["after"]["value"] == 0
    assert residue.measure(case(planted()))["zero_shot"]["after"]["value"] == 1  # nothing changed
    found = residue.measure(gone(planted(classes=2, copies={0: 1})))
    assert found["linear_probe"]["before"]["value"] < 0.6


def test_the_probe_does_not_see_the_image_that_it_judges():
    """Labels without meaning: who learns from the images that it judges finds all of them."""
    generator = torch.Generator().manual_seed(5)
    x = normalize(torch.randn(60, 64, generator=generator), dim=1)
    labels = torch.arange(60) % 2
    assert float((residue.probe(x, labels, seed=0) == labels).double().mean()) < 0.7
    # The control: with each image there five times, its copies give it away.
    copies = residue.probe(x.repeat(5, 1), labels.repeat(5), seed=0)
    assert float((copies == labels.repeat(5)).double().mean()) > 0.9


def test_the_linear_probe_weighs_classes_equally_and_reports_what_it_cannot_learn():
    """By their numbers the few would be called by the other's name in every fourth case."""
    bundle = planted(classes=2, images=200, noise=0.4)
    few = only(bundle, (bundle.labels > 0) | (torch.arange(400) < 20))
    predicted = residue.probe(few.image_features, few.labels, 0)
    assert float((predicted == few.labels)[few.labels == 0].double().mean()) >= 0.85
    assert not torch.equal(predicted, residue.probe(few.image_features, few.labels, 1))
    x = torch.eye(3)
    assert residue.probe(x, torch.tensor([0, 1, 2]), 0).tolist() == [-1] * 3
    assert residue.probe(x, torch.tensor([0, 0, 0]), 0).tolist() == [-1] * 3


def test_search_for_a_class_that_is_gone():
    found = retrieval.measure(gone())
    for direction, count in (("image_to_text", 20), ("text_to_image", 1)):
        sides = found[direction]["forgotten"]
        assert sides["before"]["1"] == accuracy(count, count)
        assert sides["after"]["10"] == accuracy(0, count)
    assert found["not_measured"] == []
    # A removed name is not found, but can be typed.
    removed = retrieval.measure(case(planted(), "class 3", removed=("class 3",)))
    assert removed["image_to_text"]["forgotten"]["after"]["10"]["value"] == 0.0
    assert removed["text_to_image"]["forgotten"]["after"]["1"]["value"] == 1.0


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_recall_against_sorted_lists(seed):
    """Noisy sets, three classes forgotten, a removed name, a class without images."""
    bundle = planted(images=4, noise=0.4, seed=seed)
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


def sent_aside(bundle: FeatureBundle, axis: int = -1) -> Case:
    """The class's text goes where no image and no other text is; nothing else moves."""
    return case(bundle, edit=move(bundle, {"class 0": LENGTH * bundle.text_projection[axis]}))


def scattered() -> FeatureBundle:
    """Each image of class 0 is a copy of an image of another class. Its text, the mean of the
    others' images, finds them all; learnt from, they lead nowhere."""
    bundle = planted(classes=12, images=11, words=10, noise=0.004)
    hidden = bundle.class_hidden.clone()
    hidden[0] = LENGTH * normalize(torch.eye(WIDTH)[1:12].sum(dim=0), dim=0)  # cosines of 0.30
    spare = torch.eye(WIDTH)[40:51]
    hidden[1:] = LENGTH * normalize(0.2 * torch.eye(WIDTH)[1:12] + spare, dim=1)  # and of 0.20
    images = bundle.image_features.clone()
    images[:11] = images[11:132:11]  # the first image of each other class
    return replace(bundle, image_features=images, class_hidden=hidden, forget_hidden=hidden)


def test_one_image_of_a_tight_cluster_brings_the_class_back():
    found = relearning.measure(sent_aside(planted()))
    once = {"forgotten": [1.0] * 5, "no_text": [1.0] * 5, "needed": 1}
    assert found["methods"] == dict.fromkeys(METHODS, once)
    assert found["shots"] == [1, 2, 4, 8, 16]
    # A text sent to its opposite holds the cache back by one image: the cosine is -1 for the class,
    # an image of the cluster is worth exp(-5.5 0.03) = 0.87.
    methods = relearning.measure(gone())["methods"]
    assert methods["cache"]["forgotten"][:2] == [0.0, 1.0] and methods["cache"]["no_text"][0] == 1.0
    needed = {method: methods[method]["needed"] for method in METHODS}
    assert needed == {"cache": 2, "refit": 1}


def test_images_that_are_those_of_others_bring_nothing_back():
    bundle = scattered()
    subject = case(bundle, edit=move(bundle, {"class 0": -bundle.text_projection[-1]}))
    assert (subject.before.predicted[:11] == 0).all()  # it was known before
    for found in relearning.measure(subject)["methods"].values():
        assert found["forgotten"] == [0.0, 0.0, 0.0, 0.0, None] and found["needed"] is None


def test_no_method_calls_everything_by_the_class():
    """What is taught from few images must leave the images of other classes theirs."""
    subject = sent_aside(planted())
    labels = subject.bundle.labels
    for draw in range(REPEATS):
        for method in METHODS.values():
            assert torch.equal(method(subject, True, draw, 1, torch.arange(240)), labels)
    # A class without a text gets one of its own: its column is where the images point.
    assert torch.equal(relearning.refit(subject, False, 0, 1, torch.arange(240)), labels)
    curve = relearning.measure(gone(planted(noise=0.3)))["methods"]["cache"]
    assert curve["no_text"][0] < curve["no_text"][-1] and curve["forgotten"] != curve["no_text"]


def test_images_and_texts_lie_apart_in_clip():
    """With a direction that all images share, and another that all texts do, the mean of a class's
    images as its text would take in every image; the difference from the others' does not."""
    bundle = planted()
    pull = 2 * bundle.text_projection[-1]
    bundle = replace(bundle, image_features=normalize(bundle.image_features + pull, dim=1))
    subject = sent_aside(bundle, axis=-2)
    texts = subject.after.classes.clone()
    texts[0] = normalize(subject.data.images[bundle.labels == 0].mean(dim=0), dim=0)
    assert ((subject.data.images @ texts.T).argmax(dim=1) == 0).all()  # what it would do
    assert torch.equal(relearning.refit(subject, True, 0, 4, torch.arange(240)), bundle.labels)


def test_the_attacker_has_k_images_of_every_class_and_is_judged_on_others(monkeypatch):
    bundle = only(planted(), torch.arange(240) % 20 < 12)
    data, held = AuditData(bundle), {}
    for draw in range(REPEATS):
        for k in SHOTS:
            images, classes = relearning.held(data, draw, k)
            held[draw, k] = set(images.tolist())
            assert torch.bincount(bundle.labels[images]).tolist() == [min(k, 12)] * 12
            assert torch.equal(classes.argmax(dim=1), bundle.labels[images])
        assert held[draw, 2] < held[draw, 4]
    assert held[0, 2] != held[1, 2]
    judged = {}

    def learn(case: Case, named: bool, draw: int, k: int, images: Tensor) -> Tensor:
        judged[draw, k] = set(images.tolist())
        return images

    monkeypatch.setitem(METHODS, "cache", learn)
    found = relearning.measure(gone(bundle, "class 3"))
    for key, images in judged.items():
        assert images == set(range(36, 48)) - held[key]
    assert set(judged) == {(draw, k) for draw in range(REPEATS) for k in (1, 2, 4, 8)}
    assert found["methods"]["cache"]["forgotten"][4] is None
    assert found["not_measured"][0] == "from 16 images: 'class 3' has 12"


def test_removed_names():
    bundle = planted(similar={1: 0.9}, noise=0.3)
    alone = relearning.measure(case(bundle, removed=("class 0",)))["methods"]
    # It starts as a class that was never known, but a text can be given again.
    assert alone["cache"]["forgotten"] == alone["cache"]["no_text"]
    untouched = relearning.measure(case(bundle))["methods"]["refit"]["forgotten"]
    assert alone["refit"]["forgotten"] == untouched
    # Others stay removed.
    both = ["class 0", "class 1"]
    with_rival = relearning.measure(case(bundle, forgotten=both))["methods"]["refit"]
    without = relearning.measure(case(bundle, forgotten=both, removed=tuple(both)))["methods"]
    assert without["refit"]["forgotten"][0] > with_rival["forgotten"][0]


def test_needed_is_the_least_that_reaches_half_and_a_seed_is_a_draw():
    curve = [0.1, 0.44, 0.45, 0.2, None]
    needed = [relearning._needed(curve, own) for own in (0.9, 0.92, 0.0, None)]
    assert needed == [4, None, None, None]
    bundle = planted(noise=0.3)
    one, again, other = (relearning.measure(gone(bundle, seed=seed)) for seed in (0, 0, 1))
    assert one == again and one != other
