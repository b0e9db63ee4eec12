"""Checkpoints of any tool as plain tensors, and the text projection in them, found by its value: it
has many names and two orientations, (w, d), and (d, w) in a torch.nn.Linear."""

import hashlib
import io
import json
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from forgetting.adapter import Adapter, projection_sha256
from forgetting.errors import ProblemError, line, shown
from forgetting.io import FLOATS, foreign, naming, read_bytes, refuse_outside
from forgetting.models.modules import maybe_transpose
from forgetting.models.torchscript import read_torchscript

OPEN_CLIP_CONFIG, HF_CONFIG = "open_clip_config.json", "config.json"
SENTENCE_MODULES = "modules.json"  # in a folder of sentence-transformers
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# OpenAI's archives keep these three integers beside the weights.
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")
CLAMPED = 2e-7  # what converters to float16 put in the place of smaller numbers, and some more


def weight_files(
    base: str | Path, names: Sequence[str] = HF_WEIGHTS + OPEN_CLIP_WEIGHTS
) -> list[Path]:
    """The files that hold the weights of a checkpoint: itself, or the first of `names` in its
    folder, which may be split in several that `NAME.index.json` lists."""
    base = Path(base)
    if base.is_file():
        return [base]
    for name in names:
        index = base / f"{name}.index.json"
        if (base / name).is_file():
            return [base / name]
        if index.is_file():
            with foreign(f"{line(index)} does not map weights to files of its folder"):
                parts = set(read_json(index)["weight_map"].values())
                return [base / Path(part).name for part in sorted(parts)]
    raise ProblemError(f"{line(base)}: no such file, or no folder with {' or '.join(names)}")


def sentence_modules(folder: Path) -> dict[str, list[Path]]:
    """The modules of a folder of sentence-transformers, as paths in it ("" is the folder itself),
    each with its files of weights, if it has any; ProblemError for another layout."""
    path = folder / SENTENCE_MODULES
    with foreign(f"{line(path)} is no list of modules with their paths"):
        places = {str(x["path"]): folder / x["path"] for x in read_json(path)}
    found = {}
    for part, place in places.items():
        refuse_outside(place, folder)
        held = [x for name in HF_WEIGHTS for x in place.glob(f"{name}*")]
        found[part] = weight_files(place, HF_WEIGHTS) if held else []
    return found


def read_json(path: Path) -> Any:
    """The content of a JSON file; ProblemError if it is none."""
    with naming(path):
        data = read_bytes(path)
        with foreign("is not JSON"):
            return json.loads(data.decode("utf-8"))


def read_checkpoint(files: Sequence[str | Path]) -> tuple[dict[str, Tensor], str]:
    """The tensors of a checkpoint's files on the CPU, in their dtypes, and the SHA-256 of the very
    bytes that they were read from; ProblemError for what `parse_tensors` refuses."""
    tensors: dict[str, Tensor] = {}
    digests = []
    for file in files:
        with naming(file):
            data = read_bytes(file)
            digests.append(hashlib.sha256(data).hexdigest())
            tensors |= parse_tensors(data)
    return tensors, combined_sha256(digests)


def combined_sha256(digests: Sequence[str]) -> str:
    """One SHA-256 for the files of a checkpoint."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256(json.dumps(list(digests)).encode()).hexdigest()


def parse_tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a checkpoint file with this content: safetensors, what `torch.save` wrote (a
    state dict, plain or under "state_dict", with or without a "module." prefix), or a TorchScript
    archive. Nothing in it is run; ProblemError if it is anything but tensors of plain numbers."""
    with foreign("cannot be read as tensors without running code from it: give a state dict"):
        state = _parsed(data)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state:
        raise ProblemError(f"is no state dict: it holds a {type(state).__name__} or nothing")
    for name, x in state.items():
        if not isinstance(name, str) or not isinstance(x, Tensor):
            raise ProblemError(f"is no state dict: {shown(name)} is a {type(x).__name__}")
        odd = x.layout != torch.strided or x.is_quantized or x.is_nested or x.is_complex()
        # A tensor with a stride of 0 may say that it has more numbers than any memory.
        if odd or x.is_meta or x.numel() * x.element_size() > x.untyped_storage().nbytes():
            raise ProblemError(f"{shown(name)} holds no plain numbers, or not all of them")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): x for name, x in state.items()}
    return {name: x for name, x in state.items() if name not in NOT_WEIGHTS}


def _parsed(data: bytes) -> Any:
    if data[8:9] == b"{":  # safetensors: eight bytes of length, then JSON
        return safetensors.torch.load(data)
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return read_torchscript(archive)
    with warnings.catch_warnings():  # on odd pickle protocols: it is read or it is refused
        warnings.simplefilter("ignore", UserWarning)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


@dataclass(frozen=True)
class Found:
    """Where the projection of an adapter is."""

    name: str  # of the tensor
    transposed: bool  # whether it is (d, w) there
    exact: Tensor  # W (w, d) itself, of which the tensor may be a rounded copy

    def changed(self, adapter: Adapter, dtype: torch.dtype) -> Tensor:
        """`W + Delta`, summed in float64, rounded once, in the orientation of the tensor."""
        weight = adapter.changed(self.exact, dtype)
        return (weight.T if self.transposed else weight).contiguous()


def find(tensors: Mapping[str, Tensor], adapter: Adapter, original: Tensor | None = None) -> Found:
    """The one tensor that is the projection for which the adapter was made, or with `original`,
    W (w, d), a copy of it that was rounded to another dtype; ProblemError for none or several."""
    found: dict[str, Found] = {}
    for name, value in tensors.items():
        for transposed in (False, True):
            weight = maybe_transpose(value, transposed)
            if name not in found and _is_projection(weight, adapter, original):
                exact = weight if original is None else original
                found[name] = Found(name, transposed, exact.detach().cpu())
    if len(found) > 1:
        names = ", ".join(map(shown, found))
        raise ProblemError(f"the text projection is there more than once ({names}): it is shared")
    if not found:
        raise ProblemError(
            f"no tensor is the text projection that the adapter was made for ({adapter.backbone}): "
            "it is another model, or changed already; of a copy that was rounded, name the "
            "checkpoint that it came from (--original)"
        )
    return next(iter(found.values()))


def _is_projection(weight: Tensor, adapter: Adapter, original: Tensor | None) -> bool:
    """Whether (w, d) is the projection, or what becomes of it in the dtype of `weight`."""
    shape = (adapter.left.shape[0], adapter.right.shape[1])
    if weight.dtype not in FLOATS or weight.shape != shape or not weight.numel():
        return False
    if not weight.double().abs().max() < 1e30:  # NaN neither
        return False
    is_same = projection_sha256(weight) == adapter.projection_sha256
    if is_same or original is None:
        return is_same
    info, exact = torch.finfo(weight.dtype), original.double().cpu()
    slack = exact.abs() * (0.51 * info.eps) + (CLAMPED if info.bits == 16 else 0.0)
    return bool(((weight.double().cpu() - exact).abs() <= slack).all())


def read_projection(base: str | Path, adapter: Adapter) -> tuple[Tensor, Tensor | None]:
    """W (w, d) of an adapter from a checkpoint, a file or folder, and the bias (d,) of it: that
    which the adapter names, else one that stands beside the projection, if any."""
    tensors, _ = read_checkpoint(weight_files(base))
    with naming(base):
        found = find(tensors, adapter)
        named = None if adapter.model is None else adapter.model.bias
        if named and named not in tensors:
            raise ProblemError(f"the projection has a bias, {line(named)}, which is not in it")
        stem, _, last = found.name.rpartition(".")
        beside = f"{stem}.bias" if last == "weight" else None  # of a torch.nn.Linear
    return found.exact.clone(), tensors.get(named or beside)
