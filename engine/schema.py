"""The shape of every JSON that the project reads, and the first thing that breaks one.

What is checked here, at the door, is trusted behind it: readers look nothing over again. Keys that
are not named may hold anything. Adapters, recipes and statistics are the library's own
(`forgetting.checks`), which needs nothing but torch; tensors of bundles stand in `clip.bundle`, and
a split file, whose entries must agree with each other, in `datasets.split`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired

from pydantic import (
    BeforeValidator,
    Field,
    FiniteFloat,
    InstanceOf,
    TypeAdapter,
)
from pydantic import ValidationError as Invalid
from typing_extensions import TypedDict

from forgetting.errors import ProblemError

SETTINGS = "settings"  # the key of logs.json beside the labels of a data set
SHOWN = 40  # characters of a wrong value in a message
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


Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Fraction | None  # None: no image to tell by
Number = FiniteFloat | None

# The paper's public code may have several classes under one name, with an object by class.
ByClass = BeforeValidator(lambda value: value if isinstance(value, dict) else {"": value})
OneClass = some(
    cls_acc_test=Annotated[dict[Any, Share], ByClass],
    no_cls_acc=Annotated[dict[Any, Share], ByClass],
)
ThisSet = Annotated[dict[Any, OneClass], Field(min_length=1)]
OtherSet = shape(all=shape(all_ds=Share))
Solver = some(  # what a method adds of its own is only shown, whatever it is
    settings=dict,
    seconds=FiniteFloat,
    adapter=Text,
    adapter_sha256=Text,
    model=Text,
    removed_names=list[Text],
    excluded=list[Text],
    trials=list,
    reduction=Number,
    certificate=some(gap=Number),
    forecast=some(
        unlisted=dict[Text, shape(rms=FiniteFloat, max=FiniteFloat)],
        affected=list[
            shape(name=Text, displacement=FiniteFloat, cosine_loss=FiniteFloat, margin=FiniteFloat)
        ],
        margin=Number,
        gap=Number,
    ),
    paraphrases=some(checked=int, added=list[Text], lagging=dict[Text, FiniteFloat]),
)
Entry = shape(
    final_results=dict[Any, dict],
    zero_shot=NotRequired[dict[Any, dict]],
    solver=NotRequired[Solver],
)

# What is read again of a run's command line.
Args = some(
    **dict.fromkeys(("dataset", "features", "root", "images", "cache", "weights"), Text | None)
)

# forget_cls.py, and a file of prompts.
Prompts = dict[Text, Annotated[list[Text], Field(min_length=1)]]  # class -> its texts
Lists = shape(
    all_ds=list[Text],
    mini_ds=list[Text],
    forget_classes_all=dict[Text, list[Text]],
    forget_prompts=NotRequired[dict[Text, Prompts]],
    protect=NotRequired[list[Text]],
)
# Files that were hashed: path -> size, times and inode, then the SHA-256.
Register = dict[Text, Annotated[list[int | Text], Field(min_length=5, max_length=5)]]


def check_logs(logs: Any, where: str | Path) -> None:
    """Refuse logs of another shape.

    Args:
        logs: what the JSON in the file `where` holds.

    Raises:
        ProblemError: one line that names the file, the data set, the label, the key, and what would
            be right there.
    """
    check(dict[Any, dict], logs, where)
    for dataset, entries in logs.items():
        for label, entry in entries.items():
            place = (where, dataset, label)
            if label == SETTINGS:
                check(dict, entry, *place)
                continue
            check(Entry, entry, *place)
            own = (entry["final_results"].get(dataset), entry.get("zero_shot", {}).get(dataset, {}))
            check(ThisSet, own[0], *place, "final_results", dataset)
            check(dict[Any, OneClass], own[1], *place, "zero_shot", dataset)
            for side in ("final_results", "zero_shot"):
                others = {k: v for k, v in entry.get(side, {}).items() if k != dataset}
                check(dict[Any, OtherSet], others, *place, side)


def check(kind: Any, value: Any, where: str | Path, *path: str) -> None:
    """Refuse a value that is not of a type; `path` holds the keys that lead to it in `where`."""
    found = fault(kind, value)
    if found is not None:
        keys = " / ".join(
            key if key.isprintable() else repr(key) for key in (*path, *map(str, found.path))
        )
        try:
            shown = json.dumps(found.found)
        except (TypeError, ValueError):  # YAML has values that JSON lacks
            shown = str(found.found)
        shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
        raise ProblemError(
            f"{where}: {keys or 'all of it'} must be {found.wanted}, and is {shown}; "
            "mend it, or move the file away"
        )
