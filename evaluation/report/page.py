"""The report as one HTML file: template, style and a short script, nothing from elsewhere."""

import json
import shlex
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evaluation.report import measures, summary
from evaluation.report.charts import charts
from evaluation.report.pictures import strips
from evaluation.report.runs import Method, forgotten_classes
from forgetting.io import write_bytes

DETAILED = 300  # classes with pictures and all that was measured; a browser must lay it out
ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters["indented"] = partial(json.dumps, indent=1, ensure_ascii=False)
ENVIRONMENT.filters["quoted"] = lambda path: shlex.quote(str(path))


def write_report(methods: list[Method], path: str | Path) -> Path:
    """Write the report of methods side by side; the file appears whole or not at all."""
    # A lone surrogate, which JSON can spell and UTF-8 cannot, becomes a question mark.
    write_bytes(render(methods).encode("utf-8", errors="replace"), path)
    return Path(path)


def render(methods: list[Method]) -> str:
    classes = forgotten_classes(methods)
    return ENVIRONMENT.get_template("template.html").render(
        methods=methods,
        classes=classes,
        strips={key: strips(key[0], classes[key]) for key in list(classes)[:DETAILED]},
        settings={str(run.folder): run.settings for method in methods for run in method.runs},
        charts=charts(methods),
        summary=summary,
        measures=measures,
    )
