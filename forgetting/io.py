"""Files that cannot lie unnoticed: how this library stores tensors, and what it reads back.

A file is safetensors. Its metadata holds a `format`, fields as JSON (of shapes as in
`forgetting.checks`), and the SHA-256 of all of that together with every tensor.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from forgetting.checks import check
from forgetting.errors import ProblemError, line, shown

DTYPES = {  # as safetensors calls and orders them
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
UNREADABLE = (OSError, SafetensorError, ValueError, TypeError, RuntimeError, AttributeError)


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's numbers, row by row and little-endian; numpy is not needed."""
    tensor = tensor.detach().cpu().contiguous().reshape(-1)
    size = tensor.element_size()
    if sys.byteorder == "big" and size > 1:
        tensor = tensor.view(torch.uint8).reshape(-1, size).flip(1).contiguous().reshape(-1)
    count = tensor.numel() * tensor.element_size()
    if not count:
        return memoryview(b"")
    held = (ctypes.c_ubyte * count).from_address(tensor.data_ptr())
    held.tensor = tensor  # lives as long as the view of its memory
    return memoryview(held).cast("B")


def digest(metadata: dict[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of metadata and of all tensors: their names, dtypes, shapes and bytes."""
    found = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(raw(tensor))
    return found.hexdigest()


def pack(kind: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a file; the same fields and tensors give the same bytes."""
    metadata = {"format": kind}
    metadata |= {name: json.dumps(value, allow_nan=False) for name, value in fields.items()}
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    return container(tensors, metadata | {"sha256": digest(metadata, tensors)})


def container(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A file of safetensors. The library's own writer needs numpy, and orders its header by chance;
    this one orders all as that one orders the data, and the header by name.

    Raises:
        ProblemError: a tensor of a dtype that such files do not hold.
    """
    for name, x in tensors.items():
        if x.dtype not in DTYPES:
            raise ProblemError(f"{shown(name)} is {x.dtype}, which safetensors does not hold")
    order = sorted(tensors, key=lambda name: (-list(DTYPES).index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name in order:
        end = start + tensors[name].numel() * tensors[name].element_size()
        kind, shape = DTYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    data = [bytes(raw(tensors[name])) for name in order]
    return b"".join([len(text).to_bytes(8, "little"), text, *data])


def unpack(
    path: str | Path,
    kind: str,
    shape: dict[str, Any],
    older: str | None = None,
    unsealed: str | None = None,
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Read what `pack` made: format, fields and tensors, which are as they were packed.

    Args:
        kind: the format; shape: that of its fields.
        older: a format with the same fields and other tensors; unsealed: one whose files say no
            digest and may lack fields.

    Raises:
        ProblemError: no such file, another format, damaged or changed since it was written, fields
            of another shape; one line that names the file.
    """
    with naming(path):
        try:
            if not Path(path).is_file():  # nor a pipe, which would be waited for
                raise FileNotFoundError("no such file")
            # safetensors reads no name that is not UTF-8, and calls what may not be read absent.
            with open(path, "rb") as raw, safe_open(_name(raw), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except UNREADABLE as error:
            raise ProblemError(f"not a readable {kind} file ({line(error)})") from error
        form = metadata.get("format")
        if form is None or form not in (kind, older, unsealed):
            raise ProblemError(f"not a {kind} file (its format is {shown(form)})")
        sealed = metadata.pop("sha256", None)
        if sealed != (None if form == unsealed else digest(metadata, tensors)):
            raise ProblemError(
                "damaged, or changed since it was written: its content has another SHA-256 than "
                "it says"
            )
        del metadata["format"]
        fields = {}
        for name, text in metadata.items():
            try:
                fields[name] = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ProblemError(f"{shown(name)} is no JSON ({error})") from error
        here = {name: shape[name] for name in shape if name in fields or form != unsealed}
        return form, check(fields, here, "metadata"), tensors


def _name(file: IO) -> str:
    """A name of an open file in plain letters."""
    return f"/dev/fd/{file.fileno()}" if os.name == "posix" else file.name


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Let a ProblemError within say which file it is about."""
    try:
        yield
    except ProblemError as error:
        raise ProblemError(f"{line(path)}: {error}") from None


def write_bytes(data: bytes, path: str | Path, durable: bool = True, replace: bool = True) -> None:
    """Write a file, which appears whole or not at all; missing folders are made.

    Args:
        durable: wait until the disk has it, and remove what killed processes left beside it.
            Without that a power cut may leave an empty file, which whoever keeps its digest
            elsewhere will notice.
        replace: whether a file that is there may be replaced.

    Raises:
        ProblemError: the place cannot be written, or is taken.
    """
    try:
        path = Path(path)
        # Made neither by tempfile nor by safetensors' save_file: their files are private (0600).
        temporary = path.with_name(f".tmp-{secrets.token_hex(8)}.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".tmp-{16 * '[0-9a-f]'}.safetensors") if durable else ():
            with suppress(OSError), open(left) as file:
                if _lock(file, wait=False):  # whoever was writing it is gone
                    left.unlink()
        try:
            with open(temporary, "wb") as file:
                _lock(file)
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
                (os.replace if replace else _settle)(temporary, path)
        finally:
            with suppress(OSError):  # gone already
                temporary.unlink()
    except (OSError, ValueError) as error:
        raise ProblemError(f"cannot write {line(path)} ({error})") from error


def _lock(file: IO, wait: bool = True) -> bool:
    """Lock a file until it is closed; whether that could be done."""
    try:
        import fcntl  # not on every system; without it nothing is removed

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError):
        return False
    return True


def _settle(temporary: Path, path: Path) -> None:
    """Put a file where none is, whoever else is about to."""
    try:
        try:
            os.link(temporary, path)  # unlike a rename it fails where something is already
        except FileExistsError:
            raise
        except OSError:  # a disk without links
            open(path, "xb").close()
            os.replace(temporary, path)
    except FileExistsError:
        raise ProblemError(f"{line(path)} exists and is not overwritten") from None


def refuse_taken(path: str | Path) -> None:
    """ProblemError if there is anything at `path`: a file, a folder, or a link to nowhere."""
    if os.path.lexists(path):
        raise ProblemError(f"{line(path)} exists and is not overwritten; choose another name")


@contextmanager
def new_place(path: str | Path) -> Iterator[Path]:
    """A path beside `path` at which to write a file or make a folder; it becomes `path` when all
    is written, and is removed if that fails. Missing folders above are made.

    Raises:
        ProblemError: something is at `path` already, or the place cannot be written.
    """
    path = Path(path)
    refuse_taken(path)
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            for file in temporary.rglob("*") if temporary.is_dir() else (temporary,):
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
            if temporary.is_dir():
                refuse_taken(path)
                os.rename(temporary, path)
            else:
                _settle(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            with suppress(OSError):  # gone already
                temporary.unlink()
    except OSError as error:
        raise ProblemError(f"cannot write {line(path)} ({error})") from error


def need(module: str, install: str | None = None) -> ModuleType:
    """A module that this library does not install by itself.

    Raises:
        ProblemError: it is not there; the message says what to install.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ProblemError(
            f"this needs the package {package}, which cannot be imported ({line(error)}): "
            f"pip install '{install or package}'"
        ) from error
