"""Architectures by name, and how each reads images.

A name stands for all that is computed, activation and preprocessing included: OpenAI's models and
`mini` by the table, anything else as `forgetting.models.loading` finds it (`open_clip:NAME/TAG`,
`hf:DIR`, `openai:FILE`, a folder). Behind OpenAI's names `-quickgelu` or `-gelu` says the
activation of weights of one's own.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.files import sha256_file
from forgetting.errors import ProblemError, shown, unknown
from forgetting.io import naming
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
    """The architecture called `name`; nothing is loaded.

    Raises:
        ProblemError: there is none, with the nearest name; a folder that is none or lacks a config.
    """
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


def published(spec: ModelSpec) -> tuple[str, str] | None:
    """File name and address of the weights that OpenAI published for an architecture, if any."""
    if spec.weights is not None or spec.sha256 not in OPENAI:
        return None
    name = OPENAI[spec.sha256]
    file = f"{name}{'px' if name.endswith('-336') else ''}.pt"
    return file, f"{OPENAI_URL}/{spec.sha256}/{file}"


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
    """SHA-256 of the identity."""
    return hashlib.sha256(identity(spec).encode()).hexdigest()


def preprocessing(spec: ModelSpec) -> dict[str, Any]:
    """How a model reads images, as open_clip's PreprocessCfg has it; see `IMAGES`.

    Raises:
        ProblemError: sizes or colours that are none, or steps that have no such form.
    """
    images = _images(spec)
    if "size" not in images:
        images["size"] = spec.model_config()["vision_cfg"].get("image_size", IMAGES["size"])
    images = IMAGES | {key: images[key] for key in IMAGE_KEYS if key in images}
    with naming(spec.name):
        return _checked(json.loads(json.dumps(images)))  # lists for tuples


def _images(spec: ModelSpec) -> dict[str, Any]:
    """What the model's own configuration says of images."""
    return _of_processor(spec.folder) if spec.is_transformers else dict(spec.images)


def _checked(images: dict[str, Any]) -> dict[str, Any]:
    size = images["size"]
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or not all(type(x) is int and 0 < x <= MOST_PIXELS for x in sides):
        raise ProblemError(f"an image size of {shown(size)} pixels")
    for key in ("mean", "std"):
        values = images[key]
        numbers = isinstance(values, list) and all(type(x) in (int, float) for x in values)
        if not numbers or len(values) != 3 or not all(map(math.isfinite, values)):
            raise ProblemError(f"a {key} of images that is no three numbers: {shown(values)}")
    if min(images["std"]) <= 0:
        raise ProblemError(f"a std of images that is not above 0: {shown(images['std'])}")
    for key, known in (("interpolation", RESAMPLE.values()), ("resize_mode", RESIZE_MODES)):
        if images[key] not in known:
            raise ProblemError(f"{key} {shown(images[key])} of images is not known here")
    return images | {"size": sides}


def _of_processor(folder: Path) -> dict[str, Any]:
    """transformers' preprocessor_config.json as open_clip's PreprocessCfg has it."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise ProblemError(f"no {path}, so how the model reads images is not known")
    content = read_json(path)
    try:
        size, crop = content["size"], content.get("crop_size")
        size = size if isinstance(size, dict) else {"shortest_edge": size}
        crop = crop if isinstance(crop, dict) or crop is None else {"height": crop, "width": crop}
        cropped = content.get("do_center_crop", False)
        if "shortest_edge" in size:
            mode, side = "shortest", [size["shortest_edge"]] * 2
            if not cropped or [crop["height"], crop["width"]] != side:
                raise ValueError("images are not cut to the size of their shorter side")
        else:
            mode, side = "squash", [size["height"], size["width"]]
            if cropped:
                raise ValueError("images are squashed and then cut")
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if not content.get(step, True):
                raise ValueError(f"{step} is false")
        if abs(content.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
            raise ValueError("rescale_factor is not 1/255")
        mean, std = content["image_mean"], content["image_std"]
        interpolation = RESAMPLE[content.get("resample", 3)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProblemError(f"{path}: a preprocessing that is not known here ({error})") from error
    return {
        "size": side,
        "mean": mean,
        "std": std,
        "interpolation": interpolation,
        "resize_mode": mode,
    }
