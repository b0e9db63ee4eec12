"""What the known slips of the paper's public code cost, one by one and together.

    python -m experiments faithfulness --features DIR [--backbone ViT-B/32]
        [--classes 2] [--csv PATH] [KEY VALUE ...]

Works on a folder of feature bundles, and measures accuracies where they hold images. Problems are
those of the trainer ForgetLoRA with its weights and its retry (see `variants.py`). One CPU thread.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

import train
from clip.bundle import load_bundles
from engine.cli import COUNT, Parser
from engine.determinism import one_thread
from engine.log import logger, progress, quiet
from evaluation.results import join_label
from evaluation.rows import rows_of
from evaluation.tables import QUANTITIES, result_table, summarise, write_table
from experiments.variants import VARIANTS, run_variants
from forgetting.problem import Batch, LowRankEdit

TOGETHER = 3  # classes forgotten at once, as many as the paper's lists hold


def run_problem(options: Sequence[str], classes: Sequence[str]) -> pd.DataFrame:
    """A row for every variant on the problem of the trainer ForgetLoRA for `classes`, forgotten at
    once, with accuracies in percent (see `utils.summarise`; NaN without images)."""
    argv = [*(f"--forget={name}" for name in classes), *options]
    several = ["--multiclass"] if len(classes) > 1 else []
    with quiet():
        trainer = train.build_trainer(train.setup_cfg(train.parse([*several, *argv])))
        (classes,), dataset = trainer.plan.requests, trainer.plan.dataset
        problem, excluded, _ = trainer.problem(Batch([trainer.request(classes)]))
    frame = run_variants(problem.part(slice(None), ~excluded[0]), trainer.settings)
    edits = [LowRankEdit(x, torch.eye(x.shape[1])) for x in frame.pop("answer")]
    before, label = trainer.accuracies.before(classes), join_label(classes)
    rows = [
        result_table(Path(), rows_of({dataset: {label: entry}}), bool(several))
        for after in trainer.accuracies.after([classes] * len(edits), edits)
        for entry in [{"zero_shot": before, "final_results": after}]
    ]
    scores = summarise(pd.concat(rows, ignore_index=True)).rename(columns={"forgotten": "classes"})
    return scores.assign(mode="at once" if several else "alone").join(frame)


def by_variant(table: pd.DataFrame) -> pd.DataFrame:
    """Means over problems, a row for each data set and variant, and one of the accuracies before;
    percent but for counts and lengths."""
    columns = {
        "problems": ("variant", "size"),
        "trials": ("trials", "mean"),
        "above optimum, %": ("above", "mean"),
        "worst, %": ("above", "max"),
        "reduction, %": ("reduction", "mean"),
        "length of Delta": ("size", "mean"),
        "drift of W, %": ("drift", "mean"),
    } | {f"{name}, %": (f"{name} after", "mean") for name in QUANTITIES}
    percent = table.assign(**{name: 100 * table[name] for name in ("above", "reduction", "drift")})
    was = percent[percent["variant"] == VARIANTS[0].name].assign(variant="before")
    was[["trials", "above", "reduction", "size", "drift"]] = float("nan")
    for name in QUANTITIES:
        was[f"{name} after"] = was[f"{name} before"]
    both = pd.concat([was.dropna(subset="class before"), percent])
    means = both.groupby(["data set", "variant"], sort=False).agg(**columns).reset_index()
    return means.sort_values("data set", kind="stable")


def apart_from_ours(table: pd.DataFrame) -> pd.DataFrame:
    """How far each variant's accuracies lie from ours on the same problem, in points: the mean
    difference, and the mean and the largest of its size, over all problems with images."""
    problem = ["data set", "mode", "classes"]
    found = table.set_index([*problem, "variant"])[[f"{name} after" for name in QUANTITIES]]
    apart = found - found.groupby(level=problem).transform("first")  # the first variant is ours
    groups, sizes = (x.groupby(level="variant", sort=False) for x in (apart, apart.abs()))
    numbers = {"mean": groups.mean(), "mean size": sizes.mean(), "largest": sizes.max()}
    shown = pd.DataFrame(
        {
            f"{name}: {key}": values[f"{name} after"]
            for name in QUANTITIES
            for key, values in numbers.items()
        }
    )
    shown.insert(0, "problems", groups["class after"].count())
    return shown.round(2).drop(index=VARIANTS[0].name).reset_index()


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Measure and print; returns a row for every problem and variant."""
    parser = Parser(prog="python -m experiments faithfulness", description=__doc__.splitlines()[0])
    parser.add_argument("--features", required=True, help="folder of feature bundles")
    parser.add_argument("--backbone", default="ViT-B/32", help="of the bundles")
    parser.add_argument("--classes", type=COUNT, default=2, help="how many of a set, each alone")
    parser.add_argument("--csv", help="where to write a row for every problem and variant")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to change")
    args = parser.parse_args(argv)
    count, work = max(args.classes, TOGETHER), []
    for dataset, bundle in load_bundles(args.features, args.backbone).items():
        names = bundle.classnames
        names = names[:: max(1, len(names) // count)][:count]  # evenly over the set
        work += [(dataset, [name]) for name in names[: args.classes]]
        work.append((dataset, names[:TOGETHER]))
    shared = ["--features", args.features, "--backbone", args.backbone, "--trainer", "ForgetLoRA"]
    with one_thread(), tempfile.TemporaryDirectory() as temporary:
        shared += ["--output-dir", f"{temporary}/out", *args.opts]
        frames = [
            run_problem(["--dataset", dataset, *shared], classes)
            for dataset, classes in progress(work, "problems")
        ]
    table = pd.concat(frames, ignore_index=True)
    tables = {f"{args.backbone}: the descent's variants": by_variant(table)}
    if table["class after"].notna().any():
        tables["Distance from ours, percentage points"] = apart_from_ours(table)
    for title, shown in tables.items():
        shown = shown.dropna(axis=1, how="all")
        print(f"\n{title}\n\n{shown.to_string(index=False, float_format='%.4g', na_rep='-')}")
    if args.csv:
        write_table(table, args.csv)
        logger.info(f"\nwritten: {args.csv}")
    return table
