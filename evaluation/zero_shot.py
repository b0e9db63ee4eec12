"""Zero-shot classification of a bundle's images, before and after the projection changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip.bundle import FeatureBundle
from engine.errors import UserError, unknown

Factors = tuple[Tensor, Tensor]  # left (w, r), right (r, d) of Delta = left @ right


def class_embeddings(bundle: FeatureBundle, factors: Factors | None = None) -> Tensor:
    """Unit-norm text embeddings (C, d) of the evaluation prompts.

    Args:
        bundle: hidden states (C, w) and projection (w, d).
        factors: the change of the projection; None for the untouched model.
    """
    embeddings = bundle.class_hidden @ bundle.text_projection  # (C, w) @ (w, d) -> (C, d)
    if factors is not None:
        left, right = factors
        embeddings = embeddings + (bundle.class_hidden @ left) @ right  # (C, r) @ (r, d)
    return normalize(embeddings, dim=-1)


def predict(
    bundle: FeatureBundle, factors: Factors | None = None, removed: Sequence[str] = ()
) -> Tensor:
    """The class of highest cosine similarity for every image, (N,) int64, in float32.

    Args:
        removed: class names that are on the list no longer: no image is given one of them.

    Raises:
        UserError: a removed name is no class, or none is left.
    """
    similarity = bundle.image_features @ class_embeddings(bundle, factors).T  # (N, C)
    for name in removed:
        if name not in bundle.classnames:
            raise unknown(
                f"class to remove from the list of {bundle.dataset}", name, bundle.classnames
            )
        similarity[:, bundle.classnames.index(name)] = -torch.inf
    if set(bundle.classnames) <= set(removed):
        raise UserError(f"every class of {bundle.dataset} is removed: none is left to choose")
    return similarity.argmax(dim=1)


def evaluate_classes(
    bundle: FeatureBundle,
    classes: list[str],
    factors: Factors | None = None,
    removed: Sequence[str] = (),
) -> dict[str, dict[str, float | None]]:
    """The paper's two accuracies on the set that classes are forgotten from.

    Args:
        removed: as for `predict`; the images of these classes stay, and count as not recognised.

    Returns:
        For each name in `classes`: `cls_acc_test`, the accuracy over its own images, and
        `no_cls_acc`, the accuracy over the images of all classes not in `classes`; both between 0
        and 1, None where there is no such image. `acc_train` is None, kept for the format.
    """
    predicted = predict(bundle, factors, removed)
    labels = {name: bundle.classnames.index(name) for name in classes}
    others = ~torch.isin(bundle.labels, torch.tensor(list(labels.values()), dtype=torch.int64))
    rest = _accuracy(bundle.labels, predicted, others)
    return {
        name: {
            "cls_acc_test": _accuracy(bundle.labels, predicted, bundle.labels == label),
            "no_cls_acc": rest,
            "acc_train": None,
        }
        for name, label in labels.items()
    }


def evaluate_set(
    bundle: FeatureBundle, factors: Factors | None = None, removed: Sequence[str] = ()
) -> float | None:
    """The accuracy over all images of a set (the paper's `all_ds`), None without images; `removed`
    as for `predict`."""
    everything = torch.ones(len(bundle.labels), dtype=torch.bool)
    return _accuracy(bundle.labels, predict(bundle, factors, removed), everything)


def _accuracy(labels: Tensor, predicted: Tensor, chosen: Tensor) -> float | None:
    if not chosen.any():
        return None
    return float((labels[chosen] == predicted[chosen]).double().mean())
