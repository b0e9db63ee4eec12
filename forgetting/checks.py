"""The door of the library: what a caller gives or a file holds is right, or refused in one line.

What a value may be is written down as data:

- `(accepts, words)`, a rule: a function that says whether a value is right, and that in words;
- `[shape]`: a list of such; `[shape, ...]`: one that is not empty;
- `{key: shape}`: an object with exactly these keys.

A tensor is given by its dtypes and dimensions: numbers, or words that stand for one number each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from forgetting.errors import ProblemError, shown

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LARGEST = 1e40  # of any number: products of four of them stay in the range of float64
MOST = 2**31  # of anything that is counted
DEEPEST = 32  # of values within values
Rule = tuple[Callable[[Any], bool], str]
Dims = Sequence[int | str]


def is_number(value: Any, largest: float = 1e300) -> bool:
    """Whether `value` is a finite number; true and false are none."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -largest <= value <= largest


def is_json(value: Any, depth: int = 0) -> bool:
    """Whether JSON can hold `value`: texts, finite numbers, lists and objects, not too deep."""
    if value is None or type(value) in (str, bool):
        return True
    if isinstance(value, dict):
        keys = all(type(key) is str for key in value)
        return keys and is_json(list(value.values()), depth)
    if isinstance(value, list | tuple):
        return depth < DEEPEST and all(is_json(item, depth + 1) for item in value)
    return is_number(value)


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON has no word for (an unreachable threshold)."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _in_range(value: Any) -> bool:
    """A number that solvers multiply: not too near to 0 either, but for 0 itself."""
    return is_number(value, LARGEST) and not 0 < abs(value) < 1 / LARGEST


def above(least: float) -> Rule:
    """A number above `least`."""
    words = f"a number above {least:g} in the range of 1e±40"
    return lambda x: _in_range(x) and x > least, words


def whole(least: int) -> Rule:
    """A whole number of at least `least`."""
    words = f"a whole number of at least {least}"
    return lambda x: isinstance(x, int) and is_number(x) and least <= x <= MOST, words


TEXT: Rule = (lambda x: type(x) is str, "a text")
HASH: Rule = (
    lambda x: type(x) is str and len(x) == 64 and not set(x) - set("0123456789abcdef"),
    "a SHA-256",
)
NUMBER: Rule = (_in_range, "a number in the range of 1e±40")
POSITIVE = above(0)
WEIGHT: Rule = (lambda x: _in_range(x) and x >= 0, "0 or more, at most 1e40")
FLAG: Rule = (lambda x: type(x) is bool, "true or false")
OBJECT: Rule = (lambda x: isinstance(x, dict) and is_json(x), "an object of finite values")


def either(word: Any, rule: Rule) -> Rule:
    """What `rule` accepts, or this one word."""
    words = f"{'null' if word is None else repr(word)} or {rule[1]}"
    return lambda x: (type(x) is type(word) and x == word) or rule[0](x), words


def check(value: Any, shape: Any, where: str) -> Any:
    """`value` itself, if it is of a shape; else a ProblemError in which `where` names it."""
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
        case (accepts, words):
            if not accepts(value):
                raise ProblemError(f"{where} must be {words}, not {shown(value)}")
    return value


def tensor(
    name: str,
    value: Any,
    dtypes: Iterable[torch.dtype],
    dims: Dims,
    known: dict[str, int] | None = None,
) -> Tensor:
    """`value`, a dense and finite tensor with data, cut off from gradients and inference mode.

    Args:
        name: what to call it in a message.
        known: what words among `dims` stand for; words that are new are added.
    """
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise ProblemError(f"{name} must be a torch tensor, not {kind}; torch.as_tensor makes one")
    dense = value.layout is torch.strided and not value.is_nested and not value.is_meta
    if not dense or value.dtype not in dtypes:
        words = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        kind = f"{value.dtype}, {value.layout} on {value.device}"
        raise ProblemError(f"{name} must be a dense tensor of {words}, not {kind}")
    shape, known = tuple(value.shape), {} if known is None else known
    words = ", ".join(f"{dim} = {known[dim]}" if dim in known else str(dim) for dim in dims)
    wanted = tuple(
        known.setdefault(dim, size) if isinstance(dim, str) else dim
        for dim, size in zip(dims, shape, strict=False)
    )
    if len(shape) != len(dims) or shape != wanted:
        kind = "matrix" if len(dims) == 2 else "vector"
        raise ProblemError(f"{name} must be a {kind} of shape ({words}), its shape is {shape}")
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


def check_tensors(
    values: Mapping[str, Any],
    table: Mapping[str, tuple[Iterable[torch.dtype], Dims]],
    known: Mapping[str, int] | None = None,
) -> None:
    """Refuse tensors that are not exactly those of `table`: name to dtypes and dimensions."""
    known = dict(known or {})
    for name in [*table, *values]:
        if name not in values or name not in table:
            has = "is missing" if name in table else "has no place here"
            raise ProblemError(f"the tensor {shown(name)} {has}")
    for name, (dtypes, dims) in table.items():
        tensor(name, values[name], dtypes, dims, known)


def matrix(name: str, value: Any, width: int | None = None, count: int | None = None) -> Tensor:
    """`value` as a matrix of numbers that can be multiplied, of so many columns and rows."""
    dims = ("rows" if count is None else count, "columns" if width is None else width)
    value = tensor(name, value, FLOATS, dims)
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
    if len({(x.dtype, x.device) for x in found}) != 1:
        kinds = [f"{n}: {x.dtype} on {x.device}" for n, x in zip(values, found, strict=True)]
        raise ProblemError(f"all tensors must share one dtype and device, got {', '.join(kinds)}")
    return found


def texts(
    name: str, hidden: Any, other: str, value: Any, square: bool = False, least: int = 1
) -> list[Tensor]:
    """Hidden states (k, w), k >= `least`, and what they are multiplied with: (w, d), or (w, w)."""
    hidden, value = matrices(**{name: hidden, other: value})
    if len(hidden) < least:
        raise ProblemError(f"{name} is empty: name at least one text to forget")
    if 0 in value.shape:
        raise ProblemError(f"a {other} of shape {tuple(value.shape)} has nothing to change")
    width = hidden.shape[1]
    return [hidden, matrix(other, value, width if square else None, width)]


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
    return tensor(name, value, (torch.bool,), ("rows" if rows is None else rows, columns))
