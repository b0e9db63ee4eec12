"""What was forgotten: a change that can be put into a model, taken out again, proved and stored."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from forgetting.adapter import (
    Adapter,
    adapter_bytes,
    load_adapter,
    projection_sha256,
    save_adapter,
)
from forgetting.deploy.embeddings import patch
from forgetting.displacement import AffectedName, Forecast
from forgetting.errors import ProblemError, line
from forgetting.io import matrix
from forgetting.models.encoder import Encoder
from forgetting.models.identity import changed_sha256, description, find, verify
from forgetting.models.modules import maybe_transpose, tensor_sha256, tensors
from forgetting.solvers.certificate import Certificate

APPLIED: dict[str, list[str]] = {}  # SHA-256 of projections that were changed here -> by what


@dataclass(frozen=True, repr=False)
class Forgotten:
    """What was forgotten, as a change that can be put into a model and taken out again.

    Attributes:
        adapter: the change itself, and all that is stored of it.
        tower: the model that it belongs to; None where it was loaded without.
        original: the projection's tensor as it came in, bit for bit; None if that is not known.
        notes: what a reader should know, a line each.
    """

    adapter: Adapter
    tower: Encoder | None = None
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
        """By which texts: the names, their other words, and wordings that hardly followed."""
        return self.adapter.texts

    @property
    def certificate(self) -> Certificate | None:
        """The proof that no smaller disturbance lands on the targets; None for a union."""
        found = self.adapter.solver.get("certificate")
        if found is None:
            return None
        known = {one.name for one in fields(Certificate)}
        numbers = {k: math.inf if v is None else v for k, v in found.items() if k in known}
        return Certificate(**numbers)

    @property
    def forecast(self) -> Forecast | None:
        """What other names will feel, by text alone; None for a union."""
        found = self.adapter.solver.get("forecast")
        if found is None:
            return None
        unlisted = {name: (part["rms"], part["max"]) for name, part in found["unlisted"].items()}
        affected = [AffectedName(**one) for one in found["affected"]]
        return Forecast(unlisted, affected, found["margin"], found["gap"])

    def apply(self) -> None:
        """Change the model in place; nothing happens if it is changed already.

        Raises:
            ProblemError: no model, or one whose projection is neither the original nor the changed.
        """
        tower = self._model("apply")
        if self._state(tower) == "original":
            before = tensor_sha256(tower.weight)
            tower.write(self.adapter.changed(tower.projection))
            if (now := tensor_sha256(tower.weight)) != before:  # nothing is no change
                APPLIED[now] = self.names

    def undo(self) -> None:
        """Make the model what it was, bit for bit; nothing happens if it is that already.

        Raises:
            ProblemError: no model; another change came since; or the original is not known, since
                the model was changed already when this was loaded.
        """
        tower = self._model("undo")
        if self._state(tower) == "original":
            return
        if self.original is None:
            raise ProblemError(
                "the original projection is not known: load the adapter with the original model, "
                "or give it (original=)"
            )
        tower.write(maybe_transpose(self.original, tower.transposed))

    def verify(self, model: nn.Module | None = None) -> bool:
        """True if a model is the original with exactly this change and nothing else.

        Args:
            model: None: that which this belongs to.

        Raises:
            ProblemError: a projection that is not the changed one, bit for bit, or any other tensor
                that is not what it was, is missing, or is new; the message names it.
        """
        model = self._model("verify").model if model is None else model
        verify(model, self.adapter, self._changed)
        return True

    def patch(self, embeddings: Any, normalised: bool = True) -> Any:
        """Cached text embeddings (n, d) as the changed model would give them; without the model.

        Args:
            normalised: whether they are of unit norm.

        Raises:
            ProblemError: the original projection is not known, or `forgetting.deploy.embeddings` refuses.
        """
        if self.original is None:
            raise ProblemError("the original projection is not known, by which texts are patched")
        bias = None if self.tower is None else self.tower.bias
        if description(self.adapter).get("bias") and bias is None:
            raise ProblemError(
                "the projection has a bias, which is in the model: load it with that"
            )
        w = maybe_transpose(self.original, self._transposed)
        left, right = self.adapter.left, self.adapter.right
        return patch(embeddings, w, left, right, bias, normalised)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the adapter; see `forgetting.save_adapter`. A file that holds just this adapter may
        be there already."""
        there = Path(path)
        if not (there.is_file() and there.read_bytes() == adapter_bytes(self.adapter)):
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
        notes = tuple(map(str, adapter.solver.get("notes") or ()))
        if original is not None:
            ways = matrix("original", original), original.T
            right = [w for w in ways if projection_sha256(w) == adapter.projection_sha256]
            if not right:
                raise ProblemError("the original projection is not the one of the adapter")
            original = right[0]
        tower = None if model is None else find(model, adapter, original)
        found = cls(adapter, tower, None, notes)
        if original is not None:
            held = maybe_transpose(original, found._transposed).clone()
            held = held if tower is None else held.to(tower.weight)
            return cls(adapter, tower, held.contiguous(), notes)
        if tower is not None and found._state(tower) == "original":
            return cls(adapter, tower, tower.weight.detach().clone(), notes)
        return found

    def _model(self, what: str) -> Encoder:
        if self.tower is None:
            raise ProblemError(f"no model to {what}: Forgotten.load(path, model) gives one")
        # By name: load_state_dict(assign=True), say, puts another tensor in its place.
        there = tensors(self.tower.model).get(self.tower.name)
        if there is None or there.shape != self.tower.weight.shape:
            raise ProblemError(f"the model has no such projection any more: {self.tower.name}")
        return replace(self.tower, weight=there)

    @property
    def _transposed(self) -> bool:
        """Whether the projection's tensor holds `W^T`."""
        known = description(self.adapter).get("transposed", False)
        return known if self.tower is None else self.tower.transposed

    @property
    def _changed(self) -> list[str]:
        """What the changed projection's tensor may be, see `changed_sha256`; empty if it cannot be
        known."""
        if self.original is not None:
            w = maybe_transpose(self.original, self._transposed)
            return changed_sha256(self.adapter, w, self._transposed)
        said = self.adapter.settings.get("changed_sha256")
        return said if isinstance(said, list) else [said] if said else []  # one, in older files

    def _state(self, tower: Encoder) -> str:
        """Whether the model's projection is the original or the changed one."""
        if projection_sha256(tower.projection) == self.adapter.projection_sha256:
            return "original"
        if tensor_sha256(tower.weight) in self._changed:
            return "changed"
        names = ", ".join(self.names)
        raise ProblemError(
            f"{tower.name} is neither the projection that {line(names)!r} was forgotten from nor "
            "what that made of it; another change came in between, or it is another model"
        )
