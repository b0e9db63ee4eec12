"""A changed model in the format of the tool that is to run it; docs/your-clip.md has their table.

`W + Delta` is rounded once, to the dtype that W has there (to float32 for `openai`, whose files are
in half precision), and every other tensor is what it was, to the bit. A folder has a model card,
README.md, in the place of the base's own.
"""

import io
import json
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgetting.adapter import Adapter
from forgetting.deploy.card import CARD, Base, model_card
from forgetting.deploy.onnx import patch_graph
from forgetting.errors import ProblemError, line, unknown
from forgetting.forgotten import EMBEDDINGS
from forgetting.io import (
    atomic_path,
    container,
    naming,
    refuse_existing,
    refuse_outside,
    write_bytes,
)
from forgetting.models.checkpoint import (
    HF_CONFIG,
    HF_WEIGHTS,
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    Found,
    find,
    read_checkpoint,
    read_projection,
    sentence_modules,
    weight_files,
)
from forgetting.models.configs import read_open_clip
from forgetting.models.loading import find_model

FORMATS = ("openai", "open_clip", "hf", "peft", "onnx", "sentence-transformers", "immich")
IMMICH = ("textual/model.onnx", "visual/model.onnx", "config.json")  # of a model of immich
COPIED = (".json", ".txt", ".model", ".vocab", ".jinja", ".md")


def export(
    adapter: Adapter,
    base: str | Path,
    to: str,
    out: str | Path,
    original: str | Path | None = None,
    config: str | None = None,
    overwrite: bool = False,
    base_id: str | None = None,
) -> Path:
    """Write the changed model for another tool, whole or not at all; returns `out`. ProblemError if
    that exists, or for a base that does not hold the projection of the adapter exactly once.

    Args:
        base: the original model, a local file or folder; to: one of `FORMATS`.
        out: the file (`openai`, `onnx`) or folder to write.
        original: the checkpoint that the adapter was made from, where `base` holds a copy of its
            projection in another dtype.
        config: for a checkpoint of open_clip that has none beside it: NAME/TAG of its
            configurations and weights, or a JSON file.
        overwrite: whether a file at `out` may be replaced, or files in a folder there.
        base_id: the base's name on the Hub, ID or ID@REVISION, for cards and for PEFT. None: what
            the Hub's own cache says, if `base` is in it.
    """
    if to not in FORMATS:
        raise unknown("format", to, FORMATS)
    if adapter.of_embeddings:
        raise ProblemError(EMBEDDINGS)
    out, base = Path(out), Path(base)
    refuse_existing(out, overwrite)
    if config is not None and to != "open_clip":
        raise ProblemError("a configuration is for a checkpoint of open_clip: leave it out")
    exact = None if original is None else read_projection(original, adapter)[0]
    origin = Base.of(base, base_id)
    if to == "onnx":
        patch_graph(adapter, base, out, exact, overwrite)
        return out
    if to == "openai":
        write_bytes(_openai(adapter, base, exact), out, overwrite)
        return out
    if to in ("sentence-transformers", "immich"):
        make = _immich if to == "immich" else _sentence_transformers
        content, copied = make(adapter, base, exact)
    else:
        if to == "hf" and not (base / HF_CONFIG).is_file():
            raise ProblemError(f"{line(base)}: no folder of transformers: it has no {HF_CONFIG}")
        names = OPEN_CLIP_WEIGHTS if to == "open_clip" else HF_WEIGHTS
        files = weight_files(base, names)
        tensors, _ = read_checkpoint(files)
        with naming(base):
            found = find(tensors, adapter, exact)
        tensors[found.name] = found.changed(adapter, tensors[found.name].dtype)
        content, copied = {names[0]: tensors}, _beside_weights(base)
        if to == "peft":
            content, copied = _lora(adapter, found, origin, files[0].parent), []
        if to == "open_clip":
            model, images = _open_clip_config(config, files[0].with_name(OPEN_CLIP_CONFIG))
            if (said := model["embed_dim"]) != (d := adapter.right.shape[1]):
                raise ProblemError(f"the config says embed_dim {said}, the projection has {d}")
            content[OPEN_CLIP_CONFIG] = {"model_cfg": model, "preprocess_cfg": images}
    content[CARD] = model_card(adapter, to, origin)
    _write_folder(out, content, overwrite, base, copied)
    return out


def _openai(adapter: Adapter, base: Path, exact: Tensor | None) -> bytes:
    """A state dict, of what OpenAI's code runs as the model that its config says."""
    files = weight_files(base, OPEN_CLIP_WEIGHTS)
    config = files[0].with_name(OPEN_CLIP_CONFIG)
    with naming(base):
        data = openai_bytes(read_checkpoint(files)[0], adapter, exact)
    if config.is_file() and not read_open_clip(config)[0].get("quick_gelu"):
        raise ProblemError(
            f"{line(config)} says GELU, and OpenAI's code always computes QuickGELU: export it to "
            "open_clip"
        )
    return data


def openai_bytes(
    tensors: Mapping[str, Tensor], adapter: Adapter, original: Tensor | None = None
) -> bytes:
    """A state dict in OpenAI's layout as `torch.save` writes it, with its projection changed, in
    float32, as it was measured; ProblemError for another layout, or another projection."""
    found = find(tensors, adapter, original)
    if found.name != "text_projection" or "visual.conv1.weight" not in tensors:
        raise ProblemError(
            f"not in OpenAI's layout (its projection is {line(found.name)}); "
            "choose the format of the tool that it is of"
        )
    buffer = io.BytesIO()
    torch.save({**tensors, found.name: found.changed(adapter, torch.float32)}, buffer)
    return buffer.getvalue()


def _open_clip_config(named: str | None, beside: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`model_cfg` and `preprocess_cfg` (empty means OpenAI's) of a name, a file or the base."""
    file = Path(named or beside)
    if file.is_file():
        return read_open_clip(file)
    if named is None:
        raise ProblemError(
            f"{line(beside.parent)} has no {OPEN_CLIP_CONFIG}: name a configuration and its "
            "weights (--config ViT-B-32-quickgelu/openai, say), or a JSON file"
        )
    spec = find_model(f"open_clip:{named}")
    if not spec.tag:
        raise ProblemError(
            f"a configuration {line(named)} does not say how images are prepared: name its weights "
            "too, NAME/TAG, or a JSON file"
        )
    return spec.model_config(), spec.images


def _lora(adapter: Adapter, found: Found, origin: Base, folder: Path) -> dict[str, Any]:
    """Files of a LoRA of `peft`: `W^T + B A` for a torch.nn.Linear, B = right^T, A = left^T.
    It names the base, `folder` where its id is not known, and AutoPeftModel loads both."""
    module, _, last = found.name.rpartition(".")
    if last != "weight" or not found.transposed:
        raise ProblemError(
            f"the projection {line(found.name)} is no torch.nn.Linear, which is what PEFT adapts: "
            "use a folder of transformers"
        )
    rank = adapter.left.shape[1]
    config = {
        "peft_type": "LORA",
        "target_modules": [module],
        "r": rank,
        "lora_alpha": rank,  # over r a factor of 1
        "base_model_name_or_path": origin.name or str(folder.absolute()),
        "revision": origin.revision,
        "auto_mapping": {"base_model_class": origin.kind, "parent_library": "transformers"},
        "inference_mode": True,
    }
    stem = f"base_model.model.{module}"
    tensors = {
        f"{stem}.lora_A.weight": adapter.left.float().T,
        f"{stem}.lora_B.weight": adapter.right.float().T,
    }
    return {"adapter_config.json": config, "adapter_model.safetensors": tensors}


def _sentence_transformers(
    adapter: Adapter, base: Path, exact: Tensor | None
) -> tuple[dict[str, Any], list[Path]]:
    """The weights of all modules, of which one holds the projection; and what else is copied."""
    files = sentence_modules(base)
    modules = {part: read_checkpoint(held)[0] for part, held in files.items() if held}
    tensors = {f"{part}:{name}": x for part, held in modules.items() for name, x in held.items()}
    with naming(base):
        found = find(tensors, adapter, exact)
    part, _, name = found.name.partition(":")
    modules[part][name] = found.changed(adapter, tensors[found.name].dtype)
    content = {str(Path(part, HF_WEIGHTS[0])): held for part, held in modules.items()}
    return content, [file for part in {"", *files} for file in _beside_weights(base / part)]


def _immich(
    adapter: Adapter, base: Path, exact: Tensor | None
) -> tuple[dict[str, Any], list[Path]]:
    """The text tower, and what is copied: all of the images' one, and of texts no other format."""
    for name in IMMICH:
        if not (base / name).is_file():
            raise ProblemError(f"{line(base)}: no model in immich's layout: it has no {name}")
    text = partial(patch_graph, adapter, base / IMMICH[0], original=exact)
    copied = [*_beside_weights(base), *_beside_weights(base / "textual")]
    return {IMMICH[0]: text}, [*copied, *(base / "visual").rglob("*")]


def _beside_weights(folder: Path) -> list[Path]:
    """The files in a folder that are copied: never weights, which would be unchanged, nor an index
    of them."""
    return [
        file
        for file in folder.glob("*")
        if file.name.startswith("LICENSE")
        or (file.suffix in COPIED and not file.name.endswith(".index.json"))
    ]


def _write_folder(
    out: Path, files: dict[str, Any], overwrite: bool, base: Path, copied: Iterable[Path]
) -> None:
    """Write tensors, JSON and text files, and what functions write, into a folder, after copies of
    files of the folder `base`; ProblemError for a link that leads out of that."""
    with atomic_path(out, overwrite) as folder:
        folder.mkdir()
        for file in copied:
            if file.is_file():
                refuse_outside(file, base)
                place = folder / file.relative_to(base)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)
        for name, content in files.items():
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if callable(content):
                content(place)
            elif isinstance(content, str):
                place.write_text(content, "utf-8")
            elif name.endswith(".json"):
                place.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
            else:  # transformers wants them to say that they are of torch
                place.write_bytes(container(content, {"format": "pt"}))
