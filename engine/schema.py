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
    AfterValidator,
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


def square(confusion: dict[str, Any]) -> dict[str, Any]:
    """Counts have a row for every name, and one column more for all other classes."""
    size = len(confusion["names"])
    for side in ("before", "after"):
        if [len(row) for row in confusion[side]] != [size + 1] * size:
            raise ValueError(f"an object whose {side!r} has {size} rows of {size + 1}")
    return confusion


def all_kinds(paraphrase: dict[str, Any]) -> dict[str, Any]:
    """Every kind of prompts has its means."""
    for prompt in paraphrase["prompts"]:
        if prompt["kind"] not in paraphrase["by_kind"]:
            raise ValueError(f"an object whose 'by_kind' has {prompt['kind']!r}")
    return paraphrase


def even(relearning: dict[str, Any]) -> dict[str, Any]:
    """Every curve has a point for every number of images, or of words."""
    words = relearning["words"]
    curves = [(relearning["shots"], method) for method in relearning["methods"].values()]
    for steps, part in [*curves, (words["counts"], words)]:
        for name in part.keys() & {"forgotten", "before", "no_text", "control"}:
            if len(part[name]) != len(steps):
                raise ValueError(f"an object whose {name!r} has {len(steps)} points")
    return relearning


Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Fraction | None  # None: no image to tell by
Number = FiniteFloat | None
Accuracy = shape(value=Share, low=Share, high=Share, n=int)
CHANGE = {"before": Accuracy, "after": Accuracy}
MEANS = {"mean_before": Share, "mean_after": Share}
REASONS = {"not_measured": list[Text]}

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

Moved = shape(text=Text, group=Text, cosine=FiniteFloat, nearest_before=Text, rank_after=int)
Taken = shape(name=Text, share=Fraction)
Leak = shape(name=Text, images=int, auc_before=Fraction, auc_after=Fraction)
Recall = shape(**dict.fromkeys(("1", "5", "10"), Accuracy))
Recalls = shape(**dict.fromkeys(("forgotten", "retained"), shape(before=Recall, after=Recall)))
Attack = shape(
    rank=int | None,
    rank_expected=int | None,
    text_cosine=Number,
    place=int | None,
    places=list[int],
    top=list[Text],
)
CURVES = {"forgotten": list[Accuracy], "before": list[Accuracy], "needed": int | None}
Paraphrase = shape(
    prompts=list[shape(text=Text, kind=Text, seen=bool, **CHANGE)],
    worst=shape(text=Text, kind=Text, **CHANGE) | None,
    back=list[Text],
    by_kind=dict[Any, shape(**MEANS)],
    **MEANS,
    **REASONS,
)
Relearning = shape(
    shots=list[int],
    methods=dict[Any, shape(no_text=list[Accuracy], control=list[Accuracy], **CURVES)],
    control_class=Text | None,
    words=shape(counts=list[int], **CURVES),
    **REASONS,
)
Confusion = shape(names=list[Text], before=list[list[int]], after=list[list[int]])
Picture = shape(row=int, before=list[Text], after=list[Text])
MEASURES = {
    "examples": shape(
        classes=list[shape(name=Text, pictures=list[Picture], **CHANGE)],
        **REASONS,
    ),
    "paraphrase": Annotated[Paraphrase, AfterValidator(all_kinds)],
    "neighbours": shape(
        classes=list[shape(name=Text, **CHANGE)],
        moved=shape(
            count=int,
            mean_cosine=Number,
            nearest_kept=Share,
            top10_overlap=Share,
            worst=list[Moved],
        ),
        **MEANS,
        **REASONS,
    ),
    "destinations": shape(
        images=int,
        before=list[Taken],
        after=list[Taken],
        entropy_bits_before=Number,
        entropy_bits_after=Number,
        leak=list[Leak],
        worst_auc=Share,
        **REASONS,
    ),
    "confusion": Annotated[Confusion, AfterValidator(square)],
    "residue": shape(
        linear_probe=shape(auc=Share, **CHANGE),
        nearest_neighbours=shape(k=int, **CHANGE),
        zero_shot=shape(**CHANGE),
        **REASONS,
    ),
    "retrieval": shape(image_to_text=Recalls, text_to_image=Recalls, **REASONS),
    "undo": shape(names=int, attacks=dict[Any, Attack], **REASONS),
    "relearning": Annotated[Relearning, AfterValidator(even)],
}
Found = shape(
    verdict=list[Text],
    seconds=dict[Any, FiniteFloat],
    **{name: NotRequired[measure] for name, measure in MEASURES.items()},
)
Audit = shape(adapter_sha256=Text, settings=dict, classes=dict[Any, Found])
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


def check_audits(audits: Any, where: str | Path) -> None:
    """Refuse audits of another shape; see `check_logs`."""
    check(dict[Any, dict[Any, Audit]], audits, where)


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
