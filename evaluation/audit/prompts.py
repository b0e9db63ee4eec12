"""All texts that stand for a class in an audit."""

from collections.abc import Collection

import torch

import datasets
from clip.audit_texts import Row, audit_rows, other_words
from datasets.names import clean_name, key
from datasets.words.lexicon import words_of
from evaluation.audit.case import AuditData, Prompt

SAME = 1e-4  # relative distance below which two hidden states are of one text: batches round apart


def prompts_for(data: AuditData, name: str, seen_texts: Collection[str]) -> list[Prompt]:
    """Prompts for a class, each text once: its bare name, the evaluation prompt, names of the
    retain vocabulary that mean the same, then other words: the bundle's, or else the model's.
    `seen_texts`: by which the class was forgotten; empty for its bare name.

    A prompt counts as seen if its text was forgotten, or if the model encodes it as such a text
    (CLIP's tokenizer knows no capitals): what is moved itself says nothing about other words.
    """
    bundle, bare = data.bundle, clean_name(name)
    label = bundle.classnames.index(name)
    rows: list[Row] = [
        (bare, "bare", bundle.forget_hidden[label]),
        (bundle.template.replace("{}", bare), "evaluation", bundle.class_hidden[label]),
    ]
    same = datasets.same_meaning([name], bundle.dataset)
    same |= {key(word) for word in words_of(name, bundle.dataset).synonyms}
    rows += [
        (bundle.retain_names[row], "retained", bundle.retain_hidden[row])
        for row, word in enumerate(data.once(_vocabulary))
        if word in same
    ]
    others = data.once(_rows).get(name, [])
    if not others and data.encode:
        words = other_words(bundle, name)
        hidden = data.encode([word.text for word in words])
        others = [(word.text, word.kind, row) for word, row in zip(words, hidden, strict=True)]
    unique: dict[str, Row] = {}
    for row in rows + others:
        text, kind, _ = row
        unique.setdefault(text if kind == "case" else text.casefold(), row)
    seen_texts = set(seen_texts) or {bare}
    moved = [hidden for text, _, hidden in unique.values() if text in seen_texts]
    prompts = []
    for text, kind, hidden in unique.values():
        equal = any(torch.dist(hidden, other) <= SAME * other.norm() for other in moved)
        prompts.append(Prompt(text, kind, text in seen_texts or equal, hidden))
    return prompts


def _vocabulary(data: AuditData) -> list[str]:
    return list(map(key, data.bundle.retain_names))


def _rows(data: AuditData) -> dict[str, list[Row]]:
    return audit_rows(data.bundle)
