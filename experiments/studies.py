"""The paper's studies on feature bundles: what each choice does, by descent and exactly.

    python -m experiments studies [NAME|all] --features DIR [--dataset SET] [--classes 5]
        [--forget NAME] [--solver lora|optimum|constrained] [--out studies] [KEY VALUE ...]

Writes OUT/BACKBONE/DATASET/NAME.csv and NAME.png. Rows that are in the CSV already, made from the
same constants and bundles, are not made again.

One file a concern: `world` (a data set, the settings, and what may be retained), `solvers`,
`varied` (what each study varies), `measure` (what a row says), `rows_file` (rows that are never
made twice), `study_report` (table and picture).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

import datasets
from clip.bundle import FeatureBundle, bundle_path, list_bundles, load_bundle, load_bundles
from engine.cli import COUNT, SEED, Parser
from engine.determinism import one_thread
from engine.files import escape, sha256_file
from engine.log import logger, progress
from evaluation.results import join_label
from experiments.measure import cells
from experiments.rows_file import KEY, Key, RowsFile
from experiments.solvers import SOLVERS, together
from experiments.study_report import plot, report
from experiments.varied import STUDIES
from experiments.world import Task, World
from forgetting.errors import ProblemError, unknown

FORMAT = 2  # of the rows; raise it where the same constants begin to mean another answer
ALL = "all"  # as NAME: every study; of --forget: every class


@dataclass(frozen=True)
class Job:
    """One data set with the classes to forget, checked; digest: of its constants and bundles."""

    world: World
    classes: list[str]
    digest: str


def make_jobs(args: argparse.Namespace) -> list[Job]:
    """The data sets of a command line.

    Raises:
        ProblemError: no such folder, backbone, data set or class, too many classes, no constants, or
            audit lists that do not fit.
    """
    paths = list_bundles(args.features, args.backbone)
    if args.dataset:
        load_bundle(args.features, args.backbone, args.dataset)  # names the nearest
    elif args.forget:
        raise ProblemError("--forget NAME needs --dataset SET: a class belongs to a set")
    bundles = load_bundles(args.features, args.backbone)
    jobs = []
    for dataset in [args.dataset] if args.dataset else paths:
        others = {name: bundle for name, bundle in bundles.items() if name != dataset}
        world = World(bundles[dataset], others, args.seed, args.opts)
        classes = choose(world.bundle, args.forget, args.classes, args.seed)
        jobs.append(Job(world, classes, digest(world, paths.values())))
    return jobs


def digest(world: World, bundles: Iterable[Path]) -> str:
    """Twelve hexadecimal digits: two rows with the same were made from the same settings and the
    same bundle files, wherever these lie."""
    configs = [
        [cfg.FORGET.dump(), cfg.TRAINER[cfg.TRAINER.NAME.upper()].dump()]
        for cfg in (world.exact, *world.paper.values())
    ]
    files = sorted((path.stem, sha256_file(path)) for path in bundles)
    return hashlib.sha256(json.dumps([FORMAT, configs, files]).encode()).hexdigest()[:12]


def choose(bundle: FeatureBundle, forget: Sequence[str], count: int, seed: int) -> list[str]:
    """The classes to forget: those named, or `count` at random, in the set's order.

    Raises:
        ProblemError: a name that the set does not have, or more classes than it has.
    """
    names = bundle.classnames
    if len(names) < 2:
        raise ProblemError(f"{bundle.dataset} has one class: none would be left to recognise")
    if list(forget) == [ALL]:
        return names
    if forget:
        found = {datasets.match(name, names, bundle.dataset) for name in forget}
        return sorted(found, key=names.index)
    if count > len(names):
        raise ProblemError(f"--classes {count}: {bundle.dataset} has {len(names)} classes")
    labels = random.Random(f"{seed}/{bundle.dataset}").sample(range(len(names)), count)
    return [names[label] for label in sorted(labels)]


def key_of(name: str, job: Job, task: Task) -> Key:
    """The cells that make a row itself, those of the columns `KEY`."""
    label, world = join_label(task.request.classes), job.world
    place = name, world.bundle.dataset, label, task.solver, task.setting
    return (*place, str(world.seed), job.digest)


def perform(
    name: str, job: Job, table: RowsFile, solvers: Sequence[str], turn: str = ""
) -> pd.DataFrame:
    """Make the rows that are missing, then the plot and the printed summary; returns the rows.

    Args:
        turn: which study of how many it is, in words.
    """
    study, world = STUDIES[name], job.world
    tasks = study.tasks(world, job.classes, solvers)
    keyed = {key_of(name, job, task): task for task in tasks}
    done = table.keys()
    pending = [task for key, task in keyed.items() if key not in done]
    where = f"{name} on {world.bundle.dataset}"
    bar = progress(desc=f"{turn}{where}, rows", total=len(pending))
    with bar:
        for group in together(pending):
            answers = SOLVERS[group[0].solver](world, group)
            rows, added = cells(world, group, answers), []
            for task, answer, row in zip(group, answers, rows, strict=True):
                row = {"place": task.place} | row
                row |= study.cells(world, task, answer) if study.cells else {}
                added.append(dict(zip(KEY, key_of(name, job, task), strict=True)) | row)
            table.add(added)
            bar.update(len(group))
    frame = table.frame(list(keyed))
    picture = table.path.with_suffix(".png")
    plot(where, study, frame, picture)
    print(f"\n{where}: {study.about}")
    report(frame, len(world.bundle.text_projection) if study.cells else None)
    logger.info(f"{len(pending)} of {len(keyed)} rows are new: {table.path}, {picture}")
    return frame


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run studies; returns the CSV files.

    Raises:
        ProblemError: a name, folder or number that does not fit, before any work.
        ProblemError: numbers that no solver can work on.
    """
    parser = Parser(prog="python -m experiments studies", description=__doc__.splitlines()[0])
    names = f"{', '.join(STUDIES)} or {ALL} (default)"
    parser.add_argument("name", nargs="?", default=ALL, metavar="NAME", help=names)
    parser.add_argument("--features", required=True, help="folder of feature bundles")
    parser.add_argument("--backbone", default="ViT-B/32", help="backbone of the bundles")
    parser.add_argument("--dataset", help="the set to forget from; default: each in turn")
    parser.add_argument("--classes", type=COUNT, default=5, help="how many random classes")
    several = {"action": "append", "default": []}
    about = "a class instead of random ones (repeatable), or all"
    parser.add_argument("--forget", metavar="NAME", help=about, **several)
    about = f"only this one of {', '.join(SOLVERS)} (repeatable)"
    parser.add_argument("--solver", metavar="SOLVER", help=about, **several)
    parser.add_argument("--seed", type=SEED, default=0, help="of classes, names and descents")
    parser.add_argument("--out", type=Path, default=Path("studies"), help="folder of the tables")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to change")
    args = parser.parse_args(argv)
    if args.name not in (*STUDIES, ALL):
        raise unknown("study", args.name, [*STUDIES, ALL])
    for solver in args.solver:
        if solver not in SOLVERS:
            raise unknown("solver", solver, SOLVERS)
    jobs = make_jobs(args)
    work = []
    for job in jobs:
        bundle = job.world.bundle
        folder = bundle_path(args.out, bundle.backbone, escape(bundle.dataset)).with_suffix("")
        for name in STUDIES if args.name == ALL else [args.name]:
            work.append((name, job, RowsFile(folder / f"{name}.csv")))
    for _, _, table in work:
        table.read()  # a file that is no table is refused before work
    with one_thread():
        for number, one in enumerate(work, start=1):
            turn = f"study {number} of {len(work)}, "
            perform(*one, args.solver or list(SOLVERS), turn)
    return [table.path for _, _, table in work]
