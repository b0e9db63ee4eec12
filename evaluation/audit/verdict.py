"""What the numbers of an audit say in words, bad news first."""

from __future__ import annotations

from typing import Any

from evaluation.audit.names import ATTACKERS, RELEARNING
from evaluation.rules import Fate, fate, is_other_word

HARM = 0.02  # loss of the neighbours' mean accuracy that is worth a line
LEAK = 0.8  # area under the curve from which two classes count as distinguished
PROBED = 0.5  # of its images: above that a probe counts as finding the class
DROP = 0.2  # loss of one neighbour that is worth a line, whatever the mean
NAMED = 5  # places within which an attack counts as having named the class

BAD, GOOD, LIMIT = "bad", "good", "limit"
Lines = list[tuple[str, str]]  # (tier, line)


def verdict(found: dict[str, Any]) -> list[str]:
    """One line per finding: first what speaks against this forgetting, then what speaks for it,
    then what no change of the text projection can mend (`limit`), then what was not measured.

    Args:
        found: measure -> its values, see each measure; absent measures are passed over.
    """
    judges = (_own_prompt, _words, _neighbours, _relearned, _logits, _images, _undone)
    lines = [entry for judge in judges for entry in judge(found)]
    parts = [measure for measure in found.values() if isinstance(measure, dict)]
    missing = dict.fromkeys(line for part in parts for line in part.get("not_measured", []))
    return [
        *(line for tier, line in lines if tier == BAD),
        *(line for tier, line in lines if tier == GOOD),
        *(f"limit: {line}" for tier, line in lines if tier == LIMIT),
        *(f"not measured: {line}" for line in missing),
    ]


def _fate(found: dict[str, Any]) -> Fate | None:
    """What became of the class under its own prompt; None if that was left out of the audit."""
    shot = found.get("residue", {}).get("zero_shot")
    return fate(shot["before"]["value"], shot["after"]["value"]) if shot else None


def _own_prompt(found: dict[str, Any]) -> Lines:
    became = _fate(found)
    if became in (None, Fate.UNMEASURED):
        return []
    before, after = (found["residue"]["zero_shot"][side] for side in ("before", "after"))
    line = (
        f"own prompt: {_percent(before['value'])} -> {_percent(after['value'])} of "
        f"{after['n']} images (95 % interval {_percent(after['low'])} to {_percent(after['high'])})"
    )
    if became is Fate.NEVER:
        line += ": never recognised, so there was nothing to forget"
    return [(GOOD if became is Fate.GONE else BAD, line)]


def _words(found: dict[str, Any]) -> Lines:
    words = found.get("paraphrase", {})
    worst = words.get("worst")
    if not worst or worst["after"]["value"] is None:
        return []
    back = words["back"]
    count = sum(is_other_word(prompt["kind"], prompt["seen"]) for prompt in words["prompts"])
    texts = f"{count} other text{'' if count == 1 else 's'}"
    most = (
        f"most by {worst['text']!r} ({worst['kind']}): {_percent(worst['after']['value'])}, "
        f"before {_percent(worst['before']['value'])}"
    )
    match _fate(found):
        case Fate.STAYS:
            line = f"was not forgotten; found by {len(back)} of {texts} too, {most}"
        case Fate.NEVER:
            line = f"never recognised by its own prompt; of {texts} {most}"
        case _ if back:
            line = f"comes back under {len(back)} of {texts}; {most}"
        case _:
            return [(GOOD, f"stays away under {texts}; {most}")]
    return [(BAD, line)]


def _neighbours(found: dict[str, Any]) -> Lines:
    near = found.get("neighbours", {})
    if near.get("mean_before") is None:
        return []
    change = near["mean_after"] - near["mean_before"]
    line = f"its {len(near['classes'])} nearest classes change by {100 * change:+.1f} points"
    lines = [(BAD if change < -HARM else GOOD, line)]
    measured = [entry for entry in near["classes"] if entry["before"]["value"] is not None]
    worst = min(measured, key=lambda entry: entry["after"]["value"] - entry["before"]["value"])
    before, after = worst["before"]["value"], worst["after"]["value"]
    if before - after >= DROP:
        line = f"{worst['name']!r}, a neighbour, falls from {_percent(before)} to {_percent(after)}"
        lines.append((BAD, line))
    return lines


def _logits(found: dict[str, Any]) -> Lines:
    places = found.get("destinations", {})
    if places.get("worst_auc") is None:
        return []
    worst = max(places["leak"], key=lambda pair: pair["auc_after"] or 0)
    line = (
        f"the full list of scores tells its images from those of {worst['name']!r} in "
        f"{100 * worst['auc_after']:.0f} of 100 pairs (before {100 * worst['auc_before']:.0f}; "
        "guessing: 50)"
    )
    return [(LIMIT if worst["auc_after"] >= LEAK else GOOD, line)]


def _images(found: dict[str, Any]) -> Lines:
    probe = found.get("residue", {}).get("linear_probe")
    if not probe or probe["after"]["value"] is None:
        return []
    line = (
        f"images look to the model as before: a classifier trained on them (linear probe) finds "
        f"{_percent(probe['after']['value'])} of its images"
    )
    return [(LIMIT if probe["after"]["value"] > PROBED else GOOD, line)]


def _relearned(found: dict[str, Any]) -> Lines:
    methods = found.get("relearning", {}).get("methods", {})
    needed = {method: values["needed"] for method, values in methods.items()}
    if not needed or _fate(found) not in (Fate.GONE, None):  # what never went cannot come back
        return []
    few = {method: count for method, count in needed.items() if count is not None}
    if not few:
        return [(GOOD, "no number of images that was tried brings half of it back")]
    method = min(few, key=few.get)
    plural = "image brings" if few[method] == 1 else "images bring"
    return [(LIMIT, f"{few[method]} {plural} half of it back ({RELEARNING[method]})")]


def _undone(found: dict[str, Any]) -> Lines:
    undo, lines = found.get("undo", {}), []
    for attack, title in ATTACKERS.items():
        place = (undo.get("attacks", {}).get(attack) or {}).get("place")
        if place is not None:
            line = f"whoever has {title} finds its name in place {place} of {undo['names']}"
            lines.append((LIMIT if place <= NAMED else GOOD, line))
    return lines


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"
