"""Where the points of the chart of forgetting against harm lie; the template draws them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

from evaluation.report.runs import Run
from evaluation.rows import mean

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 20, 56  # margins for the axes' words
TICKS = 6  # at most about so many on an axis
LEAST_HARM = 1.0  # points; an axis of hundredths would make noise look like a finding
LEAST_LEFT = 10.0  # percent
# A run is told by shape and by colour (style.css: --m0 ...); their counts share no divisor.
SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z",  # circle
    "M-3.6-3.6h7.2v7.2h-7.2Z",  # square
    "M0-4.6 4.4 3.4h-8.8Z",  # triangle
    "M0-5.2 4.6 0 0 5.2-4.6 0Z",  # diamond
    "M-4.4-2.4-2.4-4.4 0-2 2.4-4.4 4.4-2.4 2 0 4.4 2.4 2.4 4.4 0 2-2.4 4.4-4.4 2.4-2 0Z",  # cross
    "M0 4.6 4.4-3.4h-8.8Z",  # triangle that points down
)
COLOURS = 5


class Point(NamedTuple):
    """A class, or the mean of a run: `row` is the class's place among all rows of the report."""

    row: int | None
    name: str
    harm: float
    left: float  # percent


@dataclass(frozen=True)
class Series:
    """The points of one run, and how they are drawn."""

    run: Run
    shape: str
    colour: int
    points: list[Point]

    @property
    def mean(self) -> Point:
        harms, lefts = ([getattr(p, key) for p in self.points] for key in ("harm", "left"))
        return Point(None, self.run.name, mean(harms), mean(lefts))


@dataclass(frozen=True)
class Chart:
    """Series, and the ticks of the axes, which end at the first and the last of them."""

    series: list[Series]
    harms: list[float]
    lefts: list[float]

    def x(self, harm: float) -> float:
        """Where a harm lies in a drawing of WIDTH x HEIGHT."""
        first, *_, last = self.harms
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (harm - first) / (last - first), 1)

    def y(self, left: float) -> float:
        """Where an accuracy that is left lies there."""
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * left / self.lefts[-1], 1)


def mark(index: int) -> tuple[str, int]:
    """Path of a run's shape, and the number of its colour."""
    return SHAPES[index % len(SHAPES)], index % COLOURS


def scatter(runs: list[Run]) -> Chart | None:
    """Accuracy left against harm, a point a class and a mean a run; None without such numbers."""
    series, place = [], count()
    for index, run in enumerate(runs):
        rows = [(next(place), row) for row in run.rows]
        points = [
            Point(number, row.name, row.harm, 100 * row.own.after)
            for number, row in rows
            if row.harm is not None and row.own.after is not None
        ]
        if points:
            series.append(Series(run, *mark(index), points))
    if not series:
        return None
    points = [point for one in series for point in one.points]
    harms = [0.0, *(point.harm for point in points)]
    lefts = [LEAST_LEFT, *(point.left for point in points)]
    return Chart(series, ticks(min(harms), max(LEAST_HARM, *harms)), ticks(0.0, max(lefts)))


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, evenly spaced, the first at most `low` and the last at least `high`."""
    rough = (high - low) / (TICKS - 1)
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * k, 10) for k in range(first, last + 1)]
