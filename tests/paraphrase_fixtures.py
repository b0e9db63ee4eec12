"""A world in which it is known under which words a forgotten class comes back."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip.bundle import FeatureBundle
from forgetting.problem import LowRankEdit

CLASSES = ["newt", "owl", "hare", "elk"]
W = D = 16
OTHER_WAY = 12  # hidden direction that the projection sends to the first class too


def hide_wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is installed on this machine must not decide."""
    for name in ("nltk", "nltk.corpus", "wn"):
        monkeypatch.setitem(sys.modules, name, None)


def unit(*places: int, size: int = W) -> Tensor:
    """Sum of basis vectors."""
    vector = torch.zeros(size)
    vector[list(places)] = 1.0
    return vector


def projection() -> Tensor:
    """The identity, but for one more hidden direction that means the first class."""
    matrix = torch.eye(W, D)
    matrix[OTHER_WAY] = unit(0)
    return matrix


def world(images: int = 10, rows: list[tuple[str, str, str, Tensor]] = ()) -> FeatureBundle:
    """Four classes whose images lie around basis vectors 0 to 3.

    Args:
        rows: class, kind, text and hidden state of other words that the bundle brings along.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(len(CLASSES)).repeat_interleave(images)
    noise = 0.05 * torch.randn(len(labels), D, generator=generator)
    hidden = torch.stack([unit(i) for i in range(len(CLASSES))])
    bundle = FeatureBundle(
        image_features=normalize(torch.eye(len(CLASSES), D)[labels] + noise, dim=1),
        labels=labels,
        class_hidden=hidden + 0.1 * unit(8),
        forget_hidden=hidden,
        retain_hidden=torch.stack([unit(9), unit(0, 10), unit(11)]),
        neutral_hidden=unit(15)[None],
        text_projection=projection(),
        backbone="mini",
        weights="planted",
        dataset="Planted",
        split="test",
        template="a photo of a {}.",
        classnames=CLASSES,
        retain_names=["toad", "Newt", "hare"],
    )
    return with_rows(bundle, rows) if rows else bundle


def with_rows(bundle: FeatureBundle, rows: list[tuple[str, str, str, Tensor]]) -> FeatureBundle:
    classes, kinds, texts, hidden = zip(*rows, strict=True)
    lists = {"audit_classes": classes, "audit_kinds": kinds, "audit_texts": texts}
    return replace(
        bundle,
        extra=bundle.extra | {key: json.dumps(values) for key, values in lists.items()},
        extra_tensors=bundle.extra_tensors | {"audit_hidden": torch.stack(hidden)},
    )


def forget_first() -> LowRankEdit:
    """A change of the projection that sends hidden direction 0 to a little of its opposite."""
    return LowRankEdit(unit(0)[:, None], -1.2 * unit(0, size=D)[None])
