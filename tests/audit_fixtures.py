"""Worlds with a planted answer: it is known beforehand what an audit of them must find."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip.bundle import FeatureBundle
from evaluation.audit.case import AuditData, Case, Model, Prompt
from evaluation.audit.record import MEASURES
from forgetting.problem import LowRankEdit

WIDTH = 64  # w = d: every text has a direction of its own, and some are left over
LENGTH = 10.0  # of a hidden state, as in CLIP


def world(
    classes: int = 12,
    images: int = 20,
    words: int = 24,
    similar: dict[int, float] | None = None,
    lean: dict[int, list[int]] | None = None,
    copies: dict[int, int] | None = None,
    noise: float = 0.02,
    dataset: str = "Planted",
    seed: int = 0,
) -> FeatureBundle:
    """Classes `class 0`, `class 1`... whose texts are at right angles and whose images lie close
    around the text: zero-shot, a probe and a search all find every image.

    Args:
        images: of each class; words: names of the vocabulary, at right angles to all classes.
        similar: class -> cosine that its text has with that of class 0.
        lean: class -> other classes; its images lean towards these in turn, so that they go
            there once the class is gone.
        copies: class -> class whose images it has: nothing can tell the two apart.
        noise: standard deviation a dimension, beside images of norm 1.
        seed: of the images and the projection.
    """
    generator = torch.Generator().manual_seed(seed)
    projection = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    texts = torch.eye(WIDTH)[: classes + words].clone()
    for column, cosine in (similar or {}).items():
        texts[column] = cosine * texts[0] + (1 - cosine**2) ** 0.5 * texts[column]
    embedded = texts[:classes] @ projection  # (C, w) @ (w, d)
    labels = torch.arange(classes).repeat_interleave(images)
    centres = embedded[labels]
    for column, others in (lean or {}).items():
        turn = torch.tensor(others).repeat(images)[:images]
        centres[labels == column] += 0.5 * embedded[turn]
    x = normalize(centres + noise * torch.randn(len(labels), WIDTH, generator=generator), dim=1)
    for column, other in (copies or {}).items():
        x[labels == column] = x[labels == other]
    return FeatureBundle(
        image_features=x,
        labels=labels,
        class_hidden=LENGTH * texts[:classes],
        forget_hidden=LENGTH * texts[:classes],
        retain_hidden=LENGTH * texts[classes:],
        neutral_hidden=torch.ones(1, WIDTH),
        text_projection=projection,
        backbone="planted",
        weights="planted",
        dataset=dataset,
        split="test",
        template="{}",
        classnames=[f"class {number}" for number in range(classes)],
        retain_names=[f"word {number}" for number in range(words)],
    )


def move(bundle: FeatureBundle, targets: dict[str, Tensor]) -> LowRankEdit:
    """The change that sends the named texts, classes or words, exactly to their targets (d,) and
    leaves every other text of the bundle exactly where it is."""
    names = [*bundle.classnames, *bundle.retain_names]
    hidden = torch.cat([bundle.class_hidden, bundle.retain_hidden]).double()  # (m, w)
    rows = [names.index(name) for name in targets]
    moved = torch.stack(list(targets.values())).double()
    displacement = moved - hidden[rows] @ bundle.text_projection.double()
    left = torch.linalg.pinv(hidden)[:, rows]  # hidden @ left is 1 at the text itself, 0 elsewhere
    return LowRankEdit(left.float(), displacement.float())


def text(bundle: FeatureBundle, name: str) -> Tensor:
    """Where a class or word of the bundle lies in the untouched model, (d,)."""
    names = [*bundle.classnames, *bundle.retain_names]
    hidden = torch.cat([bundle.class_hidden, bundle.retain_hidden])
    return hidden[names.index(name)] @ bundle.text_projection


def opposite(bundle: FeatureBundle, *names: str) -> LowRankEdit:
    """The change that turns these texts round: no image is near them any more."""
    return move(bundle, {name: -text(bundle, name) for name in names})


def case(
    bundle: FeatureBundle,
    name: str = "class 0",
    edit: LowRankEdit | None = None,
    forgotten: list[str] | None = None,
    removed: tuple[str, ...] = (),
    others: dict[str, FeatureBundle] | None = None,
    seed: int = 0,
) -> Case:
    """A case of the class `name`; the untouched model on both sides unless there is an `edit`."""
    data = AuditData(bundle, others, seed)
    columns = tuple(map(bundle.classnames.index, removed))
    hidden = bundle.forget_hidden[bundle.classnames.index(name)]
    after = Model(data, edit or data.before.edit, columns)
    return Case(name, forgotten or [name], after, [Prompt(name, "bare", True, hidden)])


def gone(bundle: FeatureBundle | None = None, name: str = "class 0", **options) -> Case:
    """A case whose class surely is gone and where nothing else moves."""
    bundle = bundle or world()
    return case(bundle, name, opposite(bundle, name), **options)


def only(bundle: FeatureBundle, keep: Tensor) -> FeatureBundle:
    """The bundle with the images of a (N,) mask alone."""
    return replace(bundle, image_features=bundle.image_features[keep], labels=bundle.labels[keep])


def hidden_mark(images: int = 60) -> FeatureBundle:
    """Three classes; images of class 0 lie at the text of class 1 with a mark along the text of
    class 0, those of class 1 with a mark of the same size where no text points.

    So the logit of class 0, and no other, tells these two apart.
    """
    bundle = world(classes=3, images=images, words=4, noise=0.0)
    generator = torch.Generator().manual_seed(1)
    directions = bundle.text_projection[[0, -1]]  # text of class 0; no text: the last hidden axis
    x = bundle.text_projection[1] + 0.05 * torch.randn(3 * images, WIDTH, generator=generator)
    for label, direction in enumerate(directions):
        x[bundle.labels == label] += 0.5 * direction
    x[bundle.labels == 2] = bundle.text_projection[2]
    return replace(bundle, image_features=normalize(x, dim=1))


def edge(name: str) -> Case:
    """One of the cases at the edge of what can be measured, see `EDGES`."""
    near = {column: 0.5 - 0.04 * column for column in range(1, 12)}
    bundle = world(images=6, similar=near, noise=0.001)
    labels, number = bundle.labels, torch.arange(len(bundle.labels))
    small, pair = world(classes=4, words=3), world(classes=2, words=0)
    some = ["class 0", "class 3", "class 4"]
    turned = opposite(bundle, *some)
    cases = {
        "no image of the class": lambda: gone(only(bundle, labels != 0)),
        "one image of the class": lambda: gone(only(bundle, (labels != 0) | (number == 2))),
        "no image at all": lambda: gone(only(bundle, number < 0)),
        "images of the class alone": lambda: gone(only(bundle, labels == 0)),
        "two classes": lambda: gone(pair),
        "a set of one class": lambda: gone(world(classes=1, words=0)),
        "the whole set": lambda: case(
            small, edit=opposite(small, *small.classnames), forgotten=small.classnames
        ),
        "several, removed": lambda: case(bundle, "class 3", turned, some, tuple(some)),
    }
    return cases[name]()


# Which measures report that they could not measure something (words and attacks aside).
EDGES = {
    "no image of the class": {"residue", "relearning"},
    "one image of the class": {"destinations", "residue", "relearning"},
    "no image at all": {"neighbours", "residue", "retrieval", "relearning"},
    "images of the class alone": {*MEASURES} - {"examples", "paraphrase", "undo"},
    "two classes": {"retrieval"},
    "a set of one class": {"neighbours", "residue", "retrieval", "relearning"},
    "the whole set": {"neighbours", "retrieval"},
    "several, removed": {"retrieval", "relearning"},
}


def hide_wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is installed on this machine must not decide."""
    for name in ("nltk", "nltk.corpus", "wn"):
        monkeypatch.setitem(sys.modules, name, None)
