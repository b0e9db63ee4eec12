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
from dataclasses import replace
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
from engine.files import require_writable
from engine.log import logger, progress
from evaluation.results import join_label
from evaluation.tables import write_table
from experiments.measure import judged, sides
from experiments.reproduce import markdown
from experiments.solvers import problem_of
from experiments.variants import VARIANTS, run_variants
from experiments.world import World
from forgetting import AUTO, solve_exact, thresholds
from forgetting.errors import ProblemError
from forgetting.problem import LowRankEdit
from trainers.plan import user_lists

Lists = dict[str, list[str]]  # data set -> classes
ENCODER, BUNDLED = "RN50", "ViT-B/32"
TOGETHER = 3  # classes forgotten at once, as many as the paper's lists hold
ACCURACIES = ("forgotten", "rest", "others")
OTHER_NAMES = 20  # classes beside those to forget, where no images say which there are
# Names of the everyday vocabulary of public bundles that mean the same as a class of theirs.
SAME = {
    "CaltechObjects": {
        "airplane": {"aircraft"},
        "cup": {"mug", "coffee cup"},
        "handgun": {"pistol"},
        "roller skates": {"roller skate", "rollerblade"},
        "scissors": {"shears"},
        "umbrella": {"parasol"},
    }
}


def worlds(
    folder: Path, backbone: str, chosen: Iterable[str], opts: Sequence[str] = ()
) -> dict[str, World]:
    """The chosen sets of a folder of bundles, with the config keys (KEY VALUE) that are changed."""
    found = load_bundles(folder, backbone)
    return {
        name: World(found[name], {n: b for n, b in found.items() if n != name}, opts=opts)
        for name in chosen
    }


def accuracies(
    world: World, classes: list[str], answers: Sequence[Tensor]
) -> list[dict[str, float]]:
    """In percent, for each change (w, d): the forgotten classes (mean), the rest of their set, the
    other sets (mean), and what each was before; nothing where the set has no images."""
    if not len(world.bundle.labels):
        names = [*ACCURACIES, *(f"{name} before" for name in ACCURACIES)]
        return [dict.fromkeys(names, math.nan)] * len(answers)
    edits = [LowRankEdit(answer, torch.eye(answer.shape[1])) for answer in answers]
    found = []
    for rows in judged(world, [classes] * len(edits), edits):
        shares = pd.DataFrame(sides(rows), index=["before", "after"], dtype=float)
        after, before = 100 * shares.loc["after"], 100 * shares.loc["before"].add_suffix(" before")
        found.append(after.to_dict() | before.to_dict())
    return found


def run_problems(worlds: dict[str, World], lists: Lists, count: int) -> pd.DataFrame:
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
        world = worlds[dataset]
        frame = run_variants(problem_of(world, classes), world.descent)
        scores = pd.DataFrame(accuracies(world, classes, list(frame.pop("answer"))))
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


def synonyms_retained(world: World, same: dict[str, set[str]]) -> pd.DataFrame:
    """What a retained name that means the same does to the optimum: a row a class of `same`.

    `c*` is where the class starts to move, `trials` what the retry needs to get there from the
    set's weights; `share` is how far, on average, the names of the same meaning go with the class
    (1: as far as it). Both with those names out of the retain set and in it, just above c*.
    """
    bundle, rows = world.bundle, []
    names = [datasets.key(name) for name in bundle.retain_names]
    for own, words in same.items():
        name = datasets.match(own, bundle.classnames, bundle.dataset)
        meant = words & set(names)
        alike = bundle.retain_hidden[[other in meant for other in names]].double()
        row = {"set": bundle.dataset, "class": name, "same": ", ".join(sorted(meant))}
        stated = problem_of(world, [name]).double
        for when, leaving in (("out", {own} | meant), ("in", {own})):
            stay = [other not in leaving for other in names]
            problem = replace(stated, retain_hidden=bundle.retain_hidden[stay].double())
            reach, step = thresholds(problem).reach, problem.displacement[0]
            solution = solve_exact(replace(problem, lamb_forget=AUTO))
            follow = (alike @ solution.delta) @ step / (step @ step)
            missing = (reach - problem.lamb_forget) / world.descent.lamb_forget_step
            row |= {
                f"c*, {when}": reach,
                f"trials, {when}": 1 + max(0, math.ceil(missing)),
                f"share, {when}": float(follow.mean()),
            }
            (scores,) = accuracies(world, [name], [solution.delta.float()])
            row |= {f"{key}, {when}": scores[key] for key in ACCURACIES}
        rows.append(row)
    return pd.DataFrame(rows)


def synonyms_of(dataset: str, classes: list[str]) -> dict[str, set[str]]:
    """The marked synonyms of those of `classes` that have any."""
    known = datasets.synonyms(dataset)
    return {name: known[name] for name in map(datasets.key, classes) if name in known}


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
            same = set().union(*synonyms_of(dataset, forgotten).values())
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


def one_trial_fewer(table: pd.DataFrame) -> pd.DataFrame:
    """Problems of several trials: the reduction that would be kept without the trial that reached.

    Returns:
        Columns `set`, `classes`, `trials`, and a reduction in percent for ours and for the last.
    """
    names = ["ours", "last trial kept"]
    several = table[table["short"].notna() & table["variant"].isin(names)]
    wide = several.pivot(index=["set", "classes", "trials"], columns="variant", values="short")
    return (100 * wide.reindex(columns=names)).reset_index()


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
    if args.csv:  # refused before the work, not after it
        require_writable(args.csv)
    started = time.perf_counter()
    with one_thread(), tempfile.TemporaryDirectory() as temporary:
        if args.features:
            folder, backbone, by = Path(args.features), args.backbone or BUNDLED, "set"
            kind = f"bundles of {args.features}"
            lists = bundled_classes(folder, backbone, max(args.classes, TOGETHER))
            same = {name: SAME[name] for name in lists if name in SAME}
        else:
            folder, backbone, by = Path(temporary), ENCODER, "mode"
            kind = f"weights {args.weights}" if args.weights else "random weights"
            lists = text_bundles(folder, args.weights)
            same = {name: synonyms_of(name, lists[name]) for name in lists}
        sets = worlds(folder, backbone, lists, args.opts)
        table = run_problems(sets, lists, args.classes)
        print_table(f"{backbone}, {kind}: the descent's variants", by_variant(table, by))
        if table[list(ACCURACIES)].notna().all(axis=1).any():
            print_table("Distance from ours, percentage points", apart_from_ours(table))
        print_table("Without the trial that reached: reduction, %", one_trial_fewer(table))
        if same:
            parts = [synonyms_retained(sets[name], words) for name, words in same.items()]
            print_table("Names of the same meaning, out of the retain set and in", pd.concat(parts))
    if args.csv:
        write_table(table, args.csv)
        logger.info(f"\nwritten: {args.csv}")
    logger.info(f"\n{time.perf_counter() - started:.0f} s in all")
    return table


def print_table(title: str, table: pd.DataFrame) -> None:
    """Print one table of docs/faithfulness.md, without columns that hold no number."""
    table = table.dropna(axis=1, how="all")
    print(f"\n{title}\n\n{markdown(table) if len(table) else 'none'}", flush=True)
