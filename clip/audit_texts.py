"""Hidden states of other words for a set's classes, kept in its bundle for a later audit.

Whether a class is forgotten under other words can be measured without the model only if their
hidden states came along: as the tensor `audit_hidden` (A, w) and the JSON lists `audit_texts`,
`audit_classes` and `audit_kinds`, of A entries each, in the metadata.
"""

import json
from dataclasses import replace

import torch
from torch import Tensor

from clip.bundle import AUDIT_HIDDEN, AUDIT_LISTS, FeatureBundle
from clip.cache import FeatureCache
from clip.source import ClipSource
from datasets.words.paraphrases import Paraphrase, paraphrases
from engine.log import progress

Row = tuple[str, str, Tensor]  # text, kind, hidden state (w,)


def other_words(bundle: FeatureBundle, name: str) -> list[Paraphrase]:
    """The paraphrases of a class of a bundle, under the bundle's own evaluation prompt."""
    template = bundle.template if bundle.template.count("{}") == 1 else None
    return paraphrases(name, bundle.dataset, template, bundle.classnames)


def with_audit(bundle: FeatureBundle, source: ClipSource) -> FeatureBundle:
    """A bundle that the source made with the hidden states of other words for each of its classes.

    A class's texts are one entry of the cache, so a killed run goes on where it was, and the model
    is loaded only for classes whose texts have changed.
    """
    words = {name: other_words(bundle, name) for name in bundle.classnames}
    stored, rows, entries = FeatureCache(source), [], []
    for name, found in progress(words.items(), f"clip: {bundle.dataset} in other words"):
        rows.append(stored.texts([text for text, _ in found]))
        entries += [(text, name, kind) for text, kind in found]
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
