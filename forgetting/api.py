"""One call: forget names in any CLIP, by the method of ForgetExact (`forgetting.context`)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from inspect import signature
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from forgetting.adapter import Adapter, projection_sha256
from forgetting.compose import make_recipe
from forgetting.context import INDEX, ExactSettings, ForgetContext, losses
from forgetting.displacement import ClassifierTexts
from forgetting.edited_texts import EmbeddedTexts
from forgetting.errors import ProblemError, shown, unknown
from forgetting.forgotten import Forgotten
from forgetting.io import finite
from forgetting.models.encoder import Encoder, read_encoder, truncation_warning
from forgetting.models.identity import changed_sha256, identity, refuse_applied, texts_sha256
from forgetting.models.reading import Tokenize
from forgetting.models.text_embeddings import TextEmbeddings
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
_lock = Lock()


def forget(
    model: nn.Module | TextEmbeddings | str,
    tokenize: Tokenize | None,
    names: Sequence[str],
    also: Mapping[str, Sequence[str]] | None = None,
    retain: Sequence[str] | None = None,
    *,
    protect: Sequence[str] = (),
    generic: bool = True,
    templates: Sequence[str] = TEMPLATES,
    target: str | Tensor | None = None,
    beta: float | None = None,
    settings: ExactSettings | None = None,
    cache: str | Path | None = CACHE,
    progress: bool = True,
    **changes: float | None,
) -> Forgotten:
    """Forget names in a CLIP from text alone. The model is read; `Forgotten.apply` changes it.

    Args:
        model: a CLIP of open_clip, transformers, sentence-transformers or OpenAI, or any module
            whose text features are `hidden @ W (+ b)`. Or its name, such as "hf:my-clip". Or
            `TextEmbeddings`, for a change of an index of images instead: see `hide_in_index`.
        tokenize: from a list of texts to what the model reads; a tokenizer of transformers as it
            is. None: for a name, a SentenceTransformer or `TextEmbeddings`.
        names: what to forget, all at once.
        also: other words for a name, which are forgotten with it.
        retain: names to keep as near as possible, such as the other classes of a list.
        protect: names that must not be harmed; they weigh more.
        generic: whether 8,850 common names are retained too. Without them `retain` names all.
        templates: texts with {} for a name. Names are forgotten by the first one. The others are
            paraphrases to check, and the last one is what images are classified by.
        target: where the names go: "specific" (default), "opposite", "orthogonal", "empty",
            "text:TEXT", or a vector (d,).
        beta: how far beyond zero "specific" and "opposite" go; raised where that is too little.
        settings: all numbers of the method; changes: some of them by name, such as `ridge=1e-3`.
        cache: folder for the hidden states of the common names, a file per model; None: not kept.
        progress: whether to show a bar while these are encoded.

    Returns:
        The change `Delta` (w, d) of the text projection `W` (w, d), of low rank, with its proof.

    Raises:
        ProblemError: an argument that makes no sense, or a model without one last linear map.

    Example:
        >>> model = CLIPModel.from_pretrained("my-clip")
        >>> tokenize = AutoTokenizer.from_pretrained("my-clip")
        >>> answer = forget(model, tokenize, ["Acme Cola"], retain=["Pepsi", "lemonade"])
        >>> answer.names
        ['Acme Cola']
        >>> answer.apply()
        >>> answer.verify()
        True
    """
    for_index = isinstance(model, TextEmbeddings)
    encoder = model if for_index else read_encoder(model, tokenize)
    if (read_by := encoder.encoder if for_index else encoder) is not None:
        refuse_applied(read_by)
    if settings is None:
        settings = ExactSettings(**INDEX) if for_index else ExactSettings()
    if not isinstance(settings, ExactSettings):
        raise ProblemError(f"settings must be ExactSettings, not {shown(settings)}")
    if not isinstance(generic, bool):
        raise ProblemError(f"generic must be True or False, not {shown(generic)}")
    for name in changes:
        if name not in vars(settings):
            known = [*vars(settings), *signature(forget).parameters]
            raise unknown("setting of forget()", name, known)
    aim = {"target": target, "beta": beta}
    aim = {name: value for name, value in aim.items() if value is not None}
    settings = replace(settings, **aim, **changes)
    check_target(settings.target, settings.beta, encoder.projection.shape[1])
    settings = settings.chosen(listed=False)
    settings = settings if generic else replace(settings, generic=0.0)
    also, retain = {} if also is None else also, () if retain is None else retain
    call = _Call(encoder, settings, names, also, retain, templates, protect)
    if settings.generic > 0:
        call.common = generic_hidden(encoder, cache, progress)
    with one_thread():
        return call.forgotten()


@contextmanager
def one_thread() -> Iterator[None]:
    """Work on one CPU thread: the matrices are small, and a second thread mostly waits for them.
    The number is torch's for the whole process, so that calls take turns."""
    with _lock:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@dataclass
class _Call:
    """What a caller named, and what is made of it; ProblemError for names that are none."""

    encoder: Encoder | TextEmbeddings
    settings: ExactSettings
    names: Sequence[str]
    also: Mapping[str, Sequence[str]]  # name -> its texts, itself first
    retain: Sequence[str]
    templates: Sequence[str]
    protect: Sequence[str]
    common: tuple[list[str], Tensor | None] = ([], None)  # generic names, their hidden states

    def __post_init__(self) -> None:
        for name in ("names", "retain", "templates", "protect"):
            setattr(self, name, _texts(name, getattr(self, name)))
        if not self.names:
            raise ProblemError("names is empty: name at least one thing to forget")
        if not self.templates or not all("{}" in template for template in self.templates):
            raise ProblemError("templates must be texts with {} for the name, at least one")
        if not isinstance(self.also, Mapping):
            raise ProblemError(f"also must map names to lists of words, not {shown(self.also)}")
        words = {name: (name,) for name in self.names}
        for given, more in self.also.items():
            if (name := str(given).strip()) not in words:
                raise unknown("name in also", name, self.names)
            words[name] += _texts(f"also of {name!r}", more)
        self.also = words
        forgotten: dict[str, str] = {}  # of each text and name, by `key`, the name
        for name in self.names:
            for text in words[name]:
                if (other := forgotten.setdefault(key(text), name)) != name:
                    raise ProblemError(f"{text!r} stands for both {other!r} and {name!r}")
        for name in self.protect:
            if key(name) in forgotten:
                raise ProblemError(f"{name!r} is to be forgotten and to be protected; choose one")
        self.others = [name for name in self.retain if key(name) not in forgotten]
        self.known: dict[str, Tensor] = {}  # text -> hidden state (w,)
        encoder, projection = self.encoder, self.encoder.projection
        self.device = projection.device if projection.is_cuda else torch.device("cpu")
        self.projection = projection.to(self.device)
        self.bias = None if encoder.bias is None else encoder.bias.to(self.device)

    def hidden(self, texts: Sequence[str]) -> Tensor:
        """Hidden states (n, w), on the CPU; each text is read once."""
        if new := [text for text in dict.fromkeys(texts) if text not in self.known]:
            self.known |= zip(new, self.encoder.hidden(new), strict=True)
        return torch.stack([self.known[t] for t in texts]) if texts else self.encoder.hidden([])

    def retained(self) -> tuple[RetainSet, Ridge]:
        """The caller's names in the first two templates, and the generic ones; and their ridge.
        What was retained last is remembered for the model."""
        settings, forms, groups = self.settings, self.templates[:2], {}
        names, hidden = self.common
        own = self.retain if self.others else ()
        weights = settings.group_weights(listed=False, vocabulary=False, generic=bool(names))
        numbers = settings.similarity, settings.ridge, settings.max_displacement
        projection = projection_sha256(self.projection)
        last = own, self.protect, forms, *weights.values(), *numbers, projection
        memory = self.encoder.remembered("retained", dict)
        if last in memory:
            retain, ridge, known = memory[last]
            self.known |= known
            return retain, ridge

        def group(name: str, names: Sequence[str], variants: bool = False) -> None:
            if names and weights[name] > 0:
                rows, names = self.hidden(_fill(forms, names)), [*names] * len(forms)
                options = {"exclude_similar": False, "prompt_variants": variants}
                groups[name] = Group(names, rows, weights[name], **options)

        group("own", own, len(forms) == 2)
        if names and weights["generic"] > 0:
            limit = not groups
            groups["generic"] = Group(names, hidden, weights["generic"], limit_displacement=limit)
        group("protect", self.protect)
        if not groups:
            raise ProblemError("nothing to retain: name some, or retain the generic vocabulary")
        retain = RetainSet(groups, settings.similarity, self.device, MAX_SIMILAR)
        ridge = retain.ridge(settings.ridge or self.choose_ridge(retain))
        memory.clear()
        memory[last] = retain, ridge, dict(self.known)
        return retain, ridge

    def choose_ridge(self, retain: RetainSet) -> float:
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
        limit, projection = self.settings.max_displacement, self.projection.double()
        return choose_ridge(retain, projection, likely, excluded, limit, self.bias)

    def request(self) -> Request:
        """The names and their other words in the first template; in the others as paraphrases."""
        owner: dict[str, int] = {}  # text -> index of its name
        paraphrases = []
        for index, words in enumerate(self.also.values()):
            for text in _fill(self.templates[:1], words):
                owner.setdefault(text, index)
            paraphrases.append(list(dict.fromkeys(_fill(self.templates[1:], words))))
        self.hidden([*owner, *(text for some in paraphrases for text in some)])  # at once
        return Request(
            classes=list(self.names),
            texts=list(owner),
            hidden=self.hidden(list(owner)),
            owner=list(owner.values()),
            same=[set(words) for words in self.also.values()],
            paraphrases=[Paraphrases(some, self.hidden(some)) for some in paraphrases],
        )

    def context(self, retain: RetainSet, ridge: Ridge, request: Request) -> ForgetContext:
        """What a request is solved in. Images are classified among the caller's names; of the
        generic names those may be affected that are neither among them nor excluded."""
        names = [*dict.fromkeys([*self.names, *self.others, *self.protect])]
        target, kept = self.settings.target, [names.index(name) for name in self.protect]
        kind, _, text = target.partition(":") if isinstance(target, str) else ("vector", "", "")
        hidden = self.hidden(_fill(self.templates[-1:], names)).to(self.device)
        among = len(names)
        if common := retain.groups.get("generic"):
            excluded = retain.excluded(request.same, request.hidden, torch.tensor(request.owner))
            known = {key(name) for name in (*names, *retain.named(excluded.any(dim=0)))}
            some = [i for i, name in enumerate(common.names) if key(name) not in known]
            names += [common.names[i] for i in some]
            hidden = torch.cat([hidden, common.rows[some].to(hidden)])
        inputs = TargetInputs(
            self.projection,
            self.bias,
            classes=hidden,
            label={name: row for row, name in enumerate(self.names)},
            empty=self.hidden([""]) if kind == "empty" else None,
            text=self.hidden([text]) if kind == "text" else None,
            named=torch.cat([request.hidden.to(retain.rows), retain.rows]),
            noise_std=self.settings.noise_std,
            retain=retain,
            lam=self.settings.specific_ridge * retain.squared_embedding(self.projection, self.bias),
        )
        texts = EmbeddedTexts(hidden, inputs.embed(hidden))
        among = among if among > len(self.names) else len(names)
        classifier = ClassifierTexts(names, texts, inputs.label, among, kept)
        return ForgetContext(retain, ridge, inputs, classifier, self.settings)

    def forgotten(self) -> Forgotten:
        """The answer with the model that it belongs to."""
        encoder, (retain, ridge), request = self.encoder, self.retained(), self.request()
        context = self.context(retain, ridge, request)
        (answer,) = context.forget([request])
        notes = answer.notes()
        if kept := [one for one in answer.affected if one.name in self.protect]:
            notes.append(f"protected: {losses(kept)}")
        if not_retained := [name for name in self.retain if name not in self.others]:
            notes.append(f"not retained, since forgotten: {', '.join(not_retained)}")
        paraphrases = [text for some in request.paraphrases for text in some.texts]
        listed = _fill(self.templates[:2], [*self.retain, *self.protect])
        if too_long := encoder.truncated([*request.texts, *paraphrases, *listed]):
            notes.append(truncation_warning(too_long))
        settings = asdict(self.settings) | {
            "ridge": answer.mu / retain.squared_length,
            "templates": list(self.templates),
            "retain": list(self.retain),
            "protect_names": list(self.protect),
        }
        if isinstance(self.settings.target, Tensor):
            settings["target"] = "vector"
        adapter = Adapter(
            answer.edit.left.float().cpu(),
            answer.edit.right.float().cpu(),
            projection_sha256=projection_sha256(encoder.projection),
            backbone=encoder.kind,
            weights=encoder.fingerprint,
            dataset=DATASET,
            classes=list(self.names),
            trainer=TRAINER,
            settings=settings,
            record={"solver": finite({"name": "exact", **answer.report(), "notes": notes})},
            recipe=make_recipe(context, answer, DATASET, texts_sha256(encoder, self.templates[:2])),
        )
        if isinstance(encoder, TextEmbeddings):
            return Forgotten(adapter, encoder)
        changed = changed_sha256(adapter, encoder.projection, encoder.transposed)
        adapter = replace(adapter, model=identity(encoder), changed_sha256=changed)
        return Forgotten(adapter, encoder, encoder.projection.clone())


def _texts(what: str, value: Any) -> tuple[str, ...]:
    """A list of texts without the spaces around them, each once, none empty."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_list or not all(isinstance(text, str) and text.strip() for text in value):
        raise ProblemError(f"{what} must be a list of texts, none of them empty: {shown(value)}")
    return tuple(dict.fromkeys(text.strip() for text in value))


def _fill(templates: Sequence[str], names: Sequence[str]) -> list[str]:
    return [template.replace("{}", name) for template in templates for name in names]
