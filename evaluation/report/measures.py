"""What was measured of a class: tables of what, before and after, and sentences."""

from collections import defaultdict
from typing import Any

from evaluation.audit.record import ATTACKERS, RELEARNING
from evaluation.report.summary import PROVED, listed
from evaluation.rows import Row

TEXTS = 12  # other words that are written out
Line = tuple[str, float | None, float | None]


def tables(audit: dict[str, Any]) -> dict[str, list[Line]]:
    """What the audit of a class measured, by title: of what, and the fractions before and after."""
    found = defaultdict(dict, audit)  # a measure that is absent is empty
    prompts = found["paraphrase"].get("prompts", ())
    prompts = sorted(prompts, key=lambda x: x["after"]["value"] or 0, reverse=True)
    learnt = found["relearning"]
    return {
        "Recognised under other words, most first": [
            _line(f"{one['text']} ({one['kind']})", one) for one in prompts[:TEXTS]
        ],
        "Recognised images of the most similar classes": [
            _line(one["name"], one) for one in found["neighbours"].get("classes", ())
        ],
        "What its images are taken for": [
            (one["name"], None, one["share"]) for one in found["destinations"].get("after", ())
        ],
        "Recognised by its name, and from images alone": [
            _line(by.replace("_", " "), one) for by, one in found["residue"].items()
        ],
        "Search: the right one is first, or among five": [
            _line(f"{way.replace('_', ' ')}, {who}, first {k}", {x: sides[x][k] for x in sides})
            for way, groups in found["retrieval"].items()
            for who, sides in groups.items()
            for k in ("1", "5")
        ],
        "Learnt again from images (before: with no name for it at all)": [
            (f"{shots} of them, {RELEARNING[way]}", *sides)
            for way, one in learnt.get("methods", {}).items()
            for shots, *sides in zip(learnt["shots"], one["no_text"], one["forgotten"], strict=True)
        ],
    }


def _line(what: str, found: dict[str, Any]) -> Line:
    return what, found["before"]["value"], found["after"]["value"]


def sentences(row: Row) -> list[str]:
    """What the audit found in words, bad news first, and what the logs say of the change itself."""
    moved = row.measured("neighbours", "moved", "worst") or []
    attacks = row.measured("undo", "attacks") or {}
    names = {
        "likely to be recognised less, by their names alone": row.likely_misclassified,
        "moved most of what should stay": dict.fromkeys(one["text"] for one in moved),
        **{f"first guesses from {ATTACKERS[who]}": one["top"] for who, one in attacks.items()},
        "taken off the list of names": row.solver.get("removed_names"),
        "not retained, since they mean the same": row.solver.get("excluded"),
    }
    said = list(row.measured("verdict") or filter(None, [row.tag]))
    said += [f"{title}: {listed(some)}" for title, some in names.items() if some]
    if row.solver.get("branch") == "none":
        said.append("nothing moves: forgetting weighs too little")
    proved = row.gap is not None and row.gap <= PROVED
    return [*said, f"{'' if proved else 'not '}proved the best possible for its goal"]
