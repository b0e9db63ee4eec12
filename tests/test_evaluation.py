"""Accuracies before and after edits: counted by hand, and against embedding every text again; and
the rows and rules by which report, audit and driver call a class gone."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from clip.bundle import FeatureBundle
from evaluation.audit.verdict import verdict
from evaluation.rows import Change, Row, rows_of
from evaluation.rules import Fate
from evaluation.zero_shot import Evaluator, ZeroShot, embedded_texts
from forgetting.problem import LowRankEdit
from tests.conftest import accuracies, refuses, toy_bundle, whole_set
from tests.report_fixtures import acc, audit_of
from trainers.base import outcomes

BUNDLE = toy_bundle("ToyAnimals")


@pytest.fixture
def bundle() -> FeatureBundle:
    """Classes a, b, c along the axes; the images' nearest axes are 0 0 1 | 1 1 | 2 0 2 2."""
    nearest = torch.tensor([0, 0, 1, 1, 1, 2, 0, 2, 2])
    return replace(
        toy_bundle("ToyTools"),
        image_features=torch.eye(3)[nearest],
        labels=torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2]),
        class_hidden=torch.tensor([[3.0, 0, 0], [0, 1, 0], [0, 0, 7]]),
        forget_hidden=torch.eye(3),
        text_projection=torch.eye(3),
        classnames=["a", "b", "c"],
    )


def test_accuracies_are_those_counted_by_hand(bundle):
    assert whole_set(bundle) == pytest.approx(7 / 9)
    assert accuracies(bundle, ["a"]) == {
        "a": {"cls_acc_test": pytest.approx(2 / 3), "no_cls_acc": 5 / 6, "acc_train": None}
    }
    both = accuracies(bundle, ["a", "c"])  # the rest is class b alone
    assert both["c"]["cls_acc_test"] == 3 / 4
    assert both["a"]["no_cls_acc"] == both["c"]["no_cls_acc"] == 1.0
    # An edit sends a's text to minus itself: its images go elsewhere, b and c stay.
    edit = LowRankEdit(torch.tensor([[1.0], [0], [0]]), torch.tensor([[-2.0, 0, 0]]))
    after = accuracies(bundle, ["a"], edit)["a"]
    assert after["cls_acc_test"] == 0 and after["no_cls_acc"] == 5 / 6
    assert whole_set(bundle, edit) == pytest.approx(5 / 9)
    evaluator = Evaluator(BUNDLE, {"x": bundle})
    assert evaluator.before(["owl"])["x"] == {"all": {"all_ds": pytest.approx(7 / 9)}}


def test_nothing_to_measure_is_none_and_not_zero(bundle):
    empty = replace(bundle, image_features=bundle.image_features[:0], labels=bundle.labels[:0])
    assert whole_set(empty) is None and accuracies(empty, ["a"])["a"]["cls_acc_test"] is None
    only_a = replace(bundle, image_features=bundle.image_features[:3], labels=bundle.labels[:3])
    assert accuracies(only_a, ["a"])["a"]["no_cls_acc"] is None


def random_edits(seed: int, ranks: list[int], scale: float) -> list[LowRankEdit]:
    generator = torch.Generator().manual_seed(seed)
    w, d = BUNDLE.text_projection.shape
    pairs = [(torch.randn(w, r, generator=generator), torch.randn(r, d, generator=generator))
             for r in ranks]  # fmt: skip
    return [LowRankEdit(scale * left, right) for left, right in pairs]


@given(
    seed=st.integers(0, 10**6),
    ranks=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    scale=st.sampled_from([1e-3, 0.05, 1.0, 1e3]),
)
def test_edits_together_are_what_embedding_every_text_again_gives(seed, ranks, scale):
    """Predictions, lengths and cosines of texts; the negative control leaves the edits out."""
    edits = random_edits(seed, ranks, scale)
    hidden, w = BUNDLE.class_hidden.double(), BUNDLE.text_projection.double()
    texts, zero_shot = embedded_texts(BUNDLE, BUNDLE.class_hidden), ZeroShot(BUNDLE)
    predicted = zero_shot.predict(edits)
    before = texts.embeddings @ texts.embeddings.T
    for edit, edited, classes in zip(edits, texts.edited(edits), predicted, strict=True):
        embeddings = hidden @ (w + edit.left.double() @ edit.right.double())
        unit = normalize(embeddings, dim=1)
        torch.testing.assert_close(edited.embeddings(), embeddings)
        torch.testing.assert_close(edited.lengths, embeddings.norm(dim=1))
        rows = torch.tensor([4, 1])
        expected = (unit @ unit.T)[rows]
        torch.testing.assert_close(edited.cosines(before[rows], rows), expected, atol=1e-9, rtol=0)
        own = (unit * normalize(texts.embeddings, dim=1)).sum(dim=1)
        torch.testing.assert_close(edited.cosines_with_before, own)
        scores = BUNDLE.image_features.double() @ unit.T
        assert torch.equal(classes, scores.argmax(dim=1))
        if scale == 1e3 and edit.left.shape[1]:
            assert not torch.allclose(edited.lengths, texts.lengths, rtol=0.1)
            assert not torch.equal(classes, BUNDLE.labels)


def test_a_removed_name_is_chosen_no_more_and_nothing_else_changes():
    nothing = LowRankEdit(torch.zeros(24, 0), torch.zeros(0, 16))
    zero_shot = ZeroShot(BUNDLE)
    before, after = zero_shot.predict([nothing, nothing], [[], ["owl", "cat"]])
    assert torch.equal(before == BUNDLE.labels, zero_shot.correct_before)
    assert set(after.tolist()) == {1, 2, 3, 5}
    others = ~torch.isin(before, torch.tensor([0, 4]))
    assert torch.equal(before[others], after[others])
    # Far from every text a removed name is no better than the others.
    opposite = ZeroShot(replace(BUNDLE, image_features=-BUNDLE.image_features))
    before, after = opposite.predict([nothing, nothing], [[], ["owl"]])
    assert 4 in before and 4 not in after
    rest = accuracies(BUNDLE, ["owl", "newt"], nothing, ["owl"])
    assert rest["owl"]["cls_acc_test"] == 0.0 and rest["newt"]["cls_acc_test"] > 0.9
    refuses("none is left", zero_shot.predict, [nothing], [BUNDLE.classnames])


@pytest.mark.parametrize(
    ("before", "after", "fate"),
    [
        (0.0, 0.0, Fate.NEVER),
        (0.0, 0.2, Fate.NEVER),
        (0.8, 0.0, Fate.GONE),
        (0.8, 0.375, Fate.GONE),
        (0.8, 0.4, Fate.STAYS),  # exactly half
        (0.8, 0.8, Fate.STAYS),
        (None, None, Fate.UNMEASURED),
    ],
)
def test_row_screen_and_verdict_agree_on_what_became_of_a_class(before, after, fate):
    row = Row("A", "cat", "cat", 1, Change(before, after), Change(0.9, 0.9), {})
    assert row.fate is fate and row.comes_back == (fate is Fate.STAYS)
    sides = [{"a_cat": {"cls_acc_test": x, "no_cls_acc": 0.9}} for x in (before, after)]
    said = "; ".join(outcomes(*sides))
    assert said.startswith("a cat: ") and ("not forgotten" in said) == (fate is Fate.STAYS)
    assert ("not recognised before" in said) == (fate is Fate.NEVER)
    if before is not None:
        lines = " ".join(verdict(audit_of("cat", acc(before), acc(after))))
        assert ("was not forgotten" in lines) == (fate is Fate.STAYS)
        assert ("never recognised" in lines) == (fate is Fate.NEVER)


def test_several_classes_under_one_name_are_rows_of_their_own():
    """As the paper's public code may have them: what differs by class, what they share once."""
    own = {"a|b": {"cls_acc_test": {"a": 0.1, "b": 0.3}, "no_cls_acc": 0.5, "acc_train": None}}
    results = {"A": own, "B": {"all": {"all_ds": 0.85}}}
    rows = rows_of({"A": {"a|b": {"final_results": results}}})
    assert [(row.name, row.own, row.together) for row in rows] == [
        *(("a", (None, 0.1), 2), ("b", (None, 0.3), 2))
    ]
    assert all(row.rest == (None, 0.5) for row in rows)
    assert all(row.others == {"B": (None, 0.85)} and row.harm is None for row in rows)
    own = {"a|b": {"cls_acc_test": 0.1, "no_cls_acc": 0.5}}  # a class name may hold the separator
    (row,) = rows_of({"A": {"a|b": {"final_results": {"A": own}}}})
    assert (row.name, row.together) == ("a|b", 1)


def test_others_are_compared_where_they_were_measured_before_and_after():
    others = {"B": Change(0.5, 0.4), "C": Change(None, 0.9)}
    row = Row("A", "cat", "cat", 1, Change(0.9, 0.0), Change(0.8, 0.7), others)
    assert row.others_mean == (0.5, 0.4) and row.harm == pytest.approx(20)
