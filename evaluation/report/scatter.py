"""Where the points of the chart of forgetting against harm lie; the template draws them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from evaluation.report.runs import Run
from evaluation.rows import mean

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 20, 56  # margins for the axes' words
TICKS = 6  # at most about so many on an axis
LEAST_HARM = 1.0  # points; an axis of hundredths would make noise look like a finding
LEAST_LEFT = 10.0  # percent
# A run is told by shape and by colour (style.css: --m0 ...); their counts share no divisor.
SHAPES = {
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z",
    "square": "M-3.6-3.6h7.2v7.2h-7.2Z",
    "triangle": "M0-4.6 4.4 3.4h-8.8Z",
    "diamond": "M0-5.2 4.6 0 0 5.2-4.6 0Z",
    "cross": "M-4.4-2.4-2.4-4.4 0-2 2.4-4.4 4.4-2.4 2 0 4.4 2.4 2.4 4.4 0 2-2.4 4.4-4.4 2.4-2 0Z",
    "down": "M0 4.6 4.4-3.4h-8.8Z",
}
COLOURS = 5


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    row: int | None  # place among all rows of the report; None for a mean
    name: str
    harm: float
    left: float  # percent


@dataclass(frozen=True)
class Series:
    """The points of one run."""

    run: Run
    shape: str
    path: str
    colour: int
    points: list[Point]
    mean: Point


@dataclass(frozen=True)
class Chart:
    """Points and ticks in the units of a drawing of WIDTH x HEIGHT."""

    series: list[Series]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    zero: float  # x of no harm


def mark(index: int) -> tuple[str, str, int]:
    """Name and path of a run's shape, and the number of its colour."""
    name = list(SHAPES)[index % len(SHAPES)]
    return name, SHAPES[name], index % COLOURS


def scatter(runs: list[Run]) -> Chart | None:
    """Accuracy left against harm, a point a class and a mean a run; None without such numbers."""
    found = []
    place = 0
    for index, run in enumerate(runs):
        measured = []
        for row in run.rows:
            if row.harm is not None and row.own.after is not None:
                measured.append((place, row.name, row.harm, 100 * row.own.after))
            place += 1
        if measured:
            found.append((index, run, measured))
    if not found:
        return None
    harms = [harm for _, _, measured in found for _, _, harm, _ in measured]
    lefts = [left for _, _, measured in found for *_, left in measured]
    xs = ticks(min(0.0, *harms), max(LEAST_HARM, *harms))
    ys = ticks(0.0, max(LEAST_LEFT, *lefts))

    def at_x(harm: float) -> float:
        span = WIDTH - LEFT - RIGHT
        return round(LEFT + span * (harm - xs[0]) / (xs[-1] - xs[0]), 1)

    def at_y(left: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * left / ys[-1], 1)

    def point(row: int | None, name: str, harm: float, left: float) -> Point:
        return Point(at_x(harm), at_y(left), row, name, harm, left)

    series = []
    for index, run, measured in found:
        shape, path, colour = mark(index)
        centre = point(
            None,
            run.name,
            mean([harm for _, _, harm, _ in measured]),
            mean([left for *_, left in measured]),
        )
        series.append(Series(run, shape, path, colour, [point(*one) for one in measured], centre))
    return Chart(
        series,
        [(at_x(x), f"{x:g}".replace("-", "−")) for x in xs],
        [(at_y(y), f"{y:g}") for y in ys],
        at_x(0.0),
    )


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, evenly spaced, the first at most `low` and the last at least `high`."""
    rough = (high - low) / (TICKS - 1)
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * k, 10) for k in range(first, last + 1)]
