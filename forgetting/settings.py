"""Settings as dataclass fields: default, range and meaning stand beside the code that uses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, field, fields
from typing import Any

from forgetting.errors import ProblemError, in_range, range_in_words, shown, unknown

RANGE = ("low", "high", "above")


def setting(
    default: Any,
    help: str,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] = (),
    above: float | None = None,
) -> Any:
    """A dataclass field with its meaning and range. The annotation says the type: `bool`, `int`,
    `float`, `str` or `tuple[str, ...]`, and behind a `|` what else is allowed, such as None.

    Args:
        default: the value where nothing else is given.
        help: one line without a full stop, shown by `--help` and in docs/settings.md.
        low, high: inclusive bounds, of a text or tuple of its length; above: an exclusive lower
        one. choices: words that are allowed; beside a number they stand for it ("auto").
    """
    range_ = {"low": low, "high": high, "above": above, "choices": tuple(choices)}
    return field(default=default, metadata={"help": help, **range_})


def kind_of(spec: Field) -> type:
    """The type of a setting's values, from its annotation."""
    words = spec.type if isinstance(spec.type, str) else spec.type.__name__
    return next(kind for kind in (bool, int, float, str, tuple) if words.startswith(kind.__name__))


def is_optional(spec: Field) -> bool:
    """Whether a setting may be None, from its annotation."""
    return "None" in str(spec.type)


def allowed(spec: Field) -> str:
    """The values of a setting in words, such as "a number from 0 to 1, or auto"."""
    meta, kind = spec.metadata, kind_of(spec)
    choices = list(filter(None, meta["choices"]))
    if kind in (str, tuple):
        words = " or ".join(choices) or "a text"
        words = f"a list of {words}" if kind is tuple else words
        return f"{words}, not empty" if meta["low"] else words
    words = "true or false"
    if kind is not bool:
        words = range_in_words(**{key: meta[key] for key in RANGE}, whole=kind is int)
    return ", or ".join([words, *choices, *(["none"] if is_optional(spec) else [])])


def check_value(value: Any, spec: Field, name: str) -> None:
    """Raise ProblemError if `value` is none that the setting takes; `name` is the setting's."""
    choices = spec.metadata["choices"]
    if choices and kind_of(spec) in (str, tuple):
        for word in [value] if isinstance(value, str) else value if type(value) is tuple else ():
            if isinstance(word, str) and word not in choices:
                raise unknown(f"value of {name}", word, filter(None, choices))
    if not _fits(value, spec):
        raise ProblemError(
            f"{name} must be {allowed(spec)} ({spec.metadata['help']}), not {shown(value)}"
        )


def validate(settings: Any, prefix: str = "") -> None:
    """Raise ProblemError if a field of a settings dataclass is out of range; names the field."""
    for spec in fields(settings):
        if "help" in spec.metadata:
            check_value(getattr(settings, spec.name), spec, f"{prefix}{spec.name}")


def _fits(value: Any, spec: Field) -> bool:
    meta, kind = spec.metadata, kind_of(spec)
    if value is None:
        return is_optional(spec)
    if kind in (str, tuple):
        words = value if kind is tuple else [value]
        return (
            type(value) is kind
            and all(isinstance(word, str) for word in words)
            and len(value) >= (meta["low"] or 0)
        )
    if isinstance(value, str) and value in meta["choices"]:
        return True
    if kind is bool:
        return type(value) is bool
    return in_range(value, **{key: meta[key] for key in RANGE}, whole=kind is int)
