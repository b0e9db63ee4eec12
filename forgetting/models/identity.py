"""Which model an adapter belongs to: the projection in it, the rest of it, and what was applied."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from forgetting.adapter import Adapter, ModelIdentity, projection_sha256
from forgetting.errors import ProblemError, line
from forgetting.models import checkpoint, modules
from forgetting.models.encoder import PROBES, Encoder
from forgetting.models.modules import maybe_transpose, tensor_sha256, tensors

# On the module that holds a changed projection: by what, and the SHA-256 of the original.
APPLIED = "_clip_forget_applied"
# Parts of the name of a tensor that PEFT or a parametrisation keeps, and that a model does not, or
# not alone, compute with.
WRAPPED = {"base_layer", "original_module", "parametrizations"}


def identity(encoder: Encoder) -> ModelIdentity:
    """What an adapter says of the model that it was made for."""
    return ModelIdentity(encoder.name, encoder.transposed, encoder.bias_name, encoder.others_sha256)


def texts_sha256(encoder: Encoder, templates: Sequence[str]) -> str:
    """SHA-256 of what hidden states depend on beside their texts: encoder, tokenizer, prompts."""
    tokens = encoder.tokens_sha256([*PROBES, "A MIXED text, with: punctuation & 12 3 naïve ends"])
    parts = [encoder.fingerprint, tokens, list(templates)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


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
    """ProblemError for a model that is not the original with exactly this change and nothing else.
    `changed`: what the changed projection's tensor may be, see `changed_sha256`."""
    known, model = adapter.model, modules.unwrap(model)
    if known is None:
        raise ProblemError("this adapter does not say what the rest of its model is")
    if not changed:
        raise ProblemError("the changed projection is not known: load it with the original first")
    held = tensors(model).get(known.projection)
    if held is None or tensor_sha256(held) not in changed:
        raise ProblemError(
            f"{known.projection} is not what this change makes of the original: it was not "
            "applied, or something else was too"
        )
    if modules.others_sha256(model, known.projection) != known.others_sha256:
        raise ProblemError(
            f"another tensor than {known.projection} is not what it was in the model that this "
            "was made for, is missing, or is new"
        )


def find(model: nn.Module, adapter: Adapter, original: Tensor | None = None) -> Encoder:
    """The projection of an adapter within a model, as an encoder that reads no text: by name, else
    by what it holds, a changed one by `original` (w, d)."""
    model = modules.unwrap(model)
    there, known = tensors(model), adapter.model
    shape = (adapter.left.shape[0], adapter.right.shape[1])
    held = None if known is None else there.get(known.projection)
    if held is not None and maybe_transpose(held, known.transposed).shape == shape:
        name, transposed = known.projection, known.transposed
    else:
        try:
            found = checkpoint.find(there, adapter)
        except ProblemError:
            if original is None:
                raise
            changed = projection_sha256(adapter.changed(original))
            found = checkpoint.find(there, replace(adapter, projection_sha256=changed))
        name, transposed = found.name, found.transposed
    if WRAPPED.intersection(name.split(".")):
        raise ProblemError(
            f"the projection {name} is wrapped, so that a change of it may do nothing: take out "
            "what wraps it (of PEFT: merge_and_unload() or unload())"
        )
    refuse_tied(model, name)
    return Encoder(model, None, name, there[name], transposed, bias=None, normalised=False)


def refuse_tied(model: nn.Module, name: str) -> None:
    """ProblemError if a tensor of a model is another one too, which would change with it."""
    there = tensors(model)
    tied = [key for key, x in there.items() if key != name and modules.share_memory(x, there[name])]
    if tied:
        raise ProblemError(f"tied weights: the projection {name} is {', '.join(tied)} too")


def refuse_other_rest(encoder: Encoder, adapter: Adapter) -> None:
    """ProblemError for a model of the class that an adapter was made for, with its projection, of
    which another tensor differs."""
    known = adapter.model
    # Of another class, or another package's, tensors have other names.
    of_class = known and (known.projection, adapter.backbone) == (encoder.name, encoder.kind)
    if of_class and encoder.others_sha256 != known.others_sha256:
        raise ProblemError(
            f"another tensor than {encoder.name} is not what it was in the model that this was "
            "made for: it is another revision, or was trained since (Forgotten.load takes it)"
        )


def set_applied(encoder: Encoder, adapter: Adapter | None) -> None:
    """Note on a model that its projection is changed by an adapter; None: by none."""
    applied = (adapter.classes, adapter.projection_sha256) if adapter else ((), "")
    setattr(_holder(encoder), APPLIED, applied)


def refuse_applied(encoder: Encoder) -> None:
    """ProblemError if a model's projection was changed by an adapter and not given back."""
    names, original = getattr(_holder(encoder), APPLIED, ((), ""))
    if names and projection_sha256(encoder.projection) != original:
        raise ProblemError(
            f"the model has forgotten {line(', '.join(names))} already, and changes do not add up: "
            "undo that, and forget all names at once or join the adapters (clip-forget compose)"
        )


def _holder(encoder: Encoder) -> nn.Module:
    """The module that holds the projection."""
    return encoder.model.get_submodule(encoder.name.rpartition(".")[0])
