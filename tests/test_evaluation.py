"""Accuracies before and after edits: counted by hand, and against embedding every text again."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from clip.bundle import FeatureBundle
from evaluation.zero_shot import Evaluator, ZeroShot, embedded_texts
from forgetting.errors import ProblemError
from forgetting.problem import LowRankEdit
from tests.conftest import accuracies, toy_bundle, whole_set

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
    with pytest.raises(ProblemError, match="none is left"):
        zero_shot.predict([nothing], [BUNDLE.classnames])
