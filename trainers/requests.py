"""From class names to tensors: what is forgotten, what stays, and where the texts are sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

import datasets
from clip.audit_texts import audit_rows
from clip.bundle import FeatureBundle
from datasets.words.lexicon import listed_words
from engine.files import read_json, readable
from engine.schema import Prompts, fault
from evaluation.zero_shot import class_embeddings
from forgetting import TARGETS, RetainSet, empty_target, opposite_target, orthogonal_target
from forgetting.errors import ProblemError, unknown
from forgetting.problem import Batch, Paraphrases, Request
from forgetting.targets import check_beta
from trainers.plan import user_lists

BARE = "{}"
TEMPLATES = ("a photo of a {}.", "a {}", "the {}", "a picture of a {}.")  # none is an audit's
SAME_CLASS = ("template", "synonym", "plural")  # kinds of an audit's texts that mean the class
OPTIONS = (*TARGETS, "text:TEXT", "vector:FILE")
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
    if found := fault(Prompts, table):
        where = " / ".join(map(str, found.path))
        raise ProblemError(
            f"{path} must map class names to lists of texts, such as {{'cat': ['{{}}']}}; "
            f"{where or 'all of it'} must be {found.wanted}"
        )
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
    if kind not in TARGETS and not (name in ("text", "vector") and value):
        raise unknown("target (FORGET.TARGET)", kind, OPTIONS)
    if name == "vector" and not Path(value).is_file():
        raise ProblemError(f"target vector {value}: no such file (FORGET.TARGET vector:FILE)")
    try:
        check_beta(kind, beta)
    except ProblemError as error:
        raise ProblemError(f"FORGET.BETA: {error}") from error


class Texts:
    """What a class is forgotten by and sent to, from a bundle and, where there is one, a model.

    Args:
        bundle: of the set that is forgotten from; encode: reads texts that it does not hold; None
            without a model.
        prompts: class name -> texts, with {} for its name; a class without an entry is forgotten by
            its bare name.
    """

    def __init__(
        self,
        bundle: FeatureBundle,
        encode: Encode | None = None,
        prompts: Mapping[str, list[str]] | None = None,
    ) -> None:
        self.bundle, self.encode = bundle, encode
        self.prompts = {datasets.key(name): texts for name, texts in (prompts or {}).items()}
        self.label = {name: label for label, name in enumerate(bundle.classnames)}
        self._known: dict[str, Paraphrases] = {}

    def request(self, classes: list[str]) -> Request:
        """The texts of `classes` and their hidden states.

        Raises:
            ProblemError: without a model, a text whose hidden state the bundle does not hold.
        """
        bundle, texts, owner, rows = self.bundle, [], [], []
        for index, name in enumerate(classes):
            plain, label = datasets.clean_name(name), self.label[name]
            held = {
                plain: bundle.forget_hidden[label],
                bundle.template.replace(BARE, plain): bundle.class_hidden[label],
            }
            for text in self.prompts.get(datasets.key(name), [BARE]):
                text = text.replace(BARE, plain)
                if text in texts:
                    continue
                if text not in held and self.encode is None:
                    raise ProblemError(
                        f"no hidden state of {text!r} in the bundle of {bundle.dataset}, and no "
                        f"model to make one: with --features a class is forgotten by "
                        f"{' or '.join(map(repr, held))}"
                    )
                rows.append(held[text] if text in held else self.encode([text])[0])
                texts.append(text)
                owner.append(index)
        return Request(classes, texts, torch.stack(rows), owner)

    def wordings(self, names: Sequence[str]) -> dict[str, Paraphrases]:
        """Other wordings of classes, of each text once: the evaluation prompt; with a model, a few
        templates and the class's aliases (names of the vocabulary that mean the same, and the
        synonyms that `datasets` lists); without one, what the bundle brought for an audit. A text
        that the model reads as another class of the set, or as nothing, is none. Each class is read
        once."""
        bundle, found = self.bundle, {}
        brought = audit_rows(bundle) if self.encode is None else {}
        for name in names:
            if name in self._known:
                continue
            plain, label = datasets.clean_name(name), self.label[name]
            texts = {bundle.template.replace(BARE, plain): bundle.class_hidden[label]}
            kinds = [row for row in brought.get(name, ()) if row[1] in SAME_CLASS]
            texts |= {text: hidden for text, _, hidden in kinds}
            more = [] if self.encode is None else self._aliases(name)
            found[name] = texts, [text for text in more if text not in texts]
        more = [text for _, texts in found.values() for text in texts]
        rows = iter(self.encode(more) if more else ())
        read = [
            torch.stack([*held.values(), *islice(rows, len(new))]) for held, new in found.values()
        ]
        embedded = bundle.embed(torch.cat([*read, bundle.class_hidden[:0]]))
        means = (embedded @ self._classes.T).argmax(dim=1).split(list(map(len, read)))
        for (name, (held, new)), hidden, mean in zip(found.items(), read, means, strict=True):
            texts, known = [*held, *new], (mean == self.label[name]).nonzero()[:, 0]
            self._known[name] = Paraphrases([texts[i] for i in known.tolist()], hidden[known])
        return {name: self._known[name] for name in names}

    def _aliases(self, name: str) -> list[str]:
        """A class in a few templates, and under other names."""
        plain, bundle = datasets.clean_name(name), self.bundle
        own = {datasets.key(other) for other in bundle.classnames}
        same = sorted(datasets.same_meaning([name], bundle.dataset) - own)
        others = [other for other in bundle.classnames if other != name]
        same += listed_words(name, bundle.dataset, others).synonyms
        return [*dict.fromkeys([*(form.replace(BARE, plain) for form in TEMPLATES), *same])]

    def held(
        self, names: Sequence[str], others: Mapping[str, FeatureBundle]
    ) -> tuple[list[str], Tensor]:
        """Texts of names, and their hidden states (n, w): of a class the bare name and the
        evaluation prompt, of any other name that name.

        Raises:
            ProblemError: without a model, a name that no bundle holds.
        """
        found: list[tuple[str, Tensor]] = []
        for name in names:
            plain, known = datasets.clean_name(name), len(found)
            for bundle in (self.bundle, *others.values()):
                for label, classname in enumerate(bundle.classnames):
                    if datasets.key(classname) == datasets.key(name):
                        rows = bundle.forget_hidden[label], bundle.class_hidden[label]
                        found += [(plain, row) for row in rows]
            if len(found) > known:
                continue
            bundle, words = self.bundle, list(map(datasets.key, self.bundle.retain_names))
            if datasets.key(name) in words:
                found.append((plain, bundle.retain_hidden[words.index(datasets.key(name))]))
            elif self.encode is not None:
                found.append((plain, self.encode([plain])[0]))
            else:
                classes = [name for each in (bundle, *others.values()) for name in each.classnames]
                raise unknown(
                    "name to protect (FORGET.PROTECT)", name, [*classes, *bundle.retain_names]
                )
        texts, rows = zip(*found, strict=True)
        return list(texts), torch.stack(rows)

    def leaving(self, retain: RetainSet, requests: Batch) -> Tensor:
        """Which retained names leave with each class, (C, n) bool."""
        same = [datasets.same_meaning([name], self.bundle.dataset) for name in requests.classes]
        return retain.leaving(same, requests.hidden, requests.owner)

    def targets(
        self,
        kind: str,
        beta: float,
        noise_std: float,
        requests: Batch,
        generators: Sequence[torch.Generator],
    ) -> tuple[Tensor, list[int]]:
        """`P` (K, d) of all texts, and how often noise was drawn for each request (0 but for
        `empty`). For `specific`, which needs a retain set, see `SpecificTargets`.

        Raises:
            ProblemError: a text or file that cannot be had.
        """
        embed, d = self.bundle.embed, self.bundle.text_projection.shape[1]
        name, _, value = kind.partition(":")
        count, none = len(requests.hidden), [0] * len(requests)
        if kind == "empty":
            prompts = embed(self.bundle.neutral_hidden), torch.eye(d), self._classes
            found = []
            for request, generator in zip(requests, generators, strict=True):
                labels = [self.label[request.classes[index]] for index in request.owner]
                found.append(empty_target(*prompts, labels, generator, noise_std))
            return torch.cat([target for target, _ in found]), [draws for _, draws in found]
        if kind == "opposite":
            eye = torch.eye(d, dtype=torch.float64)
            return opposite_target(embed(requests.hidden.double()), eye, beta), none
        if kind == "orthogonal":
            return orthogonal_target(embed(self._names), count), none
        if name == "text":
            return normalize(embed(self._hidden_of(value)), dim=-1).expand(count, -1), none
        return _vector(Path(value), d).expand(count, -1), none

    @cached_property
    def _classes(self) -> Tensor:
        return class_embeddings(self.bundle)

    @cached_property
    def _names(self) -> Tensor:
        """Hidden states (n, w) of all that the bundle names."""
        bundle = self.bundle
        return torch.cat([bundle.class_hidden, bundle.forget_hidden, bundle.retain_hidden])

    def _hidden_of(self, text: str) -> Tensor:
        """Hidden state (1, w) of a text: a name that the bundle holds, else encoded."""
        bundle = self.bundle
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


def _vector(path: Path, d: int) -> Tensor:
    """The tensor `target`, (d,) or (1, d), of a safetensors file, as (1, d)."""
    try:
        with readable(path) as name:
            vector = load_file(name)["target"].float().reshape(1, -1)
    except (OSError, KeyError, SafetensorError) as error:
        raise ProblemError(
            f"target vector {path}: no safetensors file with a tensor 'target' ({error})"
        ) from error
    if vector.shape[1] != d or not torch.isfinite(vector).all():
        raise ProblemError(
            f"target vector {path}: {vector.shape[1]} numbers, expected {d} finite ones"
        )
    return vector
