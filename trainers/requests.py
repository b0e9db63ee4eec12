"""From class names to requests: the texts of a set's classes and their hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

import datasets
from clip.audit_texts import audit_rows
from clip.bundle import FeatureBundle
from datasets.words.lexicon import listed_words
from engine.determinism import seeded
from engine.files import read_json
from engine.log import logger
from engine.schema import check
from evaluation.results import join_label
from evaluation.zero_shot import class_embeddings
from forgetting.errors import ProblemError, nearest, unknown
from forgetting.io import read_bytes
from forgetting.problem import Paraphrases, Request
from forgetting.targets import TARGETS, WITH_BETA, check_beta
from trainers.plan import PROMPTS, user_lists

BARE = "{}"
TEMPLATES = ("a photo of a {}.", "a {}", "the {}", "a picture of a {}.")  # none is an audit's
SAME_CLASS = ("template", "synonym", "plural")  # kinds of an audit's texts that mean the class
OPTIONS = (*TARGETS, "text:TEXT", "vector:FILE")
MISTYPED = 0.85  # similarity to a class from which an unknown name to protect is a likely typo
Encode = Callable[[list[str]], Tensor]  # n texts -> hidden states (n, w)


def read_prompts(cfg) -> dict[str, list[str]]:
    """The texts by which each class is forgotten: `FORGET.PROMPTS` (a JSON file), else those of
    `forget_prompts` in forget_cls.py; a class without an entry is forgotten by its bare name.

    Raises:
        ProblemError: not a dictionary from class names to lists of texts.
    """
    path = cfg.FORGET.PROMPTS
    if not path:
        return getattr(user_lists(), "forget_prompts", {}).get(cfg.DATASET.NAME, {})
    table = read_json(path, "file of prompts")
    check(table, PROMPTS, f"file of prompts {path}")
    return table


def check_prompts(prompts: dict[str, list[str]], bundle: FeatureBundle) -> None:
    """ProblemError if a key names no class of the set, or two name the same, or a text is empty."""
    seen: dict[str, str] = {}
    for key, texts in prompts.items():
        name = datasets.match(key, bundle.classnames, f"{bundle.dataset} (prompts)")
        if name in seen:
            raise ProblemError(
                f"prompts: {seen[name]!r} and {key!r} name one class of {bundle.dataset}"
            )
        if not all(text.strip() for text in texts):
            raise ProblemError(f"prompts: a text of {key!r} is empty")
        seen[name] = key


def check_target(kind: str, beta: float) -> None:
    """ProblemError if `kind` is no target (FORGET.TARGET), or `beta` no number for it."""
    name, _, value = kind.partition(":")
    if name == "vector":
        if not Path(value).is_file():
            raise ProblemError(f"target vector {value}: no such file (FORGET.TARGET vector:FILE)")
    elif kind not in TARGETS and not (name == "text" and value.strip()):
        raise unknown("target (FORGET.TARGET)", kind, OPTIONS)
    if kind in WITH_BETA:
        check_beta(kind, beta)


def read_target(kind: str, d: int) -> str | Tensor:
    """A target as the library takes it: `vector:FILE` is read, the tensor `target`, (d,) or (1, d),
    of a safetensors file; any other stays what it is."""
    name, _, path = kind.partition(":")
    if name != "vector":
        return kind
    try:
        vector = load(read_bytes(path))["target"].float().flatten()
    except (ProblemError, KeyError, SafetensorError) as error:
        raise ProblemError(
            f"target vector {path}: no safetensors file with a tensor 'target' ({error})"
        ) from error
    if len(vector) != d or not torch.isfinite(vector).all():
        raise ProblemError(f"target vector {path}: {len(vector)} numbers, expected {d} finite ones")
    return vector


class Texts:
    """The texts of a set's classes, from its bundle and, where there is one, a model.

    Args:
        bundle: of the set that classes are forgotten from.
        encode: encodes texts that no bundle holds; None without a model.
        prompts: class name -> texts, with {} for its name; a class without an entry is forgotten by
            its bare name.
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
        self.prompts = {datasets.key(name): texts for name, texts in (prompts or {}).items()}
        self.label = {name: label for label, name in enumerate(bundle.classnames)}
        self._paraphrases: dict[str, Paraphrases] = {}

    def request(self, classes: list[str]) -> Request:
        """The texts by which `classes` are forgotten, and what means the same as each.

        Raises:
            ProblemError: without a model, a text whose hidden state the bundle does not hold.
        """
        bundle = self.bundle
        texts: dict[str, tuple[int, Tensor]] = {}  # text -> its class and hidden state
        for index, name in enumerate(classes):
            held = self._held(name)
            for template in self.prompts.get(datasets.key(name), [BARE]):
                text = template.replace(BARE, datasets.clean_name(name))
                if text in texts:
                    continue
                if text not in held and self.encode is None:
                    raise ProblemError(
                        f"no hidden state of {text!r} in the bundle of {bundle.dataset}, and no "
                        f"model to make one: with --features a class is forgotten by "
                        f"{' or '.join(map(repr, held))}"
                    )
                texts[text] = index, held[text] if text in held else self.encode([text])[0]
        return Request(
            classes,
            list(texts),
            torch.stack([hidden for _, hidden in texts.values()]),
            [owner for owner, _ in texts.values()],
            same=[datasets.same_meaning([name], bundle.dataset) for name in classes],
            seed=seeded(self.seed, bundle.dataset, join_label(classes)).initial_seed(),
        )

    def _held(self, name: str) -> dict[str, Tensor]:
        """The hidden states (w,) of a class that the bundle holds, by their texts."""
        label, plain = self.label[name], datasets.clean_name(name)
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
        names = [name for request in requests for name in request.classes]
        self._encode_paraphrases([n for n in dict.fromkeys(names) if n not in self._paraphrases])
        return [
            replace(request, paraphrases=[self._paraphrases[name] for name in request.classes])
            for request in requests
        ]

    def _encode_paraphrases(self, names: Sequence[str]) -> None:
        bundle = self.bundle
        brought = audit_rows(bundle) if self.encode is None else {}
        held, new = [], []  # of each class: text -> hidden state; texts to encode
        for name in names:
            _, prompt = self._held(name).items()
            rows = [row for row in brought.get(name, ()) if row[1] in SAME_CLASS]
            held.append(dict([prompt]) | {text: hidden for text, _, hidden in rows})
            others = [] if self.encode is None else self._other_texts(name)
            new.append([text for text in others if text not in held[-1]])
        every = [text for some in new for text in some]
        rows = iter(self.encode(every) if every else ())
        for name, known, some in zip(names, held, new, strict=True):
            known |= zip(some, islice(rows, len(some)), strict=True)
            hidden = torch.stack(list(known.values()))
            classes = (bundle.embed(hidden) @ self._classes.T).argmax(dim=1)
            mine = (classes == self.label[name]).nonzero()[:, 0]
            texts = list(known)
            self._paraphrases[name] = Paraphrases([texts[i] for i in mine.tolist()], hidden[mine])

    @cached_property
    def _classes(self) -> Tensor:
        return class_embeddings(self.bundle)

    def _other_texts(self, name: str) -> list[str]:
        """A class in a few templates, and under other names."""
        plain, bundle = datasets.clean_name(name), self.bundle
        own = {datasets.key(other) for other in bundle.classnames}
        same = sorted(datasets.same_meaning([name], bundle.dataset) - own)
        others = [other for other in bundle.classnames if other != name]
        same += listed_words(name, bundle.dataset, others).synonyms
        return [*dict.fromkeys([*(form.replace(BARE, plain) for form in TEMPLATES), *same])]

    def protected(
        self, names: Sequence[str], others: Mapping[str, FeatureBundle]
    ) -> tuple[list[str], Tensor]:
        """Texts of names to protect, and their hidden states (n, w): of a class the bare name and
        the evaluation prompt, of any other name that name.

        Raises:
            ProblemError: without a model, a name that no bundle holds.
        """
        bundles = [self.bundle, *others.values()]
        classes = [name for bundle in bundles for name in bundle.classnames]
        known = [*classes, *self.bundle.retain_names]
        found: list[tuple[str, Tensor]] = []
        for name in names:
            plain, key = datasets.clean_name(name), datasets.key(name)
            rows = [
                row
                for bundle in bundles
                for label, classname in enumerate(bundle.classnames)
                if datasets.key(classname) == key
                for row in (bundle.forget_hidden[label], bundle.class_hidden[label])
            ]
            words = list(map(datasets.key, self.bundle.retain_names))
            if not rows and key in words:
                rows = [self.bundle.retain_hidden[words.index(key)]]
            if not rows and self.encode is None:
                raise unknown("name to protect (FORGET.PROTECT)", name, known)
            if not rows and (close := mistyped(name, known)):
                logger.warning(f"protected as it is written: {name!r}; did you mean {close!r}?")
            found += [(plain, row) for row in rows or [self.encode([plain])[0]]]
        texts, rows = zip(*found, strict=True)
        return list(texts), torch.stack(rows)

    def target_text(self, kind: str | Tensor) -> Tensor | None:
        """Hidden state (1, w) of the TEXT of a target `text:TEXT`; None for other targets."""
        if not isinstance(kind, str) or not kind.startswith("text:"):
            return None
        text, bundle = kind.partition(":")[2], self.bundle
        for names, rows in (
            (bundle.classnames, bundle.forget_hidden),
            (bundle.retain_names, bundle.retain_hidden),
        ):
            if text in names:
                return rows[names.index(text)][None]
        if self.encode is None:
            raise ProblemError(
                f"target text {text!r} is no class and no retained name of the bundle of "
                f"{bundle.dataset}, and --features has no model to encode it"
            )
        return self.encode([text])


def mistyped(name: str, known: Sequence[str]) -> str | None:
    """The one of `known` that a name is probably mistyped for: all but a letter or two of it."""
    wanted = datasets.key(name)
    for other in nearest(name, known, 1):
        if SequenceMatcher(None, wanted, datasets.key(other)).ratio() >= MISTYPED:
            return other
    return None
