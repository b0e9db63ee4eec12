"""Architectures by name, and how each reads images.

A name stands for all that is computed, activation and preprocessing included: OpenAI's models and
`mini` by the table, anything else as `forgetting.models.loading` finds it (`open_clip:NAME/TAG`,
`hf:DIR`, `openai:FILE`, a folder). Behind OpenAI's names `-quickgelu` or `-gelu` says the
activation of weights of one's own.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine.files import sha256_file
from forgetting.errors import ProblemError, shown, unknown
from forgetting.models.checkpoint import read_json
from forgetting.models.configs import IMAGE_KEYS, split_activation
from forgetting.models.loading import OPENAI, ModelSpec, find_model

HERE = Path(__file__).parent
OPENAI_URL = "https://openaipublic.azureedge.net/clip/models"
# What OpenAI's models read, and what a config that leaves something out means.
IMAGES = {
    "size": 224,
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
RESIZE_MODES = ("shortest", "longest", "squash")
MOST_PIXELS = 4096  # of a side
NOT_COMPUTED = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")  # of config.json


def _label(name: str) -> str:
    """OpenAI's spelling of open_clip's name: ViT-L/14@336px of ViT-L-14-336."""
    name = name.replace("-14-336", "/14@336px").replace("-B-", "-B/")
    return name.replace("L-14", "L/14")


# OpenAI trained with QuickGELU; open_clip's plain configs of the same names use GELU.
ARCHITECTURES = {
    _label(name): ModelSpec(_label(name), f"{name}-quickgelu", explicit=False, sha256=sha256)
    for sha256, name in OPENAI.items()
}
ARCHITECTURES["mini"] = ModelSpec("mini", HERE / "mini.json", HERE / "mini.safetensors")


def architecture(name: str) -> ModelSpec:
    """The architecture called `name`; nothing is loaded."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    base, quick = split_activation(name)
    if quick is not None and base in ARCHITECTURES and ARCHITECTURES[base].sha256:
        spec = ARCHITECTURES[base]
        config = spec.model_config() | {"quick_gelu": quick}
        return replace(spec, name=name, config=config, explicit=True, sha256="")
    if ":" not in name and not Path(name).exists():
        error = unknown("architecture", name, ARCHITECTURES)
        raise ProblemError(f"{error}; or open_clip:NAME/TAG, hf:DIR, openai:FILE, or a folder")
    return find_model(name)


def openai_url(spec: ModelSpec) -> str | None:
    """Address of the weights that OpenAI published for an architecture, if any."""
    if spec.weights is not None or spec.sha256 not in OPENAI:
        return None
    name = OPENAI[spec.sha256]
    return f"{OPENAI_URL}/{spec.sha256}/{name}{'px' if name.endswith('-336') else ''}.pt"


def identity(spec: ModelSpec) -> str:
    """All that fixes what a model computes, but its weights: JSON text."""
    config, tokenizer = spec.model_config(), {}
    if spec.is_transformers:
        config = {key: value for key, value in config.items() if key not in NOT_COMPUTED}
    if spec.folder is not None:
        names = {path.name for path in spec.folder.glob("*token*")} | {"vocab.json", "merges.txt"}
        paths = [spec.folder / name for name in sorted(names)]
        tokenizer = {path.name: sha256_file(path) for path in paths if path.is_file()}
    return json.dumps([config, _images(spec), tokenizer], sort_keys=True)


def identity_sha256(spec: ModelSpec) -> str:
    return hashlib.sha256(identity(spec).encode()).hexdigest()


def preprocessing(spec: ModelSpec) -> dict[str, Any]:
    """How a model reads images, as open_clip's PreprocessCfg has it, see `IMAGES`; its size is
    (height, width). ProblemError for sizes or colours that are none, or other steps."""
    images = _images(spec)
    if "size" not in images:
        images["size"] = spec.model_config()["vision_cfg"].get("image_size", IMAGES["size"])
    images = IMAGES | {key: images[key] for key in IMAGE_KEYS if key in images}
    try:
        size = images["size"]
        images["size"] = list(size) if isinstance(size, list | tuple) else [size, size]
        pixels = all(type(side) is int and 0 < side <= MOST_PIXELS for side in images["size"])
        images |= {key: list(images[key]) for key in ("mean", "std")}
        colours = torch.tensor([images["mean"], images["std"]])
        known = images["interpolation"] in RESAMPLE.values() and len(images["size"]) == 2
        known = known and images["resize_mode"] in RESIZE_MODES and colours.shape == (2, 3)
        known = known and bool(colours.isfinite().all() and (colours[1] > 0).all())
    except (TypeError, ValueError, RuntimeError):
        known = pixels = False
    if not (known and pixels):
        raise ProblemError(f"{spec.name}: a preprocessing that is not known here: {shown(images)}")
    return images


def _images(spec: ModelSpec) -> dict[str, Any]:
    """What the model's own configuration says of images, as open_clip's PreprocessCfg has it."""
    if not spec.is_transformers:
        return dict(spec.images)
    path = spec.folder / "preprocessor_config.json"
    if not path.is_file():
        raise ProblemError(f"no {path}, so how the model reads images is not known")
    content = read_json(path)
    try:
        size, crop = content["size"], content.get("crop_size")
        size = size if isinstance(size, dict) else {"shortest_edge": size}
        crop = crop if isinstance(crop, dict) else {"height": crop, "width": crop}
        squash = "shortest_edge" not in size
        side = [size[k] for k in ("height", "width")] if squash else [size["shortest_edge"]] * 2
        steps = ("do_resize", "do_rescale", "do_normalize")
        if (
            not all(content.get(step, True) for step in steps)
            or abs(content.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6
            or content.get("do_center_crop", False) == squash
            or not (squash or [crop["height"], crop["width"]] == side)
        ):
            raise ValueError("steps that open_clip does not have")
        colours = {"mean": content["image_mean"], "std": content["image_std"]}
        interpolation = RESAMPLE[content.get("resample", 3)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProblemError(f"{path}: a preprocessing that is not known here ({error})") from error
    mode = "squash" if squash else "shortest"
    return colours | {"size": side, "interpolation": interpolation, "resize_mode": mode}
