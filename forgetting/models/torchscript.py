"""The tensors of a TorchScript archive, as OpenAI publishes its models, without running it.

Its weights are a pickle in which modules are named by their class and tensors by where their
numbers are. Both are read as data: a module becomes an empty object, no other name is looked up.
"""

import pickle
from collections import OrderedDict
from typing import Any
from zipfile import ZipFile

import torch
from torch import Tensor

DTYPES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "LongStorage": torch.int64}


class _Module:
    """What a module of the archive becomes: its attributes."""


def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    return storage.as_strided(tuple(size), tuple(stride), offset)  # refuses what is out of range


def _list(values: Any, *_: Any) -> list:
    return list(values)


_LISTS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")
_KNOWN = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("collections", "OrderedDict"): OrderedDict,
    **{("torch.jit._pickle", name): _list for name in (*_LISTS, "restore_type_tag")},
}


class _Reader(pickle.Unpickler):
    def __init__(self, file: Any, archive: ZipFile, folder: str) -> None:
        super().__init__(file)
        self._archive, self._folder, self._storages = archive, folder, {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a model's weights")

    def persistent_load(self, saved: Any) -> Tensor:
        _, dtype, key, _, _ = saved
        if key not in self._storages:
            data = bytearray(self._archive.read(f"{self._folder}/data/{key}"))
            self._storages[key] = torch.frombuffer(data, dtype=dtype)
        return self._storages[key]


def read_torchscript(archive: ZipFile) -> dict[str, Tensor]:
    """Parameters and buffers of the archived model by their names, on the CPU. Raises whatever a
    foreign file leads to."""
    (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
    with archive.open(name) as file:
        model = _Reader(file, archive, name.rpartition("/")[0]).load()
    state: dict[str, Tensor] = {}
    _collect(model, "", state)
    return state


def _collect(module: _Module, prefix: str, state: dict[str, Tensor]) -> None:
    for name, value in vars(module).items():
        if isinstance(value, Tensor) and name != "attn_mask":  # which is no weight
            state[prefix + name] = value
        elif isinstance(value, _Module):  # one within itself ends in a RecursionError
            _collect(value, f"{prefix}{name}.", state)
