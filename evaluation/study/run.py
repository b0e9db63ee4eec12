"""From a command line to rows: which classes of which sets, and the rows that are missing."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tqdm import tqdm

import datasets
from clip.audit_texts import audit_rows
from clip.bundle import FeatureBundle, bundle_path, list_bundles, load_bundle
from engine.errors import UserError
from engine.files import escape
from evaluation.study.constants import read_constants
from evaluation.study.measure import Judge
from evaluation.study.plots import plot
from evaluation.study.report import report
from evaluation.study.solvers import SOLVERS
from evaluation.study.studies import STUDIES
from evaluation.study.table import Table, key_of
from evaluation.study.world import Case, World

ALL = "all"  # of --forget: every class


@dataclass(frozen=True)
class Job:
    """One data set with the labels to forget, checked; digest: of its constants and bundles."""

    world: World
    labels: list[int]
    digest: str


def make_jobs(args: argparse.Namespace) -> list[Job]:
    """The data sets of a command line.

    Raises:
        UserError: no such folder, backbone, data set or class, too many classes, no constants, or
            audit lists that do not fit.
    """
    paths = list_bundles(args.features, args.backbone)
    if args.dataset:
        load_bundle(args.features, args.backbone, args.dataset)  # names the nearest
    elif args.forget:
        raise UserError("--forget NAME needs --dataset SET: a class belongs to a set")
    bundles = {name: load_bundle(args.features, args.backbone, name) for name in paths}
    jobs = []
    for dataset in [args.dataset] if args.dataset else paths:
        constants = read_constants(dataset, args.backbone)
        others = {name: bundle for name, bundle in bundles.items() if name != dataset}
        world = World(bundles[dataset], others, constants, args.seed)
        audit_rows(world.bundle, world.bundle.classnames[0], paths[dataset])  # refuses broken ones
        labels = choose(world.bundle, args.forget, args.classes, args.seed)
        jobs.append(Job(world, labels, constants.digest(paths.values())))
    return jobs


def choose(bundle: FeatureBundle, forget: Sequence[str], count: int, seed: int) -> list[int]:
    """Labels of the classes to forget: those named, or `count` at random, in the set's order.

    Raises:
        UserError: a name that the set does not have, or more classes than it has.
    """
    names = bundle.classnames
    if len(names) < 2:
        raise UserError(f"{bundle.dataset} has one class: none would be left to recognise")
    if list(forget) == [ALL]:
        return list(range(len(names)))
    if forget:
        found = [datasets.match(name, names, bundle.dataset) for name in forget]
        return sorted({names.index(name) for name in found})
    if count > len(names):
        raise UserError(f"--classes {count}: {bundle.dataset} has {len(names)} classes")
    return sorted(random.Random(f"{seed}/{bundle.dataset}").sample(range(len(names)), count))


def table_of(out: Path, name: str, job: Job) -> Table:
    """Where the rows of a study on a data set are kept: OUT/BACKBONE/DATASET/NAME.csv."""
    bundle = job.world.bundle
    folder = bundle_path(out, bundle.backbone, escape(bundle.dataset)).with_suffix("")
    return Table(folder / f"{name}.csv")


def identity(name: str, job: Job, case: Case) -> dict[str, str | int]:
    """The cells that make a row itself."""
    return {
        "study": name,
        "dataset": job.world.bundle.dataset,
        "classes": job.world.label(case.labels),
        "solver": case.solver,
        "setting": case.setting,
        "seed": job.world.seed,
        "constants": job.digest,
    }


def perform(name: str, job: Job, table: Table, solvers: Sequence[str]) -> pd.DataFrame:
    """Make the rows that are missing, then the plot and the printed summary; returns the rows."""
    study, world = STUDIES[name], job.world
    cases = [case for case in study.cases(world, job.labels) if case.solver in solvers]
    keyed = {key_of(identity(name, job, case)): case for case in cases}
    done = {key_of(row) for row in table.read()}
    pending = [case for key, case in keyed.items() if key not in done]
    judge, where = Judge(world), f"{name} on {world.bundle.dataset}"
    for case in tqdm(pending, desc=where, unit="row", leave=False):
        answer = SOLVERS[case.solver](world, case)
        row = identity(name, job, case) | {"place": case.place} | judge.row(case, answer)
        table.add(row | (study.cells(world, case, answer) if study.cells else {}))
    frame = table.frame(list(keyed))
    picture = table.path.with_suffix(".png")
    plot(where, study, frame, picture)
    print(f"\n{where}: {study.about}")
    report(frame, len(world.bundle.text_projection) if study.cells else None)
    print(f"{len(pending)} of {len(keyed)} rows are new: {table.path}, {picture}")
    return frame
