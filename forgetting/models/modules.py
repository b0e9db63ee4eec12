"""What a module holds: its tensors by name, their hashes, and how it is built."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from forgetting.errors import ProblemError, shown
from forgetting.io import raw

# First parts of the names of what no text meets; whatever else a model holds is its text side.
NOT_TEXT = (
    *("visual", "vision", "image", "logit_scale", "logit_bias", "text_decoder", "input_resolution"),
    *("trunk", "context_length", "vocab_size"),
)
QUANTISED = ("quantized", "bitsandbytes", "torchao", "awq", "gptq", "hqq", "quanto")


def unwrap_compiled(model: Any) -> nn.Module:
    """The module that torch.compile or DataParallel wraps, or the module itself; ProblemError for
    anything else."""
    if not isinstance(model, nn.Module):
        raise ProblemError(f"model must be a torch module, not {shown(model)}")
    parallel = nn.DataParallel | nn.parallel.DistributedDataParallel
    while isinstance(model, parallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, parallel) else model._orig_mod
    return model


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its names, also where two names are one tensor."""
    found = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes, row by row."""
    tensor = tensor.detach()
    digest = hashlib.sha256(json.dumps([str(tensor.dtype), list(tensor.shape)]).encode())
    digest.update(raw(tensor))
    return digest.hexdigest()


def maybe_transpose(matrix: Tensor, transposed: bool) -> Tensor:
    """`W` (w, d) of a tensor that holds `W` or `W^T`, or the other way round."""
    return matrix.detach().T if transposed and matrix.ndim == 2 else matrix.detach()


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors overlap in memory."""
    if a is b:
        return True
    try:
        if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
            return False
    except (RuntimeError, NotImplementedError):  # no storage, as of a sparse tensor
        return False
    spans = [(x.data_ptr(), x.data_ptr() + x.element_size() * _extent(x)) for x in (a, b)]
    return spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]


def _extent(x: Tensor) -> int:
    """From the first to the last element in memory, in elements."""
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return 1 + last if x.numel() else 0


def quantised(model: nn.Module) -> str:
    """The first module whose weights are quantised, in words; empty: none."""
    for name, module in model.named_modules():
        package = type(module).__module__.lower()
        if hasattr(module, "_packed_params") or any(word in package for word in QUANTISED):
            return f"{name or 'the model'} is a {type(module).__name__}"
    for name, x in tensors(model).items():
        if x.is_quantized or (name.endswith("weight") and x.dtype in (torch.int8, torch.uint8)):
            return f"{name} is {x.dtype}"
    return ""


def text_sha256(model: nn.Module, projection: Tensor) -> str:
    """SHA-256 of what a text's hidden state depends on: the tensors of the text side but the
    projection, and how the model is built."""
    digest = hashlib.sha256(json.dumps(_description(model)).encode())
    for name, tensor in tensors(model).items():
        if tensor is not projection and _of_text(name):
            digest.update(json.dumps([name, tensor_sha256(tensor)]).encode())
    return digest.hexdigest()


def _of_text(name: str) -> bool:
    return not name.split(".")[0].startswith(NOT_TEXT)


def _description(model: nn.Module) -> list[Any]:
    """How a model is built, as far as its numbers do not say: classes, activations, settings."""
    modules = [
        [name, type(module).__qualname__, module.extra_repr()]
        for name, module in model.named_modules()
        if _of_text(name)
    ]
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    drop = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    return [modules, {k: str(v) for k, v in sorted(settings.items()) if k not in drop}]
