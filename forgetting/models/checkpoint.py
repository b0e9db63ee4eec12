"""Checkpoints of any tool as plain tensors, and the text projection in them, found by its value.

A projection has many names (`text_projection`, `text.text_projection.weight`, `text_model.head`)
and two orientations: (w, d) where it is multiplied from the right, (d, w) in a torch.nn.Linear.
What it is called does not matter here: an adapter knows the SHA-256 of its numbers.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from forgetting.adapter import Adapter, projection_sha256
from forgetting.errors import ProblemError, line, shown
from forgetting.io import FLOATS, naming
from forgetting.models.identity import description
from forgetting.models.torchscript import is_torchscript, read_torchscript

OPEN_CLIP_CONFIG, HF_CONFIG = "open_clip_config.json", "config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# OpenAI's archives keep these three integers beside the weights.
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")
CLAMPED = 2e-7  # what converters to float16 put in the place of smaller numbers, and some more


def weight_files(base: str | Path, names: tuple[str, ...] = HF_WEIGHTS + OPEN_CLIP_WEIGHTS) -> list:
    """The files that hold the weights of a checkpoint: itself, or those of its folder.

    Args:
        names: the file names to look for in a folder, the first that is there; each may be split
            in several, which `NAME.index.json` lists.

    Raises:
        ProblemError: there are none.
    """
    base = Path(base)
    if base.is_file():
        return [base]
    with naming(base):
        if not base.is_dir():
            raise ProblemError("no such file or folder")
        for name in names:
            index = base / f"{name}.index.json"
            if (base / name).is_file():
                return [base / name]
            if index.is_file():
                parts = sorted(set(_map(read_json(index), "weight_map").values()))
                if any(Path(str(part)).name != part for part in parts):
                    raise ProblemError(f"{index.name} names files outside of the folder")
                return [base / part for part in parts]
        raise ProblemError(f"no weights in this folder: none of {', '.join(names)}")


def read_json(path: Path) -> Any:
    """The content of a JSON file; ProblemError if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ProblemError(f"{line(path)} is no readable JSON ({line(error)})") from error


def _map(value: Any, key: str) -> dict:
    inner = value.get(key) if isinstance(value, dict) else None
    if not isinstance(inner, dict):
        raise ProblemError(f"has no object {key!r} in its index")
    return inner


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of one checkpoint file on the CPU, in the dtypes of the file.

    Reads safetensors, what `torch.save` wrote (a state dict, plain or under "state_dict", with or
    without a "module." prefix), and TorchScript archives. Nothing in them is run.

    Raises:
        ProblemError: no such file, or none that can be read as tensors.
    """
    path = Path(path)
    with naming(path):
        if not path.is_file():
            raise ProblemError("no such file")
        try:
            with open(path, "rb") as file:
                start = file.read(9)
            if start[8:] == b"{":  # safetensors: eight bytes of length, then JSON
                return load_file(path)
            if zipfile.is_zipfile(path) and is_torchscript(path):
                state = read_torchscript(path)
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
        except ProblemError:
            raise
        except Exception as error:  # the readers raise whatever foreign bytes lead them to
            reason = line(str(error).partition("\n")[0])
            raise ProblemError(
                f"cannot be read as tensors without running code from it ({reason})"
            ) from error
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
            raise ProblemError("is no state dict: it holds other things than tensors")
        if state and all(str(name).startswith("module.") for name in state):
            state = {name.removeprefix("module."): x for name, x in state.items()}
        return {name: x for name, x in state.items() if name not in NOT_WEIGHTS}


@dataclass(frozen=True)
class Found:
    """Where the projection of an adapter is.

    Attributes:
        name: of the tensor; transposed: whether it is (d, w) there.
        exact: W (w, d) itself, of which the tensor may be a rounded copy.
    """

    name: str
    transposed: bool
    exact: Tensor

    def changed(self, adapter: Adapter, dtype: torch.dtype) -> Tensor:
        """`W + Delta`, summed in float64, rounded once, in the orientation of the tensor."""
        delta = adapter.left.cpu().double() @ adapter.right.cpu().double()
        weight = (self.exact.double() + delta).to(dtype)
        return (weight.T if self.transposed else weight).contiguous()


def find(tensors: Mapping[str, Tensor], adapter: Adapter, original: Tensor | None = None) -> Found:
    """The one tensor that is the projection for which the adapter was made.

    Args:
        original: W (w, d); with it a copy that was rounded to another dtype is found as well.

    Raises:
        ProblemError: none is, or several are.
    """
    w, d = adapter.left.shape[0], adapter.right.shape[1]
    found, near = [], []
    for name, value in tensors.items():
        if value.dtype not in FLOATS or tuple(value.shape) not in ((w, d), (d, w)):
            continue
        near += [name] if "proj" in name and "text" in name else []
        for transposed in (False, True):
            weight = value.T if transposed else value
            if weight.shape == (w, d) and _is(weight, adapter, original):
                exact = weight if original is None else original
                found.append(Found(name, transposed, exact.detach().cpu()))
                break
    if len(found) > 1:
        names = ", ".join(shown(x.name) for x in found)
        raise ProblemError(f"the text projection is there more than once ({names}): it is shared")
    if not found:
        there = f" ({shown(near[0])} is another one, or changed already)" if near else ""
        raise ProblemError(
            f"no tensor is the text projection that the adapter was made for: ({w}, {d}) with "
            f"SHA-256 {adapter.projection_sha256[:12]}{there}; of a copy that was rounded to "
            "another dtype, name the checkpoint that it came from (--original)"
        )
    return found[0]


def _is(weight: Tensor, adapter: Adapter, original: Tensor | None) -> bool:
    """Whether (w, d) is the projection, or what becomes of it in the dtype of `weight`."""
    if not weight.numel() or not weight.double().abs().max() < 1e30:  # NaN neither
        return False
    if projection_sha256(weight) == adapter.projection_sha256:
        return True
    if original is None:
        return False
    info, exact = torch.finfo(weight.dtype), original.double().cpu()
    slack = exact.abs() * (0.51 * info.eps) + (CLAMPED if info.bits == 16 else 0.0)
    return bool(((weight.double().cpu() - exact).abs() <= slack).all())


def read_projection(base: str | Path, adapter: Adapter) -> tuple[Tensor, Tensor | None]:
    """W (w, d) of an adapter from a checkpoint, and the bias (d,) of it: that which the adapter
    names, else one that stands beside the projection, if any.

    Args:
        base: a file of weights, or a folder of Hugging Face's or open_clip's.

    Raises:
        ProblemError: it cannot be read, or holds no such projection, or not its bias.
    """
    tensors = {}
    for file in weight_files(base):
        tensors |= read_tensors(file)
    with naming(base):
        found, named = find(tensors, adapter), description(adapter).get("bias")
        stem, dot, last = found.name.rpartition(".")
        beside = f"{stem}.bias" if dot and last == "weight" else None
        bias = tensors.get(named, tensors.get(beside))
        if named and bias is None:
            raise ProblemError(f"the projection has a bias, {line(named)}, which is not in it")
    return found.exact.clone(), bias
