"""What the numbers of an audit say in words, bad news first."""

from typing import Any

from evaluation.audit.record import ATTACKERS, RELEARNING
from evaluation.rules import Fate, fate, is_other_word

HARM = 0.02  # loss of the neighbours' mean accuracy that is worth a line
DROP = 0.2  # loss of one neighbour that is worth a line, whatever the mean
LEAK = 0.8  # area under the curve from which two classes count as distinguished
PROBED = 0.5  # of its images: above that a probe counts as finding the class
NAMED = 5  # places within which an attack counts as having named the class
BAD, GOOD, LIMIT = range(3)  # LIMIT: what no change of the text projection can mend
Lines = list[tuple[int, str]]


def verdict(found: dict[str, Any]) -> list[str]:
    """One line per finding of the measures: first what speaks against this forgetting, then what
    speaks for it, then its limits. Absent measures are passed over."""
    shot = found.get("residue", {}).get("zero_shot")
    became = fate(shot["before"]["value"], shot["after"]["value"]) if shot else Fate.UNMEASURED
    lines: Lines = []
    if became is not Fate.UNMEASURED:
        before, after = shot["before"], shot["after"]
        line = (
            f"own prompt: {_percent(before)} -> {_percent(after)} of {after['n']} images "
            f"(95 % interval {100 * after['low']:.1f} to {100 * after['high']:.1f} %)"
        )
        remark = {Fate.STAYS: ": was not forgotten", Fate.NEVER: ": was never recognised"}
        lines.append((GOOD if became is Fate.GONE else BAD, line + remark.get(became, "")))
    lines += _words(found.get("paraphrase", {}))
    lines += _neighbours(found.get("neighbours", {}).get("classes", []))
    if not shot or became is Fate.GONE:  # what never went cannot come back
        lines += _relearned(found.get("relearning", {}).get("methods", {}))
    lines += _images(found)
    lines += _undone(found.get("undo", {}))
    lines.sort(key=lambda entry: entry[0])
    return [f"limit: {line}" if tier == LIMIT else line for tier, line in lines]


def _words(words: dict[str, Any]) -> Lines:
    worst = words.get("worst")
    if not worst:
        return []
    count = sum(is_other_word(prompt["kind"], prompt["seen"]) for prompt in words["prompts"])
    line = (
        f"found by {len(words['back'])} of {count} other texts; most by {worst['text']!r} "
        f"({worst['kind']}): {_percent(worst['before'])} -> {_percent(worst['after'])}"
    )
    return [(BAD if words["back"] else GOOD, line)]


def _neighbours(classes: list[dict[str, Any]]) -> Lines:
    changes = [
        (one["after"]["value"] - one["before"]["value"], one)
        for one in classes
        if one["before"]["value"] is not None
    ]
    if not changes:
        return []
    change = sum(change for change, _ in changes) / len(changes)
    line = f"its {len(classes)} nearest classes change by {100 * change:+.1f} points"
    lines = [(BAD if change < -HARM else GOOD, line)]
    worst, one = min(changes, key=lambda entry: entry[0])
    if worst <= -DROP:
        sides = f"from {_percent(one['before'])} to {_percent(one['after'])}"
        lines.append((BAD, f"{one['name']!r}, a neighbour, falls {sides}"))
    return lines


def _relearned(methods: dict[str, Any]) -> Lines:
    few = {name: one["needed"] for name, one in methods.items() if one["needed"] is not None}
    if few:
        name = min(few, key=few.get)
        line = f"half of it comes back with {few[name]} of its images ({RELEARNING[name]})"
        return [(LIMIT, line)]
    tried = any(value is not None for one in methods.values() for value in one["forgotten"])
    return [(GOOD, "no number of images that was tried brings half of it back")] if tried else []


def _images(found: dict[str, Any]) -> Lines:
    lines = []
    if leak := found.get("destinations", {}).get("leak"):
        worst = max(leak, key=lambda pair: pair["auc_after"])
        before, after = (100 * worst[f"auc_{when}"] for when in ("before", "after"))
        line = (
            f"the full list of scores tells its images from those of {worst['name']!r} in "
            f"{after:.0f} of 100 pairs (before {before:.0f}; guessing: 50)"
        )
        lines.append((LIMIT if worst["auc_after"] >= LEAK else GOOD, line))
    probe = found.get("residue", {}).get("linear_probe", {}).get("after", {})
    if probe.get("value") is not None:
        who = "a classifier trained on images (linear probe)"
        line = f"{who} finds {_percent(probe)} of its images"
        lines.append((LIMIT if probe["value"] > PROBED else GOOD, line))
    return lines


def _undone(undo: dict[str, Any]) -> Lines:
    lines = []
    for attack, one in undo.get("attacks", {}).items():
        if (place := one["place"]) is not None:
            line = f"whoever has {ATTACKERS[attack]} finds its name in place {place}"
            lines.append((LIMIT if place <= NAMED else GOOD, f"{line} of {undo['names']}"))
    return lines


def _percent(accuracy: dict[str, Any]) -> str:
    return f"{100 * accuracy['value']:.1f} %"
