"""The paper's studies on feature bundles: what each choice does, by descent and exactly.

    python -m experiments studies [NAME|all] --features DIR [--dataset SET] [--classes 5]
        [--forget NAME] [--solver lora|optimum|constrained] [--out studies] [KEY VALUE ...]

Writes OUT/BACKBONE/DATASET/NAME.csv and NAME.png. Rows that are in the CSV already, made from the
same settings and bundles, are not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize

import datasets
from clip.audit_texts import audit_rows
from clip.bundle import FeatureBundle, bundle_path, list_bundles, load_bundle, load_bundles
from engine.cli import COUNT, SEED, Parser
from engine.determinism import one_thread
from engine.files import escape, sha256_file
from engine.log import logger, progress
from evaluation.results import join_label
from evaluation.rows import mean
from experiments.study_data import SOLVERS, StudyAnswer, StudyData, Task, sides
from experiments.study_report import PARTS, plot, report
from forgetting.errors import ProblemError, unknown
from forgetting.io import atomic_path
from forgetting.problem import Request

FORMAT = 3  # of the rows; raise it where the same settings begin to mean another answer
ALL = "all"  # as NAME: every study; of --forget: every class
KEY = ["study", "dataset", "classes", "solver", "setting", "seed", "settings"]
NEAR = 100  # retained names of the study `retained`
COUNTS = (0, 10, 30, 100, 300, 1000, 3000, 10000)
RANKS = (1, 2, 5, 10, 50)
TERMS = ("forget", "preserve", "weight")
BETAS = (0.0, 0.1, 0.2, 1.0)  # of the target opposite
BROADER = ("hypernym",)  # kinds of an audit's texts that name more than the class
SAME = 1e-4  # relative distance below which two hidden states are of one text

Settings = dict[str, dict[str, Any]]  # name of a setting -> what it changes in a `Task`
Vary = Callable[[StudyData, Request, str], Settings]


def retained(data: StudyData, request: Request, solver: str) -> Settings:
    """Nothing, random, dissimilar, similar names of the vocabulary, or all of it, retained."""
    pool = data.pool(request)
    rows = normalize(data.bundle.retain_hidden[pool], dim=1)
    cosines = rows @ normalize(request.hidden, dim=1)[0]
    nearest = pool[cosines.argsort(descending=True, stable=True)]
    number = min(NEAR, len(pool) // 2)  # so that similar and dissimilar never overlap
    picks = {
        "none": pool[:0],
        "random": _shuffled(data, request)[:number],
        "dissimilar": nearest[len(pool) - number :],
        "similar": nearest[:number],
        "all": pool,
    }
    return {setting: {"pick": pick} for setting, pick in picks.items()}


def count(data: StudyData, request: Request, solver: str) -> Settings:
    """More and more names of the vocabulary retained, in a random order."""
    pool = _shuffled(data, request)
    picks = {str(size): pool[:size] for size in COUNTS if size < len(pool)} | {"all": pool}
    return {name: {"pick": pick, "position": float(len(pick))} for name, pick in picks.items()}


def terms(data: StudyData, request: Request, solver: str) -> Settings:
    """Each loss term of the paper off; for the constrained form each group of retained names."""
    parts = data.context.retain.groups if solver == "constrained" else TERMS
    return {"all on": {}} | {f"no {part}": {"without": part} for part in parts}


def targets(data: StudyData, request: Request, solver: str) -> Settings:
    """Where the text is sent; `specific` is computed from the constrained form's retained names."""
    table = {"empty": {"target": "empty"}}
    table |= {f"opposite {beta:g}": {"target": "opposite", "beta": beta} for beta in BETAS}
    table |= {"orthogonal": {"target": "orthogonal"}}
    return table | {f"specific {data.exact.FORGET.BETA:g}": {"target": "specific"}}


def rank(data: StudyData, request: Request, solver: str) -> Settings:
    """LoRA's rank, which also multiplies the weight term, for each class and for all at once.

    The optimum has that weight term but no bound on its rank; the constrained form knows no rank.
    """
    if solver == "constrained":
        return {"rank = classes": {"position": float(len(request.classes))}}
    return {f"rank {number}": {"rank": number, "position": float(number)} for number in RANKS}


def templates(data: StudyData, request: Request, solver: str) -> Settings:
    """Which texts are forgotten: the name, the evaluation prompt, both, and what an audit has."""
    bundle, (name,) = data.bundle, request.classes
    own, prompt = request.hidden, bundle.class_hidden[[data.texts.label[name]]]
    states = {"name": own, "prompt": prompt, "both": torch.cat([own, prompt])}
    rows = audit_rows(bundle).get(name, [])
    for kind in dict.fromkeys(kind for _, kind, _ in rows if kind not in BROADER):
        more = torch.stack([hidden for _, k, hidden in rows if k == kind]).to(own)
        states[f"name + {kind}"] = torch.cat([own, more])
    return {
        setting: {"request": _by_states(request, setting, hidden)}
        for setting, hidden in states.items()
    }


def spectrum(data: StudyData, request: Request, solver: str) -> Settings:
    """Where the change sits; beside the defaults the least change, which retains nothing."""
    if solver != "constrained":
        return {"default": {}}
    return {"default": {}, "nothing retained": {"pick": torch.empty(0, dtype=torch.int64)}}


@dataclass(frozen=True)
class Study:
    """One study: what it varies, the label of a numeric axis ("": settings are names), whether all
    classes at once are a request too, and whether its rows say where the change sits."""

    about: str
    vary: Vary
    axis: str = ""
    several: bool = False
    spectrum: bool = False

    def tasks(
        self, data: StudyData, classes: list[str], solvers: Iterable[str] = SOLVERS
    ) -> Iterator[Task]:
        """A task for every class, solver and setting."""
        requests = [[name] for name in classes]
        if self.several and 1 < len(classes) < len(data.bundle.classnames):
            requests.append(classes)
        for request in map(data.texts.request, requests):
            for solver in SOLVERS:
                if solver in solvers:
                    for setting, change in self.vary(data, request, solver).items():
                        yield data.task(solver, setting, **{"request": request} | change)


STUDIES: dict[str, Study] = {
    "retained": Study("which names of the vocabulary are retained", retained),
    "count": Study("how many names are retained", count, axis="retained names"),
    "terms": Study("loss terms, or retained groups, switched off", terms),
    "targets": Study("where the text is sent", targets),
    "rank": Study("LoRA's rank", rank, axis="rank", several=True),
    "templates": Study("which text is forgotten, judged on the evaluation prompt", templates),
    "spectrum": Study("where in the spectrum of W and G the change sits", spectrum, spectrum=True),
}


def cells(data: StudyData, task: Task, answer: StudyAnswer) -> dict[str, Any]:
    """The measured cells of a row; None where there is no image to judge on.

    Accuracies are from 0 to 1; `others_worst` is the change of the set that lost most.
    """
    (rows,) = data.rows([task.request.classes], [answer.edit])
    accuracies = sides(rows)
    losses = [x.points for x in rows[0].others.values() if x.points is not None]
    return {
        **{f"{name}_before": change.before for name, change in accuracies.items()},
        **{f"{name}_after": change.after for name, change in accuracies.items()},
        "others_worst": min(losses) / 100 if losses else None,
        "carry": carry_over(data, task, answer),
        "reduction": reduction(task, answer),
        "norm": float(answer.delta.norm()),
        "seconds": answer.seconds,
        "texts": len(task.request.texts),
        **answer.facts,
    }


def carry_over(data: StudyData, task: Task, answer: StudyAnswer) -> float | None:
    """The displacement ratio s(h) of the evaluation prompts, the mean over the forgotten classes.

    The part of a class's displacement D (the mean of its texts') that its evaluation prompt h
    makes, `<h Delta, D> / <D, D>`; for one text and an exact answer `h K^-1 h_f / h_f K^-1 h_f`.
    """
    owner, ratios = torch.tensor(task.request.owner), []
    for index, name in enumerate(task.request.classes):
        d = answer.displacement[owner == index].mean(dim=0)  # (d,)
        prompt = data.bundle.class_hidden[data.texts.label[name]].double()  # (w,)
        moved = prompt @ answer.delta  # (w,) @ (w, d) -> (d,)
        if d.any():
            ratios.append(float(moved @ d / (d @ d)))
    return mean(ratios)


def reduction(task: Task, answer: StudyAnswer) -> float:
    """By what fraction the distance of the forgotten texts from their target fell."""
    before = answer.displacement.norm()
    after = (answer.displacement - task.request.hidden.double() @ answer.delta).norm()
    return float(1 - after / before) if before > 0 else 1.0


def tenths_of(basis: Tensor, delta: Tensor) -> list[float]:
    """The part of `||Delta||^2` in each tenth of a basis, first to last; they sum to 1.

    Args:
        basis: (w, w) orthonormal columns in order; delta: (w, d), not zero. Where w is no multiple
            of ten the tenths differ by one direction.
    """
    square = (basis.T @ delta).square().sum(dim=1)  # (w,)
    return [float(part.sum() / square.sum()) for part in square.tensor_split(PARTS)]


def spectrum_cells(data: StudyData, task: Task, answer: StudyAnswer) -> dict[str, float | None]:
    """Cells `left_1` to `left_10`, `right_*` and `gram_*` of a row.

    The left and right singular directions of W from the largest value down; the eigen-directions
    of the G that this solver retains by default. None where nothing moved, and for W where all
    singular values are equal, so that its directions are arbitrary.
    """
    delta, (u, values, vh) = answer.delta, data.singular
    distinct = float(values[0] - values[-1]) > 1e-6 * float(values[0])
    eigen = torch.linalg.eigh(data.gram(task)).eigenvectors.flip(1)
    bases = {
        "left": (u, delta) if distinct else None,
        "right": (vh.T, delta.T) if distinct else None,
        "gram": (eigen, delta),
    }
    row: dict[str, float | None] = {}
    for name, side in bases.items():
        parts = tenths_of(*side) if side and delta.any() else [None] * PARTS
        row |= {f"{name}_{number}": part for number, part in enumerate(parts, start=1)}
    return row


def _shuffled(data: StudyData, request: Request) -> Tensor:
    """The pool of a request in a random order."""
    pool = data.pool(request)
    return pool[torch.randperm(len(pool), generator=data.generator(request.classes, "/names"))]


def _by_states(request: Request, setting: str, rows: Tensor) -> Request:
    """A class by the hidden states `rows` (k, w), without those that repeat an earlier one."""
    distinct: list[int] = []
    for index, row in enumerate(rows):
        if not any((row - rows[other]).norm() <= SAME * row.norm() for other in distinct):
            distinct.append(index)
    texts = [f"{setting} {index}" for index in distinct]
    return Request(
        request.classes, texts, rows[distinct], [0] * len(texts), request.same, seed=request.seed
    )


def read_rows(path: Path) -> pd.DataFrame:
    """All rows of a study's CSV as text; none where there is no file.

    Raises:
        ProblemError: the file is no such table; it is left as it is.
    """
    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        return pd.DataFrame(columns=KEY, dtype=str)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise ProblemError(f"cannot read {path}: {error}; move it aside") from error
    # pandas takes what is too much in a row for an index.
    if not {*KEY} <= {*rows} or not isinstance(rows.index, pd.RangeIndex):
        raise ProblemError(f"{path} is no table of a study; move it aside")
    return rows


def perform(
    name: str, data: StudyData, classes: list[str], digest: str, path: Path, solvers: Sequence[str]
) -> pd.DataFrame:
    """Make the rows that are missing, then the plot and the printed summary; returns the rows.

    The file is written anew after each row, beside the old one: a killed run loses one row.
    """
    study, dataset = STUDIES[name], data.bundle.dataset
    keyed = {}
    for task in study.tasks(data, classes, solvers):
        label = join_label(task.request.classes)
        row_key = (name, dataset, label, task.solver, task.setting, str(data.seed), digest)
        keyed[row_key] = task
    rows = read_rows(path)
    done = set(rows[KEY].itertuples(index=False, name=None))
    pending = [row_key for row_key in keyed if row_key not in done]
    for row_key in progress(pending, f"{name} on {dataset}, rows"):
        task = keyed[row_key]
        answer = data.solve(task)
        row = dict(zip(KEY, row_key, strict=True)) | {"position": task.position}
        row |= cells(data, task, answer)
        row |= spectrum_cells(data, task, answer) if study.spectrum else {}
        rows = pd.concat([rows, pd.DataFrame([row], dtype=object)], ignore_index=True)
        with atomic_path(path) as temporary:
            rows.to_csv(temporary, index=False, lineterminator="\n")
    frame = pd.DataFrame(list(keyed), columns=KEY, dtype=str).merge(read_rows(path), on=KEY)
    for column in frame.columns.difference([*KEY, "auto"]):
        frame[column] = pd.to_numeric(frame[column])
    picture = path.with_suffix(".png")
    title = f"{name} on {dataset}: {study.about}"
    plot(title, study.axis, study.spectrum, frame, picture)
    print(f"\n{title}")
    report(frame, len(data.bundle.text_projection) if study.spectrum else None)
    logger.info(f"{len(pending)} of {len(keyed)} rows are new: {path}, {picture}")
    return frame


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
        chosen = {datasets.match(name, names, bundle.dataset) for name in forget}
        return sorted(chosen, key=names.index)
    if count > len(names):
        raise ProblemError(f"--classes {count}: {bundle.dataset} has {len(names)} classes")
    labels = random.Random(f"{seed}/{bundle.dataset}").sample(range(len(names)), count)
    return [names[label] for label in sorted(labels)]


def digest_of(data: StudyData, bundles: Iterable[Path]) -> str:
    """Twelve hexadecimal digits: two rows with the same were made from the same settings and the
    same bundle files, wherever these lie."""
    configs = [
        [cfg.FORGET.dump(), cfg.TRAINER[cfg.TRAINER.NAME.upper()].dump()]
        for cfg in (data.exact, *data.paper.values())
    ]
    files = sorted((path.stem, sha256_file(path)) for path in bundles)
    return hashlib.sha256(json.dumps([FORMAT, configs, files]).encode()).hexdigest()[:12]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
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
    if args.forget and not args.dataset:
        raise ProblemError("--forget NAME needs --dataset SET: a class belongs to a set")
    return args


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run studies; returns the CSV files.

    Raises:
        ProblemError: a name, folder or number that does not fit, before any work.
    """
    args = parse(argv)
    files = list_bundles(args.features, args.backbone)
    if args.dataset:
        load_bundle(args.features, args.backbone, args.dataset)  # names the nearest
    bundles = load_bundles(args.features, args.backbone)
    work = []
    for dataset in [args.dataset] if args.dataset else files:
        others = {name: bundle for name, bundle in bundles.items() if name != dataset}
        data = StudyData(bundles[dataset], others, args.seed, args.opts)
        classes = choose(data.bundle, args.forget, args.classes, args.seed)
        digest = digest_of(data, files.values())
        folder = bundle_path(args.out, args.backbone, escape(dataset)).with_suffix("")
        for name in STUDIES if args.name == ALL else [args.name]:
            read_rows(folder / f"{name}.csv")  # a file that is no table is refused before work
            work.append((name, data, classes, digest, folder / f"{name}.csv"))
    with one_thread():
        for study in work:
            perform(*study, args.solver or SOLVERS)
    return [path for *_, path in work]
