"""The model card of what forgot something: README.md in a folder, FILE.md beside an adapter.

Texts of users stand in it as code, so that none of them is read as Markdown, and never in its YAML.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from forgetting.adapter import Adapter, load_adapter
from forgetting.errors import ProblemError, line, shown
from forgetting.io import foreign, read_bytes, write_bytes
from forgetting.models.checkpoint import HF_CONFIG, read_json

CARD = "README.md"
AUDIT = ".audit.json"  # of an adapter FILE.safetensors: FILE.audit.json beside it
LISTED = 50  # names or texts that are written out; a list of retained names has thousands
HUB_ID = re.compile(r"((?:\w[\w.-]*/)?\w[\w.-]*)(?:@([\w./-]+))?", re.ASCII)  # ID or ID@REVISION
CACHED = re.compile(r".*/models--(.+)/snapshots/([0-9a-f]{40})")  # where the Hub's cache keeps one
# What of the YAML of the base's own card is copied: plain words, or a list of one.
HEAD = r"""(?am)^(license(?:_name|_link)?|pipeline_tag):(?: +| *\n *- +)["']?([\w.:/-]+)["']? *$"""
USES = {  # what is saved -> its library, and how it is used
    "hf": ("transformers", "{kind}.from_pretrained(PLACE)"),
    "open_clip": ("open_clip", 'open_clip.create_model_from_pretrained("local-dir:PLACE")'),
    "sentence-transformers": ("sentence-transformers", "SentenceTransformer(PLACE)"),
    "immich": ("onnx", "# Copy textual/ over the same folder in immich's cache."),
    "peft": ("peft", "PeftModel.from_pretrained({kind}.from_pretrained(BASE), PLACE)"),
    "adapter": ("clip-forgetting", "Forgotten.from_pretrained(PLACE, model).apply()"),
    "embeddings": (
        "clip-forgetting",
        "hide_in_index(vectors, Forgotten.from_pretrained(PLACE).adapter)",
    ),
}
MEASURED = {"cls_acc_test": "{} in {}", "no_cls_acc": "beside {} in {}", "all_ds": "{1}"}
TEMPLATE = Path(__file__).with_name("card.md")


@dataclass(frozen=True)
class Base:
    """The model that something was forgotten from, as far as that is known."""

    name: str | None = None  # its id on the Hub
    revision: str | None = None
    kind: str = "CLIPModel"  # its class in transformers
    head: Mapping[str, str] = field(default_factory=dict)  # what its own card says: HEAD

    @classmethod
    def of(cls, path: Path | None, base_id: str | None = None) -> Base:
        """That at a local file or folder: its class, where the Hub's cache keeps it, the license
        that its card names; or of a `base_id`, ID or ID@REVISION; ProblemError if it is none."""
        if base_id is not None and not HUB_ID.fullmatch(base_id):
            raise ProblemError(f"base_id must be ID or ID@REVISION, not {shown(base_id)}")
        name, revision = HUB_ID.fullmatch(base_id).groups() if base_id else (None, None)
        if path is None:
            return cls(name, revision)
        folder = path if path.is_dir() else path.parent
        cached = CACHED.fullmatch(folder.absolute().as_posix())
        if not name and cached and (known := HUB_ID.fullmatch(cached[1].replace("--", "/"))):
            name, revision = known[1], cached[2]
        config = read_json(folder / HF_CONFIG) if (folder / HF_CONFIG).is_file() else {}
        kinds = config.get("architectures") if isinstance(config, dict) else None
        kind = str(kinds[0]) if isinstance(kinds, list) and kinds else ""
        return cls(name, revision, kind if kind.isidentifier() else cls.kind, _head(path / CARD))

    @classmethod
    def of_model(cls, model: Any, base_id: str | None = None) -> Base:
        """That which a model of transformers says that it was loaded from, or `base_id`."""
        config = getattr(model, "config", None)
        name = str(getattr(config, "_name_or_path", None) or "")
        name = "" if name == "None" else name  # what transformers says of a model without a place
        if base_id is None and not Path(name).exists() and HUB_ID.fullmatch(name):
            return cls(name, getattr(config, "_commit_hash", None))
        return cls.of(Path(name) if name else None, base_id)


def _head(card: Path) -> dict[str, str]:
    """`HEAD` at the top of a card."""
    data = read_bytes(card) if card.is_file() else b""
    text = data.decode("utf-8", "replace").replace("\r\n", "\n")
    head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    return dict(re.findall(HEAD, head[1] if head else ""))


def code(text: Any) -> str:
    """A text as Markdown shows it unread, on one line; a backtick in it becomes a quote."""
    return "`{}`".format(line(text).replace("`", "'"))


def _some(texts: Sequence[str], most: int = LISTED, between: str = "\n- ") -> str:
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return between.join([*map(code, texts[:most]), *more])


def audited(path: str | Path) -> Adapter:
    """`load_adapter`, and in its record what an audit of this very file found, if one that can be
    read is beside it: class -> lines."""
    adapter, audit = load_adapter(path), {}
    with suppress(ProblemError), foreign("no audit"):
        found = read_json(Path(path).with_suffix(AUDIT))
        if found["adapter_sha256"] == hashlib.sha256(read_bytes(path)).hexdigest():
            audit = {name: [*map(str, of["verdict"])] for name, of in found["classes"].items()}
    return replace(adapter, record=adapter.record | {"audit": audit}) if audit else adapter


def write_card(path: str | Path) -> None:
    """Write the card of the adapter in a file beside it, over one that is there."""
    write_bytes(model_card(audited(path), "adapter", Base()).encode(), f"{path}.md")


def model_card(adapter: Adapter, saved: str, base: Base) -> str:
    """The card of an adapter, or of the changed model; saved: one of `USES`."""
    changed = "The text projection is changed, and every other tensor is the base's, to the bit"
    if adapter.of_embeddings:
        saved, changed = "embeddings", "No model is changed, but stored vectors are"
    library, use = USES[saved]
    is_adapter = saved in ("adapter", "embeddings", "peft")
    head = {
        "base_model": base.name,
        "base_model_revision": base.revision,
        "base_model_relation": "adapter" if is_adapter else "finetune",
        "library_name": library,
        **base.head,
        "tags": ["clip", "unlearning", "machine-unlearning", "concept-erasure", "clip-forget"],
    }
    of = f"A CLIP ({code(adapter.backbone)})"
    if base.name:
        of = f"[{base.name}](https://huggingface.co/{base.name})"
        of += f" at revision `{base.revision}`" if base.revision else ""
    return TEMPLATE.read_text("utf-8").format(
        head="\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items() if value),
        title=_some(adapter.classes, 5, ", "),
        base=of,
        changed=f"{changed}, by a matrix of rank {adapter.left.shape[1]}.",
        names=_some(adapter.classes),
        texts=_some(adapter.texts),
        how="\n- ".join(_how(adapter)),
        measured="\n- ".join(_measured(adapter)) or "nothing on images",
        use=use.format(kind=base.kind),
    )


def _how(adapter: Adapter) -> Iterable[str]:
    yield f"method: {code(adapter.trainer)}"
    chosen = adapter.settings | adapter.solver.get("settings", {})
    short = {k: f"{len(v)} names" if isinstance(v, list) else v for k, v in chosen.items()}
    yield f"settings: {', '.join(code(f'{k}={v}') for k, v in sorted(short.items()))}"
    proof = adapter.solver.get("certificate") or {}
    if proof.get("gap") is not None:
        best = f"proved best for its targets, to {proof['gap']:.1e} of the objective"
        yield f"certificate: {best} (how far retained names move); it says nothing of images"
    yield f"made for the projection with SHA-256 {code(adapter.projection_sha256)}"
    yield from map(code, adapter.solver.get("notes", ()))


def _measured(adapter: Adapter) -> Iterable[str]:
    """Accuracies on images before and after, and an audit's findings, as far as they are known."""
    before = adapter.record.get("zero_shot", {})
    for dataset, names in adapter.record.get("final_results", {}).items():
        for name, numbers in names.items():
            for key, of in MEASURED.items():
                now, was = numbers.get(key), before.get(dataset, {}).get(name, {}).get(key)
                if None not in (was, now):
                    of = of.format(code(name), code(dataset))
                    yield f"{of}: {was:.1%} right before, {now:.1%} after"
    for name, lines in adapter.record.get("audit", {}).items():
        yield from (f"audit of {code(name)}: {code(text)}" for text in lines)
