"""What a caller asks for: names and their other words, checked, and their hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from forgetting.displacement import Watch
from forgetting.errors import ProblemError, number, shown
from forgetting.io import FLOATS, matrix, tensor
from forgetting.models.encoder import Encoder
from forgetting.problem import Batch, Paraphrases, Request
from forgetting.targets import (
    FURTHER,
    TARGETS,
    check_beta,
    empty_target,
    opposite_target,
    orthogonal_target,
)


@dataclass(frozen=True)
class Asked:
    """What a caller named, checked: every name once, none of them empty."""

    names: tuple[str, ...]
    also: dict[str, tuple[str, ...]]
    retain: tuple[str, ...]
    templates: tuple[str, ...]
    keep: tuple[str, ...]
    gone: tuple[str, ...]  # named to be retained, and forgotten

    @classmethod
    def of(cls, names: Any, also: Any, retain: Any, templates: Any, keep: Any) -> Asked:
        names = _texts("names", names)
        if not names:
            raise ProblemError("names is empty: name at least one thing to forget")
        templates = _texts("templates", templates)
        if not templates or not all("{}" in form for form in templates):
            raise ProblemError("templates must be texts with {} for the name, at least one")
        if also is not None and not isinstance(also, Mapping):
            raise ProblemError(f"also must map names to lists of words, not {shown(also)}")
        found = {}
        for name, more in (also or {}).items():
            name = name.strip() if isinstance(name, str) else name
            if name not in names:
                near = get_close_matches(str(name), names)
                meant = f"; did you mean {near[0]!r}?" if near else ""
                raise ProblemError(f"also: {shown(name)} is not among the names to forget{meant}")
            found[name] = (*found.get(name, ()), *_texts(f"also of {shown(name)}", more))
        owners: dict[str, str] = {}
        for name in names:
            for text in (name, *found.get(name, ())):
                other = owners.setdefault(text.casefold(), name)
                if other != name:
                    raise ProblemError(f"{text!r} stands for both {other!r} and {name!r}")
        keep = _texts("keep", keep)
        if both := [name for name in keep if name.casefold() in owners]:
            raise ProblemError(f"{both[0]!r} is to be forgotten and to be kept; choose one")
        retain = _texts("retain", () if retain is None else retain)
        gone = tuple(name for name in retain if name.casefold() in owners)
        # Where some stay, those that are forgotten leave with their class, as in a list of which
        # several are forgotten in turn: the statistics are of the whole list, so requests compose.
        return cls(names, found, retain if len(gone) < len(retain) else (), templates, keep, gone)

    def same(self, names: Sequence[str]) -> list[set[str]]:
        """Of each name what means the same, in small letters."""
        return [{t.casefold() for t in (name, *self.also.get(name, ()))} for name in names]


class Book:
    """Texts of a request, and their hidden states, each read once.

    Attributes:
        cut: those of which the tokenizer does not read the end.
    """

    def __init__(self, tower: Encoder, asked: Asked, target: str | Tensor) -> None:
        self.tower, self.asked, self.target = tower, asked, target
        self.cut: list[str] = []
        self._known: dict[str, Tensor] = {}

    def rows(self, texts: Sequence[str]) -> Tensor:
        """Hidden states (n, w), of the tower's precision, on the CPU."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known |= zip(new, self.tower.hidden(new), strict=True)
            self.cut += self.tower.truncated(new)
        if not texts:
            return self.tower.hidden([])
        return torch.stack([self._known[text] for text in texts])

    def request(self) -> Request:
        """The names and their other words in the first template."""
        texts, owner = [], []
        for index, name in enumerate(self.asked.names):
            for word in (name, *self.asked.also.get(name, ())):
                text = fill(self.asked.templates[0], word)
                if text not in texts:
                    texts.append(text)
                    owner.append(index)
        return Request(list(self.asked.names), texts, self.rows(texts), owner)

    def wordings(self) -> dict[str, Paraphrases]:
        """The same in the other templates."""
        found = {}
        for name in self.asked.names:
            words = (name, *self.asked.also.get(name, ()))
            texts = [fill(form, word) for form in self.asked.templates[1:] for word in words]
            texts = list(dict.fromkeys(texts))
            found[name] = Paraphrases(texts, self.rows(texts))
        return found

    def targets(
        self, requests: Batch, watch: Watch, rows: Tensor, betas: Tensor
    ) -> tuple[Tensor, list[int]]:
        """`P` (k, d) for every target but `specific`, and the draws of noise; `betas`: (k,)."""
        kind, here = self.target, watch.hidden.device
        w = watch.projection.double()
        eye = torch.eye(w.shape[1], dtype=torch.float64, device=here)

        def embedded(hidden: Tensor) -> Tensor:
            return watch.embedded(hidden.to(here).double(), w)

        e = embedded(requests.hidden)  # (k, d)
        if isinstance(kind, Tensor):
            return kind.detach().to(e).expand(len(e), -1), [0]
        if kind == "opposite":
            return opposite_target(e, eye, betas), [0]
        if kind == "orthogonal":
            return orthogonal_target(torch.cat([e, embedded(rows)]), len(e)), [0]
        if kind == "empty":
            generator, labels = torch.Generator().manual_seed(0), requests.owner.tolist()
            neutral, classes = embedded(self.rows([""])), embedded(watch.hidden)
            found, draws = empty_target(neutral, eye, classes, labels, generator)
            return found, [draws]
        text = kind.partition(":")[2]
        return normalize(embedded(self.rows([text])), dim=1).expand(len(e), -1), [0]


def check_target(target: str | Tensor, beta: float, d: int) -> None:
    """ProblemError if `target` is none among embeddings (d,), or `beta` no number for it."""
    if isinstance(target, Tensor):
        matrix("target", tensor("target", target, FLOATS, (d,))[None])
    elif not isinstance(target, str) or (
        target not in TARGETS and not (target.startswith("text:") and target[5:].strip())
    ):
        options = ", ".join((*TARGETS, "text:TEXT"))
        raise ProblemError(f"no target {shown(target)}; there are {options}, or a vector (d,)")
    if isinstance(target, str) and target in FURTHER:
        check_beta(target, beta)
    elif number("beta", beta):
        raise ProblemError(f"beta is a number for {' and '.join(FURTHER)}, not for other targets")


def _texts(what: str, value: Any) -> tuple[str, ...]:
    """A list of texts without the spaces around them, each once, none empty."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ProblemError(f"{what} must be a list of texts, not {shown(value)}")
    for text in value:
        if not isinstance(text, str) or not text.strip():
            raise ProblemError(f"{what} must be texts that are not empty, not {shown(text)}")
    return tuple(dict.fromkeys(text.strip() for text in value))


def fill(form: str, name: str) -> str:
    return form.replace("{}", name)
