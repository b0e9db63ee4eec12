"""One call: forget names in any CLIP, from text alone.

    answer = forget(model, tokenize, ["Acme Cola"], also={"Acme Cola": ["acme soda"]})
    answer.apply()                  # the model changes in place
    answer.save("acme.safetensors")

It is the same method as the trainer ForgetExact (`forgetting.context`): a name and its other words
are moved exactly to their target, while a generic vocabulary and the names that a caller lists move
as little as possible.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from forgetting.adapter import Adapter, projection_sha256
from forgetting.compose import make_recipe
from forgetting.context import Answer, ExactSettings, ForgetContext
from forgetting.displacement import ClassifierTexts
from forgetting.edited_texts import EmbeddedTexts
from forgetting.errors import ProblemError, nearest, shown, unknown
from forgetting.forgotten import Forgotten
from forgetting.io import finite
from forgetting.models.encoder import Encoder, read_encoder, truncation_warning
from forgetting.models.identity import changed_sha256, identity, refuse_applied, texts_sha256
from forgetting.models.modules import tensor_sha256
from forgetting.models.reading import Tokenize
from forgetting.models.vocabulary import CACHE, MAX_SIMILAR, generic_hidden
from forgetting.problem import Paraphrases, Request
from forgetting.retain import Group, RetainSet, key
from forgetting.ridge import choose_ridge
from forgetting.solvers.constrained import Ridge
from forgetting.targets import TargetInputs, check_target

TEMPLATES = ("{}", "a photo of a {}.")
LIKELY = 32  # names that stand for what may be forgotten, for the ridge
ENOUGH = 16  # names of a caller's list that are enough to choose the ridge by
TRAINER, DATASET = "forget", "names"
_lock, _inside = Lock(), []  # the threads before the first of several calls, and 1 for each


def forget(
    model: nn.Module,
    tokenize: Tokenize,
    names: Sequence[str],
    also: Mapping[str, Sequence[str]] | None = None,
    retain: Sequence[str] | None = None,
    templates: Sequence[str] = TEMPLATES,
    protect: Sequence[str] = (),
    *,
    settings: ExactSettings | None = None,
    generic: bool = True,
    cache: str | Path | None = CACHE,
    progress: bool = True,
    **changes: Any,
) -> Forgotten:
    """Forget names in a CLIP from text alone. The model is read, and not changed until `apply`.

    Args:
        model, tokenize: see `forgetting.models.encoder.read_encoder`.
        names: what to forget, at once; also: name -> other words for it, forgotten too.
        retain: names that are retained, such as the other classes of a list.
        templates: texts with {} for a name. Names are forgotten by the first one; the others are
            paraphrases to check. The last one stands for how images are classified.
        protect: names that must not be harmed; they weigh more.
        settings: all numbers of the method; changes: some of them by name, such as
            `target="opposite", beta=0.2, ridge=1e-3`; see `ExactSettings`.
        generic: whether the generic vocabulary is retained; without it `retain` has to name all.
        cache: folder where the vocabulary's hidden states are kept, one file for each model; None:
            they are not kept.
        progress: whether to show a bar while the vocabulary is encoded.

    Raises:
        ProblemError: names that are no names, a model that does not end in one linear map, settings
            out of range.
    """
    encoder = read_encoder(model, tokenize)
    refuse_applied(encoder)
    settings = _settings(settings, generic, changes, encoder.projection.shape[1])
    wanted = _Names.checked(names, also, retain, templates, protect)
    if not isinstance(progress, bool):
        raise ProblemError(f"progress must be true or false, not {shown(progress)}")
    if not isinstance(cache, str | Path | None):
        raise ProblemError(f"cache must be a folder or None, not {shown(cache)}")
    common = generic_hidden(encoder, cache, progress) if settings.generic > 0 else ([], None)
    with _one_thread():
        texts = _Texts(encoder)
        retained = _retained(texts, wanted, settings, *common)
        request = _request(texts, wanted)
        context = _context(texts, wanted, settings, retained, request)
        return _forgotten(texts, wanted, context, context.forget([request])[0])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Work on one CPU thread: the matrices are small, and a second thread mostly waits for them.
    The number is torch's for the whole process: the last of several calls gives it back."""
    with _lock:
        if not _inside:
            _inside.append(torch.get_num_threads())
        _inside.append(1)
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _inside.pop()
            if len(_inside) == 1:
                torch.set_num_threads(_inside.pop())


def _settings(
    settings: ExactSettings | None, generic: bool, changes: Mapping[str, Any], d: int
) -> ExactSettings:
    settings = ExactSettings() if settings is None else settings
    if not isinstance(settings, ExactSettings):
        raise ProblemError(f"settings must be ExactSettings, not {shown(settings)}")
    if not isinstance(generic, bool):
        raise ProblemError(f"generic must be true or false, not {shown(generic)}")
    for name in changes:
        if name not in vars(settings):
            raise unknown("setting of forget()", name, vars(settings))
    settings = replace(settings, **changes)
    check_target(settings.target, settings.beta, d)
    settings = settings.chosen(listed=False)
    return settings if generic else replace(settings, generic=0.0)


@dataclass(frozen=True)
class _Names:
    """What a caller named, checked: every name once, none of them empty."""

    names: tuple[str, ...]
    also: dict[str, tuple[str, ...]]
    retain: tuple[str, ...]  # those that are forgotten among them, unless all of them are
    templates: tuple[str, ...]
    protect: tuple[str, ...]
    not_retained: tuple[str, ...]  # those of `retain` that are forgotten

    @classmethod
    def checked(cls, names: Any, also: Any, retain: Any, templates: Any, protect: Any) -> _Names:
        names = _texts("names", names)
        if not names:
            raise ProblemError("names is empty: name at least one thing to forget")
        templates = _texts("templates", templates)
        if not templates or not all("{}" in template for template in templates):
            raise ProblemError("templates must be texts with {} for the name, at least one")
        if also is not None and not isinstance(also, Mapping):
            raise ProblemError(f"also must map names to lists of words, not {shown(also)}")
        words: dict[str, tuple[str, ...]] = {}
        for name, more in (also or {}).items():
            name = name.strip() if isinstance(name, str) else name
            if name not in names:
                close = nearest(str(name), names, 1)
                meant = f"; did you mean {close[0]!r}?" if close else ""
                raise ProblemError(f"also: {shown(name)} is not among the names to forget{meant}")
            words[name] = (*words.get(name, ()), *_texts(f"also of {shown(name)}", more))
        owners: dict[str, str] = {}
        for name in names:
            for text in (name, *words.get(name, ())):
                if (other := owners.setdefault(key(text), name)) != name:
                    raise ProblemError(f"{text!r} stands for both {other!r} and {name!r}")
        protect = _texts("protect", protect)
        for name in protect:
            if key(name) in owners:
                raise ProblemError(f"{name!r} is to be forgotten and to be protected; choose one")
        retain = _texts("retain", () if retain is None else retain)
        forgotten = tuple(name for name in retain if key(name) in owners)
        if len(forgotten) == len(retain):
            retain = ()
        return cls(names, words, retain, templates, protect, forgotten)


def _texts(what: str, value: Any) -> tuple[str, ...]:
    """A list of texts without the spaces around them, each once, none empty."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ProblemError(f"{what} must be a list of texts, not {shown(value)}")
    for text in value:
        if not isinstance(text, str) or not text.strip():
            raise ProblemError(f"{what} must be texts that are not empty, not {shown(text)}")
    return tuple(dict.fromkeys(text.strip() for text in value))


class _Texts:
    """An encoder's texts and their hidden states, each encoded once.

    Attributes:
        known: text -> hidden state (w,); too_long: texts of which the tokenizer drops the end.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.device = encoder.device if encoder.device.type == "cuda" else torch.device("cpu")
        self.projection = encoder.projection.to(self.device)
        self.bias = None if encoder.bias is None else encoder.bias.to(self.device)
        self.known: dict[str, Tensor] = {}
        self.too_long: list[str] = []

    def rows(self, texts: Sequence[str]) -> Tensor:
        """Hidden states (n, w), on the CPU."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if new:
            self.known |= zip(new, self.encoder.hidden(new), strict=True)
            self.too_long += self.encoder.truncated(new)
        return torch.stack([self.known[t] for t in texts]) if texts else self.encoder.hidden([])


def _fill(template: str, names: Sequence[str]) -> list[str]:
    return [template.replace("{}", name) for name in names]


def _request(texts: _Texts, wanted: _Names) -> Request:
    """The names and their other words in the first template; in the others as paraphrases."""
    first, *others = wanted.templates
    owner: dict[str, int] = {}  # text -> index of its name
    paraphrases = []
    for index, name in enumerate(wanted.names):
        words = [name, *wanted.also.get(name, ())]
        for text in _fill(first, words):
            owner.setdefault(text, index)
        paraphrases.append(list(dict.fromkeys(t for form in others for t in _fill(form, words))))
    texts.rows([*owner, *(text for some in paraphrases for text in some)])
    return Request(
        classes=list(wanted.names),
        texts=list(owner),
        hidden=texts.rows(list(owner)),
        owner=list(owner.values()),
        same=[{name, *wanted.also.get(name, ())} for name in wanted.names],
        paraphrases=[Paraphrases(some, texts.rows(some)) for some in paraphrases],
    )


def _retained(
    texts: _Texts, wanted: _Names, settings: ExactSettings, names: list[str], hidden: Tensor | None
) -> tuple[RetainSet, Ridge]:
    """The caller's names in the first two templates, and the generic `names`; and their ridge.

    What was retained last is remembered for the model. It is encoded before the request is, since a
    text differs in its last digits by what it is encoded with, and requests must compose.
    """
    forms, groups = wanted.templates[:2], {}
    weights = settings.group_weights(listed=False, vocabulary=False, generic=bool(names))
    numbers = settings.similarity, settings.ridge, settings.max_displacement
    wanted_names = wanted.retain, wanted.protect, forms, bool(names)
    last = wanted_names, *weights.values(), *numbers, tensor_sha256(texts.encoder.weight)
    memory = texts.encoder.remembered("retained", dict)
    if (known := memory.get(last)) is not None:
        retain, ridge, rows, too_long = known
        texts.known |= rows
        texts.too_long += too_long
        return retain, ridge

    def group(name: str, names: Sequence[str], **options: Any) -> None:
        if names and weights[name] > 0:
            rows = texts.rows([text for form in forms for text in _fill(form, names)])
            groups[name] = Group(
                [*names] * len(forms), rows, weights[name], exclude_similar=False, **options
            )

    group("own", wanted.retain, prompt_variants=len(forms) == 2)
    if names and weights["generic"] > 0:
        limit = not groups
        groups["generic"] = Group(names, hidden, weights["generic"], limit_displacement=limit)
    group("protect", wanted.protect)
    if not groups:
        raise ProblemError("nothing to retain: name some, or retain the generic vocabulary")
    retain = RetainSet(groups, settings.similarity, texts.device, MAX_SIMILAR)
    ridge = retain.ridge(settings.ridge or _choose_ridge(texts, settings, retain))
    memory.clear()
    memory[last] = retain, ridge, dict(texts.known), list(texts.too_long)
    return retain, ridge


def _choose_ridge(texts: _Texts, settings: ExactSettings, retain: RetainSet) -> float:
    """By names of the caller's list, or by common ones where it is short: never by those of the
    request, so that requests compose."""
    own, common = retain.groups.get("own"), retain.groups.get("generic")
    if own is not None and (common is None or len(set(own.names)) >= ENOUGH):
        common = own
    group = common or retain.groups["protect"]
    count = len(set(group.names))
    some = list(range(0, count, max(1, count // LIKELY)))
    likely, same = group.rows[some].to(retain.rows), [{group.names[i]} for i in some]
    excluded = retain.excluded(same, likely, torch.arange(len(some)))
    projection, limit = texts.projection.double(), settings.max_displacement
    return choose_ridge(retain, projection, likely, excluded, limit, texts.bias)


def _context(
    texts: _Texts,
    wanted: _Names,
    settings: ExactSettings,
    retained: tuple[RetainSet, Ridge],
    request: Request,
) -> ForgetContext:
    """What a request is solved in. Images are classified among the caller's names; of the generic
    names those may be affected that are neither among them nor excluded."""
    (retain, ridge), target = retained, settings.target
    forgotten = {key(name) for names in request.same for name in names}
    others = [name for name in wanted.retain if key(name) not in forgotten]
    names = [*wanted.names, *others]
    hidden = texts.rows(_fill(wanted.templates[-1], names)).to(texts.device)
    n_classes = len(names)
    if common := retain.groups.get("generic"):
        excluded = retain.excluded(request.same, request.hidden, torch.tensor(request.owner))
        known = {key(name) for name in (*names, *retain.named(excluded.any(dim=0)))}
        some = [i for i, name in enumerate(common.names) if key(name) not in known]
        names += [common.names[i] for i in some]
        hidden = torch.cat([hidden, common.rows[some].to(hidden)])
    label = {name: row for row, name in enumerate(wanted.names)}
    prompts = {}
    if isinstance(target, str) and target == "empty":
        prompts["empty"] = texts.rows([""])
    if isinstance(target, str) and target.startswith("text:"):
        prompts["text"] = texts.rows([target.removeprefix("text:")])
    inputs = TargetInputs(
        projection=texts.projection,
        bias=texts.bias,
        classes=hidden,
        label=label,
        named=torch.cat([request.hidden.to(retain.rows), retain.rows]),
        noise_std=settings.noise_std,
        retain=retain,
        lam=settings.specific_ridge * retain.squared_embedding(texts.projection, texts.bias),
        **prompts,
    )
    among = n_classes if others else len(names)
    embedded = EmbeddedTexts(hidden, inputs.embed(hidden))
    classifier = ClassifierTexts(names, embedded, label, among)
    return ForgetContext(retain, ridge, inputs, classifier, settings)


def _forgotten(texts: _Texts, wanted: _Names, context: ForgetContext, answer: Answer) -> Forgotten:
    """The answer with the model that it belongs to."""
    encoder, notes = texts.encoder, answer.notes()
    if wanted.not_retained:
        notes.append(f"not retained, since forgotten: {', '.join(wanted.not_retained)}")
    if texts.too_long:
        notes.append(truncation_warning(texts.too_long))
    settings = asdict(context.settings) | {
        "ridge": answer.mu / context.retain.squared_length,
        "templates": list(wanted.templates),
        "retain": list(wanted.retain),
        "protect_names": list(wanted.protect),
    }
    if isinstance(settings["target"], Tensor):
        settings["target"] = "vector"
    texts_of = texts_sha256(encoder, wanted.templates[:2])
    solver = finite({"name": "exact", **answer.report(), "notes": notes})
    adapter = Adapter(
        answer.edit.left.float().cpu(),
        answer.edit.right.float().cpu(),
        projection_sha256=projection_sha256(encoder.projection),
        backbone=encoder.kind,
        weights=encoder.fingerprint,
        dataset=DATASET,
        classes=answer.request.classes,
        trainer=TRAINER,
        settings=settings,
        record={"solver": solver},
        recipe=make_recipe(context, answer, DATASET, texts_of),
        model=identity(encoder),
    )
    if not (torch.isfinite(adapter.left).all() and torch.isfinite(adapter.right).all()):
        raise ProblemError("the change is not finite: a weight, ridge or beta is out of range")
    changed = changed_sha256(adapter, encoder.projection, encoder.transposed)
    adapter = replace(adapter, changed_sha256=changed)
    return Forgotten(adapter, encoder, encoder.weight.detach().clone(), tuple(notes))
