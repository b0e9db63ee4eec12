"""Classes that surely come back from an image or a word, and classes that surely cannot."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip.bundle import FeatureBundle, load_bundle
from evaluation.audit import relearning, shots
from evaluation.audit.case import Case, Common, Model, Prompt
from evaluation.audit.interval import accuracy
from evaluation.audit.shots import REPEATS, SHOTS, Start, shots_of
from evaluation.zero_shot import Factors
from forgetting import Ridge, opposite_target, solve_constrained
from tests.audit_fixtures import EDGES, LENGTH, WIDTH, case, edge, gone, move, only, world
from tests.conftest import REPOSITORY

REAL_CLIP = REPOSITORY.parent / "shared" / "real_clip"
METHODS = ("cache", "probe", "refit")
CURVES = ("forgotten", "before", "no_text", "control")
NOTHING = {"value": None, "low": None, "high": None, "n": 0}


def values(found: dict, method: str, curve: str) -> list[float | None]:
    return [entry["value"] for entry in found["methods"][method][curve]]


def sent_aside(bundle: FeatureBundle) -> Case:
    """The class's text goes where no image and no other text is; nothing else moves."""
    spare = LENGTH * bundle.text_projection[-1]
    return case(bundle, factors=move(bundle, {"class 0": spare}))


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
    copied = torch.arange(11, 132, 11)  # the first image of each other class
    images[:11] = images[copied]
    return replace(bundle, image_features=images, class_hidden=hidden, forget_hidden=hidden)


def spoken(bundle: FeatureBundle, hidden: list[Tensor], kind: str = "synonym") -> list[Prompt]:
    return [Prompt(f"word {i}", kind, False, row) for i, row in enumerate(hidden)]


# --- images


def test_one_image_of_a_tight_cluster_brings_the_class_back():
    found = relearning.measure(sent_aside(world()))
    for method in METHODS:
        assert found["methods"][method]["needed"] == 1
        for curve in CURVES:
            assert values(found, method, curve) == [1.0] * 5, (method, curve)
    assert found["methods"]["cache"]["forgotten"][0]["n"] == 20  # of 5 draws, each image once
    assert found["shots"] == [1, 2, 4, 8, 16]


def test_a_text_turned_round_holds_the_cache_back_by_one_image():
    """100 cos is -100 for the class, an image of the cluster is worth 100 exp(-5.5 0.03) = 87."""
    found = relearning.measure(gone())
    assert values(found, "cache", "forgotten")[:2] == [0.0, 1.0]
    assert values(found, "cache", "no_text")[0] == values(found, "cache", "before")[0] == 1.0
    needed = {method: found["methods"][method]["needed"] for method in METHODS}
    assert needed == {"cache": 2, "probe": 1, "refit": 1}


def test_images_that_are_those_of_others_bring_nothing_back():
    bundle = scattered()
    assert (Model(Common(bundle)).predicted[:11] == 0).all()  # it was known before
    asked = case(bundle, factors=move(bundle, {"class 0": -bundle.text_projection[-1]}))
    found = relearning.measure(asked)
    for method in METHODS:
        assert found["methods"][method]["needed"] is None
        assert values(found, method, "forgotten") == [0.0, 0.0, 0.0, 0.0, None]
    # Negative control: the class that one of the copies was made from comes back from two.
    assert values(found, "probe", "control")[1] > 0.9


def test_nothing_changed_is_as_before():
    found = relearning.measure(case(world(noise=0.3)))
    for method in METHODS:
        curves = found["methods"][method]
        assert curves["forgotten"] == curves["before"]
    assert values(found, "cache", "before") != [1.0] * 5  # negative control: not all is 1 here


def test_the_probe_reads_no_text():
    found = relearning.measure(gone(world(noise=0.3)))["methods"]["probe"]
    assert found["forgotten"] == found["before"] == found["no_text"]
    assert found["forgotten"][0]["value"] < found["forgotten"][-1]["value"]


def test_no_method_calls_everything_by_the_class():
    """What is taught from few images must leave the images of other classes theirs."""
    asked = sent_aside(world())
    start = Start(asked.after, 0)
    others = (asked.bundle.labels != 0).nonzero()[:, 0]
    for draw in range(REPEATS):
        for method in (shots.cache, shots.probe):
            assert (method(start, draw, 1, others) == asked.bundle.labels[others]).all()
        seen = shots.refit(start, draw, 1, others)
        assert (seen == asked.bundle.labels[others]).all()


def test_images_and_texts_lie_apart_in_clip():
    """With a direction that all images share, and another that all texts do, the mean of a class's
    images as its text would take in every image; the difference from the others' does not."""
    bundle = world()
    pull = 2 * bundle.text_projection[-1]
    bundle = replace(bundle, image_features=normalize(bundle.image_features + pull, dim=1))
    asked = sent_aside_from(bundle)
    everything = torch.arange(len(bundle.labels))
    mean = normalize(bundle.image_features[bundle.labels == 0].mean(dim=0), dim=0)
    texts = asked.after.classes.clone()
    texts[0] = mean
    assert ((bundle.image_features @ texts.T).argmax(dim=1) == 0).all()  # what it would do
    seen = shots.refit(Start(asked.after, 0), 0, 4, everything)
    assert (seen == bundle.labels).all()


def sent_aside_from(bundle: FeatureBundle) -> Case:
    return case(bundle, factors=move(bundle, {"class 0": LENGTH * bundle.text_projection[-2]}))


def test_the_attacker_has_k_images_of_every_class_and_is_judged_on_others():
    bundle = only(world(), torch.arange(240) % 20 < 12)
    drawn = shots_of(Common(bundle))
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
    near = {1: 0.9, 2: 0.8, 3: 0.6}
    bundle = world(similar=near)
    assert relearning.measure(gone(bundle))["control_class"] == "class 1"
    few = only(bundle, (bundle.labels != 1) | (torch.arange(240) < 25))
    assert relearning.measure(gone(few))["control_class"] == "class 2"
    both = case(bundle, factors=None, forgotten=["class 0", "class 1"])
    assert relearning.measure(both)["control_class"] == "class 2"
    # Nobody has as many: the one with most.
    number = torch.arange(240) % 20
    most = only(bundle, (bundle.labels == 0) | (number < 3) | ((bundle.labels == 7) & (number < 9)))
    assert relearning.measure(gone(most))["control_class"] == "class 7"


def test_a_class_without_a_text_is_given_none(monkeypatch):
    """Nothing is solved for it: its column is where the images point."""
    asked = case(world())
    everything = torch.arange(len(asked.bundle.labels))
    monkeypatch.setattr(Start, "pulls", property(lambda _: pytest.fail("a text was moved")))
    seen = shots.refit(Start(asked.before, 0, named=False), 0, 1, everything)
    assert (seen == asked.bundle.labels).all()


def test_a_class_whose_name_is_deleted_starts_as_one_that_was_never_known():
    bundle = world(noise=0.3)
    found = relearning.measure(case(bundle, removed=("class 0",)))["methods"]
    assert found["cache"]["forgotten"] == found["cache"]["no_text"]
    assert found["refit"]["forgotten"] == found["refit"]["before"]  # a text can be given again


def test_other_deleted_names_stay_deleted():
    bundle = world(similar={1: 0.9}, noise=0.3)
    both = ["class 0", "class 1"]
    with_rival = relearning.measure(case(bundle, forgotten=both))["methods"]
    without = relearning.measure(case(bundle, forgotten=both, removed=tuple(both)))["methods"]
    assert without["refit"]["forgotten"][0]["value"] > with_rival["refit"]["forgotten"][0]["value"]
    assert without["refit"]["before"] == with_rival["refit"]["before"]


def test_too_few_images_are_said():
    bundle = only(world(), torch.arange(240) % 20 < 6)
    found = relearning.measure(gone(bundle))
    assert values(found, "probe", "forgotten") == [1.0, 1.0, 1.0, None, None]
    assert found["methods"]["probe"]["forgotten"][3] == NOTHING
    assert "relearning from 8 or more images: 'class 0' has 6" in found["not_measured"]
    assert not any("images" in line for line in relearning.measure(gone())["not_measured"])


def test_what_was_never_known_cannot_come_back():
    bundle = world()
    hidden = bundle.class_hidden.clone()
    hidden[0] = -hidden[0]
    found = relearning.measure(case(replace(bundle, class_hidden=hidden)))
    assert found["methods"]["probe"]["needed"] is None
    assert values(found, "probe", "forgotten") == [1.0] * 5
    assert any("never recognised" in line for line in found["not_measured"])


def test_needed_is_the_least_that_reaches_half():
    curve = [{"value": value} for value in (0.1, 0.44, 0.45, 0.2, None)]
    assert relearning._needed(SHOTS, curve, 0.9) == 4
    assert relearning._needed(SHOTS, curve, 0.92) is None
    assert relearning._needed(SHOTS, curve, 0.0) is relearning._needed(SHOTS, curve, None) is None


def test_an_image_asked_five_times_is_one_image():
    tested = [torch.arange(10)] * 5
    correct = [torch.arange(10) < right for right in (3, 4, 5, 4, 4)]
    found = relearning._pooled(tested, correct)
    alone = accuracy(torch.arange(10) < 4)
    assert found == alone | {"value": 0.4}
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


def forgotten_by_one_text(bundle: FeatureBundle) -> Factors:
    """The class's text is turned round, but not a text that leans to the last axis."""
    text, last = bundle.class_hidden[0], torch.eye(WIDTH)[-1]
    left = (text / LENGTH - last * 0.8 / 0.6) / LENGTH  # 1 at the text, 0 at `safe`
    return left[:, None], -2 * (text @ bundle.text_projection)[None]


def word(bundle: FeatureBundle, axis: int) -> Tensor:
    return LENGTH * (0.8 * torch.eye(WIDTH)[0] + 0.6 * torch.eye(WIDTH)[axis])


def test_words_that_did_not_move_bring_the_class_back():
    bundle = world()
    asked = case(bundle, factors=forgotten_by_one_text(bundle))
    assert not (asked.after.predicted[asked.mine] == 0).any()
    prompts = spoken(bundle, [word(bundle, WIDTH - 1)] * 5)
    found = relearning.measure(replace(asked, prompts=prompts))
    assert found["words"]["counts"] == [1, 2, 4] and found["words"]["needed"] == 1
    assert [entry["value"] for entry in found["words"]["forgotten"]] == [1.0] * 3
    assert found["words"]["forgotten"][0]["n"] == 20
    assert "relearning from 16 words: 5 unseen prompts of 'class 0'" in found["not_measured"]


def test_words_that_moved_along_do_not():
    bundle = world()
    asked = case(bundle, factors=forgotten_by_one_text(bundle))
    safe = Prompt("seen", "template", True, word(bundle, WIDTH - 1))  # forgotten by it: no new word
    prompts = [*spoken(bundle, [word(bundle, WIDTH - 2)] * 15), safe]
    found = relearning.measure(replace(asked, prompts=prompts))
    assert found["words"]["counts"] == [1, 2, 4, 8] and found["words"]["needed"] is None
    assert [entry["value"] for entry in found["words"]["forgotten"]] == [0.0] * 4
    assert [entry["value"] for entry in found["words"]["before"]] == [1.0] * 4


def test_one_word_in_five_helps_on_average():
    """Five draws of one word, four of the five words lost: the mean is over draws."""
    bundle = world()
    asked = case(bundle, factors=forgotten_by_one_text(bundle), seed=3)
    rows = [word(bundle, WIDTH - 1), *[word(bundle, WIDTH - 2)] * 4]
    found = relearning.measure(replace(asked, prompts=spoken(bundle, rows)))
    assert 0 < found["words"]["forgotten"][0]["value"] < 1
    assert found["words"]["forgotten"][0]["value"] * REPEATS % 1 == 0


def test_a_deleted_name_is_one_word_away():
    bundle = world()
    asked = case(bundle, removed=("class 0",))
    prompts = spoken(bundle, [word(bundle, WIDTH - 1)])
    assert relearning.measure(replace(asked, prompts=prompts))["words"]["needed"] == 1


# --- edges and real features


@pytest.mark.parametrize("name", EDGES)
def test_edges(name):
    found = relearning.measure(edge(name))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found) == {"shots", "methods", "control_class", "words", "not_measured"}
    assert tuple(found["methods"]) == METHODS
    for curves in found["methods"].values():
        assert set(curves) == {*CURVES, "needed"}
        assert all(len(curves[curve]) == 5 for curve in CURVES)
        for entry in (entry for curve in CURVES for entry in curves[curve]):
            assert entry == NOTHING or entry["low"] <= entry["value"] <= entry["high"]
    assert set(found["words"]) == {"counts", "forgotten", "before", "needed"}
    unmeasured = found["methods"]["probe"]["forgotten"][-1]["value"] is None
    assert not unmeasured or found["not_measured"]


@pytest.mark.skipif(not REAL_CLIP.is_dir(), reason="needs the folder shared/real_clip")
def test_a_few_photographs_bring_a_class_back():
    bundle = load_bundle(REAL_CLIP, "ViT-B/32", "CaltechNature")
    column = bundle.classnames.index("dolphin")
    h = bundle.forget_hidden[column : column + 1].double()
    w = bundle.text_projection.double()
    gram = bundle.forget_hidden.double().T @ bundle.forget_hidden.double() / 26
    solution = solve_constrained(
        Ridge(gram, 5e-6 * float(gram.trace())),
        h,
        opposite_target(h, w, 0.2) - h @ w,
        h,
        torch.tensor([1 / 26], dtype=torch.float64),
    )
    asked = case(bundle, "dolphin", (solution.left.float(), solution.right.float()))
    assert not (asked.after.predicted[asked.mine] == column).any()
    found = relearning.measure(asked)
    assert found["methods"]["probe"]["needed"] <= 2
    assert found["methods"]["refit"]["needed"] <= 2
    # The text, turned round, works against the cache: more images than a class without a text.
    forgotten, floor = (values(found, "cache", curve)[0] for curve in ("forgotten", "no_text"))
    assert forgotten <= floor <= values(found, "cache", "before")[0]


def test_a_bundle_without_images_is_said_and_no_error():
    """Texts alone, with words to try: nothing can be measured, and that is what the answer says."""
    planted = case(world(classes=3, images=0))
    words = [Prompt("pooch", "synonym", False, planted.bundle.forget_hidden[0])]
    found = relearning.measure(replace(planted, prompts=words))
    assert found["words"]["forgotten"][0]["value"] is None and found["words"]["needed"] is None
    assert found["methods"]["cache"]["forgotten"][0]["n"] == 0
