"""The pictures of an audit: which ones are shown, and the names that they are given."""

from __future__ import annotations

from dataclasses import replace

import torch

from engine.schema import MEASURES as SHAPES
from engine.schema import fault
from evaluation.audit import examples
from evaluation.audit.case import Case, Model
from tests.audit_fixtures import case, gone, move, only, opposite, text, world


def test_pictures_of_the_class_are_spaced_and_named_as_the_model_predicts():
    it = gone(world(images=20, lean={0: [3, 5]}))
    found = examples.measure(it)
    assert fault(SHAPES["examples"], found) is None
    mine = found["classes"][0]
    assert (mine["name"], mine["before"]["value"], mine["after"]["value"]) == ("class 0", 1.0, 0.0)
    assert [one["row"] for one in mine["pictures"]] == [0, 5, 10, 15]
    for one in mine["pictures"]:
        for side, model in (("before", it.before), ("after", it.after)):
            names = it.bundle.classnames
            order = sorted(range(len(names)), key=lambda c, m=model, r=one["row"]: -m.scores[r, c])
            assert one[side] == [names[column] for column in order[:5]]
        assert one["before"][0] == "class 0" and one["after"][0] in ("class 3", "class 5")


def test_those_that_lost_most_are_shown_by_what_they_lost():
    bundle = world(noise=0.05)
    away = {f"class {c}": share * -text(bundle, f"class {c}") for c, share in ((0, 1), (3, 1))}
    half = text(bundle, "class 5") + 1.1 * text(bundle, "class 6")  # some of its images go there
    it = case(bundle, factors=move(bundle, away | {"class 6": half, "class 5": half}))
    lost = {
        name: it.before.accuracy(c)["value"] - it.after.accuracy(c)["value"]
        for c, name in enumerate(bundle.classnames)
        if name != "class 0"
    }
    most = sorted((name for name in lost if lost[name] > 0), key=lambda name: -lost[name])
    assert most  # else nothing is tested
    harmed = examples.measure(it)["classes"][1:]
    assert [one["name"] for one in harmed] == most[:2]
    for one in harmed:
        assert 0 < len(one["pictures"]) <= 2
        for picture in one["pictures"]:
            assert bundle.classnames[bundle.labels[picture["row"]]] == one["name"]
            assert picture["before"][0] == one["name"] != picture["after"][0]


def test_nobody_else_is_shown_where_nobody_lost():
    assert len(examples.measure(case(world()))["classes"]) == 1  # nothing changed
    bundle = world()
    factors = opposite(bundle, "class 0", "class 1")
    both = Model(gone(bundle).common, factors)
    together = Case("class 0", ["class 0", "class 1"], both)
    names = [one["name"] for one in examples.measure(together)["classes"]]
    assert "class 1" not in names  # it was forgotten, not harmed


def test_a_name_off_the_list_and_a_class_without_images():
    bundle = world(classes=4)
    it = case(bundle)
    it = replace(it, after=replace(it.after, removed=("class 0",)))
    for one in examples.measure(it)["classes"][0]["pictures"]:
        assert len(one["before"]) == 4 and len(one["after"]) == 3 and "class 0" not in one["after"]
    bare = case(only(bundle, bundle.labels != 0))
    found = examples.measure(bare)
    assert found["classes"][0]["pictures"] == [] and found["not_measured"]
    assert torch.equal(bare.bundle.labels.unique(), torch.tensor([1, 2, 3]))
