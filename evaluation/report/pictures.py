"""Test images of a forgotten class, and of the classes that lost most, as small pictures."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

import datasets
from datasets import mini
from datasets.reader import read_image
from engine.log import logger
from evaluation.plots import thumbnail
from evaluation.report.runs import ForgottenClass, Method, Run
from evaluation.results import run_places
from forgetting.errors import ProblemError

SIDE = 84  # pixels of a thumbnail's longer side
MOST = 2000  # thumbnails of a report, so that a browser opens it
HARMED = 2  # classes that lost most, over all methods
Example = tuple[Method, Run, dict[str, Any]]  # what the audit of a run shows of a class


class Picture(NamedTuple):
    """A test image as an address that holds it ("" if it is not there), the names that the model
    gives it before forgetting, and after it by the label of the method."""

    source: str
    before: list[str]
    after: dict[str, list[str]]


class Strip(NamedTuple):
    """Pictures of one class, its name and accuracy before and after; `by`: the method by which it
    lost so much, "" for the forgotten class itself."""

    name: str
    by: str
    before: float | None
    after: float | None
    pictures: list[Picture]


def strips(forgotten: ForgottenClass, draw: bool = True) -> list[Strip]:
    """The class's own pictures, then those of the classes that lost most; [] without an audit.
    Unless `draw`, the names that the model gives them are shown alone."""
    examples, harmed = [], []
    for method, pairs in forgotten.results:
        shown = [(run, row.measured("examples", "classes")) for run, row in pairs]
        # Of each method by its first seed: the run, and what the audit shows of the class.
        examples += [(method, run, classes[0]) for run, classes in shown if classes][:1]
        harmed += [(method, run, one) for run, row in pairs for one in row.harmed]
    if not examples:
        return []
    found = [_strip(forgotten.dataset, "", examples, draw)]
    worst: dict[str, Example] = {}
    for example in sorted(harmed, key=lambda x: x[2]["after"]["value"] - x[2]["before"]["value"]):
        worst.setdefault(example[2]["name"], example)
    examples = list(worst.values())[:HARMED]
    return found + [_strip(forgotten.dataset, x[0].label, [x], draw) for x in examples]


def _strip(dataset: str, by: str, examples: list[Example], draw: bool) -> Strip:
    """The pictures of a class as the first example shows them, with the guesses of all."""
    _, run, one = examples[0]
    pictures: dict[int, Picture] = {}
    for method, _, example in examples:
        for picture in example["pictures"]:
            row = picture["row"]
            if row not in pictures:
                source = _source(run, dataset, one["name"], row) if draw else ""
                pictures[row] = Picture(source, picture["before"], {})
            pictures[row].after[method.label] = picture["after"]
    sides = (one[side]["value"] for side in ("before", "after"))
    return Strip(one["name"], by, *sides, list(pictures.values()))


def _source(run: Run, dataset: str, name: str, row: int) -> str:
    """The picture in a row of the set's images, which must be one of class `name`."""
    images = images_of(run.folder, dataset) if run.settings[dataset].get("split") == "test" else []
    if not 0 <= row < len(images) or images[row][0] != name:
        return ""
    try:
        return thumbnail(images[row][1](), SIDE)
    except ProblemError:
        return ""


@cache
def images_of(folder: Path, dataset: str) -> list[tuple[str, Callable[[], Image.Image]]]:
    """The class of every test image of a run's data set, in its order, and what opens it; empty
    where the run had none (feature bundles), or they are no longer there, which is logged."""
    try:
        places = run_places(folder, dataset)
        if places is None or places["features"]:
            return []
        if dataset in mini.MINI:  # drawn in code, and written nowhere
            drawn = mini.pictures(dataset, "test")
            return [(name, partial(Image.fromarray, picture)) for name, _, picture in drawn]
        items = datasets.load(dataset, places["root"], places["images"]).test
    except ProblemError as error:
        logger.warning(f"report: no pictures of {dataset}: {str(error).partition(';')[0]}")
        return []
    return [(item.classname, partial(read_image, item.impath)) for item in items]
