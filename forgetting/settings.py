"""Settings as dataclass fields: default, range and meaning stand beside the code that uses them."""

from collections.abc import Sequence
from dataclasses import Field, field, fields
from typing import Any

from forgetting.errors import ProblemError, in_range, range_in_words, shown, unknown


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
        help: one line without a full stop, shown by `--help` and in docs/settings.md.
        low, high: inclusive bounds, of a text or tuple the least length; above: an exclusive lower
            one. choices: words that are allowed; beside a number they stand for it ("auto").
    """
    range_ = {"low": low, "high": high, "above": above}
    return field(default=default, metadata={"help": help, "choices": choices, "range": range_})


def kind_of(spec: Field) -> type:
    """The type of a setting's values, from its annotation."""
    words = getattr(spec.type, "__name__", str(spec.type))
    return next(kind for kind in (bool, int, float, str, tuple) if words.startswith(kind.__name__))


def is_optional(spec: Field) -> bool:
    """Whether a setting may be None, from its annotation."""
    return "None" in str(spec.type)


def allowed(spec: Field) -> str:
    """The values of a setting in words, such as "a number from 0 to 1, or auto"."""
    range_, kind = spec.metadata["range"], kind_of(spec)
    choices = list(filter(None, spec.metadata["choices"]))
    if kind in (str, tuple):
        words = " or ".join(choices) or "a text"
        words = f"a list of {words}" if kind is tuple else words
        return f"{words}, not empty" if range_["low"] else words
    words = "true or false" if kind is bool else range_in_words(**range_, whole=kind is int)
    return ", or ".join([words, *choices, *(["none"] if is_optional(spec) else [])])


def check_value(value: Any, spec: Field, name: str) -> None:
    """Raise ProblemError if `value` is none that the setting takes; `name` is the setting's."""
    kind, choices, range_ = kind_of(spec), spec.metadata["choices"], spec.metadata["range"]
    if kind in (str, tuple) and type(value) is kind:
        words = [value] if kind is str else value
        for word in words if choices else ():
            if isinstance(word, str) and word not in choices:
                raise unknown(f"value of {name}", word, filter(None, choices))
        fits = all(isinstance(x, str) for x in words) and len(value) >= (range_["low"] or 0)
    elif value is None:
        fits = is_optional(spec)
    elif kind is bool:
        fits = type(value) is bool
    else:
        word = isinstance(value, str) and value in choices
        fits = kind in (int, float) and (word or in_range(value, **range_, whole=kind is int))
    if not fits:
        raise ProblemError(
            f"{name} must be {allowed(spec)} ({spec.metadata['help']}), not {shown(value)}"
        )


def validate(settings: Any, prefix: str = "") -> None:
    """Raise ProblemError if a field of a settings dataclass is out of range; names the field."""
    for spec in fields(settings):
        if "help" in spec.metadata:
            check_value(getattr(settings, spec.name), spec, f"{prefix}{spec.name}")
