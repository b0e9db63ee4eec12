"""Configurations of models, which somebody wrote. Only what describes a model reaches the library
that builds it: no key that names code, no part that would be fetched, no number without bounds."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from forgetting.errors import ProblemError, line, shown
from forgetting.io import naming, need
from forgetting.models.checkpoint import OPEN_CLIP_CONFIG, read_json

ACTIVATIONS = {"-quickgelu": True, "-gelu": False}  # the end of a name -> open_clip's quick_gelu
# What open_clip's preprocess_cfg may say of images.
IMAGE_KEYS = ("size", "mean", "std", "interpolation", "resize_mode")
# What a configuration of open_clip may say of its tokenizer, whoever wrote it.
TOKENIZER_OPTIONS = ("clean", "strip_sep_token", "language", "reduction_mask")
LARGEST, MOST_LAYERS = 2**20, 1024  # of any number in a configuration; of layers and heads
# Fields of a transformers configuration that name code or say nothing of the model.
NOT_SHAPE = ("auto_map", "quantization_config", "_name_or_path", "transformers_version")


def split_activation(name: str) -> tuple[str, bool | None]:
    """A name without the activation at its end, and open_clip's quick_gelu; None: it names none."""
    for end, quick in ACTIVATIONS.items():
        if name.endswith(end):
            return name.removesuffix(end), quick
    return name, None


def open_clip_configs() -> dict[str, Path]:
    """Name -> file of every configuration that open_clip brings. It is not imported for that."""
    package = find_spec("open_clip")
    if package is None or package.origin is None:
        need("open_clip", "clip-forgetting[open-clip]")
    return {p.stem: p for p in sorted(Path(package.origin).parent.glob("model_configs/*.json"))}


def config_beside(weights: Path) -> dict[str, Any] | None:
    """The `model_cfg` beside a file of weights, in open_clip's form; None if there is none."""
    named = weights.with_name(OPEN_CLIP_CONFIG)
    for path in (named, weights.with_suffix(".json")):
        if path != weights and path.is_file():
            content = read_json(path)  # the second may be anything
            if path == named or (isinstance(content, dict) and "model_cfg" in content):
                return read_open_clip(path)[0]
    return None


def read_open_clip(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`model_cfg`, or all of it, and `preprocess_cfg` of a file in open_clip's form."""
    content = read_json(path)
    with naming(path):
        images = content.get("preprocess_cfg", {}) if isinstance(content, dict) else None
        if not isinstance(images, dict):
            raise ProblemError("no model_cfg and preprocess_cfg in it, as open_clip writes them")
        return check_open_clip(content.get("model_cfg", content)), images


def check_open_clip(model: Any) -> dict[str, Any]:
    """The configuration of a model in open_clip's form; ProblemError for another form, a number
    that no model has, or a part that would be fetched or run."""
    parts = model if isinstance(model, dict) else {}
    text, vision = parts.get("text_cfg"), parts.get("vision_cfg")
    if not (isinstance(text, dict) and isinstance(vision, dict) and "embed_dim" in parts):
        raise ProblemError("no model_cfg in it, with embed_dim, vision_cfg and text_cfg")
    check_numbers(model)
    tower = text.get("hf_model_name") or vision.get("timm_model_name") or ""
    if text.get("hf_model_name") or not re.fullmatch(r"[\w.]*", str(tower)):
        raise ProblemError(
            f"hf_model_name or timm_model_name is {shown(tower)}, which would be fetched, and a "
            "local model is read without a network: give a folder in the form of transformers"
        )
    options = text.get("tokenizer_kwargs") or {}
    for key, value in options.items() if isinstance(options, dict) else [(options, None)]:
        if key not in TOKENIZER_OPTIONS or not isinstance(value, str | bool):
            raise ProblemError(
                f"text_cfg.tokenizer_kwargs: {shown(key)} is none of "
                f"{', '.join(TOKENIZER_OPTIONS)}, or of another type"
            )
    return model


def check_numbers(value: Any, key: str = "") -> None:
    """ProblemError for a number that would be computed for ever, or take all memory."""
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else ((key, x) for x in value):
            check_numbers(inner, str(name))
    elif isinstance(value, int | float):
        limit = MOST_LAYERS if re.search("layers|heads|depth", key) else LARGEST
        if not abs(value) <= limit:
            raise ProblemError(f"{line(key)} is {shown(value)}: at most {limit}")


def without_code(config: Any) -> Any:
    """A transformers configuration without the fields that name or choose code, nested ones too."""
    if not isinstance(config, dict):
        return config
    return {
        key: without_code(value)
        for key, value in config.items()
        if key not in NOT_SHAPE and not key.endswith("_implementation")
    }
