"""Which model an adapter belongs to: the projection in it, and hashes of everything else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from forgetting.adapter import Adapter, projection_sha256
from forgetting.checks import FLAG, HASH, TEXT, check, either
from forgetting.errors import ProblemError
from forgetting.models.encoder import Encoder
from forgetting.models.modules import maybe_transpose, tensor_sha256, tensors, unwrap_compiled

SHORT = 16  # hex digits of a tensor's hash that are kept
MODEL = {  # what an adapter says of its model, as `model` of its settings
    "projection": TEXT,
    "transposed": FLAG,
    "bias": either(None, TEXT),
    "names_sha256": HASH,
    "hashes": TEXT,
}


def describe(tower: Encoder) -> dict[str, Any]:
    """A model in values of `MODEL`: its projection by name, names and hashes of the rest."""
    others = tower.hashes()
    return {
        "projection": tower.name,
        "transposed": tower.transposed,
        "bias": tower.bias_name,
        "names_sha256": _names_sha256(sorted(others)),
        "hashes": "".join(others[name][:SHORT] for name in sorted(others)),
    }


def description(adapter: Adapter) -> dict[str, Any]:
    """What `describe` said when an adapter was made; {} where that was not by `forget`.

    Raises:
        ProblemError: something else stands in its place.
    """
    known = adapter.settings.get("model")
    if not isinstance(known, dict) or "hashes" not in known:
        return {}
    return check(known, MODEL, "model")


def upright(held: Tensor, adapter: Adapter) -> Tensor:
    """(w, d) of the projection's tensor as an adapter's model holds it."""
    return maybe_transpose(held, description(adapter).get("transposed", False))


def changed_sha256(adapter: Adapter, projection: Tensor, transposed: bool) -> list[str]:
    """SHA-256 of the tensor that an adapter makes of `W` (w, d): `W + Delta` in the dtype of W; and
    where W came from a file in half precision, as such a file gives the change back."""
    made = [adapter.changed(projection)]
    for half in (torch.float16, torch.bfloat16):
        rounded = projection.detach().to(half)
        if torch.equal(rounded.to(projection), projection):
            made.append(adapter.changed(rounded).to(projection))
    return list(dict.fromkeys(tensor_sha256(maybe_transpose(x, transposed)) for x in made))


def verify(model: nn.Module, adapter: Adapter, changed: Sequence[str]) -> None:
    """Refuse a model that is not the original with exactly this change and nothing else.

    Args:
        changed: what the changed projection's tensor may be, see `changed_sha256`; empty if that
            is not known.

    Raises:
        ProblemError: one line, which names the tensor that is wrong.
    """
    known = description(adapter)
    if not known:
        raise ProblemError("this adapter does not say what the rest of its model is")
    if not changed:
        raise ProblemError(
            "this adapter does not say what its change makes of the projection: load it with "
            "the original model first"
        )
    there, name, kept = tensors(unwrap_compiled(model)), known["projection"], known["hashes"]
    others = sorted(key for key in there if key != name)
    if name not in there or _names_sha256(others) != known["names_sha256"]:
        raise ProblemError(
            f"the model has other tensors than the one that this was made for ({name} and "
            f"{len(kept) // SHORT} others)"
        )
    if tensor_sha256(there[name]) not in changed:
        if projection_sha256(upright(there[name], adapter)) == adapter.projection_sha256:
            raise ProblemError(f"{name} is the original: nothing was applied")
        raise ProblemError(f"{name} is neither changed by this nor the original")
    wrong = [
        key
        for i, key in enumerate(others)
        if tensor_sha256(there[key])[:SHORT] != kept[i * SHORT : (i + 1) * SHORT]
    ]
    if wrong:
        more = f" and {len(wrong) - 1} others" if len(wrong) > 1 else ""
        raise ProblemError(f"{wrong[0]}{more}: not what it was")


def find(model: nn.Module, adapter: Adapter, original: Tensor | None = None) -> Encoder:
    """The projection of an adapter within a model, as a tower that reads no text: by name, else by
    what it holds.

    Args:
        original: `W` (w, d), by which a changed one is known that the adapter does not name.

    Raises:
        ProblemError: a model without it.
    """
    model = unwrap_compiled(model)
    there, known = tensors(model), description(adapter)
    name, shape = known.get("projection"), (adapter.left.shape[0], adapter.right.shape[1])
    if name in there and upright(there[name], adapter).shape == shape:
        bias = there.get(known.get("bias"))
        bias = None if bias is None else bias.detach()
        return Encoder(model, _unread, name, there[name], known["transposed"], bias, False)
    for name, x in there.items():
        for transposed in (False, True):
            if not x.is_floating_point() or x.shape != (shape[::-1] if transposed else shape):
                continue
            known = projection_sha256(maybe_transpose(x, transposed)) == adapter.projection_sha256
            if not known and original is not None:
                made = changed_sha256(adapter, original.to(x), transposed)
                known = tensor_sha256(x) in made
            if known:
                stem, _, last = name.rpartition(".")  # of a torch.nn.Linear
                bias = there.get(f"{stem}.bias") if last == "weight" else None
                bias = None if bias is None else bias.detach()
                return Encoder(model, _unread, name, x, transposed, bias, False)
    raise ProblemError(
        f"{type(model).__name__} does not hold the projection that the adapter was made for "
        f"({adapter.backbone})"
    )


def _unread(texts: list[str]) -> Any:
    raise ProblemError("this model was loaded without a tokenizer")


def _names_sha256(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()
