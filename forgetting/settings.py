"""Settings as dataclass fields: default, range and meaning stand beside the code that uses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, field, fields
from typing import Any

from forgetting.errors import ProblemError, in_range, range_in_words, shown

RANGE = ("low", "high", "above")


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
    choices = list(meta["choices"])
    if kind is str and choices:
        return " or ".join(choices)
    if kind in (bool, str):
        words = "true or false" if kind is bool else "a text"
    else:
        words = range_in_words(**{key: meta[key] for key in RANGE}, whole=kind is int)
    return ", or ".join([words, *choices, *(["none"] if meta["optional"] else [])])


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
    if kind in (bool, str):
        return type(value) is kind and not (kind is str and meta["choices"])
    return in_range(value, **{key: meta[key] for key in RANGE}, whole=kind is int)
