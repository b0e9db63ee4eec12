"""The report as one HTML file: template, style, script and data, nothing from elsewhere."""

from __future__ import annotations

import json
import math
import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from engine.files import atomic_path, refuse_foreign
from evaluation.report import summary
from evaluation.report.runs import Run
from evaluation.report.scatter import HEIGHT, WIDTH, mark, scatter
from evaluation.rows import Row

REPORT = "report.html"
GENERATOR = "clip-forget-report/1"  # in every report, so that nothing else is written over
HERE = Path(__file__).resolve().parent
SCRIPTS = ("dom.js", "charts.js", "attacks.js", "details.js", "table.js")
PACKAGES = ("torch", "open_clip_torch", "numpy", "scipy", "scikit-learn")
DIGITS = 6  # significant ones of an embedded number; a page shows at most four
ACCURACY = ("value", "low", "high", "n")
# What a parser of HTML could take for markup inside a script element.
ESCAPES = {character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def write_report(runs: list[Run], path: str | Path) -> Path:
    """Write the report of runs, whole or not at all.

    Raises:
        UserError: the place cannot be written, or holds something that is no report.
    """
    path = Path(path)
    refuse_foreign(path, GENERATOR)
    text = render(runs)
    with atomic_path(path) as temporary:
        # A lone surrogate, which JSON can spell and UTF-8 cannot, becomes a question mark.
        temporary.write_bytes(text.encode("utf-8", errors="replace"))
    return path


def render(runs: list[Run]) -> str:
    """The report's HTML; the first run is the primary one, the others are compared with it."""
    rows = [(place, run, row) for place, run in enumerate(runs) for row in run.rows]
    return _template().render(
        runs=runs,
        primary=runs[0],
        rows=list(enumerate(rows)),
        datasets=sorted({row.dataset for _, _, row in rows}),
        summaries=[(run, mark(i), summary.Summary.of(run)) for i, run in enumerate(runs)],
        audited=any(row.audit for row in runs[0].rows),
        findings=summary.findings(runs[0]),
        missing=[(run, summary.not_measured(run)) for run in runs],
        chart=scatter(runs),
        size=(WIDTH, HEIGHT),
        count=summary.count,
        listed=summary.listed,
        flat=flat,
        detail=detail,
        versions=versions(),
        generator=GENERATOR,
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup("\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)),
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": summary.percent, "points": summary.points}
    environment.filters["embedded"] = embedded
    return environment.get_template("template.html")


def detail(run: Run, row: Row) -> dict[str, Any]:
    """What the page needs to show one class, JSON values."""
    told = ("name", "dataset", "together", "own", "rest", "others", "verdict", "audit")
    in_sentences = ("left_retain_set", "trials")  # the page says these itself
    solver = row.solver
    return {key: getattr(row, key) for key in told} | {
        "run": run.name,
        "method": run.method,
        "interval": {side: row.interval(side) for side in ("before", "after")},
        "solver": {
            "gap": row.gap,
            "branch": solver.get("branch"),
            "reduction": solver.get("reduction"),
            "trials": len(solver.get("trials", [])),
            "removed": solver.get("removed_names", []),
            "left": solver.get("left_retain_set", []),
        },
        "facts": flat(compact({k: v for k, v in solver.items() if k not in in_sentences})),
        "command": run.audit_command,
    }


def embedded(value: Any) -> Markup:
    """JSON for a script element: nothing in it can end the element or begin another."""
    text = json.dumps(compact(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character, escape in ESCAPES.items():
        text = text.replace(character, escape)
    return Markup(text)


def compact(value: Any) -> Any:
    """The same, smaller: an accuracy as [value, low, high, n], numbers without their last digits,
    and None for what JSON has no word for."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        if "low" in value and value.keys() >= set(ACCURACY):
            return [compact(value[key]) for key in ACCURACY]
        return {str(key): compact(part) for key, part in value.items()}
    return [compact(part) for part in value] if isinstance(value, list | tuple) else value


def flat(settings: dict[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Nested settings as lines: a name with dots, and the value as text."""
    lines = []
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            lines += flat(value, f"{before}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            lines.append((f"{before}{key}", text))
    return lines


def versions() -> list[tuple[str, str]]:
    """Of Python and the packages that the numbers depend on, where the report was made."""
    found = [("Python", platform.python_version())]
    for package in PACKAGES:
        try:
            found.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            found.append((package, "not installed"))
    return found
