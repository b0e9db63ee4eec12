"""What was forgotten: a change that can be put into a model, taken out again, proved and stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from forgetting.adapter import Adapter, load_adapter, projection_sha256, save_adapter
from forgetting.deploy.embeddings import patch
from forgetting.displacement import AffectedName, Forecast
from forgetting.errors import ProblemError, line, reason
from forgetting.io import matrix
from forgetting.models.encoder import Encoder
from forgetting.models.identity import changed_sha256, find, refuse_tied, set_applied, verify
from forgetting.models.modules import maybe_transpose, tensor_sha256, tensors
from forgetting.solvers.certificate import Certificate

T = TypeVar("T")


@dataclass(frozen=True, repr=False)
class Forgotten:
    """What was forgotten, as a change that can be put into a model and taken out again.

    Attributes:
        adapter: the change itself, and all that is stored of it.
        encoder: the model that it belongs to; None where it was loaded without.
        original: the projection's tensor as it came in, bit for bit; None if that is not known.
        notes: what a reader should know, a line each.
    """

    adapter: Adapter
    encoder: Encoder | None = None
    original: Tensor | None = None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return "\n".join([f"{', '.join(self.names)} forgotten", *self.notes])

    @property
    def names(self) -> list[str]:
        """What was forgotten."""
        return self.adapter.classes

    @property
    def texts(self) -> list[str]:
        """By which texts: the names, their other words, and paraphrases that were added."""
        return self.adapter.texts

    @property
    def certificate(self) -> Certificate | None:
        """The proof that no smaller disturbance reaches the targets; None for a union."""
        known = {one.name for one in fields(Certificate)}

        def read(found: dict[str, Any]) -> Certificate:
            numbers = {k: math.inf if v is None else float(v) for k, v in found.items()}
            return Certificate(**{k: v for k, v in numbers.items() if k in known})

        return self._reported("certificate", read)

    @property
    def forecast(self) -> Forecast | None:
        """How far other names move, by text alone; None for a union."""

        def read(found: dict[str, Any]) -> Forecast:
            unlisted = {k: (float(v["rms"]), float(v["max"])) for k, v in found["unlisted"].items()}
            affected = [AffectedName(**one) for one in found["affected"]]
            return Forecast(unlisted, affected, found["margin"], found["gap"])

        return self._reported("forecast", read)

    def _reported(self, key: str, read: Callable[[dict[str, Any]], T]) -> T | None:
        """A part of the solver's report; ProblemError where a file holds something else."""
        found = self.adapter.solver.get(key)
        try:
            return None if found is None else read(found)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ProblemError(f"the adapter's {key} cannot be read ({reason(error)})") from error

    def apply(self) -> None:
        """Change the model in place; nothing happens if it is changed by this already.

        Raises:
            ProblemError: no model, or one whose projection is neither the original nor the changed.
        """
        encoder = self._model("apply")
        if self._state(encoder) == "original":
            encoder.write(self.adapter.changed(encoder.projection))
            set_applied(encoder, self.adapter)

    def undo(self) -> None:
        """Make the model what it was, bit for bit; nothing happens if it is that already.

        Raises:
            ProblemError: no model; another change came since; or the original is not known, since
                the model was changed already when this was loaded.
        """
        encoder = self._model("undo")
        if self._state(encoder) == "changed":
            if self.original is None:
                raise ProblemError(
                    "the original projection is not known: load the adapter with the original "
                    "model, or give it (original=)"
                )
            encoder.write(maybe_transpose(self.original, encoder.transposed))
        set_applied(encoder, None)

    def verify(self, model: nn.Module | None = None) -> bool:
        """True if a model is the original with exactly this change and nothing else.

        Args:
            model: None: that which this belongs to.

        Raises:
            ProblemError: a projection that is not the changed one, bit for bit, or any other tensor
                that is not what it was, is missing, or is new.
        """
        model = self._model("verify").model if model is None else model
        verify(model, self.adapter, self._changed)
        return True

    def patch(self, embeddings: Any, normalised: bool = True) -> Any:
        """Cached text embeddings (n, d) as the changed model would give them; without the model.

        Args:
            normalised: whether they are of unit norm.

        Raises:
            ProblemError: the original projection is not known, or
                `forgetting.deploy.embeddings.patch` refuses.
        """
        if self.original is None:
            raise ProblemError("the original projection is not known, by which texts are patched")
        bias = None if self.encoder is None else self.encoder.bias
        if self.adapter.model is not None and self.adapter.model.bias and bias is None:
            raise ProblemError(
                "the projection has a bias, which is in the model: load it with that"
            )
        w = maybe_transpose(self.original, self._transposed)
        left, right = self.adapter.left, self.adapter.right
        return patch(embeddings, w, left, right, bias, normalised)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the adapter; see `forgetting.save_adapter`."""
        save_adapter(self.adapter, path, overwrite)

    @classmethod
    def load(
        cls, path: str | Path, model: nn.Module | None = None, original: Tensor | None = None
    ) -> Forgotten:
        """Read what `save` wrote, or what `forgetting.compose` made of it.

        Args:
            model: to be changed; it may be changed already. None: only to read.
            original: (w, d) or (d, w), where the model is changed already.

        Raises:
            ProblemError: no adapter, a damaged one, or a model that has no such projection.
        """
        adapter = load_adapter(path)
        notes = adapter.solver.get("notes")
        notes = tuple(map(str, notes)) if isinstance(notes, list) else ()
        if original is not None:
            ways = matrix("original", original), original.T
            right = [w for w in ways if projection_sha256(w) == adapter.projection_sha256]
            if not right:
                raise ProblemError("the original projection is not the one of the adapter")
            original = right[0]
        encoder = None if model is None else find(model, adapter, original)
        found = cls(adapter, encoder, None, notes)
        if original is not None:
            held = maybe_transpose(original, found._transposed).clone()
            held = held if encoder is None else held.to(encoder.weight)
            found = replace(found, original=held.contiguous())
        if encoder is not None and found._state(encoder) == "original":
            found = replace(found, original=encoder.weight.detach().clone())
        elif encoder is not None:
            set_applied(encoder, adapter)  # changed by this, in another process
        return found

    def _model(self, what: str) -> Encoder:
        if self.encoder is None:
            raise ProblemError(f"no model to {what}: Forgotten.load(path, model) gives one")
        # By name: load_state_dict(assign=True), say, puts another tensor in its place.
        there = tensors(self.encoder.model).get(self.encoder.name)
        if there is None or there.shape != self.encoder.weight.shape:
            raise ProblemError(f"the model has no such projection any more: {self.encoder.name}")
        refuse_tied(self.encoder.model, self.encoder.name)
        return replace(self.encoder, weight=there)

    @property
    def _transposed(self) -> bool:
        """Whether the projection's tensor holds `W^T`."""
        if self.encoder is not None:
            return self.encoder.transposed
        return self.adapter.model is not None and self.adapter.model.transposed

    @property
    def _changed(self) -> list[str]:
        """What the changed projection's tensor may be, see `changed_sha256`; empty if it cannot be
        known."""
        if self.original is not None:
            w = maybe_transpose(self.original, self._transposed)
            return changed_sha256(self.adapter, w, self._transposed)
        return self.adapter.changed_sha256

    def _state(self, encoder: Encoder) -> str:
        """Whether the model's projection is the original or the changed one."""
        if projection_sha256(encoder.projection) == self.adapter.projection_sha256:
            return "original"
        if tensor_sha256(encoder.weight) in self._changed:
            return "changed"
        names = ", ".join(self.names)
        raise ProblemError(
            f"{encoder.name} is neither the projection that {line(names)!r} was forgotten from nor "
            "what that made of it; another change came in between, or it is another model"
        )
