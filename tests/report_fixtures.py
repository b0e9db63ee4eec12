"""Planted results folders for the report: logs.json and audit.json of the real shape, made up."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from evaluation.audit.names import MEASURES
from evaluation.audit.record import FORMAT
from evaluation.audit.run import audit_class
from evaluation.results import ARGS, AUDIT, LOGS
from evaluation.rules import holds, is_other_word
from tests.audit_fixtures import EDGES, edge

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
OTHERS = ("ToyTools", "ToyPlaces")
KINDS = {
    "evaluation": ["a photo of a {}"],
    "bare": ["{}"],
    "template": ["a drawing of a {}", "a blurry photo of a {}", "art of the {}"],
    "synonym": ["{} (another name)", "the common {}"],
    "hypernym": ["an animal", "a living thing like a {}"],
    "description": ["what a {} looks like: spots, four legs, a long tail and green eyes"],
    "misspelling": ["{}x", "teh {}"],
}
SHOTS = [1, 2, 4, 8, 16]


def acc(value: float | None, n: int = 40) -> dict[str, Any]:
    """An accuracy of the audit's shape."""
    if value is None:
        return {"value": None, "low": None, "high": None, "n": 0}
    value = round(value * n) / n
    width = 1.96 * (value * (1 - value) / n) ** 0.5 + 0.6 / n
    return {"value": value, "low": max(0.0, value - width), "high": min(1.0, value + width), "n": n}


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
    repeat_after: int = 10**9,
) -> Path:
    """Write a results folder with classes forgotten one by one.

    Args:
        names: of the classes, or how many.
        left: about what is left of a class; harm: about what others lose, both fractions.
        settings: of the solver; repeat_after: after so many classes their audits repeat.
    """
    if isinstance(names, int):
        names = [*ANIMALS, *(f"animal number {i}" for i in range(names))][:names]
    rng = random.Random(f"{seed}/{dataset}")
    run = {"trainer": trainer, "backbone": "ViT-B/32", "weights": "toy", "split": "test"}
    run |= {"template": "a photo of a {}", "seed": seed}
    logs = {dataset: {"settings": run}}
    audits = {}
    for place, name in enumerate(names):
        before, after = acc(rng.uniform(0.7, 1)), acc(max(0.0, rng.gauss(left, left / 2)))
        logs[dataset][name] = log_entry(rng, dataset, [name], before, after, harm, settings)
        like = names[place % repeat_after]
        found = audits[like]["classes"][like] if like in audits else None
        audits[name] = {
            "adapter_sha256": "0" * 64,
            "settings": {"seed": 0, "measures": MEASURES, "texts": {name: 20}},
            "classes": {name: found or audit_of(rng, name, names, before, after)},
        }
    write(folder, logs, {dataset: audits} if audit else None)
    return folder


def write(folder: Path, logs: dict, audits: dict | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOGS).write_text(json.dumps(logs))
    (folder / ARGS).write_text("Namespace(dataset='ToyAnimals', forget=['all'], seed=0)\n")
    if audits is not None:
        (folder / AUDIT).write_text(json.dumps({"format": FORMAT, "audits": audits}))


def log_entry(
    rng: random.Random,
    dataset: str,
    classes: list[str],
    before: dict,
    after: dict,
    harm: float,
    settings: dict | None = None,
) -> dict[str, Any]:
    """One label of logs.json; harm falls on the rest and on other sets."""
    rest, lost = rng.uniform(0.9, 0.95), rng.gauss(harm, 0.003)

    def side(own: float, loss: float) -> dict[str, Any]:
        mine = {"cls_acc_test": own, "no_cls_acc": rest - loss, "acc_train": None}
        sets = {name: {"all": {"all_ds": 0.9 - loss}} for name in OTHERS}
        return {dataset: {name: dict(mine) for name in classes}} | sets

    solver = {
        "name": "exact",
        "settings": settings or {"objective": "constrained", "target": "specific", "beta": 0.1},
        "certificate": {"primal": 0.0117, "bound": 0.0117, "gap": 3.5e-15, "radius": None},
        "residual": 3.6e-17,
        "texts": classes,
        "excluded": [*classes, "panther"],
        "mu": 4.6e-4,
        "branch": "generic",
        "seconds": rng.uniform(0.001, 0.01),
        "device": "cpu",
    }
    return {
        "final_results": side(after["value"], lost),
        "zero_shot": side(before["value"], 0.0),
        "solver": solver,
    }


def audit_of(
    rng: random.Random, name: str, names: list[str], before: dict, after: dict
) -> dict[str, Any]:
    """What the audit says of one class."""
    near = [other for other in [*names, *ANIMALS] if other != name][:10]
    start, end = before["value"], after["value"]

    def around(value: float, spread: float = 0.05) -> dict:
        return acc(min(1.0, max(0.0, rng.gauss(value, spread))))

    prompts = []
    for kind, texts in KINDS.items():
        for text in texts:
            comes = rng.random() < 0.04 and kind not in ("evaluation", "bare")
            prompts.append(
                {
                    "text": text.format(name),
                    "kind": kind,
                    "seen": kind == "bare",
                    "before": before if kind == "evaluation" else around(start),
                    "after": after if kind == "evaluation" else around(0.6 if comes else end),
                }
            )
    unseen = [prompt for prompt in prompts if is_other_word(prompt["kind"], prompt["seen"])]
    worst = max(unseen, key=lambda prompt: prompt["after"]["value"])
    back = [p["text"] for p in unseen if holds(p["after"]["value"], start)]
    by_kind = {}
    for kind in KINDS:
        mine = [prompt for prompt in prompts if prompt["kind"] == kind]
        means = [sum(p[side]["value"] for p in mine) / len(mine) for side in ("before", "after")]
        by_kind[kind] = {
            "count": len(mine),
            "mean_before": means[0],
            "mean_after": means[1],
            "worst_after": max(p["after"]["value"] for p in mine),
        }
    shown = [name, *near]
    matrices = {}
    for side, own in (("before", start), ("after", end)):
        rows = [[rng.randrange(3) for _ in [*shown, "other"]] for _ in shown]
        for place, row in enumerate(rows):
            row[place] = 36
        rows[0] = [round(40 * own), *[rng.randrange(6) for _ in near], 2]
        matrices[side] = rows
    shares = sorted((rng.random() ** 3 for _ in near), reverse=True)
    after_names = [
        {"name": other, "count": round(40 * share / sum(shares)), "share": share / sum(shares)}
        for other, share in zip(near, shares, strict=True)
    ]

    def found(fraction: float) -> dict[str, dict]:
        return {k: around(min(1.0, fraction + extra)) for k, extra in (("1", 0), ("5", 0.1))} | {
            "10": around(min(1.0, fraction + 0.15))
        }

    def curve(first: float, last: float) -> list[dict]:
        return [around(first + (last - first) * i / 4, 0.02) for i in range(5)]

    methods = {
        method: {
            "forgotten": curve(end + 0.1, 0.9),
            "before": curve(start, 0.97),
            "no_text": curve(0.1, 0.88),
            "control": curve(0.92, 0.96),
            "needed": rng.choice([1, 2, 4, 8, None]),
        }
        for method in ("cache", "probe", "refit")
    }
    verdict = [f"own prompt: {100 * start:.1f} % -> {100 * end:.1f} % of 40 images"]
    verdict.append("image embeddings are untouched: a linear probe on them finds 95.0 % as before")
    if back:
        verdict.insert(0, f"comes back under {len(back)} of {len(unseen)} other texts")
    guesses = [[name, *near[:4]], near[1:6]]

    def example(whose: str, old: dict, new: dict, rows: range) -> dict:
        named = {"before": guesses[0], "after": guesses[1]}
        pictures = [{"row": row, **named} for row in rows]
        return {"name": whose, "before": old, "after": new, "pictures": pictures}

    return {
        "examples": {
            "classes": [
                example(name, before, after, range(0, 20, 5)),
                example(near[0], acc(0.9), acc(0.5), range(3)),
            ],
            "not_measured": [],
        },
        "paraphrase": {
            "prompts": prompts,
            "mean_before": sum(p["before"]["value"] for p in unseen) / len(unseen),
            "mean_after": sum(p["after"]["value"] for p in unseen) / len(unseen),
            "worst": {key: worst[key] for key in ("text", "kind", "before", "after")},
            "back": back,
            "by_kind": by_kind,
            "not_measured": ["no model at hand: templates and synonyms were not read"],
        },
        "neighbours": {
            "classes": [
                {
                    "name": other,
                    "similarity": 0.9 - 0.03 * place,
                    "before": around(0.9),
                    "after": around(0.88),
                }
                for place, other in enumerate(near)
            ],
            "mean_before": 0.9,
            "mean_after": 0.88,
            "moved": {
                "count": 1386,
                "mean_cosine": 0.9996,
                "nearest_kept": 0.991,
                "top10_overlap": 0.987,
                "worst": [
                    {
                        "text": other,
                        "group": "vocabulary",
                        "cosine": 0.9 + 0.008 * place,
                        "nearest_before": name,
                        "rank_after": 3,
                    }
                    for place, other in enumerate(near)
                ],
            },
            "not_measured": [],
        },
        "destinations": {
            "images": 40,
            "before": [
                {"name": name, "count": 36, "share": 0.9},
                {"name": near[0], "count": 4, "share": 0.1},
            ],
            "after": after_names,
            "entropy_bits_before": 0.5,
            "entropy_bits_after": 2.3,
            "leak": [
                {"name": other, "images": 30, "auc_before": 0.999, "auc_after": 0.97 - place / 20}
                for place, other in enumerate(near[:5])
            ],
            "worst_auc": 0.97,
            "not_measured": [],
        },
        "confusion": {"names": shown, **matrices},
        "residue": {
            "linear_probe": {"before": around(0.95), "after": around(0.95), "auc": 0.998},
            "nearest_neighbours": {"k": 5, "before": around(0.9), "after": around(0.9)},
            "zero_shot": {"before": before, "after": after},
            "not_measured": [],
        },
        "retrieval": {
            way: {
                "forgotten": {"before": found(0.85), "after": found(end)},
                "retained": {"before": found(0.82), "after": found(0.82)},
            }
            for way in ("image_to_text", "text_to_image")
        }
        | {"not_measured": []},
        "relearning": {
            "shots": SHOTS,
            "methods": methods,
            "control_class": near[0],
            "words": {
                "counts": [1, 2, 3],
                "forgotten": [acc(0.2), acc(0.5), acc(0.7)],
                "before": [acc(0.9), acc(0.9), acc(0.95)],
                "needed": 2,
            },
            "not_measured": [],
        },
        "undo": {
            "names": 1000,
            "attacks": {
                "original_known": attack(1, 1, 0.999, [name, *near[:4]]),
                "two_adapters": attack(2, 2, 0.93, [name, *near[:4]]),
                "alone": attack(None, None, 0.12, near[:5], 311),
            },
            "not_measured": [],
        },
        "seconds": {"paraphrase": 0.02},
        "verdict": verdict,
    }


def attack(
    rank: int | None, expected: int | None, cosine: float, top: list[str], place: int = 1
) -> dict[str, Any]:
    return {
        "rank": rank,
        "rank_expected": expected,
        "text_cosine": cosine,
        "place": place,
        "places": [place],
        "top": top,
    }


def mini(folder: Path, rows: list[int], **places) -> Path:
    """Results of MiniShapes, whose audits show the pictures `rows` of its first class, and of the
    second one, which lost by it."""
    names = ["red circle", "red square"]
    plant(folder, names, "MiniShapes")
    record = json.loads((folder / "audit.json").read_text())
    for label, audit in record["audits"]["MiniShapes"].items():
        found = audit["classes"][label]["examples"]["classes"]
        for one, name, first in zip(found, names, (0, 20), strict=True):
            one["name"] = name
            one["pictures"] = [one["pictures"][0] | {"row": first + row} for row in rows]
    (folder / "audit.json").write_text(json.dumps(record))
    run = {"dataset": "MiniShapes", "root": str(folder / "gone")} | places
    (folder / "args.txt").write_text(
        f"Namespace({', '.join(f'{k}={v!r}' for k, v in run.items())})"
    )
    return folder


def riddle(value: Any, rng: random.Random, chance: float = 0.08) -> Any:
    """The same with holes: keys that are gone and values that are None, anywhere."""
    if isinstance(value, dict):
        kept = {key: part for key, part in value.items() if rng.random() >= chance}
        return {
            key: None if rng.random() < chance else riddle(part, rng, chance)
            for key, part in kept.items()
        }
    if isinstance(value, list):
        return [None if rng.random() < chance else riddle(part, rng, chance) for part in value]
    return value


def sparse_audits(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Audits of a class where little could be measured, by a name that says why."""
    edges = {name: audit_class(edge(name)) for name in EDGES}
    without = {
        f"without {measure}": {key: part for key, part in found.items() if key != measure}
        for measure in MEASURES
    }
    return {"no measure": {"verdict": [], "seconds": {}}, **without, **edges}


def plant_sparse(folder: Path) -> list[str]:
    """A results folder with a class for each of `sparse_audits`; returns their names."""
    plant(folder, 1)
    record = json.loads((folder / AUDIT).read_text())["audits"]["ToyAnimals"]
    (found,) = record[ANIMALS[0]]["classes"].values()
    audits = sparse_audits(found)
    plant(folder, list(audits))
    record = json.loads((folder / AUDIT).read_text())
    for name, sparse in audits.items():
        record["audits"]["ToyAnimals"][name]["classes"] = {name: sparse}
    (folder / AUDIT).write_text(json.dumps(record))
    return list(audits)
