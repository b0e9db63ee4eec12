"""Classes that surely come back from an image or a word, and classes that surely cannot."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip.bundle import FeatureBundle, load_bundle
from evaluation.audit import relearning, shots
from evaluation.audit.case import AuditData, Case, Prompt
from evaluation.audit.shots import METHODS, REPEATS, SHOTS, Shots, Start
from evaluation.audit.statistics import accuracy
from forgetting import Ridge, opposite_target, solve_constrained
from forgetting.problem import LowRankEdit
from tests.audit_fixtures import LENGTH, WIDTH, case, gone, move, only, world
from tests.conftest import REPOSITORY

REAL_CLIP = REPOSITORY.parent / "shared" / "real_clip"
CURVES = ("forgotten", "before", "no_text", "control")
NOTHING = {"value": None, "low": None, "high": None, "n": 0}


def values(found: dict, method: str, curve: str) -> list[float | None]:
    return [entry["value"] for entry in found["methods"][method][curve]]


def sent_aside(bundle: FeatureBundle, axis: int = -1) -> Case:
    """The class's text goes where no image and no other text is; nothing else moves."""
    return case(bundle, edit=move(bundle, {"class 0": LENGTH * bundle.text_projection[axis]}))


def scattered() -> FeatureBundle:
    """Each image of class 0 is a copy of an image of another class.

    Its text, the mean of the others' images, finds them all; learnt from, they lead nowhere: near
    each of them lie all the images of the class that it was copied from.
    """
    bundle = world(classes=12, images=11, words=10, noise=0.004)
    hidden = bundle.class_hidden.clone()
    hidden[0] = LENGTH * normalize(torch.eye(WIDTH)[1:12].sum(dim=0), dim=0)  # cosines of 0.30
    spare = torch.eye(WIDTH)[40:51]
    hidden[1:] = LENGTH * normalize(0.2 * torch.eye(WIDTH)[1:12] + spare, dim=1)  # and of 0.20
    images = bundle.image_features.clone()
    images[:11] = images[11:132:11]  # the first image of each other class
    return replace(bundle, image_features=images, class_hidden=hidden, forget_hidden=hidden)


# --- images


def test_one_image_of_a_tight_cluster_brings_the_class_back():
    found = relearning.measure(sent_aside(world()))
    for method in METHODS:
        assert found["methods"][method]["needed"] == 1
        for curve in CURVES:
            assert values(found, method, curve) == [1.0] * 5, (method, curve)
    assert found["methods"]["cache"]["forgotten"][0]["n"] == 20  # of 5 draws, each image once
    assert found["shots"] == [1, 2, 4, 8, 16]


def test_a_text_sent_to_its_opposite_holds_the_cache_back_by_one_image():
    """100 cos is -100 for the class, an image of the cluster is worth 100 exp(-5.5 0.03) = 87."""
    found = relearning.measure(gone())
    assert values(found, "cache", "forgotten")[:2] == [0.0, 1.0]
    assert values(found, "cache", "no_text")[0] == values(found, "cache", "before")[0] == 1.0
    needed = {method: found["methods"][method]["needed"] for method in METHODS}
    assert needed == {"cache": 2, "probe": 1, "refit": 1}


def test_images_that_are_those_of_others_bring_nothing_back():
    bundle = scattered()
    subject = case(bundle, edit=move(bundle, {"class 0": -bundle.text_projection[-1]}))
    assert (subject.before.predicted[:11] == 0).all()  # it was known before
    found = relearning.measure(subject)
    for method in METHODS:
        assert found["methods"][method]["needed"] is None
        assert values(found, method, "forgotten") == [0.0, 0.0, 0.0, 0.0, None]
    # Negative control: the class that one of the copies was made from comes back from two.
    assert values(found, "probe", "control")[1] > 0.9


def test_nothing_changed_is_as_before_and_the_probe_reads_no_text():
    found = relearning.measure(case(world(noise=0.3)))["methods"]
    for method in METHODS:
        assert found[method]["forgotten"] == found[method]["before"]
    assert found["cache"]["before"][0]["value"] < 1  # negative control: not all is 1 here
    found = relearning.measure(gone(world(noise=0.3)))["methods"]
    assert found["cache"]["forgotten"] != found["cache"]["before"]
    probe = found["probe"]
    assert probe["forgotten"] == probe["before"] == probe["no_text"]
    assert probe["forgotten"][0]["value"] < probe["forgotten"][-1]["value"]


def test_no_method_calls_everything_by_the_class():
    """What is taught from few images must leave the images of other classes theirs."""
    subject = sent_aside(world())
    start, labels = Start(subject.after, 0), subject.bundle.labels
    others = (labels != 0).nonzero()[:, 0]
    for draw in range(REPEATS):
        for method in METHODS.values():
            assert (method(start, draw, 1, others) == labels[others]).all()
    # A class without a text gets one of its own: its column is where the images point.
    everything = torch.arange(len(labels))
    unnamed = Start(subject.before, 0, named=False)
    assert (shots.refit(unnamed, 0, 1, everything) == labels).all()


def test_images_and_texts_lie_apart_in_clip():
    """With a direction that all images share, and another that all texts do, the mean of a class's
    images as its text would take in every image; the difference from the others' does not."""
    bundle = world()
    pull = 2 * bundle.text_projection[-1]
    bundle = replace(bundle, image_features=normalize(bundle.image_features + pull, dim=1))
    subject = sent_aside(bundle, axis=-2)
    texts = subject.after.classes.clone()
    texts[0] = normalize(subject.data.images[bundle.labels == 0].mean(dim=0), dim=0)
    assert ((subject.data.images @ texts.T).argmax(dim=1) == 0).all()  # what it would do
    seen = shots.refit(Start(subject.after, 0), 0, 4, torch.arange(len(bundle.labels)))
    assert (seen == bundle.labels).all()


def test_the_attacker_has_k_images_of_every_class_and_is_judged_on_others():
    bundle = only(world(), torch.arange(240) % 20 < 12)
    drawn = Shots(AuditData(bundle))
    for draw in range(REPEATS):
        for k in SHOTS:
            held = drawn.held[draw, k]
            assert torch.bincount(bundle.labels[held]).tolist() == [min(k, 12)] * 12
            rest = drawn.rest(draw, k, 3)
            assert set(rest.tolist()) | set(held.tolist()) >= set(range(36, 48))
            assert not set(rest.tolist()) & set(held.tolist())
        assert set(drawn.held[draw, 2].tolist()) < set(drawn.held[draw, 4].tolist())
    assert not torch.equal(drawn.held[0, 2], drawn.held[1, 2])


def test_the_nearest_class_with_enough_images_is_the_control():
    bundle = world(similar={1: 0.9, 2: 0.8, 3: 0.6})
    number = torch.arange(240) % 20
    few = only(bundle, (bundle.labels != 1) | (torch.arange(240) < 25))
    both = case(bundle, forgotten=["class 0", "class 1"])
    # Nobody has as many: the one with most.
    most = only(bundle, (bundle.labels == 0) | (number < 3) | ((bundle.labels == 7) & (number < 9)))
    for subject, name in ((gone(bundle), 1), (gone(few), 2), (both, 2), (gone(most), 7)):
        assert relearning.measure(subject)["control_class"] == f"class {name}"


def test_removed_names():
    bundle = world(similar={1: 0.9}, noise=0.3)
    alone = relearning.measure(case(bundle, removed=("class 0",)))["methods"]
    # It starts as a class that was never known, but a text can be given again.
    assert alone["cache"]["forgotten"] == alone["cache"]["no_text"]
    assert alone["refit"]["forgotten"] == alone["refit"]["before"]
    # Others stay removed.
    both = ["class 0", "class 1"]
    with_rival = relearning.measure(case(bundle, forgotten=both))["methods"]["refit"]
    without = relearning.measure(case(bundle, forgotten=both, removed=tuple(both)))["methods"]
    assert without["refit"]["forgotten"][0]["value"] > with_rival["forgotten"][0]["value"]
    assert without["refit"]["before"] == with_rival["before"]


def test_what_cannot_be_measured_is_reported():
    few = relearning.measure(gone(only(world(), torch.arange(240) % 20 < 6)))
    assert values(few, "probe", "forgotten") == [1.0, 1.0, 1.0, None, None]
    assert few["methods"]["probe"]["forgotten"][3] == NOTHING
    assert "relearning from 8 or more images: 'class 0' has 6" in few["not_measured"]
    assert not any("images" in line for line in relearning.measure(gone())["not_measured"])
    bundle = world()
    hidden = torch.cat([-bundle.class_hidden[:1], bundle.class_hidden[1:]])
    never = relearning.measure(case(replace(bundle, class_hidden=hidden)))
    assert never["methods"]["probe"]["needed"] is None
    assert values(never, "probe", "forgotten") == [1.0] * 5
    assert any("never recognised" in line for line in never["not_measured"])


def test_needed_is_the_least_that_reaches_half():
    curve = [{"value": value} for value in (0.1, 0.44, 0.45, 0.2, None)]
    assert relearning._needed(SHOTS, curve, 0.9) == 4
    assert relearning._needed(SHOTS, curve, 0.92) is None
    assert relearning._needed(SHOTS, curve, 0.0) is relearning._needed(SHOTS, curve, None) is None


def test_an_image_tested_five_times_is_one_image():
    tested = [torch.arange(10)] * 5
    correct = [torch.arange(10) < right for right in (3, 4, 5, 4, 4)]
    found = relearning._pooled(tested, correct)
    assert found == accuracy(torch.arange(10) < 4) | {"value": 0.4}
    fivefold = accuracy(torch.cat(correct))
    assert found["low"] < fivefold["low"] and found["high"] > fivefold["high"]
    uneven = relearning._pooled(tested[:2], [torch.arange(10) < 10, torch.arange(10) < 9])
    assert uneven["value"] == 0.95 and uneven["low"] <= 0.95 <= uneven["high"]
    assert relearning._pooled([], []) == NOTHING


def test_a_seed_is_a_draw():
    bundle = world(noise=0.3)
    one, again, other = (relearning.measure(gone(bundle, seed=seed)) for seed in (0, 0, 1))
    assert one == again and one != other


# --- words


def forgotten_by_one_text(bundle: FeatureBundle) -> LowRankEdit:
    """The class's text goes to its opposite, but not a text that leans to the last axis."""
    text, last = bundle.class_hidden[0], torch.eye(WIDTH)[-1]
    left = (text / LENGTH - last * 0.8 / 0.6) / LENGTH  # 1 at the text, 0 at `word(-1)`
    return LowRankEdit(left[:, None], -2 * (text @ bundle.text_projection)[None])


def word(axis: int) -> Tensor:
    return LENGTH * (0.8 * torch.eye(WIDTH)[0] + 0.6 * torch.eye(WIDTH)[axis])


def by_words(axes: list[int], seen: tuple[Prompt, ...] = (), **options) -> dict:
    """What words that lean to these axes bring back."""
    bundle = world()
    subject = case(bundle, edit=forgotten_by_one_text(bundle), **options)
    assert not (subject.after.predicted[subject.own_images] == 0).any()
    prompts = [Prompt(f"word {i}", "synonym", False, word(axis)) for i, axis in enumerate(axes)]
    return relearning.measure(replace(subject, prompts=[*prompts, *seen]))


def test_words_that_did_not_move_bring_the_class_back():
    found = by_words([-1] * 5)
    assert found["words"]["counts"] == [1, 2, 4] and found["words"]["needed"] == 1
    assert [entry["value"] for entry in found["words"]["forgotten"]] == [1.0] * 3
    assert found["words"]["forgotten"][0]["n"] == 20
    assert "relearning from 16 words: 5 unseen prompts of 'class 0'" in found["not_measured"]


def test_words_that_moved_along_do_not():
    seen = Prompt("seen", "template", True, word(-1))  # forgotten by it: no new word
    found = by_words([-2] * 15, (seen,))["words"]
    assert found["counts"] == [1, 2, 4, 8] and found["needed"] is None
    assert [entry["value"] for entry in found["forgotten"]] == [0.0] * 4
    assert [entry["value"] for entry in found["before"]] == [1.0] * 4
    # Five draws of one word, four of the five words lost: the mean is over draws.
    some = by_words([-1, -2, -2, -2, -2], seed=3)["words"]["forgotten"][0]["value"]
    assert 0 < some < 1 and some * REPEATS % 1 == 0


def test_a_removed_name_is_one_word_away():
    subject = case(world(), removed=("class 0",))
    prompts = [Prompt("word", "synonym", False, word(-1))]
    assert relearning.measure(replace(subject, prompts=prompts))["words"]["needed"] == 1
    # Texts alone: nothing can be measured, and that is the answer.
    found = relearning.measure(replace(case(world(classes=3, images=0)), prompts=prompts))
    assert found["words"]["forgotten"][0]["value"] is None and found["words"]["needed"] is None
    assert found["methods"]["cache"]["forgotten"][0]["n"] == 0


@pytest.mark.skipif(not REAL_CLIP.is_dir(), reason="needs the folder shared/real_clip")
def test_a_few_photographs_bring_a_class_back():
    bundle = load_bundle(REAL_CLIP, "ViT-B/32", "CaltechNature")
    column = bundle.classnames.index("dolphin")
    h, w = bundle.forget_hidden[[column]].double(), bundle.text_projection.double()
    names = bundle.forget_hidden
    mu = 5e-6 * float(names.square().sum(dim=1).mean())
    ridge, own = Ridge(names, mu, torch.full((26,), 1 / 26)), torch.arange(26) == column
    solution = solve_constrained(ridge, h, opposite_target(h @ w, 0.2) - h @ w, own)
    subject = case(bundle, "dolphin", LowRankEdit(solution.left, solution.right))
    assert not (subject.after.predicted[subject.own_images] == column).any()
    found = relearning.measure(subject)
    assert found["methods"]["probe"]["needed"] <= 2
    assert found["methods"]["refit"]["needed"] <= 2
    # The opposite text works against the cache: more images than a class without a text.
    forgotten, floor = (values(found, "cache", curve)[0] for curve in ("forgotten", "no_text"))
    assert forgotten <= floor <= values(found, "cache", "before")[0]
