"""The report as one HTML file: template, style and a short script, nothing from elsewhere."""

import json
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evaluation.audit.record import ATTACKERS, RELEARNING
from evaluation.report import summary
from evaluation.report.charts import charts
from evaluation.report.pictures import HARMED, MOST, strips
from evaluation.report.runs import Method, forgotten_classes, tags
from forgetting.io import write_bytes

OPENING = 12  # classes whose pictures come first
TEXTS = 12  # other words that are written out
DETAILED = 400  # classes of which everything is written out; a browser must lay it out
ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.tests["startswith"] = str.startswith
ENVIRONMENT.filters["indented"] = partial(json.dumps, indent=1, ensure_ascii=False)
for each in (summary.percent, summary.points, summary.listed, summary.within):
    ENVIRONMENT.filters[each.__name__] = each


def write_report(methods: list[Method], path: str | Path) -> Path:
    """Write the report of methods side by side; the file appears whole or not at all."""
    text = render(methods)
    # A lone surrogate, which JSON can spell and UTF-8 cannot, becomes a question mark.
    write_bytes(text.encode("utf-8", errors="replace"), path)
    return Path(path)


def render(methods: list[Method]) -> str:
    classes = forgotten_classes(methods)
    drawn = MOST // (5 * (1 + HARMED))  # classes whose images fit
    pictured = [(one, strips(one, number < drawn)) for number, one in enumerate(classes)]
    opening = [
        (number, one, found)
        for number, (one, found) in enumerate(pictured)
        if any(picture.source for strip in found for picture in strip.pictures)
    ][:OPENING]
    return ENVIRONMENT.get_template("template.html").render(
        methods=methods,
        opening=opening,
        opened={number for number, *_ in opening},
        classes=pictured,
        charts=charts(methods),
        summary=summary,
        tags=tags,
        attackers=ATTACKERS,
        teachers=RELEARNING,
        TEXTS=TEXTS,
        DETAILED=DETAILED,
    )
