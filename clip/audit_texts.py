"""Hidden states of other words for a set's classes, kept in its bundle for a later audit.

A bundle holds one text for each class to forget and one to evaluate. Whether a class is gone under
other words can be measured without the model only if their hidden states came along: as the tensor
`audit_hidden` (A, w) and the JSON lists `audit_texts`, `audit_classes` and `audit_kinds`, of A
entries each, in the metadata. A bundle without them is as good as any for everything else.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from clip.bundle import AUDIT_HIDDEN, AUDIT_LISTS, FeatureBundle
from clip.cache import FeatureCache
from clip.source import ClipSource
from datasets.words.paraphrases import Paraphrase, paraphrases
from datasets.words.wordnet import ABSENT, installed
from engine.log import logger, progress
from forgetting.errors import ProblemError

Row = tuple[str, str, Tensor]  # text, kind, hidden state (w,)


def other_words(bundle: FeatureBundle, name: str) -> list[Paraphrase]:
    """The paraphrases of a class of a bundle, under the bundle's own evaluation prompt."""
    template = bundle.template if bundle.template.count("{}") == 1 else None
    return paraphrases(name, bundle.dataset, template, bundle.classnames)


def with_audit(bundle: FeatureBundle, source: ClipSource, cache: str | Path) -> FeatureBundle:
    """The bundle with the hidden states of other words for each of its classes.

    A class's texts are one entry of the cache, so a killed run goes on where it was, and the model
    is loaded only for classes whose texts have changed.

    Raises:
        ProblemError: a bundle of another architecture or other weights than the source's.
    """
    for key, own in (("backbone", source.arch), ("weights", source.weights_sha256)):
        if getattr(bundle, key) != own:
            raise ProblemError(
                f"feature bundle of {bundle.dataset}: {key} is {getattr(bundle, key)!r}, but the "
                f"model's is {own!r}; other words must be read by the model that made the bundle"
            )
    package = installed()
    joined = f"WordNet ({package})" if package else f"no WordNet: {ABSENT}"
    logger.info(f"clip: {bundle.dataset}: other words from datasets/words, {joined}")
    words = {name: other_words(bundle, name) for name in bundle.classnames}
    stored = FeatureCache(source, cache)
    rows, entries = [], []
    title, total = f"clip: {bundle.dataset} in other words, text", sum(map(len, words.values()))
    with progress(desc=title, total=total, unit="texts") as bar:
        for name, found in words.items():
            rows.append(stored.texts([text for text, _ in found]))
            entries += [(text, name, kind) for text, kind in found]
            bar.update(len(found))
    lists = zip(AUDIT_LISTS, zip(*entries, strict=True), strict=True)
    return replace(
        bundle,
        extra=bundle.extra | {key: json.dumps(values, ensure_ascii=False) for key, values in lists},
        extra_tensors=bundle.extra_tensors | {AUDIT_HIDDEN: torch.cat(rows)},
    )


def audit_rows(bundle: FeatureBundle) -> dict[str, list[Row]]:
    """Class -> other words for it that the bundle brought along; empty if it brought none."""
    found: dict[str, list[Row]] = {}
    if AUDIT_HIDDEN in bundle.extra_tensors:
        texts, classes, kinds = (json.loads(bundle.extra[key]) for key in AUDIT_LISTS)
        states = bundle.extra_tensors[AUDIT_HIDDEN].float()
        for name, *row in zip(classes, texts, kinds, states, strict=True):
            found.setdefault(name, []).append(tuple(row))
    return found
