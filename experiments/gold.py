"""How near each method comes to gold: `mini` trained anew without a class, its pictures and words.

    python -m experiments gold [--out gold] [--steps N] [--method NAME ...]

OUT/NAME.safetensors are the trainings, 4 to 6 minutes of one core each, and OUT/edits what every
method did to the committed model. What is there is not made again. Every training has a space of
its own: what is compared does not depend on it. docs/truth.md has the tables, and explains them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.special import xlogy

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
from experiments.hide import Mini, average_precision, unit
from experiments.runs import launch, refuse_failed, runs_of
from forgetting.adapter import load_adapter
from forgetting.errors import ProblemError
from forgetting.io import read_safetensors
from forgetting.targets import WITH_BETA

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
    f"exact-{target}-0": NO_MARGIN | {"FORGET.TARGET": target} for target in WITH_BETA
}
ALONE, FULLS, STILL = "left out alone", "two full trainings", "gold still recognises"
NEAREST = 5  # classes that are its neighbours
SHOTS = (1, 5, 10)  # images of each class, to learn it again
DRAWS, NOISE = 10, 8.0  # small perturbations of an image; their standard deviation, of 255
RIDGE, PROBE_RIDGE = 0.01, 0.3  # the first of the mean square of hidden states
LEAST = 1e-30  # of a probability, for its logarithm
WORDS = ["name", "held-out words", "descriptions"]
COLUMNS = 10  # of a printed table
DRAWN = {
    "name": "cosine of its name with its images,\nless gold's: left is over-forgotten",
    "own": "where its images go:\nJensen-Shannon divergence from gold, nats",
}


class Training(Mini):
    """A training of `mini`, the committed one without `weights`, and the images of its sets."""

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__(weights)
        source = self.source
        self.projection, self.scale = source.projection.double(), source.model.logit_scale.exp()
        self.data = [AuditData(bundle) for bundle in self.bundles.values()]
        items = [item for name in MINI for item in datasets.load(name, "data").test]
        rows = [row for row, item in enumerate(items) if item.classname in LEFT_OUT]
        images = [source.preprocess(read_image(items[row].impath)) for row in rows]
        pictures = torch.stack(images * DRAWS)  # (DRAWS n, 3, s, s)
        noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
        noisy = (pictures + NOISE * noise).round().clamp(0, 255).byte()
        self.noisy = unit(source.encode_images(noisy))
        self.noisy_labels = self.labels[rows].repeat(DRAWS)


@dataclass(frozen=True, eq=False)
class Model:
    """A training with a change of its text projection, and names that left the list."""

    training: Training
    delta: Tensor | float = 0.0  # (w, d)
    removed: Sequence[str] = ()

    def embed(self, hidden: Tensor) -> Tensor:
        """Unit-norm embeddings (n, d) of hidden states (n, w)."""
        return unit(hidden.double() @ (self.training.projection + self.delta))

    def logits(self, images: Tensor, labels: Tensor, without: Sequence[str] = ()) -> Tensor:
        """(n, C) of images (n, d) with the names of their set; -inf for others, and `without`."""
        known = self.training
        gone = torch.tensor([name in (*self.removed, *without) for name in known.names])
        gone = gone | (known.set_of[labels][:, None] != known.set_of)  # (n, C)
        logits = known.scale * images @ self.embed(known.prompts).T
        return logits.masked_fill(gone, -torch.inf)


def beside(model: Model, label: int) -> dict[str, Tensor]:
    """Classes of the same set, (C,) bool: the nearest by evaluation prompt, and those that share a
    word with the name, as other colours of a shape do."""
    known, texts = model.training, model.embed(model.training.prompts)
    others = known.set_of == known.set_of[label]
    others[label] = False
    nearest = (texts @ texts[label]).masked_fill(~others, -1).topk(NEAREST).indices
    words = {*known.names[label].split()}
    shared = others & torch.tensor([bool(words & {*name.split()}) for name in known.names])
    return {"neighbours": torch.zeros_like(others).index_fill(0, nearest, True), "siblings": shared}


def profile(model: Model, label: int, near: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is measured of a model around a class: numbers; of many images the probabilities (n, C)
    of the names of their set; and predictions (n,)."""
    known, name, number = model.training, model.training.names[label], model.training.set_of[label]
    dataset = list(known.bundles)[number]
    gone = next(names for names in GROUPS.values() if name in names)
    logits = model.logits(known.images, known.labels, [each for each in gone if each != name])
    mine, own_set = known.labels == label, known.set_of[known.labels] == number
    kept = ~torch.isin(known.labels, torch.tensor([known.names.index(each) for each in gone]))
    parts = {"own": mine} | {part: classes[known.labels] for part, classes in near.items()}
    found: dict[str, Tensor] = {}
    for part, rows in (parts | {"rest": own_set & ~mine, "others": ~own_set & kept}).items():
        if rows.any():
            p, labels = logits[rows].softmax(dim=1), known.labels[rows]
            found[part] = p
            found[f"{part} accuracy"] = (p.argmax(dim=1) == labels).double().mean()
            found[f"{part} probability"] = p.gather(1, labels[:, None]).mean()

    held_out, described = halves(name, dataset)[1], committed(name, dataset).descriptions
    template = known.bundles[dataset].template
    prompts = [template.replace("{}", word) for word in (name, *held_out)]
    texts = model.embed(known.encode(prompts + described))  # (1 + words, d)
    cosines = (known.images[mine] @ texts.T).mean(dim=0)
    words = cosines.split([1, len(held_out), len(described)])
    found |= zip(WORDS, words, strict=True)
    found["search"] = average_precision(known.images[own_set] @ texts[:1].T, mine[own_set][:, None])
    found["rank"] = 1 / (logits[mine] >= logits[mine][:, [label]]).sum(dim=1).double()

    noisy = known.noisy_labels == label
    found["perturbed"] = model.logits(known.noisy[noisy], known.noisy_labels[noisy]).argmax(dim=1)
    found["perturbed accuracy"] = (found["perturbed"] == label).double().mean()
    cosines = logits[own_set][:, known.set_of == number].nan_to_num(neginf=0.0) / known.scale
    return found | relearnt(known.data[number], label - known.first[dataset], cosines)


def probed(data: AuditData, draw: int, k: int) -> Tensor:
    """The class (N,) that a linear probe of the held images, a ridge regression of their classes,
    sees in each image."""
    images, classes = data.once(held, draw, k)
    x = data.bundle.image_features
    fit = Ridge(alpha=PROBE_RIDGE).fit(x[images], classes)
    return torch.from_numpy(fit.predict(x)).argmax(dim=1)


def relearnt(data: AuditData, label: int, cosines: Tensor) -> dict[str, Tensor]:
    """Accuracy of the class's other images after k images of every class, means over draws: by the
    mean image alone, by mean image and text (of `cosines`, (N, C)), and by a linear probe."""
    right: dict[str, list[Tensor]] = {}
    for k in SHOTS:
        for draw in range(REPEATS):
            tested = (data.bundle.labels == label) & (data.once(places)[draw] >= k)
            means = unit(data.images) @ unit(data.once(class_means, draw, k)).T  # (N, C)
            ways = {"images": means.argmax(dim=1), "both": (cosines + means).argmax(dim=1)}
            for way, predicted in (ways | {"probe": data.once(probed, draw, k)}).items():
                right.setdefault(f"{way} {k}", []).append((predicted == label)[tested])
    return {way: torch.cat(each).double().mean() for way, each in right.items()}


def distance(a: Tensor, b: Tensor) -> float:
    """Between entries of two profiles: of probabilities the mean Jensen-Shannon divergence (nats),
    of predictions the part that differs, of numbers the mean absolute difference."""
    if a.ndim == 2:
        middle = (a + b) / 2
        terms = sum(xlogy(p, p) - xlogy(p, middle) for p in (a, b))
        return float(terms.sum(dim=1).mean() / 2)
    return float((a - b).abs().mean() if a.is_floating_point() else (a != b).double().mean())


def compare(
    label: int, golds: list[Model], fulls: list[Model], ways: Mapping[str, Model]
) -> Iterator[dict[str, Any]]:
    """A row for each way and measure: its value (a distance where it is no number), gold's, and the
    distance, means over pairs of models. `told apart`: the AUC of a classifier of log-probabilities
    of other images of the set, every second of which is seen by one model, the rest by the other.
    """
    known, near = fulls[0].training, beside(fulls[0], label)
    own_set = known.set_of == known.set_of[label]
    pairs = {way: [(model, gold) for gold in golds] for way, model in ways.items()}
    pairs["another seed"] = [(full, gold) for full in fulls[1:] for gold in golds]
    pairs |= {"gold": [*combinations(golds, 2)], FULLS: [*combinations(fulls, 2)]}
    profiles = {each: profile(each, label, near) for each in (*golds, *fulls, *ways.values())}
    for way, both in pairs.items():
        sides = [(profiles[a], profiles[b]) for a, b in both]
        apart = [torch.cat([a["rest"][::2], b["rest"][1::2]])[:, own_set] for a, b in sides]
        areas = [separation(p.clamp_min(LEAST).log(), (len(p) + 1) // 2, 0) for p in apart]
        yield {"way": way, "measure": "told apart", "value": sum(areas) / len(areas)}
        for measure, example in profiles[golds[0]].items():
            found = [(a[measure], b[measure]) for a, b in sides]
            far = sum(distance(x, y) for x, y in found) / len(both)
            means = torch.tensor([[x.double().mean(), y.double().mean()] for x, y in found]).mean(0)
            is_number = example.ndim < 2 and example.is_floating_point()
            value, gold = means.tolist() if is_number else (far, None)
            yield {"way": way, "measure": measure, "value": value, "gold": gold, "distance": far}


def trainings(out: Path, steps: int) -> dict[str, Model]:
    """`TRAININGS`, trained where missing. ProblemError for a file that was trained otherwise."""
    models = {}
    for name, (seed, without) in TRAININGS.items():
        path = out / f"{name}.safetensors"
        if not path.exists():
            options = [f"--without={each}" for each in without] + [f"--out={path}"]
            train_mini.main([*options, f"--seed={seed}", f"--steps={steps}"])
        about = read_safetensors(path)[0]
        wanted = {"seed": seed, "steps": steps, "without": without}
        if {key: json.loads(about.get(key, "null")) for key in wanted} != wanted:
            raise ProblemError(f"{path} was not trained with {wanted}; choose another --out")
        models[name] = Model(Training(path))
    return models


def forgotten(out: Path, methods: Sequence[str], full: Training) -> dict[str, dict[str, Model]]:
    """Class -> method -> the committed model after the method forgot the class alone."""
    runs, varied = [], {"methods": {method: METHODS[method] for method in methods}}
    for dataset, classes in MINI.items():
        varied |= {"datasets": [dataset], "classes": [x for x in LEFT_OUT if x in classes]}
        runs += runs_of(varied, out, ["--quiet"], ["methods"])
    refuse_failed(launch(runs, LauncherSettings()))
    found: dict[str, dict[str, Model]] = {name: {} for name in LEFT_OUT}
    for run in runs:
        for label in run.labels:
            adapter = load_adapter(Results(run.folder).path(run.keys[-1], label))
            delta = adapter.left.double() @ adapter.right.double()
            removed = adapter.solver.get("removed_names", ())
            found[label][run.keys[1]] = Model(full, delta, removed)
    return found


def from_text(full: Model, truth: Mapping[str, float]) -> pd.DataFrame:
    """How well the retained names explain each class name that is not among them, by text alone.
    `gold`: the probability of the name for its images, where there is a gold."""
    known, found = full.training, []
    retained: dict[str, Tensor] = {}
    for bundle in known.bundles.values():
        retained |= zip(bundle.retain_names, bundle.retain_hidden.double(), strict=True)
    for name, number in zip(known.names, known.set_of.tolist(), strict=True):
        same = datasets.same_meaning([name], list(known.bundles)[number])
        others = {key: row for key, row in retained.items() if datasets.key(key) not in same}
        x, h = torch.stack(list(others.values())), retained[name]  # (m, w), (w,)
        ridge = RIDGE * x.square().mean()
        inverse = torch.linalg.inv(x.T @ x / len(x) + ridge * torch.eye(len(h)))
        q, a = ((x @ inverse) * x).sum(dim=1), x @ inverse @ h
        left_out = a / (1 - q / len(x))  # Sherman and Morrison: as if each were not retained
        ratios = left_out / (h @ inverse @ h + a * left_out / len(x))
        holds = [[word in key.split() for key in others] for word in name.split()]
        centre = x.mean(dim=0)
        parts = sum(
            (x[torch.tensor(rows)].mean(dim=0) - centre for rows in holds if any(rows)), 0 * h
        )
        scores = {
            "sum of its parts": float(unit(parts[None])[0] @ unit((h - centre)[None])[0]),
            "explained": 1 - float((ridge * inverse @ h).norm() / h.norm()),
            "displacement ratio": float(ratios.square().mean().sqrt()),
        }
        found.append({"class": name, "gold": truth.get(name)} | scores)
    return pd.DataFrame(found)


def report(table: pd.DataFrame, names: pd.DataFrame) -> None:
    """Print values, distances in units of two golds', and what text tells of names. Below, above:
    how often the cosine of a name, or of held-out words, differs from gold's by more than a unit.
    """
    for group, rows in table[table["way"] != ALONE].groupby("group"):
        print(f"\n{group}: {', '.join(rows['class'].unique())}. Value (distance to gold):")
        means = rows.groupby(["way", "measure"], sort=False)[["value", "ratio"]].mean()
        cells = means["value"].map("{:.2f}".format) + means["ratio"].map(" ({:.1f})".format)
        cells = cells.str.replace(" (nan)", "").unstack("measure")
        words = rows[rows["measure"].isin(WORDS[:2])]
        for side, sign in (("below", -1), ("above", 1)):
            is_off = sign * (words["value"] - words["gold"]) > words["unit"]
            cells[side] = is_off.groupby(words["way"]).sum()
        for first in range(0, len(cells.columns), COLUMNS):
            print(cells.iloc[:, first : first + COLUMNS].to_string())
    alone = table[table["way"] == ALONE].set_index("measure")["ratio"].dropna()
    print(f"\n{ALONE}: {', '.join(f'{name} {ratio:.1f}' for name, ratio in alone.items())}")
    known = names.dropna()
    truth = known["gold"] > 0.5
    print(f"\n{known.to_string(index=False, float_format='{:.2f}'.format)}")
    for score in known.columns[2:]:
        area = roc_auc_score(truth, known[score]) if 0 < truth.sum() < len(truth) else torch.nan
        print(f"{score}: AUC {area:.2f} ({truth.sum()} of {len(known)} names with a gold)")


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
    models, full, rows = trainings(args.out, args.steps), Model(Training()), []
    fulls = [full, *(models[name] for name in models if name.startswith("full"))]
    edited = forgotten(args.out / "edits", args.method or list(METHODS), full.training)
    for group, names in GROUPS.items():
        golds = [models[f"{group}-{seed}"] for seed in (0, 1)]
        for name in progress(names, f"group {group}"):
            alone = {ALONE: models["alone-0"]} if name in TRAININGS["alone-0"][1] else {}
            ways = {"nothing": full} | edited[name] | alone
            found = compare(full.training.names.index(name), golds, fulls, ways)
            rows += [{"group": group, "class": name} | row for row in found]
    table = pd.DataFrame(rows)
    of_gold = table[(table["way"] == "nothing") & (table["measure"] == "own probability")]
    truth = dict(zip(of_gold["class"], of_gold["gold"], strict=True))
    table["group"] = table["group"].where(table["class"].map(truth) < 0.5, STILL)
    of_two = table[(table["way"] == "gold") & (table["group"] != STILL)]
    units = of_two.groupby("measure")["distance"].mean()
    table["unit"] = table["measure"].map(units.where(units > 0))
    table["ratio"] = table["distance"] / table["unit"]
    write_table(table, args.out / "gold.csv")
    report(table, from_text(full, truth))
    draw(table, args.out / "truth.png")
    return table
