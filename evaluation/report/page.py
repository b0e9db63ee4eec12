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
from evaluation.report.classes import ALL, BUDGET, Strip, forgotten
from evaluation.report.runs import Method, Run, methods
from evaluation.report.summary import Summary, percent, points, span
from evaluation.rules import Fate

GENERATOR = "clip-forget-report/1"  # in every report, so that nothing else is written over
HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "open_clip_torch", "numpy", "scipy", "scikit-learn")
OPENING = 12  # classes whose pictures stand first
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


def check_report(path: str | Path) -> Path:
    """`path`; ProblemError if it cannot be written, or holds something that is no report."""
    refuse_foreign(path, GENERATOR)
    return Path(path)


def write_report(runs: list[Run], path: str | Path) -> Path:
    """Write the report of runs, whole or not at all, see `check_report`."""
    path = check_report(path)
    text = render(runs)
    with atomic_path(path) as temporary:
        # A lone surrogate, which JSON can spell and UTF-8 cannot, becomes a question mark.
        temporary.write_bytes(text.encode("utf-8", errors="replace"))
    return path


def render(runs: list[Run]) -> str:
    """The report's HTML, of one run or of several side by side."""
    found = forgotten(runs)
    classes = [(one, one.strips(min(BUDGET, ALL // len(found)))) for one in found]
    pictured = [
        (place, *pair) for place, pair in enumerate(classes) if any(map(Strip.shown, pair[1]))
    ]
    opening = pictured[:OPENING]
    told = methods(runs)
    return _template().render(
        runs=runs,
        many=len(told) > 1,
        several=len(runs) > 1,
        sentence=summary.sentence(runs),
        opening=opening,
        pictured=len(pictured),
        above={place for place, *_ in opening},
        classes=classes,
        columns=COLUMNS,
        lines=[(method, line(method)) for method in told],
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
    filters = {"percent": percent, "points": points, "listed": summary.listed, "within": within}
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


def line(method: Method) -> list[tuple[str, str]]:
    """A line among the methods: a number for each of `COLUMNS`, and what is to be said. Of seeds
    the range of counts, and means with their standard deviation."""
    found = list(map(Summary.of, method.runs))
    means = method.means

    def change(key: str, spreads: list[summary.Spread]) -> tuple[str, str]:
        told = [one for one in spreads if one.worst is not None]
        worst = min(told, key=lambda one: one.worst, default=None)
        said = [within(means[f"std_{key}"])]
        said += [f"{points(worst.worst)} at worst, {worst.worst_name}"] if worst else []
        return points(means[key]), "; ".join(filter(None, said))

    left = max((one.left for one in found if one.left), key=lambda r: r.own.after, default=None)
    stay = [one.fates[Fate.STAYS] for one in found]
    tried = [one for one in found if one.tried]
    after = means["std_after"]
    said = [within(None if after is None else 100 * after)]
    said += (
        [f"most left: {percent(left.own.after)}, {left.name}"] if left and left.own.after else []
    )
    return [
        (span(len(run.rows) for run in method.runs), ""),
        (span(one.fates[Fate.GONE] for one in found), f"{span(stay)} not" if max(stay) else ""),
        (span(one.returning for one in tried), tried[0].texts) if tried else ("–", "not tried"),
        (
            f"{percent(means['before'])} → {percent(means['after'])}" if left else "–",
            "; ".join(filter(None, said)),
        ),
        change("rest", [one.rest for one in found]),
        change("others", [one.others for one in found]),
        ("–" if means["seconds"] is None else f"{means['seconds']:.3f}", ""),
    ]


def within(deviation: float | None) -> str:
    """A standard deviation over seeds; "" of one."""
    return "" if deviation is None else f"± {deviation:.1f}"


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
