"""The exact solver measured: against the paper's descent, in growth, beside other closed forms.

    python -m benchmarks solver [--features BUNDLE.safetensors] [--json OUT.json]

Every class of the bundle (of 1,000 random texts without one) is forgotten alone while all others
and the vocabulary are retained. All numbers are of one run on one CPU thread, as the trainers
solve (a second thread waits in a spin on a machine that others use); with `--json` a plot is
written beside the file. Seconds waver with the load of the machine, ratios less so.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch

from benchmarks.compare import Score, closed_forms, run_lora
from benchmarks.growth import growth_classes, growth_names, growth_width
from benchmarks.workload import constants, from_bundle, random_workload
from engine import UserError
from engine.cli import Parser
from engine.config import paper_weights
from engine.determinism import one_thread
from engine.files import write_json_atomic
from evaluation.plots import drawing

REPEATS = 3


def measure(features: str | None) -> dict:
    """Run everything, printing as it goes, and return what the JSON file holds."""
    started = time.perf_counter()
    work = from_bundle(features) if features else random_workload()
    count = len(work.classes)
    lamb_forget = work.auto_lamb_forget()
    w, d = work.projection.shape
    print(f"{work.name}: {count} classes, {len(work.retained)} names, w {w}, d {d}")
    weights = paper_weights(constants())
    print(
        f"lamb_forget {lamb_forget:.4f} (just above the largest c*), lamb_preserve "
        f"{weights['lamb_preserve']:g}, lamb_weight {weights['lamb_weight']:g}, rank "
        f"{constants().FORGET.RANK}, target the empty prompt; {torch.get_num_threads()} thread"
    )
    runs = [work.solve(lamb_forget) for _ in range(REPEATS)]
    exact = statistics.median(run.solve_seconds for run in runs)
    lora = run_lora(work, lamb_forget)
    lora_seconds = statistics.median(lora.seconds)
    score = Score(work, lamb_forget)
    ratios = [score.ratio(*pair) for pair in zip(lora.classes, lora.answers, strict=True)]
    result = {
        "classes": count,
        "exact_seconds": exact,
        "certify_seconds": statistics.median(run.certify_seconds for run in runs),
        "lora_seconds_per_class": lora_seconds,
        "lora_objective_over_exact": statistics.median(ratios),
        "max_relative_gap": float(runs[0].gap.max()),
        "exact_speedup_per_class": lora_seconds * count / exact,
    }
    for key, value in result.items():
        print(f"  {key:<27} {value:.4g}" if isinstance(value, float) else f"  {key:<27} {value}")
    tables = {
        "growth_m": (
            "names read into the statistics, then one class solved from them",
            lambda: growth_names(work),
        ),
        "growth_classes": (
            "classes, each forgotten alone",
            lambda: growth_classes(work, lamb_forget),
        ),
        "growth_w": ("1,000 classes of random texts of width w", growth_width),
    }
    for key, (title, grow) in tables.items():
        result[key] = grow()
        print_table(f"{key}: {title}", result[key])
    result["closed_forms"] = closed_forms(work, lamb_forget, lora)
    print_table("closed_forms: means over the classes", result["closed_forms"]["methods"])
    print(f"{time.perf_counter() - started:.0f} s in all")
    return result


def print_table(title: str, rows: list[dict]) -> None:
    """Rows of one kind, aligned; bytes as MB."""
    heads = [key.replace("_bytes", "_MB") for key in rows[0]]
    lines = [heads, *([_cell(key, value) for key, value in row.items()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for line in lines:
        print("  " + "  ".join(c.rjust(n) for c, n in zip(line, widths, strict=True)))


def _cell(key: str, value) -> str:
    if value is None:
        return "-"
    if key.endswith("_bytes"):
        return f"{value / 1e6:.1f}"
    if isinstance(value, float):
        return f"{value:.3f}" if key.endswith(("accuracy", "exact")) else f"{value:.2g}"
    return str(value)


def plot(result: dict, path: Path) -> None:
    """Growth with names, classes and width, and seconds a class against the objective."""
    panels = [
        ("growth_m", "names", "retained names", ["read_seconds", "solve_seconds"]),
        ("growth_classes", "classes", "classes", ["solve_seconds", "certify_seconds"]),
        ("growth_w", "w", "width w = d, 1,000 classes", ["solve_seconds", "certify_seconds"]),
    ]
    with drawing(path, 15, 3.8) as figure:
        axes = figure.subplots(1, 4)
        for axis, (key, column, label, series) in zip(axes, panels, strict=False):
            rows = result[key]
            x = [row[column] for row in rows]
            for name in series:
                axis.plot(x, [row[name] for row in rows], "o-", label=name.removesuffix("_seconds"))
            memory = "statistics_bytes" if key == "growth_m" else "peak_tensor_bytes"
            twin = axis.twinx()
            twin.plot(x, [row[memory] / 1e6 for row in rows], "s:", color="0.6")
            twin.set_ylim(0, 1.3 * rows[-1][memory] / 1e6)
            twin.set_ylabel("MB (dotted)", color="0.5")
            axis.set(xlabel=label, ylabel="seconds", yscale="log")
            if key != "growth_w":
                axis.set_xscale("log")
            axis.legend(loc="lower right")
        axis, methods = axes[3], result["closed_forms"]["methods"][1:]  # without "before"
        names = [row["method"] for row in methods]
        axis.barh(names, [row["seconds_per_class"] for row in methods])
        axis.invert_yaxis()
        axis.set(xscale="log", xlabel="seconds a class")


def main(argv: list[str] | None = None) -> dict:
    """Measure, print and write."""
    parser = Parser(prog="python -m benchmarks solver", description=__doc__.splitlines()[0])
    parser.add_argument("--features", help="a FeatureBundle; random texts without it")
    parser.add_argument("--json", help="where to write the numbers; a plot goes beside it (.png)")
    args = parser.parse_args(argv)
    path = Path(args.json) if args.json else None
    if path and (path.suffix != ".json" or path.is_dir()):
        raise UserError(f"--json {args.json}: must name a file that ends in .json")
    with one_thread():
        result = measure(args.features)
    if path:
        write_json_atomic(result, path)
        plot(result, path.with_suffix(".png"))
        print(f"written: {path} and {path.with_suffix('.png')}")
    return result
