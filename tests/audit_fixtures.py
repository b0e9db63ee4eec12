"""Sets with a planted answer: it is known beforehand what an audit of them must find."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip.bundle import FeatureBundle
from clip.retain import exact_context
from evaluation.audit.case import AuditData, Case, Model, Prompt
from forgetting.context import ExactSettings
from forgetting.problem import LowRankEdit
from forgetting.solvers.constrained import solve_constrained
from tests.solver_fixtures import REAL_CLIP

needs_real_clip = pytest.mark.skipif(not REAL_CLIP.is_dir(), reason="needs shared/real_clip")
WIDTH = 64  # w = d: every text has a direction of its own, and some are left over
LENGTH = 10.0  # of a hidden state, as in CLIP


def planted(
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
        lean: class -> other classes, where its images go once the class is gone.
        copies: class -> class whose images it has: nothing can tell the two apart.
        noise: standard deviation a dimension, beside images of norm 1.
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


def texts_of(bundle: FeatureBundle) -> dict[str, Tensor]:
    """Class or word of the bundle -> its hidden state (w,)."""
    names = [*bundle.classnames, *bundle.retain_names]
    return dict(zip(names, [*bundle.class_hidden, *bundle.retain_hidden], strict=True))


def move(bundle: FeatureBundle, targets: dict[str, Tensor]) -> LowRankEdit:
    """The change that sends the named texts, classes or words, exactly to their targets (d,) and
    leaves every other text of the bundle exactly where it is."""
    hidden = texts_of(bundle)
    rows = [list(hidden).index(name) for name in targets]
    # `h @ left` is 1 at the text itself, 0 elsewhere.
    left = torch.linalg.pinv(torch.stack([*hidden.values()]).double())[:, rows]
    right = [target - text(bundle, name) for name, target in targets.items()]
    return LowRankEdit(left.float(), torch.stack(right))


def text(bundle: FeatureBundle, name: str) -> Tensor:
    """Where a class or word of the bundle lies in the untouched model, (d,)."""
    return texts_of(bundle)[name] @ bundle.text_projection


def opposite(bundle: FeatureBundle, *names: str) -> LowRankEdit:
    """The change that turns these texts round: no image is near them any more."""
    return move(bundle, {name: -text(bundle, name) for name in names})


def exact(bundle: FeatureBundle, *columns: int, beta: float = 0.2) -> LowRankEdit:
    """The constrained form at its defaults."""
    context = exact_context(ExactSettings(), bundle)
    retain, h = context.retain, bundle.forget_hidden.double()[[*columns]]
    e = context.inputs.embed(h)
    classes = [bundle.classnames[column] for column in columns]
    excluded = torch.tensor([name in classes for name in retain.names])
    return solve_constrained(context.ridge, h, -(1 + beta) * e, excluded)


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
    data = AuditData(bundle, others or {}, seed)
    columns = tuple(map(bundle.classnames.index, removed))
    hidden = bundle.forget_hidden[bundle.classnames.index(name)]
    after = Model(data, edit or data.before.edit, columns)
    return Case(name, forgotten or [name], after, [Prompt(name, "bare", True, hidden)])


def gone(bundle: FeatureBundle | None = None, name: str = "class 0", **options) -> Case:
    """A case whose class surely is gone and where nothing else moves."""
    bundle = bundle or planted()
    return case(bundle, name, opposite(bundle, name), **options)


def only(bundle: FeatureBundle, keep: Tensor) -> FeatureBundle:
    """The bundle with the images of a (N,) mask alone."""
    return replace(bundle, image_features=bundle.image_features[keep], labels=bundle.labels[keep])


def edges() -> dict[str, tuple[Case, set[str]]]:
    """Cases at the edge of what can be measured, and the measures that must say so (words and
    attacks aside)."""
    near = {column: 0.5 - 0.04 * column for column in range(1, 12)}
    bundle, small = planted(images=6, similar=near, noise=0.001), planted(classes=4, words=3)
    labels, number = bundle.labels, torch.arange(len(bundle.labels))
    whole = case(small, edit=opposite(small, *small.classnames), forgotten=small.classnames)
    some = ["class 0", "class 3", "class 4"]
    several = case(bundle, "class 3", opposite(bundle, *some), some, tuple(some))
    alone = {"neighbours", "residue", "retrieval", "relearning"}
    return {
        "no image of the class": (gone(only(bundle, labels != 0)), {"residue", "relearning"}),
        "one image of the class": (
            gone(only(bundle, (labels != 0) | (number == 2))),
            {"destinations", "residue", "relearning"},
        ),
        "no image at all": (gone(only(bundle, number < 0)), alone),
        "images of the class alone": (gone(only(bundle, labels == 0)), alone | {"destinations"}),
        "two classes": (gone(planted(classes=2, words=0)), {"retrieval"}),
        "a set of one class": (gone(planted(classes=1, words=0)), alone),
        "the whole set": (whole, {"neighbours", "retrieval"}),
        "several, removed": (several, {"retrieval", "relearning"}),
    }


EDGES = {name: gaps for name, (_, gaps) in edges().items()}


def edge(name: str) -> Case:
    return edges()[name][0]
