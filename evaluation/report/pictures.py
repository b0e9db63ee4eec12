"""Test images of a forgotten class, and of the classes that lost most, as small pictures."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

import datasets
from datasets import mini
from datasets.reader import read_image
from engine.log import logger
from evaluation.report.runs import ForgottenClass, Run
from evaluation.results import run_places
from forgetting.errors import ProblemError

SIDE = 84  # pixels of a thumbnail's longer side
QUALITY = 60
MOST = 2000  # thumbnails of a report, so that a browser opens it
HARMED = 2  # classes that lost most, over all methods
SPLITS = ("train_x", "val", "test")
Opener = Callable[[], Image.Image]


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
    examples: dict[str, tuple[Run, dict[str, Any]]] = {}  # of each method, by its first seed
    for run, row in forgotten.rows:
        if classes := row.measured("examples", "classes"):
            examples.setdefault(run.label, (run, classes[0]))
    if not examples:
        return []
    names: dict[int, tuple[list[str], dict[str, list[str]]]] = {}
    for run, example in examples.values():
        for picture in example["pictures"]:
            entry = names.setdefault(picture["row"], (picture["before"], {}))
            entry[1][run.title] = picture["after"]
    run, example = next(iter(examples.values()))
    chosen = [(run, "", example, names)]
    losses = [
        (other["before"]["value"] - other["after"]["value"], other, run)
        for run, row in forgotten.rows
        for other in row.harmed
    ]
    worst: dict[str, tuple[dict[str, Any], Run]] = {}
    for _, other, by in sorted(losses, key=lambda loss: -loss[0]):
        worst.setdefault(other["name"], (other, by))
    for other, by in list(worst.values())[:HARMED]:
        rows = {p["row"]: (p["before"], {by.title: p["after"]}) for p in other["pictures"]}
        chosen.append((by, by.title, other, rows))
    return [
        Strip(
            one["name"],
            by,
            one["before"]["value"],
            one["after"]["value"],
            [
                Picture(_source(run, forgotten.dataset, one["name"], row) if draw else "", *given)
                for row, given in rows.items()
            ],
        )
        for run, by, one, rows in chosen
    ]


def _source(run: Run, dataset: str, name: str, row: int) -> str:
    """The picture in a row of the set's images, which must be one of class `name`."""
    split = run.settings.get(dataset, {}).get("split")
    images = images_of(run.folder, dataset, split if isinstance(split, str) else "")
    if not 0 <= row < len(images) or images[row][0] != name:
        return ""
    try:
        return thumbnail(images[row][1]())
    except ProblemError:
        return ""


@cache
def images_of(folder: Path, dataset: str, split: str) -> list[tuple[str, Opener]]:
    """The class of every image of a run's data set, in its order, and what opens it; empty where
    the run had none (feature bundles), or they are no longer there, which is logged."""
    try:
        places = run_places(folder, dataset)
        if places is None or places["features"] or split not in SPLITS:
            return []
        if dataset in mini.MINI and split == "test":  # drawn in code, wherever its files are
            drawn = mini.pictures(dataset, split)
            return [(name, partial(Image.fromarray, picture)) for name, _, picture in drawn]
        with redirect_stdout(io.StringIO()):
            items = getattr(datasets.load(dataset, places["root"], places["images"]), split)
    except ProblemError as error:
        logger.warning(f"report: no pictures of {dataset}: {str(error).partition(';')[0]}")
        return []
    return [(item.classname, partial(read_image, item.impath)) for item in items]


def thumbnail(image: Image.Image) -> str:
    """A small JPEG as an address that holds it."""
    image.thumbnail((SIDE, SIDE))
    packed = io.BytesIO()
    image.convert("RGB").save(packed, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{b64encode(packed.getvalue()).decode()}"
