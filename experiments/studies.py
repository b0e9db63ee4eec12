"""The paper's studies on feature bundles: what each choice does, by descent and exactly.

    python -m experiments studies [NAME|all] --features DIR [--dataset SET] [--classes 5]
        [--forget NAME] [--solver lora|optimum|constrained] [--out studies] [KEY VALUE ...]

A study is some sweeps: those of studies.yaml, or of a function here that writes names and texts
for its runs. Results, table and report are those of a sweep, in OUT/NAME. The same command resumes.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize

import datasets
from clip.bundle import FeatureBundle, load_bundles
from engine.cli import COUNT, SEED, Parser
from engine.config import read_yaml
from engine.determinism import seeded
from experiments.runs import refuse_failed, runs_of
from experiments.sweep import run_sweep
from forgetting.errors import ProblemError, unknown
from forgetting.io import write_bytes
from trainers.inputs import ALL

SOLVERS = {"lora": "ForgetLoRA", "optimum": "ForgetOptimum", "constrained": "ForgetExact"}
SIMILAR = 0.95  # cosine with a class from which on a name is not retained
NEAR = 100  # retained names of the study `retained`
COUNTS = (0, 10, 30, 100, 300, 1000, 3000, 10000)
EXACT = "TRAINER.FORGETEXACT"
# Few trials of the descent; for the constrained form the texts and the beta as they are given.
OPTIONS = ["TRAINER.FORGETLORA.MAX_TRIALS", "3"]
OPTIONS += [f"{EXACT}.MIN_MARGIN", "0", f"{EXACT}.MIN_DISPLACEMENT", "0"]
Keys = dict[str, Any]  # of the config
Sweep = dict[str, Any]  # what it varies


@dataclass(frozen=True)
class Inputs:
    """A data set, and where a study writes the files that its runs read."""

    bundle: FeatureBundle
    folder: Path
    seed: int

    def file(self, option: str, text: str, suffix: str) -> Keys:
        """The key that gives `option` a file with this text."""
        path = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}{suffix}"
        write_bytes(text.encode(), path)
        return {option: str(path)}

    def retain(self, rows: Tensor) -> Keys:
        """The keys that retain some names of the vocabulary, (n,) rows of it, alone."""
        if not len(rows):  # beside such a ridge names weigh nothing
            return {"FORGET.LAMB_PRESERVE": 0, f"{EXACT}.RIDGE": 1e6}
        names = "\n".join(self.bundle.retain_names[row] for row in rows.tolist())
        groups = {f"{EXACT}.OWN": 0, f"{EXACT}.OTHERS": 0, f"{EXACT}.VOCABULARY": 1}
        return self.file("FORGET.RETAIN_NAMES", names, ".txt") | groups

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


def retained(inputs: Inputs, classes: Sequence[str]) -> list[Sweep]:
    """Nothing, random names of the vocabulary, all of it, or those unlike or like a class."""
    names = inputs.shuffled()
    picks = {"none": names[:0], "random": names[: min(NEAR, len(names) // 2)], "all": names}
    sweeps = [{"settings": {setting: inputs.retain(rows) for setting, rows in picks.items()}}]
    for name in classes:
        nearest = inputs.nearest(name)
        number = min(NEAR, len(nearest) // 2)  # so that the two never overlap
        picks = {"dissimilar": nearest[len(nearest) - number :], "similar": nearest[:number]}
        settings = {setting: inputs.retain(rows) for setting, rows in picks.items()}
        sweeps.append({"classes": [name], "settings": settings})
    return sweeps


def count(inputs: Inputs, classes: Sequence[str]) -> list[Sweep]:
    """More and more names of the vocabulary retained, in a random order."""
    names = inputs.shuffled()
    sizes = [*(size for size in COUNTS if size < len(names)), len(names)]
    return [{"settings": {f"{size} names": inputs.retain(names[:size]) for size in sizes}}]


def templates(inputs: Inputs, classes: Sequence[str]) -> list[Sweep]:
    """Which text is forgotten: the name, the evaluation prompt, or both."""
    prompt, settings = inputs.bundle.template, {}
    for setting, forms in {"name": ["{}"], "prompt": [prompt], "both": ["{}", prompt]}.items():
        texts = json.dumps(dict.fromkeys(inputs.bundle.classnames, forms))
        settings[setting] = inputs.file("FORGET.PROMPTS", texts, ".json")
    settings["both"]["FORGET.LAMB_FORGET"] = "auto"  # the paper's weight would move nothing
    return [{"settings": settings}]


CHOSEN = {study.__name__: study for study in (retained, count, templates)}
FIXED = read_yaml(Path(__file__).with_name("studies.yaml"))
STUDIES = [*CHOSEN, *FIXED]


def main(argv: Sequence[str] | None = None) -> list[pd.DataFrame]:
    """Run studies; returns their tables."""
    parser = Parser(prog="python -m experiments studies", description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", default=ALL, choices=[*STUDIES, ALL])
    parser.add_argument("--features", required=True, help="folder of feature bundles")
    parser.add_argument("--backbone", default="ViT-B/32", help="backbone of the bundles")
    parser.add_argument("--dataset", help="the set to forget from; default: each of them")
    parser.add_argument("--classes", type=COUNT, default=5, help="how many random classes of a set")
    several = {"action": "append", "default": []}
    about = "a class instead of random ones (repeatable), or all"
    parser.add_argument("--forget", metavar="NAME", help=about, **several)
    about = "only this one (repeatable)"
    parser.add_argument("--solver", choices=SOLVERS, help=about, **several)
    parser.add_argument("--seed", type=SEED, default=0, help="of classes, names and descents")
    parser.add_argument("--out", type=Path, default=Path("studies"), help="folder of the results")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to change")
    args = parser.parse_args(argv)
    if args.forget and not args.dataset:
        raise ProblemError("--forget NAME needs --dataset SET: a class belongs to a set")
    bundles = load_bundles(args.features, args.backbone)
    if args.dataset and args.dataset not in bundles:
        raise unknown("data set of the bundles", args.dataset, bundles)
    options = ["--features", args.features, "--quiet", *OPTIONS, *args.opts]
    shared = {"backbones": [args.backbone], "seeds": [args.seed], "trainers": SOLVERS.values()}
    solvers, tables = [SOLVERS[name] for name in args.solver or SOLVERS], []
    for study in STUDIES if args.name == ALL else [args.name]:
        root, runs = args.out / study, []
        for dataset in [args.dataset] if args.dataset else bundles:
            inputs = Inputs(bundles[dataset], root / "inputs", args.seed)
            classes = _classes(args, inputs.bundle)
            own = shared | {"datasets": [dataset], "classes": classes}
            for sweep in CHOSEN[study](inputs, classes) if study in CHOSEN else FIXED[study]:
                varied = own | sweep
                if len(classes) == len(inputs.bundle.classnames):  # at once they leave no class
                    varied["modes"] = ["alone"]
                if trainers := [name for name in varied["trainers"] if name in solvers]:
                    runs += runs_of(varied | {"trainers": trainers}, root, options)
        table, failed = run_sweep(runs, root)
        refuse_failed(failed)
        tables.append(table)
    return tables


def _classes(args: argparse.Namespace, bundle: FeatureBundle) -> list[str]:
    """The classes that the command line names, or random ones, in the order of the bundle."""
    names, classes = bundle.classnames, args.forget
    count = len(names) if classes == [ALL] else args.classes
    if count > len(names):
        raise ProblemError(f"--classes {count}: {bundle.dataset} has {len(names)} classes")
    if classes in ([], [ALL]):
        classes = random.Random(f"{args.seed}/{bundle.dataset}").sample(names, count)
    return sorted({datasets.match(x, names, bundle.dataset) for x in classes}, key=names.index)
