"""What a module holds: its tensors by name, and their hashes."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from forgetting.errors import ProblemError, shown
from forgetting.io import raw

SENTENCE = "sentence_embedding"  # what sentence-transformers calls the embedding of a text


def unwrap(model: Any) -> nn.Module:
    """The module that torch.compile or DataParallel wraps, the CLIP of a SentenceTransformer, or
    the module itself."""
    if not isinstance(model, nn.Module):
        raise ProblemError(f"model must be a torch module, not {shown(model)}")
    parallel = nn.DataParallel | nn.parallel.DistributedDataParallel
    while isinstance(model, parallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, parallel) else model._orig_mod
    if is_sentence_transformer(model):
        first, *others = model.children()
        inner, given = getattr(first, "model", None), getattr(first, "module_output_name", None)
        if hasattr(inner, "get_text_features") and given in (None, SENTENCE):
            if any(tensors(module) for module in others):
                raise ProblemError("a module behind the CLIP has weights, and images pass it too")
            model = inner
    return model


def is_sentence_transformer(model: nn.Module) -> bool:
    """Whether a module passes a dictionary on, as those of sentence-transformers do."""
    return any(kind.__name__ == "SentenceTransformer" for kind in type(model).__mro__)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its names, also where two names are one tensor."""
    found = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes, row by row."""
    digest = hashlib.sha256(json.dumps([str(tensor.dtype), list(tensor.shape)]).encode())
    digest.update(raw(tensor))
    return digest.hexdigest()


def others_sha256(model: nn.Module, name: str) -> str:
    """SHA-256 of the names and contents of all tensors of a model but one."""
    digest = hashlib.sha256()
    for key, value in sorted(tensors(model).items()):
        if key != name:
            digest.update(json.dumps([key, tensor_sha256(value)]).encode())
    return digest.hexdigest()


def maybe_transpose(matrix: Tensor, transposed: bool) -> Tensor:
    """`W` (w, d) of a tensor that holds `W` or `W^T`, or the other way round."""
    return matrix.detach().T if transposed and matrix.ndim == 2 else matrix.detach()


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors start at the same place in memory, as tied weights do."""
    stored = all(x.layout == torch.strided and x.numel() for x in (a, b))
    return a is b or (stored and a.data_ptr() == b.data_ptr())
