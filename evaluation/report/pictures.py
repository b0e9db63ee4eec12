"""Test images of a forgotten class, and of the classes that lost most, as small pictures."""

from __future__ import annotations

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
from evaluation.report.runs import ForgottenClass, Run
from evaluation.results import run_places
from forgetting.errors import ProblemError

SIDE = 84  # pixels of a thumbnail's longer side
MOST = 2000  # thumbnails of a report, so that a browser opens it
HARMED = 2  # classes that lost most, over all methods
SPLITS = ("train_x", "val", "test")


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

    Args:
        draw: whether images are shown, not only the names that the model gives them.
    """
    # Of each method by its first seed: the run, and what the audit shows of the class.
    examples: dict[str, tuple[Run, dict[str, Any]]] = {}
    for run, row in forgotten.rows:
        if classes := row.measured("examples", "classes"):
            examples.setdefault(run.label, (run, classes[0]))
    if not examples:
        return []
    first = next(iter(examples.values()))
    found = [_strip(forgotten.dataset, "", first, list(examples.values()), draw)]
    harmed = [(run, one) for run, row in forgotten.rows for one in row.harmed]
    harmed.sort(key=lambda pair: pair[1]["after"]["value"] - pair[1]["before"]["value"])
    worst: dict[str, tuple[Run, dict[str, Any]]] = {}
    for pair in harmed:
        worst.setdefault(pair[1]["name"], pair)
    for pair in list(worst.values())[:HARMED]:
        found.append(_strip(forgotten.dataset, pair[0].title, pair, [pair], draw))
    return found


def _strip(
    dataset: str,
    by: str,
    shown: tuple[Run, dict[str, Any]],
    guesses: list[tuple[Run, dict[str, Any]]],
    draw: bool,
) -> Strip:
    """The pictures of a class as one run's audit shows them, with the guesses of several."""
    run, one = shown
    pictures: dict[int, Picture] = {}
    for other, example in guesses:
        for picture in example["pictures"]:
            row = picture["row"]
            if row not in pictures:
                source = _source(run, dataset, one["name"], row) if draw else ""
                pictures[row] = Picture(source, picture["before"], {})
            pictures[row].after[other.title] = picture["after"]
    sides = (one[side]["value"] for side in ("before", "after"))
    return Strip(one["name"], by, *sides, list(pictures.values()))


def _source(run: Run, dataset: str, name: str, row: int) -> str:
    """The picture in a row of the set's images, which must be one of class `name`."""
    images = images_of(run.folder, dataset, str(run.settings[dataset].get("split")))
    if not 0 <= row < len(images) or images[row][0] != name:
        return ""
    try:
        return thumbnail(images[row][1](), SIDE)
    except ProblemError:
        return ""


@cache
def images_of(
    folder: Path, dataset: str, split: str
) -> list[tuple[str, Callable[[], Image.Image]]]:
    """The class of every image of a run's data set, in its order, and what opens it; empty where
    the run had none (feature bundles), or they are no longer there, which is logged."""
    try:
        places = run_places(folder, dataset)
        if places is None or places["features"] or split not in SPLITS:
            return []
        if dataset in mini.MINI and split == "test":  # drawn in code, and written nowhere
            drawn = mini.pictures(dataset, split)
            return [(name, partial(Image.fromarray, picture)) for name, _, picture in drawn]
        items = getattr(datasets.load(dataset, places["root"], places["images"]), split)
    except ProblemError as error:
        logger.warning(f"report: no pictures of {dataset}: {str(error).partition(';')[0]}")
        return []
    return [(item.classname, partial(read_image, item.impath)) for item in items]
