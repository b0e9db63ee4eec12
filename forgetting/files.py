"""Files that cannot lie unnoticed: how this library stores tensors, and what it reads back.

A file is safetensors. Its metadata holds a `format`, fields as JSON, and the SHA-256 of all of
that together with every tensor. What a field may hold is written down as data:

- a function `rule(where, value)` that raises ProblemError, such as those of `checks`;
- `[shape]`: a list of such; `[shape, ...]`: one that is not empty;
- `{key: shape}`: an object with exactly these keys.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from forgetting.checks import ProblemError, plain, shown

DEEPEST = 32  # of values within values


def text(where: str, value: Any) -> None:
    """A text, also one that cannot be shown."""
    if type(value) is not str:
        raise ProblemError(f"{where} must be a text, not {shown(value)}")


def sha256(where: str, value: Any) -> None:
    """A SHA-256 as 64 small hexadecimal digits."""
    if type(value) is not str or not re.fullmatch("[0-9a-f]{64}", value):
        raise ProblemError(f"{where} must be a SHA-256, not {shown(value)}")


def json_object(where: str, value: Any) -> None:
    """An object that JSON can hold: of texts, finite numbers, lists and objects, not too deep."""
    if not isinstance(value, dict) or not _is_json(value, 0):
        raise ProblemError(f"{where} must be an object of finite values, not {shown(value)}")


def _is_json(value: Any, depth: int) -> bool:
    if isinstance(value, dict | list | tuple):
        inner = value.values() if isinstance(value, dict) else value
        keys = all(type(key) is str for key in value) if isinstance(value, dict) else True
        return keys and depth < DEEPEST and all(_is_json(item, depth + 1) for item in inner)
    plain_number = type(value) in (int, float) and -1e300 < value < 1e300
    return value is None or type(value) in (str, bool) or plain_number


def line(value: Any) -> str:
    """A text or path in a message: whatever would break the line, or cannot be shown, escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


def check(value: Any, shape: Any, where: str) -> None:
    """Refuse a value of another shape; `where` names it in the ProblemError."""
    match shape:
        case dict():
            if not isinstance(value, dict) or value.keys() != shape.keys():
                has = shown(sorted(map(str, value)) if isinstance(value, dict) else value)
                raise ProblemError(f"{where} must be an object of {', '.join(shape)}, not {has}")
            for key, inner in shape.items():
                check(value[key], inner, f"{where}.{key}")
        case list():
            if not isinstance(value, list | tuple) or len(value) < len(shape) - 1:
                least = " that is not empty" if len(shape) > 1 else ""
                raise ProblemError(f"{where} must be a list{least}, not {shown(value)}")
            for i, item in enumerate(value):
                check(item, shape[0], f"{where}.{i}")
        case _:
            shape(where, value)


def check_tensors(
    tensors: Mapping[str, Any],
    table: Mapping[str, tuple[tuple[torch.dtype, ...], Sequence[int | str]]],
    sizes: Mapping[str, int] | None = None,
) -> None:
    """Refuse tensors that are not exactly those of `table`, dense and finite.

    Args:
        table: for each name the dtypes that it may have, and its shape: numbers, or words that
            stand for one number everywhere; sizes: what some of the words stand for.
    """
    known = dict(sizes or {})
    for name in [*table, *tensors]:
        if name not in tensors or name not in table:
            has = "is missing" if name in table else "has no place here"
            raise ProblemError(f"the tensor {shown(name)} {has}")
    for name, (dtypes, dims) in table.items():
        tensor = plain(name, tensors[name], dtypes)
        shape = tuple(tensor.shape)
        wanted = tuple(
            dim if isinstance(dim, int) else known.setdefault(dim, size)
            for dim, size in zip(dims, shape, strict=False)
        )
        if len(shape) != len(dims) or shape != wanted:
            words = ", ".join(f"{dim} = {known[dim]}" if dim in known else str(dim) for dim in dims)
            raise ProblemError(f"{name} has the shape {shape}, expected ({words})")
        if not torch.isfinite(tensor).all():
            raise ProblemError(f"{name} holds NaN or infinite values")


def digest(metadata: dict[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of metadata and of all tensors: their names, dtypes, shapes and bytes."""
    found = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def pack(kind: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a file; the same fields and tensors give the same bytes."""
    # Copies: safetensors refuses tensors that share memory.
    tensors = {name: x.detach().cpu().clone().contiguous() for name, x in tensors.items()}
    metadata = {"format": kind}
    metadata |= {name: json.dumps(value, allow_nan=False) for name, value in fields.items()}
    data = save(tensors, metadata | {"sha256": digest(metadata, tensors)})
    # The library orders its header by chance. Sorted and padded to 8 bytes it means the same.
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:start]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[start:]


def unpack(
    path: str | Path, kind: str, shape: dict[str, Any], unsealed: str | None = None
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Read what `pack` made: format, fields and tensors, which are as they were packed.

    Args:
        kind: the format; shape: that of its fields.
        unsealed: an older format, whose files say no digest and may lack fields.

    Raises:
        ProblemError: no such file, another format, damaged or changed since it was written, fields
            of another shape; one line that names the file.
    """
    try:
        if not Path(path).is_file():  # nor a pipe, which would be waited for
            raise FileNotFoundError("no such file")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise ProblemError(f"{line(path)}: not a readable {kind} file ({line(error)})") from error
    form = metadata.get("format")
    if form is None or form not in (kind, unsealed):
        raise ProblemError(f"{line(path)}: not a {kind} file (its format is {shown(form)})")
    sealed = metadata.pop("sha256", None)
    if sealed != (digest(metadata, tensors) if form == kind else None):
        raise ProblemError(
            f"{line(path)}: damaged, or changed since it was written: its content has another "
            "SHA-256 than it says"
        )
    del metadata["format"]
    fields = {}
    for name, content in metadata.items():
        try:
            fields[name] = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ProblemError(f"{line(path)}: {shown(name)} is no JSON ({error})") from error
    with naming(path):
        known = shape if form == kind else {name: shape[name] for name in shape if name in fields}
        check(fields, known, "metadata")
    return form, fields, tensors


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
        durable: wait until the disk has it. Without that a power cut may leave an empty file, which
            whoever keeps its digest elsewhere will notice.
        replace: whether a file that is there may be replaced.

    Raises:
        ProblemError: the place cannot be written, or is taken.
    """
    try:
        path = Path(path)
        # Made neither by tempfile nor by safetensors' save_file: their files are private (0600).
        temporary = path.with_name(f".tmp-{secrets.token_hex(8)}.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            (os.replace if replace else _settle)(temporary, path)
        finally:
            with suppress(OSError):  # gone already
                temporary.unlink()
    except (OSError, ValueError) as error:
        raise ProblemError(f"cannot write {line(path)} ({error})") from error


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
