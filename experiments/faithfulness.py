"""What the known slips of the paper's public code cost, one by one and together.

    python -m experiments faithfulness [--weights RN50.pt]
    python -m experiments faithfulness --features DIR [--backbone ViT-B/32]
        [--classes 2] [--csv PATH] [KEY VALUE ...]

The first encodes the texts of the four sets by an RN50, randomly initialised unless --weights names
a checkpoint: objectives, reductions and the drift of the projection need no images. The second
works on a folder of feature bundles, and measures accuracies where they hold images. Problems are
those of the trainer ForgetLoRA with its weights and its retry (see `variants.py`). One CPU thread.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

import datasets
import train
from clip.architectures import architecture
from clip.bundle import FeatureBundle, bundle_path, load_bundles
from clip.source import ClipSource
from engine.cli import COUNT, Parser
from engine.determinism import one_thread
from engine.log import logger, progress, quiet
from evaluation.results import join_label
from evaluation.rows import rows_of
from evaluation.tables import result_table, summarise, write_table
from experiments.variants import VARIANTS, run_variants
from forgetting.errors import ProblemError
from forgetting.problem import Batch, LowRankEdit
from trainers.inputs import user_lists

Lists = dict[str, list[str]]  # data set -> classes
ENCODER, BUNDLED = "RN50", "ViT-B/32"
TOGETHER = 3  # classes forgotten at once, as many as the paper's lists hold
ACCURACIES = ("class", "rest", "others")
OTHER_NAMES = 20  # classes beside those to forget, where no images say which there are


def run_problem(options: Sequence[str], classes: Sequence[str]) -> pd.DataFrame:
    """A row for every variant on the problem of the trainer ForgetLoRA for `classes`, forgotten at
    once, with accuracies in percent (see `utils.summarise`; NaN without images)."""
    argv = [*(f"--forget={name}" for name in classes), *options]
    several = ["--multiclass"] if len(classes) > 1 else []
    with quiet():
        trainer = train.build_trainer(train.setup_cfg(train.parse([*several, *argv])))
        (classes,), dataset = trainer.plan.requests, trainer.plan.dataset
        problem, excluded, _ = trainer.problem(Batch([trainer.texts.request(classes)]))
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


def by_variant(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """Means over problems, a row for each value of `by` and variant, and one of the accuracies
    before; percent but for counts and lengths."""
    columns = {
        "problems": ("variant", "size"),
        "trials": ("trials", "mean"),
        "above optimum, %": ("above", "mean"),
        "worst, %": ("above", "max"),
        "reduction, %": ("reduction", "mean"),
        "length of Delta": ("size", "mean"),
        "drift of W, %": ("drift", "mean"),
    } | {f"{name}, %": (f"{name} after", "mean") for name in ACCURACIES}
    percent = table.assign(**{name: 100 * table[name] for name in ("above", "reduction", "drift")})
    was = percent[percent["variant"] == VARIANTS[0].name].assign(variant="before")
    was[["trials", "above", "reduction", "size", "drift"]] = float("nan")
    for name in ACCURACIES:
        was[f"{name} after"] = was[f"{name} before"]
    both = pd.concat([was.dropna(subset="class before"), percent])
    means = both.groupby([by, "variant"], sort=False).agg(**columns).reset_index()
    return means.sort_values(by, kind="stable")


def apart_from_ours(table: pd.DataFrame) -> pd.DataFrame:
    """How far each variant's accuracies lie from ours on the same problem, in percentage points: a
    row a variant; for each accuracy its mean difference, the mean and the largest of its size over
    all problems with images."""
    problem = ["data set", "mode", "classes"]
    found = table.set_index([*problem, "variant"])[[f"{name} after" for name in ACCURACIES]]
    apart = found - found.groupby(level=problem).transform("first")  # the first variant is ours
    groups, sizes = (x.groupby(level="variant", sort=False) for x in (apart, apart.abs()))
    numbers = {"mean": groups.mean(), "mean size": sizes.mean(), "largest": sizes.max()}
    shown = pd.DataFrame(
        {
            f"{name}: {key}": values[f"{name} after"]
            for name in ACCURACIES
            for key, values in numbers.items()
        }
    )
    shown.insert(0, "problems", groups["class after"].count())
    return shown.round(2).drop(index=VARIANTS[0].name).reset_index()


def text_bundles(folder: Path, weights: str | None) -> Lists:
    """Bundles without images of the four sets, encoded by an RN50; the classes to forget."""
    path, users = Path(weights or folder / "random.pt"), user_lists()
    if not weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = architecture(ENCODER).build().half()  # as OpenAI's archives hold it
        torch.save(model.state_dict(), path)
    source = ClipSource(ENCODER, path, folder, "cpu")
    lists = {}
    for dataset in users.all_ds:
        forgotten = [*map(datasets.clean_name, users.forget_classes_all[dataset])]
        vocabulary = [datasets.clean_name(name) for name in datasets.retain_vocabulary(dataset)]
        same = datasets.same_meaning(forgotten, dataset)
        free = [name for name in vocabulary if name not in same]
        classnames = [*forgotten, *free[:OTHER_NAMES]]
        template = datasets.spec(dataset).template
        FeatureBundle(
            image_features=torch.zeros(0, source.projection.shape[1]),
            labels=torch.zeros(0, dtype=torch.int64),
            class_hidden=source.encode_hidden([template.format(name) for name in classnames]),
            forget_hidden=source.encode_hidden(classnames),
            retain_hidden=source.encode_hidden(vocabulary),
            neutral_hidden=source.encode_hidden([""]),
            text_projection=source.projection,
            backbone=ENCODER,
            weights=source.weights_sha256,
            dataset=dataset,
            split="none",
            template=template,
            classnames=classnames,
            retain_names=vocabulary,
        ).save(bundle_path(folder, ENCODER, dataset))
        lists[dataset] = forgotten
    return lists


def bundled_classes(folder: Path, backbone: str, count: int) -> Lists:
    """At least `count` classes of every set of a folder, evenly over the set."""
    chosen = {}
    for dataset, bundle in load_bundles(folder, backbone).items():
        names = bundle.classnames
        chosen[dataset] = names[:: max(1, len(names) // count)][:count]
    return chosen


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Measure and print; returns a row for every problem and variant."""
    parser = Parser(prog="python -m experiments faithfulness", description=__doc__.splitlines()[0])
    parser.add_argument("--features", help="folder of feature bundles; default: encode texts")
    parser.add_argument("--backbone", help=f"backbone of the bundles (default: {BUNDLED})")
    parser.add_argument("--weights", help=f"checkpoint of {ENCODER}; default: random weights")
    parser.add_argument("--classes", type=COUNT, default=2, help="how many of a set, each alone")
    parser.add_argument("--csv", help="where to write a row for every problem and variant")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to change")
    args = parser.parse_args(argv)
    if (args.features and args.weights) or (args.backbone and not args.features):
        raise ProblemError("--backbone goes with --features, and --weights without it")
    with one_thread(), tempfile.TemporaryDirectory() as temporary:
        if args.features:
            folder, backbone, by = Path(args.features), args.backbone or BUNDLED, "data set"
            lists = bundled_classes(folder, backbone, max(args.classes, TOGETHER))
        else:
            folder, backbone, by = Path(temporary), ENCODER, "mode"
            lists = text_bundles(folder, args.weights)
        shared = ["--features", str(folder), "--backbone", backbone, "--trainer", "ForgetLoRA"]
        shared += ["--output-dir", f"{temporary}/out", *args.opts]
        work = [
            (dataset, classes)
            for dataset, names in lists.items()
            for classes in [*([name] for name in names[: args.classes]), names[:TOGETHER]]
        ]
        table = pd.concat(
            [
                run_problem(["--dataset", dataset, *shared], classes)
                for dataset, classes in progress(work, "problems")
            ],
            ignore_index=True,
        )
    tables = {f"{backbone}: the descent's variants": by_variant(table, by)}
    if table["class after"].notna().any():
        tables["Distance from ours, percentage points"] = apart_from_ours(table)
    for title, shown in tables.items():
        shown = shown.dropna(axis=1, how="all")
        print(f"\n{title}\n\n{shown.to_string(index=False, float_format='%.4g', na_rep='-')}")
    if args.csv:
        write_table(table, args.csv)
        logger.info(f"\nwritten: {args.csv}")
    return table
