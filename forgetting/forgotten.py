"""What was forgotten: a change that can be put into a model, taken out again, proved and stored."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from forgetting.adapter import ADAPTER, Adapter, adapter_bytes, projection_sha256, save_adapter
from forgetting.deploy.card import CARD, HUB_ID, Base, audited, model_card
from forgetting.displacement import AffectedName, Forecast
from forgetting.errors import ProblemError, line
from forgetting.flag import SCALE, Vectors, none_of_these
from forgetting.io import atomic_path, foreign, need, refuse_existing, refuse_outside, write_bytes
from forgetting.models.encoder import Encoder
from forgetting.models.identity import (
    changed_sha256,
    find,
    refuse_applied,
    refuse_other_rest,
    refuse_tied,
    set_applied,
    verify,
)
from forgetting.models.modules import tensor_sha256, tensors
from forgetting.models.text_embeddings import TextEmbeddings
from forgetting.models.vocabulary import CACHE, generic_hidden
from forgetting.retain import key
from forgetting.solvers.certificate import Certificate

HUB_PACKAGE = "huggingface_hub", "clip-forgetting[hub]"
EMBEDDINGS = (
    "this adapter is of embeddings: it changes no model, but an index of images (hide_in_index, "
    "clip-forget index), or cached texts (clip-forget patch)"
)


@dataclass(frozen=True, repr=False)
class Forgotten:
    """What was forgotten, as a change that can be put into a model and taken out again."""

    adapter: Adapter  # the change itself, and all that is stored of it
    encoder: Encoder | TextEmbeddings | None = None  # what it belongs to; None: loaded without
    original: Tensor | None = None  # W (w, d) as it came in, bit for bit; None: not known

    def __repr__(self) -> str:
        return "\n".join([f"forgets {', '.join(self.names)}", *self.notes])

    @property
    def names(self) -> list[str]:
        """What was forgotten."""
        return self.adapter.classes

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know, a line each."""
        return tuple(self.adapter.solver.get("notes", ()))

    @property
    def texts(self) -> list[str]:
        """By which texts: the names, their other words, and paraphrases that were added."""
        return self.adapter.texts

    @property
    def certificate(self) -> Certificate | None:
        """The proof that no smaller disturbance reaches the targets; None for a union."""
        if (stored := self.adapter.solver.get("certificate")) is None:
            return None
        return Certificate(**{k: math.inf if v is None else v for k, v in stored.items()})

    @property
    def forecast(self) -> Forecast | None:
        """How far other names move, by text alone; None for a union."""
        if (stored := self.adapter.solver.get("forecast")) is None:
            return None
        unlisted = {group: (of["rms"], of["max"]) for group, of in stored["unlisted"].items()}
        affected = [AffectedName(**one) for one in stored["affected"]]
        return Forecast(unlisted, affected, stored["margin"], stored["gap"])

    def apply(self) -> None:
        """Change the model in place, if it is not changed by this already. ProblemError for no
        model, or a projection that is neither the original nor the changed one."""
        encoder = self._model()
        if self._is_original(encoder):
            encoder.write(self.adapter.changed(encoder.projection))
            set_applied(encoder, self.adapter)

    def undo(self) -> None:
        """Make the model what it was, bit for bit. ProblemError for no model, another change since,
        or an original that is not known, since the model was changed when this was loaded."""
        encoder = self._model()
        encoder.write(self._original(encoder))
        set_applied(encoder, None)

    def verify(self, model: nn.Module | None = None) -> bool:
        """True if a model (None: that which this belongs to) is the original with exactly this
        change, bit for bit; else ProblemError."""
        verify(self._model().model if model is None else model, self.adapter, self._changed())
        return True

    def flag(
        self,
        vectors: Vectors,
        false_alarms: float = 0.005,
        reference: Vectors | None = None,
        texts: TextEmbeddings | None = None,
        cache: str | Path | None = CACHE,
        progress: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Which images show what was forgotten, by names alone, whatever was applied; nothing is
        changed. Each name is sought by all texts that it was forgotten by, in the original model,
        beside the generic vocabulary and what was retained or protected by name.

        Args:
            vectors: embeddings (n, d) of images, as the original model gives them.
            false_alarms, reference: see `forgetting.flag.flag`, as for what is returned and raised.
            texts: of the original model, where this was loaded; cache, progress: see `forget`.
        """
        encoder = self.encoder if texts is None else texts
        if encoder is None or (isinstance(encoder, Encoder) and encoder.tokenize is None):
            raise ProblemError("there is no model to read texts by: name TextEmbeddings (texts=)")
        projection = encoder.projection
        if isinstance(encoder, Encoder):
            encoder = read_by = self._model()
            projection = self._original(encoder)
        else:
            if (read_by := encoder.encoder) is not None:
                refuse_applied(read_by)
            if not self._reads_as_original(encoder):
                raise ProblemError("these texts are not read by the model that this was made for")
        recipe, settings = self.adapter.recipe, self.adapter.settings
        names = [part.texts for part in recipe.parts] if recipe else [[x] for x in self.texts]
        sought = {key(text) for some in names for text in some}
        template = settings.get("templates", ["{}"])[0]
        listed = [*settings.get("retain", ()), *settings.get("protect_names", ())]
        listed = [template.replace("{}", name) for name in listed]
        listed = [text for text in listed if key(text) not in sought]

        def embed(hidden: Tensor) -> Tensor:
            embedded = hidden.double() @ projection.cpu().double()  # (n, w) @ (w, d)
            return embedded if encoder.bias is None else embedded + encoder.bias.cpu().double()

        _, common = generic_hidden(encoder, cache, progress, template)
        common = embed(torch.cat([common, encoder.hidden(listed)]))
        named = [embed(encoder.hidden(some)) for some in names]
        learnt = getattr(read_by and read_by.model, "logit_scale", None)
        scale = SCALE if learnt is None else float(learnt.detach().exp()) / 2
        shares, none = none_of_these(vectors, named, common, false_alarms, reference, scale)
        return 1 - shares, ~none

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the adapter, and its model card beside it (`PATH.md`): see `save_adapter`."""
        card = f"{path}.md"
        refuse_existing(card, overwrite)
        save_adapter(self.adapter, path, overwrite)
        write_bytes(self._shared(None)[CARD], card, overwrite)

    @classmethod
    def load(
        cls, path: str | Path, model: nn.Module | None = None, original: Tensor | None = None
    ) -> Forgotten:
        """Read what `save` wrote, or `forgetting.compose` made of it. ProblemError: no adapter, a
        damaged one, or a model that has no such projection. What an audit beside it found is in its
        record, and in cards.

        Args:
            model: to be changed; it may be changed already. None: only to read.
            original: W, (w, d), where the model is changed already.
        """
        adapter = audited(path)
        if original is not None:
            adapter.apply(original)  # refuses another projection
        if model is None:
            return cls(adapter)
        if adapter.of_embeddings:
            raise ProblemError(EMBEDDINGS)
        encoder = find(model, adapter, original)
        original = None if original is None else original.detach().to(encoder.weight)
        found = cls(adapter, encoder, original)
        if found._is_original(encoder):
            return replace(found, original=encoder.projection.clone())
        set_applied(encoder, adapter)  # changed by this, in another process
        return found

    def save_pretrained(
        self, folder: str | Path, overwrite: bool = False, base_id: str | None = None
    ) -> None:
        """Write a folder to share: `adapter.safetensors` and its model card, README.md. `base_id`
        is the original model's name on the Hub, ID or ID@REVISION; None: as a model of transformers
        says. ProblemError if it is there and `overwrite` is False."""
        with atomic_path(folder, overwrite) as temporary:
            temporary.mkdir()
            for name, content in self._shared(base_id).items():
                (temporary / name).write_bytes(content)

    def push_to_hub(
        self,
        repo_id: str,
        base_id: str | None = None,
        overwrite: bool = False,
        private: bool | None = None,
    ) -> str:
        """Put what `save_pretrained` writes into a repository of the Hub, made if need be, in one
        commit, and give the address. The login is huggingface_hub's."""
        hub, files = need(*HUB_PACKAGE), self._shared(base_id)
        with foreign(f"{line(repo_id)} cannot be written"):
            api = hub.HfApi()
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            there = files.keys() & set(api.list_repo_files(repo_id))
            if there and not overwrite:
                raise ProblemError(f"{repo_id} has {min(there)}: overwrite=True replaces it")
            added = [hub.CommitOperationAdd(name, content) for name, content in files.items()]
            message = "An adapter of clip-forget and its card"
            return api.create_commit(repo_id, added, commit_message=message).commit_url

    @classmethod
    def from_pretrained(
        cls, folder_or_id: str | Path, model: nn.Module | None = None, revision: str | None = None
    ) -> Forgotten:
        """`load` what `save_pretrained` wrote, and no other file than `adapter.safetensors`, from
        a folder, or `revision` (commit, branch, tag) of a repository on the Hub. ProblemError too
        if the model is of the class that it was made for, and another tensor differs."""
        found = cls.load(_adapter_file(folder_or_id, revision), model)
        if found.encoder is not None:
            refuse_other_rest(found.encoder, found.adapter)
        return found

    def _shared(self, base_id: str | None) -> dict[str, bytes]:
        """Names and contents of the files that are shared."""
        encoder = getattr(self.encoder, "encoder", self.encoder)  # of text embeddings
        base = Base.of_model(encoder and encoder.model, base_id)
        card = model_card(self.adapter, "adapter", base)
        return {ADAPTER: adapter_bytes(self.adapter), CARD: card.encode()}

    def _model(self) -> Encoder:
        """The model as it is now, in which another tensor may stand for the projection: that of
        load_state_dict(assign=True), say."""
        if self.adapter.of_embeddings:
            raise ProblemError(EMBEDDINGS)
        if self.encoder is None:
            raise ProblemError("there is no model: Forgotten.load(path, model) gives one")
        there = tensors(self.encoder.model).get(self.encoder.name)
        if there is None or there.shape != self.encoder.weight.shape:
            raise ProblemError(f"the model has no such projection any more: {self.encoder.name}")
        refuse_tied(self.encoder.model, self.encoder.name)
        return replace(self.encoder, weight=there)

    def _changed(self) -> list[str]:
        """What the changed projection's tensor may be, see `changed_sha256`; empty: not known."""
        if self.original is None or self.encoder is None:
            return self.adapter.changed_sha256
        return changed_sha256(self.adapter, self.original, self.encoder.transposed)

    def _original(self, encoder: Encoder) -> Tensor:
        """W (w, d) as it was before; ProblemError if that is not known."""
        known = encoder.projection if self._is_original(encoder) else self.original
        if known is None:
            raise ProblemError("the original W is not known: load(path, model, original=W)")
        return known

    def _reads_as_original(self, texts: TextEmbeddings) -> bool:
        """Whether texts are embedded by the model that this was made for, unchanged."""
        if self.adapter.of_embeddings:
            return texts.fingerprint == self.adapter.weights
        read_by = texts.encoder
        return read_by is not None and (
            projection_sha256(read_by.projection) == self.adapter.projection_sha256
        )

    def _is_original(self, encoder: Encoder) -> bool:
        """Whether the projection is the original; ProblemError if it is not the changed either."""
        if projection_sha256(encoder.projection) == self.adapter.projection_sha256:
            return True
        if tensor_sha256(encoder.weight) in self._changed():
            return False
        raise ProblemError(
            f"{encoder.name} is neither the projection that {line(', '.join(self.names))} was "
            "forgotten from nor the changed one: it was changed since, or is another model"
        )


def _adapter_file(place: str | Path, revision: str | None) -> Path:
    """The adapter in a folder, or a repository of which it is downloaded."""
    if (folder := Path(place)).is_dir():
        if revision is not None:
            raise ProblemError(f"{line(place)} is a folder, which has no revision: leave it out")
        refuse_outside(folder / ADAPTER, folder)
        return folder / ADAPTER
    if folder.exists() or "@" in str(place) or not HUB_ID.fullmatch(str(place)):
        raise ProblemError(f"{line(place)}: no folder, nor a name on the Hub (of a file: load)")
    hub = need(*HUB_PACKAGE)
    with foreign(f"{line(place)} cannot be fetched"):
        return Path(hub.hf_hub_download(str(place), ADAPTER, revision=revision))
