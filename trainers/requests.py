"""From class names to requests: the texts of a set's classes and their hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import cached_property

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from clip.bundle import FeatureBundle
from datasets import clean_name, key, same_meaning
from datasets.words.lexicon import listed_words
from engine.determinism import seeded
from engine.log import logger
from evaluation.results import join_label
from evaluation.zero_shot import class_embeddings
from forgetting.errors import ProblemError, unknown
from forgetting.io import read_bytes
from forgetting.problem import Paraphrases, Request
from forgetting.targets import check_target

BARE = "{}"
TEMPLATES = ("a photo of a {}.", "a {}", "the {}", "a picture of a {}.")  # none is an audit's
SAME_CLASS = ("template", "synonym", "plural")  # kinds of an audit's texts that mean the class
MISTYPED = 0.85  # similarity to a class from which an unknown name to protect is a likely typo
Encode = Callable[[list[str]], Tensor]  # n texts -> hidden states (n, w)


def read_target(kind: str, d: int | None = None) -> str | Tensor:
    """A target as the library takes it: of `vector:FILE` the tensor `target`, (d,) or (1, d), of a
    safetensors file; any other stays what it is. ProblemError if it is none."""
    name, _, path = kind.partition(":")
    if name != "vector":
        check_target(kind)
        return kind
    try:
        vector = load(read_bytes(path))["target"].float().flatten()
        check_target(vector, d=d)
    except (ProblemError, KeyError, SafetensorError) as error:
        raise ProblemError(
            f"target vector {path}: no safetensors file with a tensor 'target' ({error})"
        ) from error
    return vector


class Texts:
    """The texts of a set's classes, from its bundle and, where there is one, a model.

    Args:
        encode: encodes texts that no bundle holds; None without a model.
        prompts: class name -> texts, with {} for its name; without an entry the bare name.
        seed: of a run, from which each request gets its own.
    """

    def __init__(
        self,
        bundle: FeatureBundle,
        encode: Encode | None = None,
        prompts: Mapping[str, list[str]] | None = None,
        seed: int = 0,
    ) -> None:
        self.bundle, self.encode, self.seed = bundle, encode, seed
        self.prompts = prompts or {}
        self.label = {name: label for label, name in enumerate(bundle.classnames)}

    @cached_property
    def names(self) -> dict[str, Tensor]:
        """The hidden states (w,) of the bare names that the bundle holds, by their keys."""
        b = self.bundle
        rows = torch.cat([b.retain_hidden, b.forget_hidden])
        return dict(zip(map(key, [*b.retain_names, *b.classnames]), rows, strict=True))

    def hidden(self, texts: Sequence[str], what: str) -> Tensor:
        """Hidden states (n, w) of texts: encoded, or without a model those of the bundle's names.
        ProblemError if it lacks one; `what` says what it is."""
        if self.encode is not None:
            return self.encode(list(map(clean_name, texts)))
        for text in texts:
            if key(text) not in self.names:
                raise _no_model(what, text, self.names)
        return torch.stack([self.names[key(text)] for text in texts])

    def request(self, classes: list[str]) -> Request:
        """The texts by which `classes` are forgotten, and what means the same as each; ProblemError
        without a model for a text that the bundle does not hold."""
        bundle = self.bundle
        texts: dict[str, tuple[int, Tensor]] = {}  # text -> its class and hidden state
        for index, name in enumerate(classes):
            held = self._held(name)
            for template in self.prompts.get(name, [BARE]):
                text = template.replace(BARE, clean_name(name))
                if text not in held and self.encode is None:
                    raise _no_model(f"text of the bundle of {bundle.dataset}", text, held)
                if text not in texts:
                    texts[text] = index, held[text] if text in held else self.encode([text])[0]
        return Request(
            classes,
            list(texts),
            torch.stack([hidden for _, hidden in texts.values()]),
            [owner for owner, _ in texts.values()],
            same=[same_meaning([name], bundle.dataset) for name in classes],
            seed=seeded(self.seed, bundle.dataset, join_label(classes)).initial_seed(),
        )

    def _held(self, name: str) -> dict[str, Tensor]:
        """The hidden states (w,) of a class that the bundle holds: its bare name's and its
        evaluation prompt's."""
        label, plain = self.label[name], clean_name(name)
        return {
            plain: self.bundle.forget_hidden[label],
            self.bundle.template.replace(BARE, plain): self.bundle.class_hidden[label],
        }

    def with_paraphrases(self, requests: Sequence[Request]) -> list[Request]:
        """Requests with other texts for each of their classes; new ones are encoded at once.

        They are the evaluation prompt; with a model a few templates and the class's other names
        (names of the vocabulary that mean the same, and the synonyms that `datasets` lists);
        without one what the bundle brought for an audit. A text that the model takes for another
        class of the set is left out.
        """
        brought: dict[str, list] = {}
        if self.encode is None:
            from clip.audit_texts import audit_rows

            brought = audit_rows(self.bundle)
        known: dict[str, dict[str, Tensor]] = {}  # of each class: text -> hidden state
        new: dict[str, list[str]] = {}  # of each class: texts to encode
        for name in dict.fromkeys(name for request in requests for name in request.classes):
            _, prompt = self._held(name).items()
            rows = [row for row in brought.get(name, ()) if row[1] in SAME_CLASS]
            known[name] = dict([prompt]) | {text: hidden for text, _, hidden in rows}
            others = self._other_texts(name) if self.encode is not None else []
            new[name] = [text for text in others if text not in known[name]]
        every = [text for texts in new.values() for text in texts]
        encoded = iter(self.encode(every) if every else ())
        classes = class_embeddings(self.bundle)
        found = {}
        for name, rows in known.items():
            rows |= zip(new[name], encoded, strict=False)
            hidden = torch.stack(list(rows.values()))
            nearest = (self.bundle.embed(hidden) @ classes.T).argmax(dim=1)
            mine = nearest == self.label[name]
            texts = [text for text, own in zip(rows, mine.tolist(), strict=True) if own]
            found[name] = Paraphrases(texts, hidden[mine])
        return [replace(r, paraphrases=[found[name] for name in r.classes]) for r in requests]

    def _other_texts(self, name: str) -> list[str]:
        """A class in a few templates, and under other names."""
        plain, bundle = clean_name(name), self.bundle
        same = sorted(same_meaning([name], bundle.dataset) - set(map(key, bundle.classnames)))
        others = [other for other in bundle.classnames if other != name]
        same += listed_words(name, bundle.dataset, others).synonyms
        return [*dict.fromkeys([*(form.replace(BARE, plain) for form in TEMPLATES), *same])]

    def protected(
        self, names: Sequence[str], others: Mapping[str, FeatureBundle]
    ) -> tuple[list[str], Tensor]:
        """Texts of names to protect, and their hidden states (n, w): of a class the bare name and
        the evaluation prompt, of any other name that name."""
        classes: dict[str, list[Tensor]] = {}
        for bundle in (self.bundle, *others.values()):
            for label, name in enumerate(bundle.classnames):
                rows = bundle.forget_hidden[label], bundle.class_hidden[label]
                classes.setdefault(key(name), []).extend(rows)
        found: list[tuple[str, Tensor]] = []
        for name in names:
            rows = classes.get(key(name))
            if rows is None:
                rows = self.hidden([name], "name to protect (FORGET.PROTECT)")
                known = classes | self.names
                close = get_close_matches(key(name), known, 1, MISTYPED)
                if close and key(name) not in known:
                    logger.warning(f"protected as it is: {name!r}; did you mean {close[0]!r}?")
            found += [(clean_name(name), row) for row in rows]
        texts, rows = zip(*found, strict=True)
        return list(texts), torch.stack(rows)

    def target_text(self, kind: str | Tensor) -> Tensor | None:
        """Hidden state (1, w) of the TEXT of a target `text:TEXT`; None for other targets."""
        if not isinstance(kind, str) or not kind.startswith("text:"):
            return None
        return self.hidden([kind.partition(":")[2]], "target text")


def _no_model(what: str, text: str, known: Iterable[str]) -> ProblemError:
    return ProblemError(f"{unknown(what, text, known)}; --features has no model to encode it")
