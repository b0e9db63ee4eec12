"""The forgotten classes of all folders, each once, with its strips of test images."""

from __future__ import annotations

import io
from base64 import b64encode
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

import datasets
from datasets import mini
from datasets.reader import read_image
from engine.log import logger
from evaluation.report.runs import Method, Run, bad_news_first, methods
from evaluation.results import run_places
from evaluation.rows import Row
from forgetting.errors import ProblemError

SIDES = (112, 56)  # pixels of a thumbnail's longer side
BUDGET = 40_000  # characters of all thumbnails of a class
ALL = 16_000_000  # of those of all classes: a report that a browser opens
HARMED = 2  # classes that lost most, over all methods
QUALITIES = (85, 70, 55, 40, 25)
EXAMPLES = ("examples", "classes")
SPLITS = ("train_x", "val", "test")
Opener = Callable[[], Image.Image]


class Picture(NamedTuple):
    """A test image: what stands in for it ("" if it is not at hand), the names that the model gives
    it before forgetting, and after it by the label of the method."""

    source: str
    before: list[str]
    after: dict[str, list[str]]


class Told(NamedTuple):
    """What one method did to a class by one request: its rows, one a seed."""

    method: Method
    rows: list[tuple[Run, Row]]

    @property
    def means(self) -> dict[str, float | None]:
        """Over the seeds."""
        return self.method.of(self.rows[0][1])

    @property
    def tags(self) -> list[str]:
        """What is wrong with it, and in how many of the seeds."""
        counts = Counter(row.tag for _, row in self.rows if row.tag)
        every = len(self.rows)
        return [t if n == every else f"{t} in {n} of {every} seeds" for t, n in counts.items()]


class Strip(NamedTuple):
    """Pictures of one class, its name and accuracy before and after; `by`: the method by which it
    lost so much, "" for the forgotten class itself."""

    name: str
    by: str
    before: float | None
    after: float | None
    pictures: list[Picture]

    def shown(self) -> bool:
        """Whether a picture of it is at hand."""
        return any(picture.source for picture in self.pictures)


@dataclass(frozen=True)
class Forgotten:
    """A class, and its row of every folder that forgot it; `told`: by method and request."""

    dataset: str
    name: str
    told: list[Told] = field(default_factory=list)

    @property
    def rows(self) -> list[tuple[Run, Row]]:
        return [pair for told in self.told for pair in told.rows]

    @property
    def comes_back(self) -> bool:
        return any(row.comes_back for _, row in self.rows)

    @property
    def left(self) -> float:
        """The most that a method leaves of it, for sorting."""
        return max(row.own.after or 0 for _, row in self.rows)

    @property
    def harm(self) -> float:
        """The most that all else loses by a method, for sorting."""
        return max(row.harm or 0 for _, row in self.rows)

    def strips(self, budget: int = BUDGET) -> list[Strip]:
        """Its own pictures, in all of `budget` characters, then those of the classes that lost
        most; [] where no audit has any. Names are those of a method's first seed."""
        first: dict[str, tuple[Run, dict[str, Any]]] = {}
        for run, row in self.rows:
            if found := row.found(*EXAMPLES):
                first.setdefault(run.label, (run, found[0]))
        told = list(first.values())
        if not told:
            return []
        own: dict[int, tuple[list[str], dict[str, list[str]]]] = {}
        for run, mine in told:
            for one in mine["pictures"]:
                own.setdefault(one["row"], (one["before"], {}))[1][run.title] = one["after"]
        run, mine = told[0]
        losses = [
            (one["before"]["value"] - one["after"]["value"], one, run)
            for run, row in self.rows
            for one in row.harmed
        ]
        worst: dict[str, tuple[dict[str, Any], Run]] = {}
        for _, one, by in sorted(losses, key=lambda loss: -loss[0]):
            worst.setdefault(one["name"], (one, by))
        lists = [(mine, "", run, own)]
        for one, by in list(worst.values())[:HARMED]:
            rows = {p["row"]: (p["before"], {by.title: p["after"]}) for p in one["pictures"]}
            lists.append((one, by.title, by, rows))
        room = budget // max(1, sum(len(rows) for *_, rows in lists))
        return [
            Strip(
                one["name"],
                by,
                one["before"]["value"],
                one["after"]["value"],
                [
                    Picture(self._source(run, one["name"], row, room), *names)
                    for row, names in rows.items()
                ],
            )
            for one, by, run, rows in lists
        ]

    def _source(self, run: Run, name: str, row: int, room: int) -> str:
        """The picture in a row of the set's images, which must be one of class `name`."""
        split = run.settings.get(self.dataset, {}).get("split")
        images = images_of(run.folder, self.dataset, split if isinstance(split, str) else "")
        if not 0 <= row < len(images) or images[row][0] != name:
            return ""
        try:
            return thumbnail(images[row][1](), room)
        except ProblemError:
            return ""


def forgotten(runs: list[Run]) -> list[Forgotten]:
    """Every class once, the worst news first, whichever method they are of."""
    found: dict[tuple[str, str], Forgotten] = {}
    for method in methods(runs):
        told: dict[tuple[str, str, str], Told] = {}
        for run in method.runs:
            for row in run.rows:
                key = row.dataset, row.label, row.name
                if key not in told:
                    told[key] = Told(method, [])
                    own = row.dataset, row.name
                    found.setdefault(own, Forgotten(*own)).told.append(told[key])
                told[key].rows.append((run, row))
    return sorted(found.values(), key=lambda one: min(bad_news_first(row) for _, row in one.rows))


@cache
def images_of(folder: Path, dataset: str, split: str) -> list[tuple[str, Opener]]:
    """The class of every image of a run's data set, in its order, and what opens it; empty where
    the run had none (feature bundles), or they are no longer there, which is said."""
    try:
        places = run_places(folder, dataset)
    except ProblemError as error:
        return _missing(dataset, error)
    if places is None or places["features"] or split not in SPLITS:
        return []
    return _read(dataset, split, places["root"], places["images"])


@cache
def _read(dataset: str, split: str, root: str, images: str) -> list[tuple[str, Opener]]:
    if dataset in mini.MINI and split == "test":  # drawn in code, wherever its files are
        drawn = mini.pictures(dataset, split)
        return [(name, partial(Image.fromarray, picture)) for name, _, picture in drawn]
    try:
        with redirect_stdout(io.StringIO()):
            items = getattr(datasets.load(dataset, root, images), split)
    except ProblemError as error:
        return _missing(dataset, error)
    return [(item.classname, partial(read_image, item.impath)) for item in items]


def _missing(dataset: str, error: ProblemError) -> list[tuple[str, Opener]]:
    logger.warning(f"report: no pictures of {dataset}: {str(error).partition(';')[0]}")
    return []


def thumbnail(image: Image.Image, room: int) -> str:
    """A small JPEG as an address that holds it, of at most `room` characters; "" if none fits."""
    for side in SIDES:
        image.thumbnail((side, side))
        for quality in QUALITIES:
            packed = io.BytesIO()
            image.save(packed, "JPEG", quality=quality, optimize=True)
            address = f"data:image/jpeg;base64,{b64encode(packed.getvalue()).decode()}"
            if len(address) <= room:
                return address
    return ""
