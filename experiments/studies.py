"""The paper's studies on feature bundles: what each choice does, by descent and exactly.

    python -m experiments studies [NAME|all] --features DIR [--dataset SET] [--classes 5]
        [--forget NAME] [--solver lora|optimum|constrained] [--out studies] [KEY VALUE ...]

A setting of a study is a run of train.py with some keys changed. Results of the runs are below
OUT/BACKBONE/DATASET/NAME, their rows in NAME.csv beside it, drawn in NAME.png. The same command
resumes.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize

import datasets
from clip.bundle import FeatureBundle, bundle_path, load_bundles
from engine.cli import COUNT, SEED, Parser
from engine.config import TERMS
from engine.determinism import seeded
from engine.files import escape
from engine.log import logger
from engine.ray import LauncherSettings
from evaluation.plots import COLOURS, draw_results
from evaluation.results import split_label
from evaluation.rows import mean, read_rows
from evaluation.tables import QUANTITIES, write_table
from experiments.runs import Run, launch, plan_run, refuse_failed
from experiments.sweep import results_of
from forgetting import load_adapter
from forgetting.errors import ProblemError, unknown
from forgetting.io import write_bytes

ALL = "all"  # as NAME: every study; of --forget: every class
SOLVERS = {"lora": "ForgetLoRA", "optimum": "ForgetOptimum", "constrained": "ForgetExact"}
SIMILAR = 0.95  # cosine with a class from which on a name is not retained
NEAR = 100  # retained names of the study `retained`
COUNTS = (10, 30, 100, 300, 1000, 3000, 10000)
BETAS = (0.0, 0.1, 0.2, 1.0)  # of the target opposite
EXACT = "TRAINER.FORGETEXACT"
# The texts and the beta as they are given.
AS_GIVEN = [f"{EXACT}.MIN_MARGIN", "0", f"{EXACT}.MIN_DISPLACEMENT", "0"]
AUTO = ["FORGET.LAMB_FORGET", "auto"]  # where the paper's weight moves nothing
Keys = dict[str, list[str]]  # name of a setting -> its KEY VALUE pairs


@dataclass(frozen=True)
class Inputs:
    """A data set, the other sets, and where a study writes the files that its runs read."""

    bundle: FeatureBundle
    others: dict[str, FeatureBundle]
    folder: Path
    seed: int

    def file(self, option: str, text: str, suffix: str) -> list[str]:
        """The keys that give `option` a file with this text."""
        path = self.folder / "inputs" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}{suffix}"
        write_bytes(text.encode(), path)
        return [option, str(path)]

    def retain(self, rows: Tensor) -> list[str]:
        """The keys that retain some names of the vocabulary, (n,) rows of it, alone."""
        if not len(rows):  # beside such a ridge names weigh nothing
            return ["FORGET.LAMB_PRESERVE", "0", f"{EXACT}.RIDGE", "1e6"]
        names = "\n".join(self.bundle.retain_names[row] for row in rows.tolist())
        groups = [f"{EXACT}.OWN", "0", f"{EXACT}.OTHERS", "0", f"{EXACT}.VOCABULARY", "1"]
        return [*self.file("FORGET.RETAIN_NAMES", names, ".txt"), *groups]

    def shuffled(self) -> Tensor:
        """The rows of the vocabulary in a random order."""
        generator = seeded(self.seed, self.bundle.dataset, "names")
        return torch.randperm(len(self.bundle.retain_names), generator=generator)

    def nearest(self, name: str) -> Tensor:
        """The rows of the vocabulary, those most similar to a class first, without names that mean
        it or are too similar to be retained."""
        bundle, same = self.bundle, datasets.same_meaning([name], self.bundle.dataset)
        own = bundle.forget_hidden[bundle.classnames.index(name)]
        cosines = normalize(bundle.retain_hidden, dim=1) @ normalize(own, dim=0)  # (M,)
        means = torch.tensor([datasets.key(word) in same for word in bundle.retain_names])
        order = cosines.argsort(descending=True, stable=True)
        return order[~(means | (cosines > SIMILAR))[order]]


def retained(inputs: Inputs, name: str, solver: str) -> Keys:
    """Nothing, random, dissimilar, similar names of the vocabulary, or all of it, retained."""
    nearest = inputs.nearest(name)
    number = min(NEAR, len(nearest) // 2)  # so that similar and dissimilar never overlap
    picks = {
        "none": nearest[:0],
        "random": inputs.shuffled()[:number],
        "dissimilar": nearest[len(nearest) - number :],
        "similar": nearest[:number],
        "all": inputs.shuffled(),
    }
    return {setting: inputs.retain(rows) for setting, rows in picks.items()}


def count(inputs: Inputs, name: str, solver: str) -> Keys:
    """More and more names of the vocabulary retained, in a random order."""
    names = inputs.shuffled()
    sizes = [0, *(size for size in COUNTS if size < len(names)), len(names)]
    return {str(size): inputs.retain(names[:size]) for size in sizes}


def terms(inputs: Inputs, name: str, solver: str) -> Keys:
    """Each loss term of the paper off; for the constrained form each group of retained names."""
    if solver == "constrained":
        groups = ["own", "vocabulary"] + (["others"] if inputs.others else [])
        off = {group: [f"{EXACT}.{group.upper()}", "0"] for group in groups}
    else:
        off = {
            term: ["FORGET.TERMS", str(tuple(other for other in TERMS if other != term))]
            for term in TERMS
        }
    return {"all on": []} | {f"no {part}": keys for part, keys in off.items()}


def targets(inputs: Inputs, name: str, solver: str) -> Keys:
    """Where the text is sent; `specific` is of the constrained form alone."""
    table = {"empty": ["FORGET.TARGET", "empty"], "orthogonal": ["FORGET.TARGET", "orthogonal"]}
    for beta in BETAS:
        table[f"opposite {beta:g}"] = ["FORGET.TARGET", "opposite", "FORGET.BETA", str(beta)]
    return table | ({"specific": []} if solver == "constrained" else {})


def rank(inputs: Inputs, name: str, solver: str) -> Keys:
    """LoRA's rank, which also multiplies the weight term; the constrained form knows no rank."""
    if solver == "constrained":
        return {"rank = classes": []}
    ranks = {1: [], 2: [], 5: [], 10: AUTO, 50: AUTO}
    return {f"rank {rank}": ["FORGET.RANK", str(rank), *more] for rank, more in ranks.items()}


def templates(inputs: Inputs, name: str, solver: str) -> Keys:
    """Which text is forgotten: the name, the evaluation prompt, or both."""
    prompt, names = inputs.bundle.template, inputs.bundle.classnames
    texts = {"name": ["{}"], "prompt": [prompt], "both": ["{}", prompt]}
    table = {}
    for setting, forms in texts.items():
        content = json.dumps(dict.fromkeys(names, forms))
        table[setting] = inputs.file("FORGET.PROMPTS", content, ".json")
    return table | {"both": [*table["both"], *AUTO]}


# Each is called with the name of a class and of a solver.
STUDIES: dict[str, Callable[[Inputs, str, str], Keys]] = {
    study.__name__: study for study in (retained, count, terms, targets, rank, templates)
}


def runs_of(
    study: str,
    inputs: Inputs,
    classes: Sequence[str],
    solvers: Iterable[str],
    options: Sequence[str],
) -> list[Run]:
    """The runs of a study: classes that share the keys of a setting are of one run; the study
    `rank` forgets them all at once too."""
    together: dict[tuple[str, ...], list[str]] = {}  # solver, setting, mode, keys -> classes
    for solver in solvers:
        for name in classes:
            for setting, keys in STUDIES[study](inputs, name, solver).items():
                together.setdefault((solver, setting, "alone", *keys), []).append(name)
        if study == "rank" and 1 < len(classes) < len(inputs.bundle.classnames):
            for setting, keys in rank(inputs, "", solver).items():
                together[solver, setting, "at once", *keys] = list(classes)
    runs = []
    for (solver, setting, mode, *keys), names in together.items():
        keyed = inputs.bundle.backbone, SOLVERS[solver], setting, mode, inputs.bundle.dataset
        folder = inputs.folder / solver / escape(setting) / f"seed_{inputs.seed}"
        given = AS_GIVEN if solver == "constrained" else []
        argv = [f"--forget={name}" for name in names] + [*options, *given, *keys]
        runs.append(plan_run(keyed, folder, argv, inputs.seed))
    return runs


def table_of(runs: Sequence[Run], bundle: FeatureBundle) -> pd.DataFrame:
    """A row for every request: accuracies in percent as `sweep` has them, `rest change` and `others
    change` in points, and what is measured of its edit."""
    frames = []
    for run in runs:
        frame, lines = results_of(run), []
        records = {row.label: row.solver for row in read_rows(run.folder)}
        for label in frame["forgotten"]:
            record = records[label]
            delta = load_adapter(run.folder / record["adapter"]).delta().double()
            proof = record.get("certificate", {})
            measured = {
                "objective": record.get("objective", proof.get("primal")),
                "gap": proof.get("gap"),
                "carry": carry_over(bundle, split_label(label), record["texts"], delta),
                "norm": float(delta.norm()),
                "seconds": record["seconds"],
            }
            lines.append(measured)
        frames.append(frame.join(pd.DataFrame(lines, frame.index, dtype=float)))
    table = pd.concat(frames, ignore_index=True)
    for name in ("rest", "others"):  # a difference of equal means is 0, not 1e-14
        table[f"{name} change"] = (table[f"{name} after"] - table[f"{name} before"]).round(9)
    return table


def carry_over(
    bundle: FeatureBundle, classes: Sequence[str], texts: Sequence[str], delta: Tensor
) -> float | None:
    """The displacement ratio of the evaluation prompts, the mean over the forgotten classes: the
    part of the way D that the texts of a class move on average which its evaluation prompt h goes,
    `<h Delta, D> / <D, D>`; None where nothing moves."""
    ratios = []
    for name in classes:
        label, plain = bundle.classnames.index(name), datasets.clean_name(name)
        prompt = bundle.class_hidden[label].double()  # (w,)
        held = {plain: bundle.forget_hidden[label].double()}
        held[bundle.template.replace("{}", plain)] = prompt
        hidden = torch.stack([held[text] for text in texts if text in held])  # (k, w)
        way = (hidden @ delta).mean(dim=0)  # (d,)
        ratios.append(float((prompt @ delta) @ way / (way @ way)) if way.any() else None)
    return mean(ratios)


def report(table: pd.DataFrame) -> None:
    """Print means over the classes, and `class most`, that of the class that kept most."""
    groups = table.groupby(["trainer", "setting", "mode"], sort=False)
    columns = ["class after", "rest change", "others change"]
    means = groups[[*columns, "carry", "objective", "gap", "norm", "seconds"]].mean()
    means.insert(1, "class most", groups["class after"].max())
    means.insert(0, "rows", groups.size())
    print(means.to_string(float_format="{:.3g}".format, na_rep=""))


def plot(table: pd.DataFrame, path: Path) -> None:
    """Draw the means over the classes, a row per setting and mode, the methods side by side."""
    trainers = list(dict.fromkeys(table["trainer"]))
    groups = table.groupby(["setting", "mode", "trainer"], sort=False)
    means = groups.mean(numeric_only=True).unstack("trainer")
    drawn = pd.DataFrame({"data set": table["data set"].iloc[0]}, index=means.index)
    drawn["forgotten"] = [", ".join(keys) for keys in means.index]
    for stem in QUANTITIES:
        drawn[f"{stem} before"] = means[f"{stem} before"].mean(axis=1)
        for trainer in trainers:
            drawn[f"{stem} {trainer}"] = means[f"{stem} after", trainer]
    draw_results(drawn.reset_index(drop=True), dict(zip(trainers, COLOURS[1:], strict=False)), path)


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run studies; returns the CSV files."""
    parser = Parser(prog="python -m experiments studies", description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", default=ALL, choices=[*STUDIES, ALL])
    parser.add_argument("--features", required=True, help="folder of feature bundles")
    parser.add_argument("--backbone", default="ViT-B/32", help="backbone of the bundles")
    parser.add_argument("--dataset", help="the set to forget from; default: each in turn")
    parser.add_argument("--classes", type=COUNT, default=5, help="how many random classes")
    several = {"action": "append", "default": []}
    about = "a class instead of random ones (repeatable), or all"
    parser.add_argument("--forget", metavar="NAME", help=about, **several)
    about = "only this one (repeatable)"
    parser.add_argument("--solver", choices=SOLVERS, help=about, **several)
    parser.add_argument("--seed", type=SEED, default=0, help="of classes, names and descents")
    parser.add_argument("--out", type=Path, default=Path("studies"), help="folder of the tables")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to change")
    args = parser.parse_args(argv)
    if args.forget and not args.dataset:
        raise ProblemError("--forget NAME needs --dataset SET: a class belongs to a set")
    bundles = load_bundles(args.features, args.backbone)
    if args.dataset and args.dataset not in bundles:
        raise unknown("data set of the bundles", args.dataset, bundles)
    options = ["--features", args.features, "--quiet", "TRAINER.FORGETLORA.MAX_TRIALS", "3"]
    options += args.opts
    paths = []
    for dataset in [args.dataset] if args.dataset else bundles:
        others = {name: bundle for name, bundle in bundles.items() if name != dataset}
        names = bundles[dataset].classnames
        count = len(names) if args.forget == [ALL] else args.classes
        if count > len(names):
            raise ProblemError(f"--classes {count}: {dataset} has {len(names)} classes")
        classes = random.Random(f"{args.seed}/{dataset}").sample(names, count)
        if args.forget and args.forget != [ALL]:
            classes = [datasets.match(name, names, dataset) for name in args.forget]
        classes.sort(key=names.index)
        root = bundle_path(args.out, args.backbone, escape(dataset)).with_suffix("")
        for name in STUDIES if args.name == ALL else [args.name]:
            inputs = Inputs(bundles[dataset], others, root / name, args.seed)
            runs = runs_of(name, inputs, classes, args.solver or SOLVERS, options)
            refuse_failed(launch(runs, LauncherSettings()))
            table = table_of(runs, inputs.bundle)
            paths.append(root / f"{name}.csv")
            write_table(table, paths[-1])
            plot(table, paths[-1].with_suffix(".png"))
            print(f"\n{name} on {dataset}: {STUDIES[name].__doc__.splitlines()[0]}")
            report(table)
            logger.info(f"{paths[-1]}, {paths[-1].with_suffix('.png')}")
    return paths
