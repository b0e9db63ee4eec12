"""How near each method comes to gold: `mini` trained anew without a class, its pictures and words.

    python -m experiments gold [--out gold] [--steps N] [--method NAME ...]

OUT/NAME.safetensors are the trainings, 4 to 6 minutes of one core each, and OUT/edits what every
method did to the committed model. What is there is not made again. Every training has a space of
its own: what is compared does not depend on it. docs/truth.md has the tables, and explains them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sklearn.linear_model import Ridge as RidgeRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.special import entr

import datasets
from clip import train_mini
from datasets.mini import MINI
from datasets.reader import read_image
from datasets.words.lexicon import committed, halves
from engine.cli import Parser, whole
from engine.log import progress
from engine.ray import LauncherSettings
from evaluation.audit.case import AuditData
from evaluation.audit.destinations import separation
from evaluation.audit.relearning import REPEATS, class_means, held, places
from evaluation.plots import COLOURS, drawing
from evaluation.results import Results
from evaluation.tables import write_table
from experiments import baselines
from experiments.hide import Mini, report, unit
from experiments.runs import launch, refuse_failed, runs_of
from forgetting.adapter import load_adapter
from forgetting.errors import ProblemError
from forgetting.io import read_safetensors

# One class of each set is left out together: the sets share no name.
GROUPS = {
    "a": ["digit two", "latin capital letter m", "anchor", "green triangle"],
    "b": ["digit seven", "latin capital letter z", "ballot x", "red square"],
}
LEFT_OUT = [*GROUPS["a"], *GROUPS["b"]]
TRAININGS: dict[str, tuple[int, list[str]]] = {  # name -> seed, classes that are left out
    **{f"{g}-{seed}": (seed, names) for seed in (0, 1) for g, names in GROUPS.items()},
    **{f"full-{seed}": (seed, []) for seed in (1, 2, 3)},
    "alone-0": (0, ["digit two"]),
}
NO_MARGIN = {"trainer": "ForgetExact", "FORGET.BETA": 0, "TRAINER.FORGETEXACT.MIN_MARGIN": 0}
METHODS: dict[str, dict[str, Any]] = baselines.METHODS | {
    f"exact-{name}-0": NO_MARGIN | {"FORGET.TARGET": name} for name in ("specific", "opposite")
}
ALONE, FULLS, STILL = "left out alone", "two full trainings", "gold still recognises"
KEYS = ["group", "class", "way", "measure"]
NEAREST = 5  # classes that are its neighbours
SHOTS = (1, 5, 10)  # images of each class, to learn it again
DRAWS, NOISE = 10, 8.0  # small perturbations of an image; their standard deviation, of 255
PROBE_RIDGE = 0.3
LEAST = 1e-30  # of a probability, for its logarithm
WORDS = ["name", "held-out words", "descriptions"]
DRAWN = {
    "name": "cosine of its name with its images,\nless gold's: left is over-forgotten",
    "own": "where its images go:\nJensen-Shannon divergence from gold, nats",
}


class Training(Mini):
    """A training of `mini`, whose list may lose names."""

    removed: Sequence[str] = ()

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__(weights)
        self.scale = self.source.model.logit_scale.exp()
        self.data = [AuditData(bundle) for bundle in self.bundles.values()]
        items = [item for name in MINI for item in datasets.load(name, "data").test]
        rows = [row for row, item in enumerate(items) if item.classname in LEFT_OUT]
        images = [self.source.preprocess(read_image(items[row].impath)) for row in rows]
        pictures = torch.stack(images * DRAWS)  # (DRAWS n, 3, s, s)
        noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
        noisy = (pictures + NOISE * noise).round().clamp(0, 255).byte()
        self.noisy = unit(self.source.encode_images(noisy))
        self.noisy_labels = self.labels[rows].repeat(DRAWS)

    def logits(self, images: Tensor, labels: Tensor, without: Sequence[str] = ()) -> Tensor:
        """(n, C) of images (n, d) with the names of their set; -inf for others, and `without`."""
        gone = torch.tensor([name in (*self.removed, *without) for name in self.names])
        gone = gone | (self.set_of[labels][:, None] != self.set_of)  # (n, C)
        logits = self.scale * images @ self.embed(self.prompts).T
        return logits.masked_fill(gone, -torch.inf)


def beside(full: Training, label: int) -> dict[str, Tensor]:
    """Classes of the same set, (C,) bool: the nearest by evaluation prompt, and those that share a
    word with the name, as other colours of a shape do."""
    texts, words = full.embed(full.prompts), set(full.names[label].split())
    others = full.set_of == full.set_of[label]
    others[label] = False
    nearest = (texts @ texts[label]).masked_fill(~others, -1).topk(NEAREST).indices
    shared = torch.tensor([not words.isdisjoint(name.split()) for name in full.names])
    is_near = torch.isin(torch.arange(len(others)), nearest)
    return {"neighbours": is_near, "siblings": others & shared}


def profile(model: Training, label: int, near: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is measured of a model around a class: numbers; of many images the probabilities (n, C)
    of the names of their set; and predictions (n,)."""
    name, dataset, number = model.names[label], model.sets[label], int(model.set_of[label])
    bundle = model.bundles[dataset]
    gone = next(names for names in GROUPS.values() if name in names)
    logits = model.logits(model.images, model.labels, [each for each in gone if each != name])
    mine, own_set = model.labels == label, model.set_of[model.labels] == number
    kept = torch.tensor([each not in gone for each in model.names])[model.labels]
    parts = {"own": mine} | {part: classes[model.labels] for part, classes in near.items()}
    parts |= {"rest": own_set & ~mine, "others": ~own_set & kept}
    found = {part: logits[rows].softmax(dim=1) for part, rows in parts.items() if rows.any()}
    found["own probability"] = found["own"][:, label].mean()

    held_out, described = halves(name, dataset)[1], committed(name, dataset).descriptions
    prompts = [bundle.template.replace("{}", word) for word in (name, *held_out)]
    texts = model.embed(model.encode(prompts + described))  # (1 + words, d)
    words = (texts @ model.images[mine].mean(dim=0)).split([1, len(held_out), len(described)])
    found |= zip(WORDS, words, strict=True)

    noisy = model.noisy_labels == label
    found["perturbed"] = model.logits(model.noisy[noisy], model.noisy_labels[noisy]).argmax(dim=1)
    found["perturbed accuracy"] = (found["perturbed"] == label).double().mean()
    cosines = logits[own_set][:, model.set_of == number].nan_to_num(neginf=0.0) / model.scale
    return found | relearnt(model.data[number], bundle.classnames.index(name), cosines)


def probe(data: AuditData, draw: int, k: int) -> Tensor:
    """Scores (N, C) of a linear probe: a ridge regression of the held images' classes."""
    images, classes = data.once(held, draw, k)
    x = data.bundle.image_features
    return torch.from_numpy(RidgeRegression(PROBE_RIDGE).fit(x[images], classes).predict(x))


def relearnt(data: AuditData, label: int, cosines: Tensor) -> dict[str, Tensor]:
    """Accuracy of the class's other images after k images of every class, means over draws: by the
    mean image alone, by mean image and text (of `cosines`, (N, C)), and by a linear probe."""
    right: dict[str, list[Tensor]] = {}
    for k, draw in product(SHOTS, range(REPEATS)):
        tested = (data.bundle.labels == label) & (data.once(places)[draw] >= k)
        means = unit(data.images) @ unit(data.once(class_means, draw, k)).T  # (N, C)
        ways = {"images": means, "both": cosines + means, "probe": data.once(probe, draw, k)}
        for way, scores in ways.items():
            right.setdefault(f"{way} {k}", []).append((scores.argmax(dim=1) == label)[tested])
    return {way: torch.cat(each).double().mean() for way, each in right.items()}


def distance(a: Tensor, b: Tensor) -> float:
    """Between entries of two profiles: of probabilities the mean Jensen-Shannon divergence (nats),
    of predictions the part that differs, of numbers the mean absolute difference."""
    if a.ndim == 2:
        return float((entr((a + b) / 2) - (entr(a) + entr(b)) / 2).sum(dim=1).mean())
    return float((a - b).abs().mean() if a.is_floating_point() else (a != b).double().mean())


def compare(
    label: int, golds: list[Training], fulls: list[Training], ways: Mapping[str, Training]
) -> Iterator[dict[str, Any]]:
    """A row for each way, pair of models and measure: the first's value (a distance where it is no
    number), the second's, and their distance. `distinguished`: the AUC of a classifier of
    log-probabilities of other images of the set, every second of which is seen by one model, the
    rest by the other."""
    near = beside(fulls[0], label)
    profiles = {each: profile(each, label, near) for each in (*golds, *fulls, *ways.values())}
    pairs = {way: [*product([model], golds)] for way, model in ways.items()}
    pairs |= {"another seed": [*product(fulls[1:], golds)], "gold": [*combinations(golds, 2)]}
    pairs[FULLS] = [*combinations(fulls, 2)]
    for way, both in pairs.items():
        for a, b in ((profiles[one], profiles[other]) for one, other in both):
            seen = torch.cat([a["rest"][::2], b["rest"][1::2]]).clamp_min(LEAST).log()
            area = separation(seen, len(a["rest"][::2]), 0)
            yield {"way": way, "measure": "distinguished", "value": area}
            for measure, x in a.items():
                far = distance(x, b[measure])
                row = {"way": way, "measure": measure, "value": far, "distance": far}
                if x.ndim < 2 and x.is_floating_point():
                    row |= {"value": float(x.mean()), "gold": float(b[measure].mean())}
                yield row


def trainings(out: Path, steps: int) -> dict[str, Training]:
    """`TRAININGS`, trained where missing. ProblemError for a file that was trained otherwise."""
    models = {}
    for name, (seed, without) in TRAININGS.items():
        path = out / f"{name}.safetensors"
        if not path.exists():
            options = [f"--without={each}" for each in without] + [f"--out={path}"]
            train_mini.main([*options, f"--seed={seed}", f"--steps={steps}"])
        about = read_safetensors(path)[0]
        wanted = {"seed": seed, "steps": steps, "without": without}
        if any(about.get(key) != json.dumps(value) for key, value in wanted.items()):
            raise ProblemError(f"{path} was not trained with {wanted}; choose another --out")
        models[name] = Training(path)
    return models


def forgotten(out: Path, methods: Sequence[str], full: Training) -> dict[str, dict[str, Training]]:
    """Class -> method -> the committed model after the method forgot the class alone."""
    runs, varied = [], {"methods": {method: METHODS[method] for method in methods}}
    for dataset, classes in MINI.items():
        varied |= {"datasets": [dataset], "classes": [x for x in LEFT_OUT if x in classes]}
        runs += runs_of(varied, out, ["--quiet"], ["methods"])
    refuse_failed(launch(runs, LauncherSettings()))
    found: dict[str, dict[str, Training]] = {name: {} for name in LEFT_OUT}
    for run in runs:
        for name in run.labels:
            adapter = load_adapter(Results(run.folder).path(run.keys[-1], name))
            model = full.changed(adapter.changed(full.source.projection, torch.float64))
            model.removed = adapter.solver.get("removed_names", ())
            found[name][run.keys[1]] = model
    return found


def from_text(full: Training, truth: Mapping[str, float]) -> pd.DataFrame:
    """How far each class name that there is a gold of is the sum of its parts, by text alone: the
    cosine with what other retained names with its words share. `truth`, `gold`: the probability
    that gold gives to the name for its images."""
    retained: dict[str, Tensor] = {}
    for bundle in full.bundles.values():
        retained |= zip(bundle.retain_names, bundle.retain_hidden.double(), strict=True)
    found = []
    for name, gold in truth.items():
        same = datasets.same_meaning([name], full.sets[full.names.index(name)])
        others = {key: row for key, row in retained.items() if datasets.key(key) not in same}
        x = torch.stack(list(others.values()))  # (m, w)
        centre, parts = x.mean(dim=0), torch.zeros(x.shape[1])
        for word in name.split():
            if any(rows := [word in key.split() for key in others]):
                parts = parts + x[rows].mean(dim=0) - centre
        cosine = float(torch.cosine_similarity(parts, retained[name] - centre, dim=0))
        found.append({"class": name, "gold": gold, "sum of its parts": cosine})
    return pd.DataFrame(found)


def report_all(table: pd.DataFrame, names: pd.DataFrame) -> None:
    """Print values, distances in units of two golds', and what text tells of names. Below, above:
    how often the cosine of a name, or of held-out words, differs from gold's by more than a unit.
    """
    for part in ("value", "ratio"):
        cells = table.pivot_table(part, KEYS[:3], "measure", sort=False).reset_index()
        print(f"\n{part.upper()}")
        report(cells, ["group", "way"])
    words = table[table["measure"].isin(WORDS[:2])]
    off = (words["value"] - words["gold"]) / words["unit"]
    counts = words.assign(below=off < -1, above=off > 1).groupby(["group", "way"], sort=False)
    print(f"\n{counts[['below', 'above']].sum().to_string()}")
    print(f"\n{names.round(2).to_string(index=False)}")
    truth = names["gold"] > 0.5
    area = roc_auc_score(truth, names["sum of its parts"]) if truth.nunique() == 2 else torch.nan
    print(f"sum of its parts: AUC {area:.2f} ({truth.sum()} of {len(names)} names with a gold)")


def draw(table: pd.DataFrame, path: Path) -> None:
    """A dot for each class and way; the bands are as wide as two golds differ."""
    ways = [way for way in table["way"].unique() if way not in (ALONE, FULLS)]
    with drawing(path, 11, 1.5 + 0.22 * len(ways)) as figure:
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (measure, title) in zip(axes, DRAWN.items(), strict=True):
            rows = table[(table["measure"] == measure) & table["way"].isin(ways)]
            width = rows["unit"].max()
            axis.axvspan(-width if measure == "name" else 0, width, color="0.9", linewidth=0)
            for colour, (group, part) in zip(COLOURS, rows.groupby("group"), strict=False):
                x = part["value"] - part["gold"].fillna(0)
                axis.scatter(x, part["way"].map(ways.index), s=28, color=colour, label=group)
            axis.set_title(title)
        axes[0].set_yticks(range(len(ways)), ways)
        axes[0].invert_yaxis()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Train what is missing, forget by every method, and compare; returns the table."""
    parser = Parser(prog="python -m experiments gold", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gold"), help="folder of the results")
    parser.add_argument("--steps", type=whole(1, 10**9), default=train_mini.STEPS)
    about = "a method (repeatable); default: all"
    parser.add_argument("--method", action="append", choices=METHODS, metavar="NAME", help=about)
    args = parser.parse_args(argv)
    models, full, rows = trainings(args.out, args.steps), Training(), []
    fulls = [full, *(models[name] for name in models if name.startswith("full"))]
    edited = forgotten(args.out / "edits", args.method or list(METHODS), full)
    for group, names in GROUPS.items():
        golds = [models[f"{group}-{seed}"] for seed in (0, 1)]
        for name in progress(names, f"group {group}"):
            alone = {ALONE: models["alone-0"]} if name in TRAININGS["alone-0"][1] else {}
            ways = {"nothing": full} | edited[name] | alone
            found = compare(full.names.index(name), golds, fulls, ways)
            rows += [{"group": group, "class": name} | row for row in found]
    table = pd.DataFrame(rows).groupby(KEYS, sort=False).mean().reset_index()  # over pairs
    of_gold = table[(table["way"] == "nothing") & (table["measure"] == "own probability")]
    truth = of_gold.set_index("class")["gold"]
    table["group"] = table["group"].where(table["class"].map(truth) < 0.5, STILL)
    of_two = table[(table["way"] == "gold") & (table["group"] != STILL)]
    units = of_two.groupby("measure")["distance"].mean()
    table["unit"] = table["measure"].map(units.where(units > 0))
    table["ratio"] = table["distance"] / table["unit"]
    write_table(table, args.out / "gold.csv")
    report_all(table, from_text(full, truth))
    draw(table, args.out / "truth.png")
    return table
