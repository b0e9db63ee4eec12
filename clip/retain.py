"""What is retained beside a set's classes, from bundles: names and hidden states, in groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

import datasets
from clip.bundle import FeatureBundle
from forgetting import Group, RetainSet

GROUPS = ("own", "vocabulary", "others")


def retain_set(
    bundle: FeatureBundle,
    others: Sequence[FeatureBundle],
    weights: Mapping[str, float | None],
    similarity: float,
    device: torch.device | str = "cpu",
) -> RetainSet:
    """The retained names of a set: its own classes, its vocabulary, the other sets' classes.

    Args:
        weights: of those of `GROUPS` that are retained; None: every name weighs 1.
        similarity: cosine of hidden states beyond which a name leaves with a forgotten text.
    """
    plain = datasets.plain
    foreign = torch.cat([bundle.forget_hidden[:0], *(other.forget_hidden for other in others)])
    groups = {
        "own": ([plain(name) for name in bundle.classnames], bundle.forget_hidden),
        "vocabulary": (bundle.retain_names, bundle.retain_hidden),
        "others": ([plain(name) for other in others for name in other.classnames], foreign),
    }
    chosen = {
        group: Group(names, rows, weights[group], alike=group != "own")
        for group, (names, rows) in groups.items()
        if group in weights
    }
    return RetainSet(chosen, similarity, device)
