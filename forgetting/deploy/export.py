"""A changed model in the format of the tool that is to run it.

| format | `base` | what is written |
|---|---|---|
| `openai` | a state dict in OpenAI's layout | such a state dict, a `.pt` file |
| `open_clip` | open_clip's folder, or a file with `config` | a folder: weights, config, tokenizer |
| `hf` | a folder of transformers | the same folder with changed weights |
| `peft` | a folder of transformers, or its weights | a folder: a LoRA of the projection alone |
| `onnx` | an `.onnx` file, or a folder | the file with its projection changed, or the text tower |

In each the projection is the one tensor that the adapter was made for, whatever it is called and
whichever way it lies. `W + Delta` is rounded once, to the dtype that W has there (to float32 for
`openai`, whose files are in half precision), and every other tensor is what it was, to the bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from forgetting.adapter import Adapter
from forgetting.errors import ProblemError, line, unknown
from forgetting.io import atomic_path, container, naming, need, refuse_existing
from forgetting.models.checkpoint import (
    HF_CONFIG,
    HF_WEIGHTS,
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    Found,
    find,
    read_json,
    read_projection,
    read_tensors,
    weight_files,
)
from forgetting.models.configs import check_open_clip
from forgetting.models.loading import ModelSpec, find_model

# What is copied of a folder beside its weights: never other weights, which would be unchanged.
COPIED = (".json", ".txt", ".model", ".vocab", ".jinja", ".md")
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")  # what open_clip says of weights


@dataclass(frozen=True)
class Job:
    """What an export is made from; see `export`."""

    adapter: Adapter
    base: Path
    original: Tensor | None
    config: str | None
    overwrite: bool

    def read(self, names: tuple[str, ...]) -> tuple[list[Path], dict[str, Tensor]]:
        """The files of the base's weights, and all their tensors."""
        files, tensors = weight_files(self.base, names), {}
        for file in files:
            tensors |= read_tensors(file)
        return files, tensors

    def changed(self, names: tuple[str, ...]) -> tuple[dict[str, Tensor], Found, list[Path]]:
        """All tensors of the base with the projection changed, where it is, and the files."""
        files, tensors = self.read(names)
        with naming(self.base):
            found = find(tensors, self.adapter, self.original)
        tensors[found.name] = found.changed(self.adapter, tensors[found.name].dtype)
        return tensors, found, files


def export(
    adapter: Adapter,
    base: str | Path,
    to: str,
    out: str | Path,
    original: str | Path | None = None,
    config: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the changed model for another tool; what is written appears whole or not at all.

    Args:
        base: the original model, a local file or folder; to: one of `FORMATS`.
        out: the file (`openai`, `onnx`) or folder to write.
        original: the checkpoint that the adapter was made from, where `base` holds a copy of its
            projection in another dtype.
        config: for a checkpoint of open_clip (`open_clip`, `onnx`) that has none beside it: a name
            of its configurations, NAME/TAG where their weights differ, or a JSON file.
        overwrite: whether a file at `out` may be replaced, or files in a folder there.

    Returns:
        `out`.

    Raises:
        ProblemError: an unknown format; `out` exists or cannot be written; a base that cannot be
            read, is not of the format, or does not hold the projection of the adapter exactly
            once (another model's, or changed already); a package that is missing.
    """
    if to not in FORMATS:
        raise unknown("format", to, FORMATS)
    out, base = Path(out), Path(base)
    refuse_existing(out, overwrite)
    if config is not None and (to not in ("open_clip", "onnx") or base.suffix == ".onnx"):
        raise ProblemError("a configuration is for a checkpoint of open_clip: leave it out")
    exact = None if original is None else read_projection(original, adapter)[0]
    FORMATS[to](Job(adapter, base, exact, config, overwrite), out)
    return out


def _openai(job: Job, out: Path) -> None:
    files, tensors = job.read(OPEN_CLIP_WEIGHTS)
    with naming(job.base):
        state = openai_state(tensors, job.adapter, job.original)
        _require_openai(files[0].with_name(OPEN_CLIP_CONFIG))
    save_state(state, out, job.overwrite)


def openai_state(
    tensors: Mapping[str, Tensor], adapter: Adapter, original: Tensor | None = None
) -> dict[str, Tensor]:
    """A state dict in OpenAI's layout with its projection changed, in float32, as it was measured.

    Raises:
        ProblemError: another layout, or not the projection of the adapter.
    """
    found = find(tensors, adapter, original)
    if found.name != "text_projection" or "visual.conv1.weight" not in tensors:
        raise ProblemError(
            f"not in OpenAI's layout (its projection is {line(found.name)}); "
            "choose the format of the tool that it is of"
        )
    return {**tensors, found.name: found.changed(adapter, torch.float32)}


def save_state(state: dict[str, Tensor], out: Path, overwrite: bool = False) -> None:
    """Write a state dict by `torch.save`."""
    with atomic_path(out, overwrite) as temporary, open(temporary, "wb") as file:
        try:  # given a path, torch would write its name into the file
            torch.save(state, file)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(str(error).splitlines()[0]) from error


def _require_openai(config: Path) -> None:
    """Refuse what OpenAI's code would run as another model than its config says."""
    if not config.is_file():
        return
    model = _model_config(read_json(config))
    if not model.get("quick_gelu"):
        raise ProblemError(
            f"{config.name} says GELU, and OpenAI's code always computes QuickGELU: export it "
            "to open_clip"
        )
    heads = (model.get("vision_cfg") or {}).get("head_width", 64)
    text = model.get("text_cfg") or {}
    if heads != 64 or text.get("width", 512) != 64 * text.get("heads", 8):
        raise ProblemError(
            f"{config.name} has attention heads that are not 64 wide, as OpenAI's code takes "
            "them to be: export it to open_clip"
        )


def _model_config(config: Any) -> dict[str, Any]:
    """The part of open_clip's config that describes the model."""
    model = config.get("model_cfg", config) if isinstance(config, dict) else None
    if not isinstance(model, dict) or "embed_dim" not in model:
        raise ProblemError("is no config of open_clip: it names no embed_dim")
    return model


def _open_clip(job: Job, out: Path) -> None:
    tensors, _, files = job.changed(OPEN_CLIP_WEIGHTS)
    config = _open_clip_config(job.config, files[0].with_name(OPEN_CLIP_CONFIG))
    d = job.adapter.right.shape[1]
    if config["model_cfg"]["embed_dim"] != d:
        raise ProblemError(
            f"the config says embed_dim {config['model_cfg']['embed_dim']}, the projection has {d}"
        )
    with atomic_path(out, job.overwrite) as folder:
        folder.mkdir()
        if job.base.is_dir():
            _copy(job.base, folder)
        (folder / OPEN_CLIP_CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        _save(tensors, folder / OPEN_CLIP_WEIGHTS[0])


def _open_clip_config(named: str | None, beside: Path) -> dict[str, Any]:
    """`model_cfg` and `preprocess_cfg` (empty means OpenAI's) of a name, a file or the base."""
    if named is None and not beside.is_file():
        raise ProblemError(
            f"{line(beside.parent)} has no {OPEN_CLIP_CONFIG}: name the architecture (--config), "
            "with its activation: ViT-B-32-quickgelu for OpenAI's weights, ViT-B-32 for GELU"
        )
    file = beside if named is None else Path(named)
    config = read_json(file) if file.is_file() else _named_config(named)
    with naming(file):
        model = _model_config(config)
    return {"model_cfg": model, "preprocess_cfg": config.get("preprocess_cfg", {})}


def _named_config(named: str) -> dict[str, Any]:
    """The configuration NAME or NAME/TAG of open_clip, and the preprocessing of its weights."""
    library = need("open_clip", "clip-forgetting[open-clip]")
    name, _, tag = named.partition("/")
    config, tags = library.get_model_config(name), library.list_pretrained_tags_by_model(name)
    if config is None or (tag and tag not in tags):
        raise ProblemError(f"open_clip knows no configuration {line(named)!r}")
    found = []
    for each in [tag] if tag else tags:
        known = library.get_pretrained_cfg(name, each)
        own = {key: known[key] for key in PREPROCESSING if key in known}
        found += [own] if own not in found else []
    if len(found) > 1:
        raise ProblemError(
            f"weights of {line(name)} differ in how images are prepared: name yours "
            f"({line(name)}/TAG, one of {', '.join(tags)}), or a file of a configuration"
        )
    return {"model_cfg": config, "preprocess_cfg": found[0] if found else {}}


def _hf(job: Job, out: Path) -> None:
    _require_hf(job.base)
    tensors, found, files = job.changed(HF_WEIGHTS)
    with atomic_path(out, job.overwrite) as folder:
        folder.mkdir()
        _copy(job.base, folder)
        if files[0].suffix != ".safetensors":  # transformers reads one file of any size
            _save(tensors, folder / HF_WEIGHTS[0])
            return
        index = f"{HF_WEIGHTS[0]}.index.json"
        if not (job.base / HF_WEIGHTS[0]).is_file():  # they are parts
            shutil.copyfile(job.base / index, folder / index)
        for file in files:  # only one of them changes
            with safe_open(file, framework="pt") as held:
                names, metadata = list(held.keys()), held.metadata()
            if found.name in names:
                _save({name: tensors[name] for name in names}, folder / file.name, metadata)
            else:
                shutil.copyfile(file, folder / file.name)


def _require_hf(base: Path) -> None:
    with naming(base):
        if not (base / HF_CONFIG).is_file():
            raise ProblemError(f"no folder of transformers: it has no {HF_CONFIG}")


def _peft(job: Job, out: Path) -> None:
    """A LoRA as `peft` saves it: `W^T + B A` for a torch.nn.Linear, B = right^T, A = left^T."""
    _, found, _ = job.changed(HF_WEIGHTS)
    module, _, last = found.name.rpartition(".")
    if last != "weight" or not found.transposed:
        raise ProblemError(
            f"{line(job.base)}: the projection {line(found.name)} is no torch.nn.Linear, which is "
            "what PEFT adapts: use a folder of transformers"
        )
    left, right = (x.detach().cpu().float() for x in (job.adapter.left, job.adapter.right))
    rank = left.shape[1]
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": [module],
        "r": rank,
        "lora_alpha": rank,  # a factor of 1
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
    stem = f"base_model.model.{module}"
    tensors = {f"{stem}.lora_A.weight": left.T, f"{stem}.lora_B.weight": right.T}
    with atomic_path(out, job.overwrite) as folder:
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        _save(tensors, folder / "adapter_model.safetensors")


def _onnx(job: Job, out: Path) -> None:
    from forgetting.deploy.onnx import export_text_encoder, patch_graph

    if job.base.suffix == ".onnx":
        return patch_graph(job.adapter, job.base, out, job.original, job.overwrite)
    if job.config is None and job.base.is_dir() and not (job.base / OPEN_CLIP_CONFIG).is_file():
        _require_hf(job.base)
        tensors, _, _ = job.changed(HF_WEIGHTS)
        spec = find_model(f"hf:{job.base}")
    else:
        tensors, _, files = job.changed(OPEN_CLIP_WEIGHTS)
        config = _open_clip_config(job.config, files[0].with_name(OPEN_CLIP_CONFIG))["model_cfg"]
        custom = any(name.startswith("text.") for name in tensors)
        with naming(job.base):
            spec = ModelSpec(str(job.base), check_open_clip(config) | {"custom_text": custom})
    return export_text_encoder(spec.make(tensors), out, job.overwrite)


FORMATS: dict[str, Callable[[Job, Path], None]] = {
    "openai": _openai,
    "open_clip": _open_clip,
    "hf": _hf,
    "peft": _peft,
    "onnx": _onnx,
}


def _copy(base: Path, folder: Path) -> None:
    """Copy config, tokenizer and card of a folder, and nothing that could hold weights.

    Raises:
        ProblemError: a link that leads out of the folder, to what may not be meant to be copied.
    """
    # The hub's cache keeps the files of a snapshot as links to ../../blobs.
    allowed = (base.resolve(), (base / "../../blobs").resolve())
    for file in sorted(base.iterdir()):
        copied = file.suffix in COPIED and not file.name.endswith(".index.json")  # of weights
        if file.is_file() and (copied or file.name.startswith("LICENSE")):
            if file.resolve().parent not in allowed:
                raise ProblemError(f"{line(file)} is a link that leads out of the folder")
            shutil.copyfile(file, folder / file.name)


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write safetensors, which transformers wants to say that they are of torch."""
    path.write_bytes(container(tensors, {"format": "pt"} | (metadata or {})))
