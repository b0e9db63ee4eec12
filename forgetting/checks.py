"""The door of the library: a caller gives a plain tensor or number, or is refused in one line."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LARGEST = 1e40  # of any number: products of four of them stay in the range of float64
MOST = 2**31  # of anything that is counted


class ProblemError(ValueError):
    """Input that no solver can work on; the message is one line."""


def matrix(name: str, value: object, width: int | None = None, count: int | None = None) -> Tensor:
    """`value` as a plain matrix of floating point numbers, without a gradient.

    Args:
        name: what to call it in a message; width, count: the columns and rows that it must have.

    Raises:
        ProblemError: no tensor, another shape or kind, NaN, or numbers whose squares overflow.
    """
    value = plain(name, value, DTYPES)
    shape = tuple(value.shape)
    if value.ndim != 2 or width not in (None, shape[1]) or count not in (None, shape[0]):
        wanted = ", ".join("any" if size is None else str(size) for size in (count, width))
        raise ProblemError(f"{name} must be a matrix of shape ({wanted}), its shape is {shape}")
    if not torch.isfinite(value).all():
        raise ProblemError(f"{name} holds NaN or infinite values")
    largest = float(value.abs().max()) if value.numel() else 0.0
    if largest > LARGEST or 0 < largest < 1 / LARGEST:
        raise ProblemError(
            f"{name} holds numbers up to {largest:.1e}, whose squares are out of range; "
            f"scale it to between {1 / LARGEST:.0e} and {LARGEST:.0e}"
        )
    return value


def matrices(width: int | None = None, **values: object) -> list[Tensor]:
    """Several matrices that are multiplied with one another: of one dtype, on one device."""
    found = [matrix(name, value, width) for name, value in values.items()]
    if len({(x.dtype, x.device) for x in found}) != 1:
        kinds = ", ".join(
            f"{n}: {x.dtype} on {x.device}" for n, x in zip(values, found, strict=True)
        )
        raise ProblemError(f"all tensors must share one dtype and device, got {kinds}")
    return found


def vector(name: str, value: object, count: int) -> Tensor:
    """`value` as (count,) numbers of 0 or more, float64."""
    value = matrix(name, value[None] if isinstance(value, Tensor) else value, count, 1)[0].double()
    if len(value) and value.min() < 0:
        raise ProblemError(f"{name} must be 0 or more, the least is {float(value.min())}")
    return value


def indices(name: str, value: object, count: int, below: int) -> Tensor:
    """`value` as (count,) int64 from 0 to `below` - 1."""
    value = plain(name, value, (torch.int64,))
    if value.shape != (count,):
        raise ProblemError(f"{name} must have shape ({count},), its shape is {tuple(value.shape)}")
    if count and (value.min() < 0 or value.max() >= below):
        raise ProblemError(f"{name} must lie from 0 to {below - 1}")
    return value


def mask(name: str, value: object, rows: int | None, columns: int) -> Tensor:
    """`value` as a matrix of truth values."""
    value = plain(name, value, (torch.bool,))
    shape = tuple(value.shape)
    if value.ndim != 2 or shape[1] != columns or rows not in (None, shape[0]):
        wanted = f"({'any' if rows is None else rows}, {columns})"
        raise ProblemError(f"{name} must be a mask of shape {wanted}, its shape is {shape}")
    return value


def number(name: str, value: object, above: float = -LARGEST) -> float:
    """`value` if it is a finite number above `above`, not too near to 0 but for 0 itself."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    good = good and -LARGEST <= value <= LARGEST and value > above
    if not good or 0 < abs(value) < 1 / LARGEST:
        wanted = "" if above == -LARGEST else f" above {above:g}" if above else " above 0"
        raise ProblemError(
            f"{name} must be a number{wanted} in the range of 1e±40, got {shown(value)}"
        )
    return value


def weight(name: str, value: object) -> float:
    """`value` if it is a number of 0 or more."""
    try:
        number(name, value, above=-1 / LARGEST)
    except ProblemError as error:
        raise ProblemError(f"{name} must be 0 or more, at most 1e40, got {shown(value)}") from error
    return value


def whole(name: str, value: object, least: int = 1) -> int:
    """`value` if it is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST:
        raise ProblemError(f"{name} must be a whole number of at least {least}, got {shown(value)}")
    return value


def plain(name: str, value: object, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """A dense tensor of one of `dtypes` with data, cut off from gradients and inference mode."""
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise ProblemError(f"{name} must be a torch tensor, not {kind}; torch.as_tensor makes one")
    dense = value.layout == torch.strided and not value.is_nested and not value.is_meta
    if not dense or value.dtype not in dtypes:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ProblemError(
            f"{name} must be a dense tensor of {known}, got {value.dtype}, {value.layout} on "
            f"{value.device}"
        )
    value = value.detach()
    return (
        value.clone() if value.is_inference() and not torch.is_inference_mode_enabled() else value
    )


def shown(value: object) -> str:
    """A value in a message: one short line."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # more digits than Python prints, or too deep
        text = f"a {type(value).__name__} that is too long"
    return text if len(text) <= 60 else f"{text[:57]}..."
