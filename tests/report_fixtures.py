"""Results folders for the report: logs.json and audits of the real measures, under planted names
and with planted accuracies."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from datasets.mini import MINI, TEST_IMAGES
from evaluation.audit.case import Prompt, accuracy
from evaluation.audit.record import FORMAT, MEASURES
from evaluation.audit.run import audit_class
from evaluation.audit.verdict import verdict
from evaluation.results import ARGS, AUDIT, LOGS
from evaluation.rules import holds
from tests.audit_fixtures import EDGES, case, edge, move, planted, text
from tests.results_fixtures import entry

NASTY = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    '" onmouseover="alert(3)" x=\'',
    "C/V & {{ 7 * 7 }} {% raw %}",
    "line\u2028and\u2029paragraph",
    "a name " + "that goes on " * 12 + "and on",
    "שלום",
]
ANIMALS = [
    *("leopard", "ant", "sea turtle", "flamingo", "kangaroo", "octopus", "cougar", "starfish"),
    *("elephant", "crab", "alpaca", "crocodile", "strawberry", "seahorse", "ibis", "sunflower"),
]
WORDS = {"synonym": ("{} (another name)", "the common {}"), "description": ("four legs and {}x",)}


def acc(value: float, n: int = 40) -> dict[str, Any]:
    """An accuracy as audits have it, rounded to whole images."""
    return accuracy(round(min(value, 1) * n), n)


@cache
def audited() -> str:
    """What all measures find for class 0, which is gone and class 1 with it, as JSON."""
    bundle = planted()
    moved = {"class 0": -text(bundle, "class 0"), "class 1": text(bundle, "class 2")}
    texts = [("{}", "bare"), ("a photo of a {}", "evaluation")]
    texts += [(words, kind) for kind, several in WORDS.items() for words in several]
    prompts = [
        Prompt(words.format("class 0"), kind, kind == "bare", bundle.class_hidden[0])
        for words, kind in texts
    ]
    subject = case(bundle, edit=move(bundle, moved))
    return json.dumps(audit_class(replace(subject, prompts=prompts)))


def audit_of(name: str, before: dict, after: dict, back: float = 0.0) -> dict[str, Any]:
    """That audit of another class with planted accuracies; `back`: under the worst other words."""
    found = json.loads(audited().replace("class 0", json.dumps(name)[1:-1]))
    sides = {"before": before, "after": after}
    words = found["paraphrase"]
    worst = acc(max(back, after["value"]))
    for prompt in words["prompts"]:
        prompt |= sides
    words["prompts"][-1]["after"] = words["worst"]["after"] = worst
    is_back = holds(worst["value"], before["value"])
    words["back"] = [words["prompts"][-1]["text"]] if is_back else []
    found["residue"]["zero_shot"] = sides
    found["examples"]["classes"][0] |= sides
    return found | {"verdict": verdict(found)}


def plant(
    folder: Path,
    names: list[str] | int = 8,
    dataset: str = "ToyAnimals",
    audit: bool = True,
    seed: int = 0,
    left: float = 0.0,
    harm: float = 0.002,
    trainer: str = "ForgetExact",
    settings: dict[str, Any] | None = None,
) -> Path:
    """Write a results folder with classes forgotten one by one.

    Args:
        names: of the classes, or how many.
        left: about what is left of a class; harm: about what others lose, both fractions.
        settings: of the solver.
    """
    if isinstance(names, int):
        names = [*ANIMALS, *(f"animal number {i}" for i in range(names))][:names]
    rng = random.Random(f"{seed}/{dataset}")
    run = {"trainer": trainer, "backbone": "ViT-B/32", "split": "test", "seed": seed}
    logs, audits = {dataset: {"settings": run}}, {}
    solver = {
        "settings": settings or {"objective": "constrained", "target": "specific", "beta": 0.1},
        "certificate": {"gap": 3.5e-15},
        "excluded": ["panther"],
    }
    for name in names:
        before, after = acc(rng.uniform(0.7, 1)), acc(max(0.0, rng.gauss(left, left / 2)))
        lost = rng.gauss(harm, 0.003)
        logs[dataset][name] = entry(
            dataset,
            name,
            before["value"],
            after["value"],
            ("ToyTools", "ToyPlaces"),
            (0.9, 0.9 - lost),
            (0.8, 0.8 - lost),
            **solver,
            seconds=rng.uniform(0.001, 0.01),
        )
        audits[name] = {
            "adapter_sha256": "0" * 64,
            "settings": {"seed": 0},
            "classes": {name: audit_of(name, before, after, 0.6 * (rng.random() < 0.3))},
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOGS).write_text(json.dumps(logs))
    (folder / ARGS).write_text(f"Namespace(dataset={dataset!r}, root='gone', seed=0)\n")
    if audit:
        record = {"format": FORMAT, "audits": {dataset: audits}}
        (folder / AUDIT).write_text(json.dumps(record))
    return folder


def changed(folder: Path, file: str, change: Callable[[dict], object]) -> Path:
    """A results folder whose logs, or audits, `change` has changed in place."""
    record = json.loads((folder / file).read_text())
    change(record if file == LOGS else record["audits"])
    (folder / file).write_text(json.dumps(record))
    return folder


def plant_shapes(folder: Path, count: int, rows: Sequence[int]) -> Path:
    """Results of the first classes of MiniShapes, each with pictures: `rows` of its own images, and
    of those of the two next classes, which lost by it."""
    names = MINI["MiniShapes"]

    def show(record: dict) -> None:
        for place, audit in enumerate(record["MiniShapes"].values()):
            classes = audit["classes"][names[place]]["examples"]["classes"]
            for number, one in enumerate(classes, place):
                pictures = [{"row": TEST_IMAGES * number + row} for row in rows]
                one["name"] = names[number]
                one["pictures"] = [one["pictures"][0] | picture for picture in pictures]

    return changed(plant(folder, names[:count], "MiniShapes"), AUDIT, show)


def plant_sparse(folder: Path) -> list[str]:
    """Results of classes of which little could be measured; returns their names, which say why."""
    found = json.loads(audited())
    audits = {name: audit_class(edge(name)) for name in EDGES}
    audits |= {f"without {x}": {k: v for k, v in found.items() if k != x} for x in MEASURES}
    audits["no measure"] = {"verdict": [], "seconds": {}}

    def thin(record: dict) -> None:
        for name, sparse in audits.items():
            record["ToyAnimals"][name]["classes"] = {name: sparse}

    changed(plant(folder, list(audits)), AUDIT, thin)
    return list(audits)
