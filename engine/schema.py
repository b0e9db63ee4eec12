"""The shape of what files hold, declared for pydantic, and the first thing that breaks one.

Each room declares the shapes of its own files; they are checked at the door, and readers behind it
look nothing over again.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from pydantic import InstanceOf, TypeAdapter
from pydantic import ValidationError as Invalid
from typing_extensions import TypedDict

Text = InstanceOf[str]  # not str: JSON can spell names that UTF-8 cannot
WORDS = {  # pydantic's names of errors -> what would be right
    "dict_type": "an object",
    "list_type": "a list",
    "is_instance_of": "a text",
    "int_type": "a whole number",
    "bool_type": "a boolean",
    "float_type": "a number",
    "finite_number": "a number",
    "greater_than_equal": "a number between 0 and 1",
    "less_than_equal": "a number between 0 and 1",
}


class Fault(NamedTuple):
    """Where a value breaks a shape (keys and indices), what would be right, and what is there."""

    path: tuple[str | int, ...]
    wanted: str
    found: Any


def shape(**keys: Any) -> Any:
    """The type of an object with these keys."""
    return TypedDict("object", keys)


def some(**keys: Any) -> Any:
    """The type of an object where any of these keys may be absent."""
    return TypedDict("object", keys, total=False)


def fault(kind: Any, value: Any) -> Fault | None:
    """The first way in which a value is not of a type; None if it is."""
    try:
        adapter(kind).validate_python(value, strict=True)
    except Invalid as error:
        first = error.errors(include_url=False)[0]
        path = tuple(key for key in first["loc"] if key != "")
        wanted = WORDS.get(first["type"], first["msg"].removeprefix("Value error, "))
        if first["type"] == "too_short":
            wanted = f"{WORDS['dict_type' if isinstance(first['input'], dict) else 'list_type']} "
            wanted += "that is not empty"
        if first["type"] == "missing":
            *path, lacking = path
            wanted = f"an object with {lacking}"
        return Fault(tuple(path), wanted, first["input"])
    return None


@cache
def adapter(kind: Any) -> TypeAdapter:
    """What checks a type, made once."""
    return TypeAdapter(kind)
