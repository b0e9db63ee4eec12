"""What logs.json and audit.json look like inside: checked once, where they are read.

Readers behind that door look nothing over again. A shape is written down as data:

- a type, such as `str`; `object` is anything;
- `[shape]`: a list;
- `{key: shape}`: an object; `...` as a key stands for all keys that are not named, which else may
  hold anything;
- `Absent(shape)`: a key of an object that may be absent; `Maybe(shape)`: a value that may be null;
- a function that checks a value itself; a tuple of shapes that must all fit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import UserError

SHOWN = 40  # characters of a wrong value in a message
WORDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number", bool: "a boolean"}

Check = Callable[[Any], None]


class Wrong(Exception):
    """A value of another shape. `path` holds the keys that lead to it, innermost first."""

    def __init__(self, wanted: str, value: Any) -> None:
        self.wanted, self.value, self.path = wanted, value, []


class Absent(NamedTuple):
    shape: Any


class Maybe(NamedTuple):
    shape: Any


def number(value: Any) -> None:
    """Any finite number."""
    if type(value) not in (float, int) or not -1e300 < value < 1e300:
        raise Wrong("a number", value)


def fraction(value: Any) -> None:
    """A number between 0 and 1."""
    if type(value) not in (float, int) or not 0 <= value <= 1:
        raise Wrong("a number between 0 and 1", value)


def some(value: Any) -> None:
    """An object that is not empty."""
    if not value:
        raise Wrong("an object that is not empty", value)


def square(value: Any) -> None:
    """Counts of a confusion: a row for every name, and one column more for all other classes."""
    size = len(value["names"])
    for side in ("before", "after"):
        if [len(row) for row in value[side]] != [size + 1] * size:
            raise Wrong(f"an object whose {side!r} has {size} rows of {size + 1}", value[side])


def all_kinds(value: Any) -> None:
    """Every kind of prompts has its means."""
    lacking = [p["kind"] for p in value["prompts"] if p["kind"] not in value["by_kind"]]
    if lacking:
        raise Wrong(f"an object whose 'by_kind' has {lacking[0]!r}", list(value["by_kind"]))


def even(value: Any) -> None:
    """Every curve has a point for every number of images, or of words."""
    curves = [(value["shots"], method) for method in value["methods"].values()]
    for steps, part in [*curves, (value["words"]["counts"], value["words"])]:
        for name in part.keys() & {"forgotten", "before", "no_text", "control"}:
            if len(part[name]) != len(steps):
                raise Wrong(f"an object whose {name!r} has {len(steps)} points", len(part[name]))


def by_class(value: Any) -> None:
    """A fraction or null, or an object with one for each of the classes that were forgotten."""
    (_BY_CLASS if type(value) is dict else _ONE)(value)


COUNT, TEXT = int, str
ACCURACY = {"value": Maybe(fraction), "low": Maybe(fraction), "high": Maybe(fraction), "n": COUNT}
CHANGE = {"before": ACCURACY, "after": ACCURACY}
MEANS = {"mean_before": Maybe(fraction), "mean_after": Maybe(fraction)}
REASONS = {"not_measured": [TEXT]}

RESULTS = {"cls_acc_test": Absent(by_class), "no_cls_acc": Absent(by_class)}  # of one class
OTHER_SET = {"all": {"all_ds": Maybe(fraction)}}
SOLVER = {  # what a method adds of its own is only shown, whatever it is
    "settings": Absent(dict),
    "seconds": Absent(number),
    "adapter": Absent(TEXT),
    "adapter_sha256": Absent(TEXT),
    "model": Absent(TEXT),
    "removed_names": Absent([TEXT]),
    "left_retain_set": Absent([TEXT]),
    "trials": Absent([object]),
    "reduction": Absent(Maybe(number)),
    "certificate": Absent({"gap": Absent(Maybe(number))}),
}

MOVED = {"text": TEXT, "group": TEXT, "cosine": number, "nearest_before": TEXT, "rank_after": COUNT}
SHARE = {"name": TEXT, "share": fraction}
LEAK = {"name": TEXT, "images": COUNT, "auc_before": fraction, "auc_after": fraction}
RECALL = {side: {k: ACCURACY for k in ("1", "5", "10")} for side in ("before", "after")}
RECALLS = {"forgotten": RECALL, "retained": RECALL}
ATTACK = {
    "rank": Maybe(COUNT),
    "rank_expected": Maybe(COUNT),
    "text_cosine": Maybe(number),
    "place": Maybe(COUNT),
    "places": [COUNT],
    "top": [TEXT],
}
CURVES = {"forgotten": [ACCURACY], "before": [ACCURACY], "needed": Maybe(COUNT)}
MEASURES = {
    "paraphrase": (
        {
            "prompts": [{"text": TEXT, "kind": TEXT, "seen": bool, **CHANGE}],
            "worst": Maybe({"text": TEXT, "kind": TEXT, **CHANGE}),
            "back": [TEXT],
            "by_kind": {...: MEANS},
            **MEANS,
            **REASONS,
        },
        all_kinds,
    ),
    "neighbours": {
        "classes": [{"name": TEXT, **CHANGE}],
        "moved": {
            "count": COUNT,
            "mean_cosine": Maybe(number),
            "nearest_kept": Maybe(fraction),
            "top10_overlap": Maybe(fraction),
            "worst": [MOVED],
        },
        **MEANS,
        **REASONS,
    },
    "destinations": {
        "images": COUNT,
        "before": [SHARE],
        "after": [SHARE],
        "entropy_bits_before": Maybe(number),
        "entropy_bits_after": Maybe(number),
        "leak": [LEAK],
        "worst_auc": Maybe(fraction),
        **REASONS,
    },
    "confusion": ({"names": [TEXT], "before": [[COUNT]], "after": [[COUNT]]}, square),
    "residue": {
        "linear_probe": {"auc": Maybe(fraction), **CHANGE},
        "nearest_neighbours": {"k": COUNT, **CHANGE},
        "zero_shot": CHANGE,
        **REASONS,
    },
    "retrieval": {"image_to_text": RECALLS, "text_to_image": RECALLS, **REASONS},
    "undo": {"names": COUNT, "attacks": {...: ATTACK}, **REASONS},
    "relearning": (
        {
            "shots": [COUNT],
            "methods": {...: {"no_text": [ACCURACY], "control": [ACCURACY], **CURVES}},
            "control_class": Maybe(TEXT),
            "words": {"counts": [COUNT], **CURVES},
            **REASONS,
        },
        even,
    ),
}
CLASS = {name: Absent(shape) for name, shape in MEASURES.items()}
CLASS |= {"verdict": [TEXT], "seconds": {...: number}}
AUDIT = {"adapter_sha256": TEXT, "settings": dict, "classes": {...: CLASS}}


def check_logs(logs: Any, where: str | Path) -> None:
    """Refuse logs of another shape.

    Args:
        logs: what the JSON in the file `where` holds.

    Raises:
        UserError: one line that names the file, the data set, the label, the key, and what would
            be right there.
    """
    # Which results of an entry are its own depends on the data set that it stands under.
    shape = {name: _entries(name) for name in logs} if type(logs) is dict else dict
    _refuse(compiled(shape), logs, where)


def check_audits(audits: Any, where: str | Path) -> None:
    """Refuse audits of another shape; see `check_logs`."""
    _refuse(_AUDITS, audits, where)


def _entries(dataset: str) -> dict:
    """The shape of the results of a data set."""
    own = {...: RESULTS}
    return {
        "settings": Absent(dict),
        ...: {
            "final_results": {dataset: (own, some), ...: OTHER_SET},
            "zero_shot": Absent({dataset: Absent(own), ...: OTHER_SET}),
            "solver": Absent(SOLVER),
        },
    }


def _refuse(check: Check, value: Any, where: str | Path) -> None:
    try:
        check(value)
    except Wrong as wrong:
        path = [key if key.isprintable() else repr(key) for key in reversed(wrong.path)]
        found = json.dumps(wrong.value)
        found = found if len(found) <= SHOWN else f"{found[:SHOWN]}..."
        raise UserError(
            f"{where}: {' / '.join(path) or 'all of it'} must be {wrong.wanted}, and is {found}; "
            "mend it, or move the file away"
        ) from None


def compiled(shape: Any) -> Check:
    """The function that raises `Wrong` for a value of another shape."""
    match shape:
        case Maybe():
            inner = compiled(shape.shape)
            return lambda value: None if value is None else inner(value)
        case tuple():
            return _all([compiled(part) for part in shape])
        case list():
            return _list(compiled(shape[0]))
        case dict():
            return _object(shape)
        case type():
            return _type(shape)
    return shape


def _type(kind: type) -> Check:
    def check(value: Any) -> None:
        if type(value) is not kind:  # exactly: true is no whole number
            raise Wrong(WORDS[kind], value)

    return check if kind is not object else lambda value: None


def _all(parts: list[Check]) -> Check:
    def check(value: Any) -> None:
        for part in parts:
            part(value)

    return check


def _list(inner: Check) -> Check:
    def check(value: Any) -> None:
        if type(value) is not list:
            raise Wrong("a list", value)
        for place, item in enumerate(value):
            try:
                inner(item)
            except Wrong as wrong:
                wrong.path.append(str(place))
                raise

    return check


def _object(shape: dict) -> Check:
    rest = compiled(shape[...]) if ... in shape else None
    optional = {key for key, part in shape.items() if isinstance(part, Absent)}
    parts = {
        key: compiled(part.shape if key in optional else part)
        for key, part in shape.items()
        if key is not ...
    }
    needed = parts.keys() - optional

    def check(value: Any) -> None:
        if type(value) is not dict:
            raise Wrong("an object", value)
        if not needed <= value.keys():
            lacking = ", ".join(key for key in parts if key in needed - value.keys())
            raise Wrong(f"an object with {lacking}", value)
        for key, item in value.items():
            inner = parts.get(key, rest)
            if inner is not None:
                try:
                    inner(item)
                except Wrong as wrong:
                    wrong.path.append(key)
                    raise

    return check


_ONE = compiled(Maybe(fraction))
_BY_CLASS = compiled({...: Maybe(fraction)})
_AUDITS = compiled({...: {...: AUDIT}})
