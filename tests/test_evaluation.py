"""The three accuracies, counted by hand on a bundle whose predictions are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clip.bundle import FeatureBundle
from evaluation.zero_shot import ZeroShot, class_embeddings, evaluate_classes
from tests.conftest import whole_set


@pytest.fixture
def bundle() -> FeatureBundle:
    """Classes a, b, c along the axes; the images' nearest axes are 0 0 1 | 1 1 | 2 0 2 2."""
    nearest = torch.tensor([0, 0, 1, 1, 1, 2, 0, 2, 2])
    return FeatureBundle(
        image_features=torch.eye(3)[nearest],
        labels=torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2]),
        class_hidden=torch.tensor([[3.0, 0, 0], [0, 1, 0], [0, 0, 7]]),
        forget_hidden=torch.eye(3),
        retain_hidden=torch.eye(3),
        neutral_hidden=torch.ones(1, 3),
        text_projection=torch.eye(3),
        backbone="x",
        weights="x",
        dataset="x",
        split="test",
        template="{}",
        classnames=["a", "b", "c"],
        retain_names=["a", "b", "c"],
    )


def test_before(bundle):
    assert ZeroShot(bundle).predict().tolist() == [0, 0, 1, 1, 1, 2, 0, 2, 2]
    assert whole_set(bundle) == pytest.approx(7 / 9)
    assert evaluate_classes(bundle, ["a"]) == {
        "a": {"cls_acc_test": pytest.approx(2 / 3), "no_cls_acc": 5 / 6, "acc_train": None}
    }


def test_several_classes_leave_the_rest_together(bundle):
    both = evaluate_classes(bundle, ["a", "c"])
    assert both["a"]["cls_acc_test"] == pytest.approx(2 / 3)
    assert both["c"]["cls_acc_test"] == 3 / 4
    assert both["a"]["no_cls_acc"] == both["c"]["no_cls_acc"] == 1.0  # class b alone


def test_after(bundle):
    """The change sends a's text to minus itself: its images go elsewhere, b and c stay."""
    change = (torch.tensor([[1.0], [0], [0]]), torch.tensor([[-2.0, 0, 0]]))
    assert class_embeddings(bundle, change)[0].tolist() == [-1, 0, 0]
    after = evaluate_classes(bundle, ["a"], change)["a"]
    assert after["cls_acc_test"] == 0 and after["no_cls_acc"] == 5 / 6
    assert whole_set(bundle, change) == pytest.approx(5 / 9)


def test_nothing_to_measure_is_none_and_not_zero(bundle):
    empty = replace(bundle, image_features=bundle.image_features[:0], labels=bundle.labels[:0])
    assert whole_set(empty) is None
    assert evaluate_classes(empty, ["a"])["a"]["cls_acc_test"] is None
    only_a = replace(bundle, image_features=bundle.image_features[:3], labels=bundle.labels[:3])
    assert evaluate_classes(only_a, ["a"])["a"]["no_cls_acc"] is None
