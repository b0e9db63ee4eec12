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

import math
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

import datasets
from clip.architectures import architecture
from clip.bundle import FeatureBundle, bundle_path, load_bundles
from clip.source import ClipSource
from engine.cli import COUNT, Parser
from engine.determinism import one_thread
from engine.log import logger, progress
from evaluation.results import join_label
from evaluation.tables import write_table
from experiments.reproduce import markdown
from experiments.study_data import StudyData, sides
from experiments.variants import VARIANTS, run_variants
from forgetting.errors import ProblemError
from forgetting.problem import ForgetProblem, LowRankEdit
from trainers.inputs import user_lists

Lists = dict[str, list[str]]  # data set -> classes
ENCODER, BUNDLED = "RN50", "ViT-B/32"
TOGETHER = 3  # classes forgotten at once, as many as the paper's lists hold
ACCURACIES = ("forgotten", "rest", "others")
OTHER_NAMES = 20  # classes beside those to forget, where no images say which there are


def read_sets(
    folder: Path, backbone: str, chosen: Iterable[str], opts: Sequence[str] = ()
) -> dict[str, StudyData]:
    """The chosen sets of a folder of bundles, with the config keys (KEY VALUE) that are changed."""
    found = load_bundles(folder, backbone)
    return {
        name: StudyData(found[name], {n: b for n, b in found.items() if n != name}, opts=opts)
        for name in chosen
    }


def problem_of(data: StudyData, classes: list[str]) -> ForgetProblem:
    """The problem of the trainer ForgetLoRA for `classes`, forgotten at once."""
    return data.paper_problem(data.task("lora", request=data.texts.request(classes)))


def accuracies(
    data: StudyData, classes: list[str], answers: Sequence[Tensor]
) -> list[dict[str, float]]:
    """In percent, for each change (w, d): the forgotten classes (mean), the rest of their set, the
    other sets (mean), and what each was before; nothing where the set has no images."""
    if not len(data.bundle.labels):
        names = [*ACCURACIES, *(f"{name} before" for name in ACCURACIES)]
        return [dict.fromkeys(names, math.nan)] * len(answers)
    edits = [LowRankEdit(answer, torch.eye(answer.shape[1])) for answer in answers]
    found = []
    for rows in data.rows([classes] * len(edits), edits):
        shares = pd.DataFrame(sides(rows), index=["before", "after"], dtype=float)
        after, before = 100 * shares.loc["after"], 100 * shares.loc["before"].add_suffix(" before")
        found.append(after.to_dict() | before.to_dict())
    return found


def run_problems(sets: dict[str, StudyData], lists: Lists, count: int) -> pd.DataFrame:
    """The first `count` classes of every list alone, then `TOGETHER` at once: a row for every
    problem and variant."""
    frames = []
    work = [
        (dataset, classes)
        for dataset, names in lists.items()
        for classes in [*([name] for name in names[:count]), names[:TOGETHER]]
    ]
    bar = progress(work, "problems")
    for dataset, classes in bar:
        bar.set_postfix_str(f"{dataset} / {', '.join(classes)}")
        data = sets[dataset]
        frame = run_variants(problem_of(data, classes), data.descent)
        scores = pd.DataFrame(accuracies(data, classes, list(frame.pop("answer"))))
        mode = "at once" if len(classes) > 1 else "alone"
        place = {"set": dataset, "mode": mode, "classes": join_label(classes)}
        frames.append(pd.DataFrame(place, index=frame.index).join([frame, scores]))
    return pd.concat(frames, ignore_index=True)


def by_variant(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """Means over problems, a row for each value of `by` and variant, and one of the accuracies
    before; percent but for counts and lengths."""
    count = {"problems": ("variant", "size")}
    accuracies = {f"{name}, %": (name, "mean") for name in ACCURACIES}
    columns = count | {
        "trials": ("trials", "mean"),
        "above optimum, %": ("above", "mean"),
        "worst, %": ("above", "max"),
        "reduction, %": ("reduction", "mean"),
        "length of Delta": ("size", "mean"),
        "drift of W, %": ("drift", "mean"),
    }
    percent = table.assign(**{name: 100 * table[name] for name in ("above", "reduction", "drift")})
    rows = percent.groupby([by, "variant"], sort=False).agg(**columns, **accuracies)
    was = table[table["variant"] == VARIANTS[0].name].assign(
        variant="before", **{name: table[f"{name} before"] for name in ACCURACIES}
    )
    before = was.groupby([by, "variant"], sort=False).agg(**count, **accuracies)
    both = pd.concat([before.dropna(subset=f"{ACCURACIES[0]}, %"), rows]).reset_index()
    place = list(table[by].unique()).index
    ordered = both.sort_values(by, key=lambda values: values.map(place), kind="stable")
    return ordered[[by, "variant", *rows]]


def apart_from_ours(table: pd.DataFrame) -> pd.DataFrame:
    """How far each variant's accuracies lie from ours on the same problem, in percentage points.

    Returns:
        A row a variant; for each accuracy its mean difference, the mean and the largest of its
        size over all problems with images.
    """
    problem = ["set", "mode", "classes"]
    found = table.set_index([*problem, "variant"])[list(ACCURACIES)]
    apart = found - found.groupby(level=problem).transform("first")  # the first variant is ours
    groups, sizes = (x.groupby(level="variant", sort=False) for x in (apart, apart.abs()))
    numbers = {"mean": groups.mean(), "mean size": sizes.mean(), "largest": sizes.max()}
    columns = {
        f"{name}: {key}": values[name] for name in ACCURACIES for key, values in numbers.items()
    }
    shown = pd.DataFrame(columns).round(2) + 0.0
    shown.insert(0, "problems", groups[ACCURACIES[0]].count())
    return shown.drop(index=VARIANTS[0].name).reset_index()


def text_bundles(folder: Path, weights: str | None) -> Lists:
    """Bundles without images of the four sets, encoded by an RN50; the classes to forget."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(weights) if weights else Path(temporary) / "random.pt"
        if not weights:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = architecture(ENCODER).build().half()  # as OpenAI's archives hold it
            torch.save(model.state_dict(), path)
        source = ClipSource(ENCODER, path, temporary, "cpu")
        users = user_lists()
        lists = {
            name: [*map(datasets.clean_name, users.forget_classes_all[name])]
            for name in users.all_ds
        }
        for dataset, forgotten in lists.items():
            vocabulary = [datasets.clean_name(name) for name in datasets.retain_vocabulary(dataset)]
            same = set().union(
                *(datasets.synonyms(dataset).get(key, ()) for key in map(datasets.key, forgotten))
            )
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
                text_bias=source.bias,
                backbone=ENCODER,
                weights=source.weights_sha256,
                dataset=dataset,
                split="none",
                template=template,
                classnames=classnames,
                retain_names=vocabulary,
            ).save(bundle_path(folder, ENCODER, dataset))
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
    parser.add_argument("--backbone", help=f"of those bundles (default: {BUNDLED})")
    parser.add_argument("--weights", help=f"a checkpoint of {ENCODER}; default: random weights")
    parser.add_argument("--classes", type=COUNT, default=2, help="how many of a set, each alone")
    parser.add_argument("--csv", help="where to write a row for every problem and variant")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to change")
    args = parser.parse_args(argv)
    if (args.features and args.weights) or (args.backbone and not args.features):
        raise ProblemError("--backbone goes with --features, and --weights without it")
    started = time.perf_counter()
    with one_thread(), tempfile.TemporaryDirectory() as temporary:
        if args.features:
            folder, backbone, by = Path(args.features), args.backbone or BUNDLED, "set"
            kind = f"bundles of {args.features}"
            lists = bundled_classes(folder, backbone, max(args.classes, TOGETHER))
        else:
            folder, backbone, by = Path(temporary), ENCODER, "mode"
            kind = f"weights {args.weights}" if args.weights else "random weights"
            lists = text_bundles(folder, args.weights)
        sets = read_sets(folder, backbone, lists, args.opts)
        table = run_problems(sets, lists, args.classes)
        print_table(f"{backbone}, {kind}: the descent's variants", by_variant(table, by))
        if table[list(ACCURACIES)].notna().all(axis=1).any():
            print_table("Distance from ours, percentage points", apart_from_ours(table))
    if args.csv:
        write_table(table, args.csv)
        logger.info(f"\nwritten: {args.csv}")
    logger.info(f"\n{time.perf_counter() - started:.0f} s in all")
    return table


def print_table(title: str, table: pd.DataFrame) -> None:
    """Print one table of docs/faithfulness.md, without columns that hold no number."""
    table = table.dropna(axis=1, how="all")
    print(f"\n{title}\n\n{markdown(table) if len(table) else 'none'}", flush=True)
