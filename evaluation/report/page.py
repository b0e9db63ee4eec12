"""The report as one HTML file: template, style and a short script, nothing from elsewhere."""

from __future__ import annotations

import json
import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from engine.files import atomic_path, refuse_foreign
from evaluation.report import summary
from evaluation.report.charts import charts
from evaluation.report.classes import Strip, forgotten
from evaluation.report.runs import Run
from evaluation.report.summary import Summary, percent, points
from evaluation.rules import Fate

REPORT = "report.html"
GENERATOR = "clip-forget-report/1"  # in every report, so that nothing else is written over
HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "open_clip_torch", "numpy", "scipy", "scikit-learn")
OPENING = 3  # classes whose pictures stand first
TEXTS = 12  # other words that are written out
COLUMNS = (
    *("Method", "Classes", "Gone", "Come back", "Recognised, %"),
    *("Rest of their set, points", "Other sets, points", "Seconds"),
)
ATTACKERS = {  # what each has
    "original_known": "the original weights too",
    "two_adapters": "a second changed model",
    "alone": "nothing else",
}
TEACHERS = {
    "cache": "kept beside the model",
    "probe": "a classifier on top",
    "refit": "its name learnt anew",
}


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
    """The report's HTML, of one run or of several side by side."""
    classes = [(one, one.strips) for one in forgotten(runs)]
    opening = [pair for pair in classes if any(map(Strip.shown, pair[1]))][:OPENING]
    return _template().render(
        runs=runs,
        many=len(runs) > 1,
        sentence=summary.sentence(runs),
        opening=opening,
        classes=classes,
        columns=COLUMNS,
        summaries=[(run, Summary.of(run)) for run in runs],
        told=told,
        charts=charts(runs),
        findings=[(run, summary.findings(run)) for run in runs],
        missing=[(run, summary.not_measured(run)) for run in runs],
        versions=versions(),
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "search.js").read_text(encoding="utf-8")),
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
    filters = {"percent": percent, "points": points, "listed": summary.listed}
    environment.filters |= filters
    environment.tests["startswith"] = str.startswith
    environment.globals |= {
        "generator": GENERATOR,
        "TEXTS": TEXTS,
        "PROVED": summary.PROVED,
        "attackers": ATTACKERS,
        "teachers": TEACHERS,
        "count": summary.count,
        "flat": flat,
        "shares": shares,
        "share_of": lambda share: f"{100 * (share or 0):.3g}",
        "worst_first": lambda prompts: sorted(prompts, key=lambda p: -(p["after"]["value"] or 0)),
    }
    return environment.get_template("template.html")


def told(run: Run, one: Summary) -> list[tuple[str, str]]:
    """A run's line among the methods: a number for each of `COLUMNS`, and what is to be said."""

    def change(spread: summary.Spread) -> tuple[str, str]:
        worst = f"{points(spread.worst)} at worst, {spread.worst_name}"
        return points(spread.points), worst if spread.worst is not None else ""

    left, stay = one.left and one.left.own.after, one.fates[Fate.STAYS]
    return [
        (f"{len(run.rows):,}", ""),
        (str(one.fates[Fate.GONE]), f"{stay} not" if stay else ""),
        (str(one.returning), one.texts) if one.tried else ("–", "not tried"),
        (
            f"{percent(one.own.before)} → {percent(one.own.after)}" if one.left else "–",
            f"most left: {percent(left)}, {one.left.name}" if left else "",
        ),
        change(one.rest),
        change(one.others),
        ("–" if one.seconds is None else f"{one.seconds:.3f}", ""),
    ]


def shares(found: dict[str, Any]) -> list[tuple[str, float | None, float | None]]:
    """What a class's images are taken for: names with their shares before and after, those of
    after first; None where a list of ten names does not say."""
    before, after = ({one["name"]: one["share"] for one in found[k]} for k in ("before", "after"))
    rest = 0.0 if len(after) < 10 else None
    names = dict.fromkeys([*after, *list(before)[:1]])
    return [(name, before.get(name, 0.0), after.get(name, rest)) for name in names]


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
