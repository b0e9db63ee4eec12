"""Settings as dataclass fields: default, range and meaning stand beside the code that uses them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import Field, field, fields
from typing import Any

from forgetting.errors import ProblemError, shown


def setting(
    default: Any,
    help: str,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] = (),
    above: float | None = None,
    optional: bool = False,
) -> Any:
    """A dataclass field with its meaning and range.

    Args:
        default: its type is the setting's type; where it is None, a number is meant.
        help: one line without a full stop, shown by `--help` and in docs/settings.md.
        low, high: inclusive bounds; above: an exclusive lower bound.
        choices: words that are allowed; beside a number they stand for it ("auto").
        optional: whether None is allowed ("chosen from the names").
    """
    range_ = {"low": low, "high": high, "above": above, "choices": tuple(choices)}
    return field(default=default, metadata={"help": help, "optional": optional, **range_})


def allowed(spec: Field) -> str:
    """The values of a setting in words, such as "a number from 0 to 1, or auto"."""
    meta, kind = spec.metadata, type(spec.default)
    words = {bool: "true or false", str: "a text", int: "a whole number"}.get(kind, "a number")
    if kind is str and meta["choices"]:
        return " or ".join(meta["choices"])
    if meta["above"] is not None:
        words += f" above {meta['above']:g}"
    if meta["low"] is not None:
        words += (
            f" from {meta['low']:g}"
            if meta["high"] is not None
            else f" of at least {meta['low']:g}"
        )
    if meta["high"] is not None:
        words += (
            f" to {meta['high']:g}" if meta["low"] is not None else f" of at most {meta['high']:g}"
        )
    return ", or ".join([words, *meta["choices"], *(["none"] if meta["optional"] else [])])


def validate(settings: Any, prefix: str = "") -> None:
    """Raise ProblemError if a field of a settings dataclass is out of range; names the field."""
    for spec in fields(settings):
        if "help" not in spec.metadata:
            continue
        value = getattr(settings, spec.name)
        if not _fits(value, spec):
            raise ProblemError(
                f"{prefix}{spec.name} must be {allowed(spec)} ({spec.metadata['help']}), "
                f"not {shown(value)}"
            )


def _fits(value: Any, spec: Field) -> bool:
    meta, kind = spec.metadata, type(spec.default)
    if value is None:
        return meta["optional"]
    if isinstance(value, str) and value in meta["choices"]:
        return True
    if kind is bool or kind is str:
        return type(value) is kind and not (kind is str and meta["choices"])
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        return False
    low, high, above = meta["low"], meta["high"], meta["above"]
    return (
        math.isfinite(value)
        and (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
    )
