"""Files that cannot lie unnoticed, and checks of tensors.

A file of this library is safetensors. Its metadata holds a `format`, fields as JSON, and the
SHA-256 of all of that together with every tensor.
"""

import hashlib
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from forgetting.errors import LARGEST, ProblemError, line, reason

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
STALE = 3600.0  # seconds after which nobody is writing a temporary file any more


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's numbers, row by row."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of metadata and of all tensors: their names, dtypes, shapes and bytes."""
    found = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(raw(tensor))
    return found.hexdigest()


def pack(kind: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a file; the same fields (JSON values) and tensors give the same bytes."""
    metadata = {name: json.dumps(value, allow_nan=False) for name, value in fields.items()}
    metadata["format"] = kind
    return container(tensors, metadata | {"sha256": digest(metadata, tensors)})


def container(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A file of safetensors, with its header in the order of names: the library's own is random.
    ProblemError for a tensor that such files do not hold."""
    with foreign("safetensors cannot hold these tensors"):
        data = save({k: x.detach().cpu().contiguous() for k, x in tensors.items()}, dict(metadata))
    header, start = _header(data)
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(data)[start:]])


def _header(data: bytes) -> tuple[dict[str, Any], int]:
    """The header of a file of safetensors, and where its data start."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), end


def unpack(path: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `pack` made: fields and tensors, which are as they were packed; ProblemError for
    another format, or a file that was damaged or changed since it was written."""
    with naming(path):
        metadata, tensors = read_safetensors(path)
        form, sealed = metadata.get("format"), metadata.pop("sha256", None)
        if form != kind:
            raise ProblemError(f"not a {kind} file, its format is {line(form)}; make it anew")
        if sealed != digest(metadata, tensors):
            raise ProblemError("damaged, or changed since it was written (its SHA-256 differs)")
        fields = {name: json.loads(x) for name, x in metadata.items() if name != "format"}
        return fields, tensors


def read_safetensors(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file of safetensors; ProblemError if it is none."""
    data = read_bytes(path)
    with foreign("truncated, or not a safetensors file"):
        return _header(data)[0].get("__metadata__", {}), load(data)


def read_bytes(path: str | Path) -> bytes:
    """The content of a regular file; ProblemError if it cannot be read."""
    try:
        if not Path(path).is_file():  # nor a pipe, which would be waited for
            raise FileNotFoundError("no such file")
        return Path(path).read_bytes()
    except (OSError, TypeError, ValueError) as error:
        raise ProblemError(f"cannot be read ({line(error)})") from error


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Let a ProblemError within say which file it is about."""
    try:
        yield
    except ProblemError as error:
        raise ProblemError(f"{line(path)}: {error}") from None


@contextmanager
def foreign(problem: str) -> Iterator[None]:
    """Whatever a library makes of somebody's files, or of the network, is one line."""
    try:
        yield
    except ProblemError:
        raise
    except Exception as error:
        raise ProblemError(f"{problem} ({reason(error)})") from error


def refuse_outside(file: Path, folder: Path) -> None:
    """ProblemError for a name or a link that leads out of `folder`, to what may not be meant to be
    read. The hub's cache keeps the files of its `snapshots` as links to `blobs` beside them."""
    folder = folder.resolve()
    allowed = [folder, *(x.parent / "blobs" for x in folder.parents if x.name == "snapshots")]
    if not any(file.resolve().is_relative_to(x) for x in allowed):
        raise ProblemError(f"{line(file)} leads out of the folder")


def refuse_existing(path: str | Path, overwrite: bool = False) -> None:
    """ProblemError if there is anything at `path`: a file, a folder, or a link to nowhere."""
    if not overwrite and os.path.lexists(path):
        raise ProblemError(f"{line(path)} exists; choose another name, or --overwrite")


@contextmanager
def atomic_path(path: str | Path, overwrite: bool = True) -> Iterator[Path]:
    """A path beside `path` at which to write a file or make a folder; it becomes `path` when all
    is written, and is removed if that fails. Missing folders above are made. `overwrite`: whether a
    file that is there may be replaced; of a folder the files are replaced one by one, and others
    stay. ProblemError: it cannot be written, or something, a device or a pipe is there already."""
    try:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            path.lstat()  # refuses a name that no file can have
        temporary = path.with_name(f".tmp-{secrets.token_hex(8)}{path.suffix}")
    except (OSError, TypeError, ValueError) as error:
        raise ProblemError(f"cannot write {line(path)} ({line(error)})") from error
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ProblemError(f"{line(path)} is not a regular file; choose another name")
    try:
        yield temporary
        refuse_existing(path, overwrite)
        if temporary.is_dir() and path.is_dir():
            for file in [x for x in temporary.rglob("*") if x.is_file()]:
                place = path / file.relative_to(temporary)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, place)
        else:
            os.replace(temporary, path)
    except OSError as error:
        if error.filename and temporary.name not in str(error):
            raise  # something else could not be read
        raise ProblemError(f"cannot write {line(path)} ({line(error)})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)


def write_bytes(data: bytes, path: str | Path, overwrite: bool = True) -> None:
    """Write a file by `atomic_path`."""
    with atomic_path(path, overwrite) as temporary:
        temporary.write_bytes(data)


def remove_stale(folder: str | Path) -> None:
    """Remove what killed processes left of `atomic_path` anywhere below a folder."""
    for path in Path(folder).rglob(f".tmp-{16 * '[0-9a-f]'}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def need(module: str, install: str | None = None) -> ModuleType:
    """A module that this library does not install by itself; ProblemError if it is not there."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ProblemError(
            f"this needs the package {package}, which cannot be imported ({line(error)}): "
            f"pip install '{install or package}'"
        ) from error


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON has no word for (an unreachable threshold)."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tensor(
    name: str, value: Any, dtypes: Iterable[torch.dtype], dims: Sequence[int | None]
) -> Tensor:
    """`value`, a dense and finite tensor of shape `dims` (None: any size), cut off from gradients
    and inference mode; ProblemError for anything else."""
    if not isinstance(value, Tensor):
        raise ProblemError(f"{name} must be a torch tensor, not {type(value).__name__}")
    dense = value.layout is torch.strided and not value.is_nested and not value.is_meta
    fits = dense and value.ndim == len(dims)
    fits = fits and all(d in (None, n) for d, n in zip(dims, value.shape, strict=True))
    if not fits or value.dtype not in dtypes:
        words = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        shape = ", ".join("any" if dim is None else str(dim) for dim in dims)
        found = f"{value.dtype} {tuple(value.shape) if dense else value.layout} on {value.device}"
        raise ProblemError(f"{name} must be a dense tensor of {words} ({shape}), not {found}")
    if not math.isfinite(largest(value)):
        raise ProblemError(f"{name} holds NaN or infinite values")
    value = value.detach()
    inference = value.is_inference() and not torch.is_inference_mode_enabled()
    return value.clone() if inference else value


def largest(value: Tensor) -> float:
    """The largest absolute value; 0 of nothing, NaN where one is."""
    if not value.numel():
        return 0.0
    low, high = (float(end) for end in value.detach().aminmax())  # copies nothing, as abs would
    return max(-low, high)


def matrix(name: str, value: Any, width: int | None = None, count: int | None = None) -> Tensor:
    """`value` as a matrix of numbers that can be multiplied, of `width` columns, `count` rows."""
    value = tensor(name, value, FLOATS, (count, width))
    size = largest(value)
    if size > LARGEST or 0 < size < 1 / LARGEST:
        raise ProblemError(
            f"{name} holds numbers up to {size:.1e}, whose squares are out of range; "
            f"scale it to between {1 / LARGEST:.0e} and {LARGEST:.0e}"
        )
    return value


def matrices(**values: Any) -> list[Tensor]:
    """Several matrices that are multiplied with one another: of one dtype, on one device."""
    found = [matrix(name, value) for name, value in values.items()]
    if len(kinds := {f"{x.dtype} on {x.device}" for x in found}) != 1:
        names = f"{', '.join(values)} must share one dtype and device"
        raise ProblemError(f"{names}, not {', '.join(sorted(kinds))}")
    return found


def vector(name: str, value: Any, count: int) -> Tensor:
    """`value` as (count,) numbers of 0 or more, float64."""
    value = tensor(name, value, FLOATS, (count,))
    value = matrix(name, value[None])[0].double()
    if len(value) and value.min() < 0:
        raise ProblemError(f"{name} must be 0 or more, the least is {float(value.min())}")
    return value


def indices(name: str, value: Any, count: int, below: int) -> Tensor:
    """`value` as (count,) int64 from 0 to `below` - 1."""
    value = tensor(name, value, (torch.int64,), (count,))
    if count and (value.min() < 0 or value.max() >= below):
        raise ProblemError(f"{name} must lie from 0 to {below - 1}")
    return value


def mask(name: str, value: Any, columns: int, rows: int | None = None) -> Tensor:
    """`value` as a matrix of truth values."""
    return tensor(name, value, (torch.bool,), (rows, columns))
