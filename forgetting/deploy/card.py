"""The model card of what forgot something: README.md in an exported folder and beside an adapter.

Texts of users stand in it as code, so that none of them is read as Markdown, and never in its YAML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forgetting.adapter import Adapter
from forgetting.errors import ProblemError, line, shown
from forgetting.io import read_bytes
from forgetting.models.checkpoint import HF_CONFIG, read_json

CARD = "README.md"
LISTED = 50  # names or texts that are written out; a list of retained names has thousands
HUB_ID = re.compile(r"((?:[\w.-]+/)?[\w.-]+)(?:@([\w./-]+))?", re.ASCII)  # ID or ID@REVISION
CACHED = re.compile(r".*/models--(.+)/snapshots/([0-9a-f]{40})")  # where the Hub's cache keeps one
COPIED = ("license", "license_name", "license_link", "pipeline_tag")  # of the base's own card
UNDO = "Load the base model instead: nothing in it was changed."
# What is saved -> library, its relation to the base model, how it is loaded, how it is undone.
USES = {
    "hf": ("transformers", "finetune", "model = {kind}.from_pretrained(PLACE)", UNDO),
    "open_clip": (
        "open_clip",
        "finetune",
        'model, preprocess = open_clip.create_model_from_pretrained("local-dir:FOLDER")',
        UNDO,
    ),
    "peft": (
        "peft",
        "adapter",
        "model = PeftModel.from_pretrained({kind}.from_pretrained(BASE), PLACE)",
        "`model.unload()` gives the base model back. PEFT loads this into any model with layers of "
        "the same names and does not notice that it is another one.",
    ),
    "adapter": (
        "clip-forgetting",
        "adapter",
        "answer = Forgotten.from_pretrained(PLACE, model)\nanswer.apply()",
        "`answer.undo()` makes the model what it was, to the bit. Any other model is refused.",
    ),
}
TEMPLATE = """\
---
{head}
---

# CLIP without {title}

{base}, changed so that texts that name what is listed here no longer find images of it.
Only the text projection is changed, by a matrix of rank {rank}; every other tensor is the base
model's, to the bit. Made by clip-forget, from names alone.

## What was forgotten

{names}

By these texts:

{texts}

## How

{how}

## Measured

{measured}

## What it does not do

- **Images** are as they were: classifiers, probes and searches that compare images with images find
  what was forgotten as before. Models that read the image tower alone (LLaVA), or the text tower
  before its projection (Stable Diffusion 1.x), do not notice.
- **Other words**: a text that is not listed, and is not close to one that is, may still find it.
  Broader ones (`animal` for a cat) mostly do.
- **Weights**: it is hidden, not erased. The changed projection tells what was forgotten, and the
  original one brings it back.

## Use

```python
{use}
```

PLACE is this folder, or its name on the Hub.

## Undo

{undo}
"""


@dataclass(frozen=True)
class Base:
    """The model that something was forgotten from, as far as that is known."""

    name: str | None = None  # its id on the Hub
    revision: str | None = None
    kind: str = "CLIPModel"  # its class in transformers
    head: Mapping[str, str] = field(default_factory=dict)  # what its own card says: COPIED

    @classmethod
    def of(cls, path: Path | None, base_id: str | None = None) -> Base:
        """That at a local file or folder: its class, where the Hub's cache keeps it, the license
        that its card names; or of a `base_id`, ID or ID@REVISION; ProblemError if it is none."""
        name, revision, kind, head = None, None, cls.kind, {}
        if path is not None:
            folder = path if path.is_dir() else path.parent
            if named := CACHED.fullmatch(folder.absolute().as_posix()):
                name, revision = named[1].replace("--", "/"), named[2]
            config, card = folder / HF_CONFIG, path / CARD
            said = read_json(config) if config.is_file() else None
            names = said.get("architectures") if isinstance(said, dict) else None
            if isinstance(names, list) and names and str(names[0]).isidentifier():
                kind = names[0]
            head = _head(card) if card.is_file() else {}
        if base_id is not None:
            if not (found := HUB_ID.fullmatch(base_id)):
                raise ProblemError(f"base_id must be ID or ID@REVISION, not {shown(base_id)}")
            name, revision = found.groups()
        return cls(name, revision, kind, head)


def _head(card: Path) -> dict[str, str]:
    """`COPIED` of the YAML at the top of a card, where they are plain words or a list of one."""
    text = read_bytes(card).decode("utf-8", "replace").replace("\r\n", "\n")
    head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    word = r"""^{}:(?: +| *\n *- +)["']?([\w.:/-]+)["']? *$"""
    found = ((k, re.search(word.format(k), head[1] if head else "", re.M | re.A)) for k in COPIED)
    return {key: match[1] for key, match in found if match}


def code(text: Any) -> str:
    """A text as Markdown shows it unread: in more backticks than it holds, on one line."""
    text = line(text)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if len(ticks) > 1 else f"{ticks}{text}{ticks}"


def _listed(texts: Iterable[Any], between: str = "\n- ", most: int = LISTED) -> str:
    texts = list(texts)
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    start = between.lstrip("\n") if between.startswith("\n") else ""
    return start + between.join([*map(code, texts[:most]), *more])


def model_card(adapter: Adapter, saved: str, base: Base) -> str:
    """The card of an adapter, or of the changed model; saved: one of `USES`."""
    library, relation, use, undo = USES[saved]
    head = {"base_model": base.name, "base_model_revision": base.revision}
    head |= {"base_model_relation": relation, "library_name": library, **base.head}
    head["tags"] = ["clip", "unlearning", "machine-unlearning", "concept-erasure", "clip-forget"]
    link = f"[{base.name}](https://huggingface.co/{base.name})"
    what = link + (f" at revision `{base.revision}`" if base.revision else "")
    return TEMPLATE.format(
        head="\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items() if value),
        title=_listed(adapter.classes, ", ", 5),
        base=what if base.name else f"A CLIP ({code(adapter.backbone)})",
        rank=adapter.left.shape[1],
        names=_listed(adapter.classes),
        texts=_listed(adapter.texts),
        how="\n".join(f"- {what}: {said}" for what, said in _how(adapter)),
        measured=_measured(adapter),
        use=use.format(kind=base.kind),
        undo=undo,
    )


def _how(adapter: Adapter) -> Iterable[tuple[str, str]]:
    yield "method", code(adapter.trainer)
    chosen = adapter.settings | adapter.solver.get("settings", {})
    yield (
        "settings",
        ", ".join(
            code(f"{key}={f'{len(value)} names' if isinstance(value, list) else value}")
            for key, value in sorted(chosen.items())
        ),
    )
    if proof := adapter.solver.get("certificate"):
        yield (
            "certificate",
            (
                f"the objective is {proof['primal']:.6g}, and no change goes below "
                f"{proof['bound']:.6g}: none is better by more than a part of {proof['gap']:.1e}"
            ),
        )
    yield "made for the projection with SHA-256", code(adapter.projection_sha256)
    for note in adapter.solver.get("notes", ()):
        yield "note", code(note)


def _measured(adapter: Adapter) -> str:
    """Accuracies on images before and after, if the adapter holds some."""
    after, before = (adapter.record.get(side, {}) for side in ("final_results", "zero_shot"))
    kinds = {"cls_acc_test": "its images", "no_cls_acc": "other classes", "all_ds": "all images"}
    lines = []
    for dataset, names in after.items():
        for name, numbers in names.items():
            for key, what in kinds.items():
                was, now = before.get(dataset, {}).get(name, {}).get(key), numbers.get(key)
                if was is not None and now is not None:
                    of = code(dataset) if name == "all" else f"{code(name)} in {code(dataset)}"
                    lines.append(f"- {of}, {what}: {was:.1%} right before, {now:.1%} after")
    return "\n".join(lines) or "Nothing on images. The notes above are from texts alone."
