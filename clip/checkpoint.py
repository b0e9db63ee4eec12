"""Read a CLIP state dict from any file that people have, without running anything from it."""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from clip.architectures import ARCHITECTURES, OPENAI_FILES, Architecture
from forgetting.errors import ProblemError
from forgetting.models.checkpoint import NOT_WEIGHTS


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a CLIP checkpoint on the CPU, in the dtypes of the file.

    Reads safetensors, a `torch.save`d state dict (plain, or under "state_dict", with or without
    a "module." prefix), and OpenAI's TorchScript archives. An archive is a program: it is run
    only if its SHA-256 is one that OpenAI published.

    Raises ProblemError, one line: a file that is missing, empty, a folder, truncated, foreign, a
    program, or holds NaN.
    """
    path = Path(path)
    require_file(path)
    try:
        data = path.read_bytes()  # read once: what is hashed is what is loaded
    except OSError as error:
        raise ProblemError(f"weights {path} cannot be read ({error.strerror})") from error
    if not data:
        raise ProblemError(f"weights {path} is empty")
    try:
        loaded = _parse(path, data)
    except ProblemError:
        raise
    except Exception as error:  # the readers raise whatever foreign bytes lead them to
        raise ProblemError(_broken(path, data, error)) from error
    return _tensors_only(path, loaded)


def require_file(path: Path) -> None:
    """ProblemError if there is no file at `path`."""
    if not path.is_file():
        kind = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise ProblemError(f"weights {path} {kind}")


def load_into(model: nn.Module, state: dict[str, Tensor], arch: Architecture, path: Path) -> None:
    """Load `state` into `model` in float32; ProblemError as `check_fit`."""
    check_fit(model, state, arch, path)
    model.load_state_dict({key: value.float() for key, value in state.items()}, strict=True)


def check_fit(model: nn.Module, state: dict[str, Tensor], arch: Architecture, path: Path) -> None:
    """ProblemError saying what the file looks like if it is not exactly this architecture."""
    problem = _difference(model.state_dict(), state)
    if problem:
        raise ProblemError(
            f"weights {path} are not those of {arch.name}: they look like {describe(state)} "
            f"({problem})"
        )


def describe(state: dict[str, Tensor]) -> str:
    """What a state dict looks like, judged by the names and shapes of its tensors."""
    for arch in ARCHITECTURES.values():
        with torch.device("meta"):  # shapes without memory
            if not _difference(arch.build().state_dict(), state):
                return arch.name
    kernel = state.get("visual.conv1.weight")
    if kernel is None or kernel.ndim != 4 or "text_projection" not in state:
        return "no CLIP of OpenAI's layout"
    if "visual.proj" in state:
        return f"another CLIP, a ViT of width {kernel.shape[0]}, patch {kernel.shape[-1]}"
    return f"another CLIP, a ResNet of width {2 * kernel.shape[0]}"


def _difference(expected: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    """The first way in which `state` does not fit the tensors of a model; empty if it fits."""
    # Counters of batch normalisation play no part in inference and older files lack them.
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    if missing:
        return f"{missing[0]} is missing"
    for key, tensor in state.items():
        if key not in expected:
            return f"{key} is not part of it"
        if tensor.shape != expected[key].shape:
            return f"{key} is {tuple(tensor.shape)}, not {tuple(expected[key].shape)}"
    return ""


def _parse(path: Path, data: bytes) -> Any:
    """The object in the file: for all that we accept, a mapping of names to tensors."""
    if data[8:9] == b"{":  # safetensors: eight bytes of length, then JSON
        return load_safetensors(data)
    if zipfile.is_zipfile(io.BytesIO(data)):
        members = zipfile.ZipFile(io.BytesIO(data)).namelist()
        if any("/code/" in name or name.endswith("constants.pkl") for name in members):
            digest = hashlib.sha256(data).hexdigest()
            if digest not in OPENAI_FILES.values():
                raise ProblemError(
                    f"weights {path} is a TorchScript program (sha256 {digest[:16]}…) that is none "
                    "of OpenAI's published files, so it is not run; save its state dict instead"
                )
            with warnings.catch_warnings():  # deprecated, but that is what OpenAI published
                warnings.simplefilter("ignore", FutureWarning)
                return torch.jit.load(io.BytesIO(data), map_location="cpu").state_dict()
    with warnings.catch_warnings():  # on odd pickle protocols: it is read or it is refused
        warnings.simplefilter("ignore", UserWarning)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _broken(path: Path, data: bytes, error: Exception) -> str:
    """One line for a file that could not be parsed."""
    if isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error):
        return (
            f"weights {path} holds code or objects beside tensors and was not run; use a state dict"
        )
    if data[:2] == b"PK" or data[8:9] == b"{":
        return f"weights {path} is truncated or damaged ({len(data)} bytes); get it again"
    return (
        f"weights {path} is no checkpoint that can be read without running it; "
        "give a state dict (torch.save), safetensors, or OpenAI's archive"
    )


def _tensors_only(path: Path, loaded: Any) -> dict[str, Tensor]:
    """The state dict within `loaded`, without prefix and without OpenAI's three integers."""
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not loaded:
        raise ProblemError(f"weights {path} holds a {type(loaded).__name__}, not a state dict")
    state: dict[str, Tensor] = {}
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ProblemError(
                f"weights {path}: {name!r} is a {type(value).__name__}, not a tensor"
            )
        special = value.layout != torch.strided or value.is_quantized or value.is_nested
        if special or value.is_meta or value.is_complex():
            raise ProblemError(f"weights {path}: {name} holds no plain numbers, or none at all")
        state[name] = value
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    for name in NOT_WEIGHTS:
        state.pop(name, None)
    for name, value in state.items():
        if not torch.isfinite(value.float()).all():
            raise ProblemError(f"weights {path}: {name} holds NaN or infinite values")
    return state
