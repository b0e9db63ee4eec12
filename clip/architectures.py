"""What a model is: how it is built, how it reads images and texts, where its weights are.

A name stands for one way to compute, activation and preprocessing included: OpenAI's models and
`mini` by the table, any of open_clip's by `open_clip:NAME[/PRETRAINED]`, a folder in the form of
Hugging Face or open_clip by `hf:DIR`. Weights alone do not say how they are to be computed with
(ViT-B/32 has a twin of the same shapes with another activation), so that a file without a config is
taken only where its SHA-256 is known or the name says the activation: see `require_identity`.
"""

from __future__ import annotations

import hashlib
import json
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from engine.files import read_json
from forgetting.errors import ProblemError, reason, unknown
from forgetting.models.loading import OPENAI

HERE = Path(__file__).parent
OPENAI_URL = "https://openaipublic.azureedge.net/clip/models"
# File name -> SHA-256 of every model that OpenAI published.
OPENAI_FILES = {
    f"{name}{'px' if name.endswith('-336') else ''}.pt": digest for digest, name in OPENAI.items()
}
ACTIVATIONS = {"-quickgelu": True, "-gelu": False}  # the end of a name -> open_clip's quick_gelu
OPEN_CLIP, HUGGING_FACE = "open_clip:", "hf:"
OPEN_CLIP_CONFIG = "open_clip_config.json"
FOLDER_WEIGHTS = (  # of a folder, the first that is there
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)
INTERPOLATION = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


@dataclass(frozen=True)
class Architecture:
    """One model.

    Attributes:
        config: name of an open_clip config, a JSON file of that form, or what such a file holds;
            for a folder of transformers the contents of its config.json.
        weights: a file name in OPENAI_FILES, a file, or None if --weights must say.
        images: what differs from OpenAI's preprocessing, as open_clip's PreprocessCfg has it.
        explicit: whether the name, or a config beside the weights, says the activation.
        pretrained: open_clip's tag of the weights; folder: of Hugging Face's form.
    """

    name: str
    config: str | Path | dict[str, Any]
    weights: str | Path | None = None
    images: dict[str, Any] = field(default_factory=dict)
    explicit: bool = True
    pretrained: str = ""
    folder: Path | None = None

    @property
    def sha256(self) -> str | None:
        """Published SHA-256 of the default weights; None for those that OpenAI did not publish."""
        return OPENAI_FILES[self.weights] if isinstance(self.weights, str) else None

    @property
    def url(self) -> str | None:
        """Where the default weights are downloaded from; None if they need no network."""
        return f"{OPENAI_URL}/{self.sha256}/{self.weights}" if self.sha256 else None

    @property
    def transformers(self) -> bool:
        """Whether transformers builds it, and not open_clip."""
        return isinstance(self.config, dict) and "model_type" in self.config

    def identity(self) -> str:
        """All that fixes what the model computes, but the weights: JSON text."""
        config = self.config
        if isinstance(config, Path):
            config = json.loads(config.read_text(encoding="utf-8"))
        tokenizer = {}
        if self.folder is not None:
            from clip.digests import digests

            files = sorted(path for path in self.folder.glob("*token*") if path.is_file())
            files += [self.folder / name for name in ("vocab.json", "merges.txt")]
            files = [path for path in files if path.is_file()]
            hashes = digests(files, None)
            tokenizer = {path.name: sha for path, sha in zip(files, hashes, strict=True)}
        return json.dumps([config, self.images, tokenizer], sort_keys=True)

    @property
    def sha(self) -> str:
        """Of the identity."""
        return hashlib.sha256(self.identity().encode()).hexdigest()

    def model_config(self) -> dict[str, Any]:
        """What open_clip builds it from; a copy."""
        if isinstance(self.config, dict):
            return deepcopy(self.config)
        if isinstance(self.config, Path):
            return json.loads(self.config.read_text(encoding="utf-8"))
        from open_clip import get_model_config  # it takes seconds to import

        return get_model_config(self.config)

    def build(self) -> nn.Module:
        """A randomly initialised open_clip model of this architecture; no weights, no network."""
        from open_clip import CLIP, CoCa, CustomTextCLIP

        config = self.model_config()
        text, vision = config["text_cfg"], config["vision_cfg"]
        custom = config.pop("custom_text", False) or "hf_model_name" in text
        if "timm_model_name" in vision:
            vision["timm_model_pretrained"] = False
        if "hf_model_name" in text:
            text["hf_model_pretrained"] = False
        kind = (CoCa if "multimodal_cfg" in config else CustomTextCLIP) if custom else CLIP
        try:
            return kind(**config)
        except Exception as error:  # of a config that somebody wrote, or a tower of another library
            raise ProblemError(f"{self.name} cannot be built: {reason(error)}") from error

    def preprocessing(self) -> dict[str, Any]:
        """open_clip's PreprocessCfg of the model."""
        if self.transformers:
            return self.images
        size = self.model_config()["vision_cfg"].get("image_size", 224)
        return {"size": size} | self.images

    def require_identity(self, path: Path, sha256: str) -> None:
        """ProblemError unless it is known how the weights at `path` are to be computed with."""
        known = {digest: name for name, digest in OPENAI_FILES.items()}.get(sha256)
        quick = bool(self.model_config().get("quick_gelu")) if not self.transformers else None
        if known is not None:
            if isinstance(self.weights, str) and known != self.weights:
                raise ProblemError(f"weights {path} are OpenAI's {known}, not those of {self.name}")
            if quick is False:
                raise ProblemError(
                    f"weights {path} are OpenAI's {known}, which compute with QuickGELU, and "
                    f"{self.name} computes with GELU; give ARCH as {known.removesuffix('.pt')!r}"
                )
            return
        if beside := beside_weights(path):
            found, mine = read_open_clip(beside), self
            for what, theirs, own in (
                ("model", _plain(found.model_config()), _plain(mine.model_config())),
                ("preprocessing", _full(found.preprocessing()), _full(mine.preprocessing())),
            ):
                differ = sorted(k for k in {*theirs, *own} if theirs.get(k) != own.get(k))
                if differ:
                    raise ProblemError(
                        f"weights {path} have a config beside them, {beside.name}, whose {what} is "
                        f"another than that of {self.name}: {differ[0]} is "
                        f"{theirs.get(differ[0])!r:.80}, not {own.get(differ[0])!r:.80}"
                    )
            return
        if not self.explicit:
            base = self.name.removeprefix(OPEN_CLIP)
            prefix = self.name[: len(self.name) - len(base)]
            raise ProblemError(
                f"weights {path} (sha256 {sha256[:16]}…) are none that OpenAI published and have "
                f"no config beside them ({path.with_suffix('.json').name}, {OPEN_CLIP_CONFIG}), so "
                f"how they compute is not known: give ARCH as {prefix}{base}-quickgelu (OpenAI's "
                f"activation, and most that were trained from it) or {prefix}{base}-gelu "
                "(open_clip's plain configs, such as LAION's)"
            )


def beside_weights(path: Path) -> Path | None:
    """The config that lies beside a file of weights, in open_clip's form; None if there is none."""
    if (place := path.with_name(OPEN_CLIP_CONFIG)).is_file():
        return place
    place = path.with_suffix(".json")  # may be anything
    if place == path or not place.is_file():
        return None
    content = read_json(place, "model config")
    return place if isinstance(content, dict) and "model_cfg" in content else None


def read_open_clip(path: Path) -> Architecture:
    """The architecture of a config in open_clip's form: `model_cfg`, and perhaps `preprocess_cfg`.

    Raises:
        ProblemError: a file of another form.
    """
    content = read_json(path, "model config")
    parts = content if isinstance(content, dict) else {}
    model, images = parts.get("model_cfg"), parts.get("preprocess_cfg", {})
    needed = ("embed_dim", "vision_cfg", "text_cfg")
    if not isinstance(model, dict) or any(key not in model for key in needed):
        raise ProblemError(f"{path}: no model_cfg with {', '.join(needed)}, as open_clip writes it")
    if not isinstance(images, dict) or not {*images} <= {*IMAGE_KEYS, "mode", "fill_color"}:
        raise ProblemError(f"{path}: preprocess_cfg must hold some of {', '.join(IMAGE_KEYS)}")
    images = {key: images[key] for key in IMAGE_KEYS if key in images}
    return Architecture(path.name, model, images=images)


IMAGE_KEYS = ("size", "mean", "std", "interpolation", "resize_mode")


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A model's config with what stands for nothing left out."""
    return {key: value for key, value in config.items() if value not in (False, None)}


def _full(images: dict[str, Any]) -> dict[str, Any]:
    """A preprocessing with its defaults, as JSON has it."""
    from open_clip.transform import PreprocessCfg

    found = asdict(PreprocessCfg(**images))
    side = found["size"]
    found["size"] = [side, side] if isinstance(side, int) else side
    return json.loads(json.dumps(found))


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        # OpenAI trained with QuickGELU; the plain configs of the same names use GELU.
        *(
            Architecture(
                name.replace("-14-336px", "/14@336px")
                .replace("-B-", "-B/")
                .replace("L-14", "L/14"),
                f"{name.removesuffix('px')}-quickgelu",
                f"{name}.pt",
                explicit=False,
            )
            for name in (file.removesuffix(".pt") for file in OPENAI_FILES)
        ),
        Architecture("mini", HERE / "mini.json", HERE / "mini.safetensors"),
    )
}


def architecture(name: str) -> Architecture:
    """The architecture called `name`: of the table, with `-quickgelu` or `-gelu` behind it for
    weights of one's own, `open_clip:NAME[/PRETRAINED]` or `hf:DIR`.

    Raises:
        ProblemError: there is none, with the nearest name; a folder that is none or lacks a config.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if name.startswith(OPEN_CLIP):
        return _of_open_clip(name)
    if name.startswith(HUGGING_FACE):
        return _of_folder(name, Path(name.removeprefix(HUGGING_FACE)))
    base, quick = _activation(name)
    if base in ARCHITECTURES and isinstance(ARCHITECTURES[base].weights, str):
        row = ARCHITECTURES[base]
        config = row.model_config() | {"quick_gelu": quick}
        return replace(row, name=name, config=config, weights=None, explicit=True)
    error = unknown("architecture", name, ARCHITECTURES)
    raise ProblemError(f"{error}; or {OPEN_CLIP}NAME[/PRETRAINED], {HUGGING_FACE}DIR")


def _activation(name: str) -> tuple[str, bool | None]:
    """A name without the activation at its end, and open_clip's quick_gelu; None: it names none."""
    for end, quick in ACTIVATIONS.items():
        if name.endswith(end):
            return name.removesuffix(end), quick
    return name, None


def _of_open_clip(name: str) -> Architecture:
    from open_clip import get_model_config, list_models, list_pretrained_tags_by_model
    from open_clip.pretrained import get_pretrained_cfg

    model, _, tag = name.removeprefix(OPEN_CLIP).partition("/")
    base, quick = _activation(model)
    config = get_model_config(model) or get_model_config(base)
    if config is None:
        raise unknown("open_clip model", model, list_models())
    if quick is not None:
        config["quick_gelu"] = quick
    if not tag:
        return Architecture(name, config, explicit=quick is not None)
    known = model if get_model_config(model) else base
    tags = list_pretrained_tags_by_model(known)
    if tag not in tags:
        raise unknown(f"pretrained tag of open_clip's {known}", tag, tags)
    trained = get_pretrained_cfg(known, tag)
    theirs = bool(trained.get("quick_gelu", False))
    if quick is not None and quick != theirs:
        says = "QuickGELU" if theirs else "GELU"
        raise ProblemError(f"{name}: the weights {tag} were trained with {says}; name the model so")
    config["quick_gelu"] = theirs
    images = {key: trained[key] for key in IMAGE_KEYS if key in trained}
    return Architecture(name, config, images=images, pretrained=tag)


def _of_folder(name: str, folder: Path) -> Architecture:
    if not folder.is_dir():
        raise ProblemError(f"architecture {name}: no folder {folder}")
    weights = [folder / file for file in FOLDER_WEIGHTS if (folder / file).is_file()]
    weights += sorted(folder.glob("model-*-of-*.safetensors"))
    missing = ProblemError(f"architecture {name}: none of {', '.join(FOLDER_WEIGHTS)} in {folder}")
    if (folder / OPEN_CLIP_CONFIG).is_file():
        found = read_open_clip(folder / OPEN_CLIP_CONFIG)
        if not weights:
            raise missing
        return replace(found, name=name, weights=weights[0], folder=folder)
    if not (folder / "config.json").is_file():
        raise ProblemError(
            f"architecture {name}: {folder} holds neither config.json nor {OPEN_CLIP_CONFIG}, so "
            "how its weights compute is not known"
        )
    config = read_json(folder / "config.json", "model config")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ProblemError(f"{folder / 'config.json'}: no config of transformers: no model_type")
    if not weights:
        raise missing
    drop = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
    config = {key: value for key, value in config.items() if key not in drop}
    return Architecture(name, config, weights[0], _of_processor(folder), folder=folder)


def _of_processor(folder: Path) -> dict[str, Any]:
    """Hugging Face's preprocessor_config.json as open_clip's PreprocessCfg has it.

    Raises:
        ProblemError: there is none, or it asks for steps that have no such form.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise ProblemError(f"no {path}, so how the model reads images is not known")
    content = read_json(path, "image preprocessing")
    try:
        size, crop = content["size"], content.get("crop_size")
        size = size if isinstance(size, dict) else {"shortest_edge": size}
        crop = crop if isinstance(crop, dict) or crop is None else {"height": crop, "width": crop}
        cropped = content.get("do_center_crop", False)
        if "shortest_edge" in size:
            mode, side = "shortest", (size["shortest_edge"],) * 2
            if not cropped or (crop["height"], crop["width"]) != side:
                raise ValueError("images are not cut to the size of their shorter side")
        else:
            mode, side = "squash", (size["height"], size["width"])
            if cropped:
                raise ValueError("images are squashed and then cut")
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if not content.get(step, True):
                raise ValueError(f"{step} is false")
        if abs(content.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
            raise ValueError("rescale_factor is not 1/255")
        return {
            "size": list(side),
            "mean": [float(x) for x in content["image_mean"]],
            "std": [float(x) for x in content["image_std"]],
            "interpolation": INTERPOLATION[content.get("resample", 3)],
            "resize_mode": mode,
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProblemError(f"{path}: a preprocessing that is not known here ({error})") from error
