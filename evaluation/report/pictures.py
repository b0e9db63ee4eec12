"""Test images of a forgotten class, and of the classes that lost most, as small pictures."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from PIL import Image

import datasets
from datasets import mini
from datasets.reader import read_image
from engine.log import logger
from evaluation.plots import thumbnail
from evaluation.report.runs import Method, Run
from evaluation.results import run_places
from forgetting.errors import ProblemError

SIDE = 84  # pixels of a thumbnail's longer side
HARMED = 2  # classes that lost most, over all methods
NAMES = 3  # of those that a picture is given
Example = tuple[str, Run, dict[str, Any]]  # a method's label, and what the audit of its run shows
# A class, its accuracies before and after by method, and its images: an address that holds one, and
# the names that it is given before, and after by each method, with probabilities.
Strip = tuple[str, list[tuple[str, float, float]], list[tuple[str, dict[str, list]]]]


def strips(dataset: str, results: list[Method]) -> list[Strip]:
    """A class's own pictures, then those of the classes that lost most by it, as the first audit of
    each method shows them; [] without an audit. `results`: of `forgotten_classes`."""
    own: list[Example] = []
    harmed: dict[str, list[Example]] = {}
    for method in results:
        audited = [
            (run, row) for run in method.runs for row in run.rows if row.measured("examples")
        ]
        for run, row in audited[:1]:
            own.append((method.label, run, row.audit["examples"]["classes"][0]))
            for one in row.harmed:
                harmed.setdefault(one["name"], []).append((method.label, run, one))
    shown = sorted(
        harmed.values(),
        key=lambda some: min(x["after"]["value"] - x["before"]["value"] for *_, x in some),
    )
    return [_strip(dataset, some) for some in [own, *shown[:HARMED]] if some]


def _strip(dataset: str, examples: list[Example]) -> Strip:
    name = examples[0][2]["name"]
    sources: dict[int, str] = {}
    guesses: dict[int, dict[str, list]] = {}
    for label, run, one in examples:
        for picture in one["pictures"]:
            row = picture["row"]
            before, after = ([*picture[x].items()][:NAMES] for x in ("before", "after"))
            sources[row] = sources.get(row) or _source(run, dataset, name, row)
            guesses.setdefault(row, {"before": before})[f"after, {label}"] = after
    accuracies = [(label, x["before"]["value"], x["after"]["value"]) for label, _, x in examples]
    return name, accuracies, [(sources[row], guesses[row]) for row in sources]


def _source(run: Run, dataset: str, name: str, row: int) -> str:
    """The picture in a row of the set's images, which must be one of class `name`."""
    images = images_of(run.folder, dataset) if run.settings[dataset].get("split") == "test" else []
    try:
        found, opened = images[row]
        return thumbnail(opened(), SIDE) if found == name and row >= 0 else ""
    except (IndexError, ProblemError):
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
