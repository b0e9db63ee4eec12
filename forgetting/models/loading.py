"""Load a model by name. Its files are read strictly, and no code of theirs is run.

hf:DIR_OR_ID                  transformers; configuration and tokenizer of the checkpoint
open_clip:NAME/PRETRAINED     a configuration of open_clip with its weights, or a file of them
openai:FILE                   a file that OpenAI published, known by its SHA-256
DIR                           a folder that holds either configuration, or CLIP's modules.json

A local folder is read without a network: what its configuration would fetch is refused. Weights are
read by `forgetting.models.checkpoint` alone, and only what a configuration may say of a model's
shape reaches the library that builds it.
"""

import hashlib
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from forgetting.errors import ProblemError, line, shown, unknown
from forgetting.io import foreign, naming, need, read_bytes
from forgetting.models import checkpoint, configs
from forgetting.models.checkpoint import HF_CONFIG, HF_WEIGHTS, OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS
from forgetting.models.reading import Tokenize

# Every file that OpenAI published (openai/CLIP, clip/clip.py): SHA-256 -> name. All are QuickGELU.
OPENAI = {
    "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762": "RN50",
    "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599": "RN101",
    "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd": "RN50x4",
    "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa": "RN50x16",
    "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c": "RN50x64",
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af": "ViT-B-32",
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f": "ViT-B-16",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836": "ViT-L-14",
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02": "ViT-L-14-336",
}
KINDS = "hf:DIR_OR_ID, open_clip:NAME/TAG, open_clip:NAME/FILE, openai:FILE, or a folder"


@dataclass(frozen=True)
class ModelSpec:
    """What a model is: how it is built, and where its weights are. Nothing is loaded yet."""

    name: str  # as it was given
    config: dict[str, Any] | str | Path  # open_clip's `model_cfg`, a file of it; or transformers'
    weights: Path | None = None  # a file or folder
    images: dict[str, Any] = field(default_factory=dict)  # open_clip's `preprocess_cfg`, if known
    explicit: bool = True  # whether the name says the activation
    tag: str = ""  # open_clip's, of weights to be fetched
    folder: Path | None = None  # of a local model, with its configuration and tokenizer
    sha256: str = ""  # what the weights must have, where the name was chosen by it

    @property
    def is_transformers(self) -> bool:
        """Whether transformers builds it, and not open_clip."""
        return isinstance(self.config, dict) and "model_type" in self.config

    def model_config(self) -> dict[str, Any]:
        """What the model is built from; a copy."""
        if isinstance(self.config, dict):
            return deepcopy(self.config)
        path = self.config
        path = configs.open_clip_configs()[path] if isinstance(path, str) else path
        return checkpoint.read_json(path)

    def files(self) -> list[Path]:
        """The files of its weights; ProblemError if there are none."""
        if self.weights is None:
            raise ProblemError(f"{line(self.name)} has no weights: name a tag or a file of them")
        names = HF_WEIGHTS if self.is_transformers else OPEN_CLIP_WEIGHTS + HF_WEIGHTS
        return checkpoint.weight_files(self.weights, names)

    def read(self) -> tuple[dict[str, Tensor], str]:
        """The tensors of its weights, and the SHA-256 of the bytes that they were read from."""
        state, sha256 = checkpoint.read_checkpoint(self.files())
        if self.sha256 not in ("", sha256):
            raise ProblemError(f"{line(self.weights)} has changed since its SHA-256 was computed")
        return state, sha256

    def check_activation(self, sha256: str) -> None:
        """ProblemError for weights with this SHA-256 if it is not known how they compute: models
        with QuickGELU and with GELU have tensors of the same names and shapes."""
        if self.is_transformers:
            return
        weights, name = self.files()[0], line(self.name)
        beside = configs.config_beside(weights)
        if sha256 not in OPENAI and beside is None:
            if self.explicit:
                return
            raise ProblemError(
                f"weights {line(weights)} are none that OpenAI published and have no config beside "
                f"them ({OPEN_CLIP_CONFIG}), so how they compute is not known: add the activation "
                f"to the name, {name}-quickgelu (OpenAI's) or -gelu (LAION's)"
            )
        theirs = sha256 in OPENAI or bool(beside.get("quick_gelu"))
        if theirs != bool(self.model_config().get("quick_gelu")):
            raise ProblemError(
                f"weights {line(weights)}, by their config or as OpenAI's, have quick_gelu "
                f"{theirs}, and {name} has not: it is another model"
            )

    def build(self) -> nn.Module:
        """A randomly initialised model of open_clip; no weights, no network for a local folder."""
        open_clip = need("open_clip", "clip-forgetting[open-clip]")
        config = self.model_config()
        custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
        config["vision_cfg"]["timm_model_pretrained"] = False
        config["text_cfg"]["hf_model_pretrained"] = False
        kind = open_clip.CLIP
        if custom:
            kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
        return kind(**config).eval()

    def make(self, state: Mapping[str, Tensor]) -> nn.Module:
        """The model with these weights, in evaluation mode: of open_clip in float32, of
        transformers in the dtype of its weights; ProblemError for weights that do not fit."""
        for name, x in state.items():
            if x.is_floating_point() and not torch.isfinite(x).all():
                raise ProblemError(f"{shown(name)} holds NaN or infinite values")
        make = self._make_transformers if self.is_transformers else self._make_open_clip
        # Random initialisation must not move the caller's random numbers.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with foreign(f"{line(self.name)} cannot be made of these weights"):
                return make(dict(state)).eval()

    def _make_open_clip(self, state: dict[str, Tensor]) -> nn.Module:
        from open_clip.convert import convert_state_dict
        from open_clip.model import convert_to_custom_text_state_dict

        with torch.device("meta"):  # names and shapes, without memory
            shapes = self.build()
        # Earlier forms and those of other makers: the steps of `open_clip.load_checkpoint`.
        state, own = convert_state_dict(shapes, state), shapes.state_dict()
        if "positional_embedding" in state and "positional_embedding" not in own:
            state = convert_to_custom_text_state_dict(state)
        for name in ("logit_scale", "logit_bias"):
            if name in own and name in state and state[name].numel() == 1:
                state[name] = state[name].reshape(own[name].shape)
        old = "text.transformer.embeddings.position_ids"  # transformers stores them no more
        state = {name: x for name, x in state.items() if name != old or old in own}
        shapes.load_state_dict(state)  # says what does not fit
        model = self.build()
        model.load_state_dict({name: x.float() for name, x in state.items()})
        return model

    def _make_transformers(self, state: dict[str, Tensor]) -> nn.Module:
        transformers = _transformers()
        config = configs.without_code(self.model_config())
        kind, named = config.pop("model_type"), config.pop("architectures", None) or [None]
        config = transformers.AutoConfig.for_model(kind, **config)
        builder = getattr(transformers, str(named[0]), None)
        known = isinstance(builder, type) and issubclass(builder, transformers.PreTrainedModel)
        builder = builder if known else transformers.MODEL_MAPPING[type(config)]
        model, report = builder.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True
        )
        for what in ("missing_keys", "mismatched_keys"):
            if report.get(what):
                raise ValueError(f"{what}: {next(iter(report[what]))}")
        return model

    def tokenizer(self) -> Tokenize:
        """The model's own: that of its folder, or the byte-pair tokenizer that open_clip brings."""
        with foreign(f"{line(self.name)}: its tokenizer cannot be loaded"):
            if self.is_transformers:
                return _transformers().AutoTokenizer.from_pretrained(
                    self.folder, local_files_only=True, trust_remote_code=False
                )
            open_clip = need("open_clip", "clip-forgetting[open-clip]")
            text = self.model_config()["text_cfg"]
            options = dict(text.get("tokenizer_kwargs") or {})
            options["context_length"] = text.get("context_length", 77)
            if "hf_tokenizer_name" not in text:
                return open_clip.SimpleTokenizer(**options)
            _transformers()
            return open_clip.HFTokenizer(
                str(self.folder or text["hf_tokenizer_name"]),
                tokenizer_mode=text.get("tokenizer_mode"),
                trust_remote_code=False,
                local_files_only=self.folder is not None,
                **options,
            )


def load_model(
    model: str | nn.Module, tokenize: Tokenize | None = None
) -> tuple[nn.Module, Tokenize | None]:
    """A model in evaluation mode and its tokenizer by a name; what is no name is given back.
    ProblemError: there is no such model, or a checkpoint does not say how it is to be read."""
    if not isinstance(model, str):
        return model, tokenize or getattr(model, "tokenizer", None)  # of a SentenceTransformer
    spec = fetch(find_model(model))
    state, sha256 = spec.read()
    spec.check_activation(sha256)
    return spec.make(state), tokenize or spec.tokenizer()


def find_model(name: str) -> ModelSpec:
    """The model of a name, see above; ProblemError if there is none."""
    kind, _, rest = name.partition(":")
    if rest and kind == "hf":
        return _folder(name, _downloaded(rest))
    if rest and kind == "open_clip":
        return _open_clip(name, rest)
    if rest and kind == "openai":
        return _openai(name, rest)
    if Path(name).is_dir():
        return _folder(name, Path(name))
    raise ProblemError(
        f"no model {line(name)!r}; a model is {KINDS} (a file of weights alone does not say its "
        f"activation: open_clip:ViT-B-32-quickgelu/{line(name)}, say)"
    )


def _downloaded(text: str) -> Path:
    """A folder, or that of a model of the hub, downloaded if need be."""
    if Path(text).is_dir():
        return Path(text)
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise ProblemError(f"{line(text)}: no such folder")
    hub = need("huggingface_hub", "clip-forgetting[transformers]")
    with foreign(f"no folder {line(text)} is here, and it cannot be fetched"):
        for weights in ("*.safetensors", "*.bin"):  # the latter where the former are missing
            wanted = ["*.json", "*.txt", "*.model", weights]
            folder = Path(hub.snapshot_download(text, allow_patterns=wanted))
            if any(folder.rglob(weights)):
                break
    return folder


def _open_clip(name: str, text: str) -> ModelSpec:
    model, _, weights = text.partition("/")
    base, quick = configs.split_activation(model)
    files = configs.open_clip_configs()
    known = model if model in files else base
    if known not in files:
        raise unknown("open_clip model", model, files)
    config = checkpoint.read_json(files[known])
    if quick is not None:
        config["quick_gelu"] = quick
    ambiguous = {base, f"{base}-quickgelu"} <= files.keys()
    spec = ModelSpec(name, config, explicit=quick is not None or not ambiguous)
    if not weights or Path(weights).exists():
        return replace(spec, weights=Path(weights) if weights else None)
    open_clip = need("open_clip", "clip-forgetting[open-clip]")  # it takes seconds
    tags = open_clip.list_pretrained_tags_by_model(known)
    if weights not in tags:
        raise unknown(f"file, or pretrained tag of open_clip's {known}", weights, tags)
    trained = open_clip.get_pretrained_cfg(known, weights)
    config["quick_gelu"] = bool(trained.get("quick_gelu"))
    if quick not in (None, config["quick_gelu"]):
        raise ProblemError(f"{name}: its weights were trained with the other activation")
    images = {key: trained[key] for key in configs.IMAGE_KEYS if key in trained}
    return replace(spec, images=images, explicit=True, tag=f"{known}/{weights}")


def fetch(spec: ModelSpec, cache: Path | None = None) -> ModelSpec:
    """A model with the weights that open_clip fetches for its tag, if it has one."""
    if not spec.tag:
        return spec
    open_clip = need("open_clip", "clip-forgetting[open-clip]")
    known = open_clip.get_pretrained_cfg(*spec.tag.split("/", 1))
    with foreign(f"{line(spec.name)} cannot be fetched; name a file of its weights"):
        path = open_clip.download_pretrained(known, cache_dir=cache and str(cache))
    return replace(spec, weights=Path(path), tag="")


def _openai(name: str, text: str) -> ModelSpec:
    with naming(text):
        sha256 = hashlib.sha256(read_bytes(text)).hexdigest()
    if sha256 not in OPENAI:
        raise ProblemError(
            f"{line(text)} is none of the files that OpenAI published (SHA-256 {sha256[:16]}); "
            f"name what it is, with its activation: open_clip:ViT-B-32-quickgelu/{line(text)}, say"
        )
    return ModelSpec(name, f"{OPENAI[sha256]}-quickgelu", Path(text), sha256=sha256)


def _folder(name: str, folder: Path) -> ModelSpec:
    if (folder / checkpoint.SENTENCE_MODULES).is_file():
        parts = [part for part, files in checkpoint.sentence_modules(folder).items() if files]
        if len(parts) > 1:
            several = f"{line(folder)} holds {len(parts)} modules of sentence-transformers"
            raise ProblemError(f"{several}: give forget() the SentenceTransformer itself")
        folder = folder.joinpath(*parts)
    path, theirs = folder / OPEN_CLIP_CONFIG, folder / HF_CONFIG
    if theirs.is_file() and (name.startswith("hf:") or not path.is_file()):
        config = checkpoint.read_json(theirs)
        if isinstance(config, dict) and isinstance(config.get("model_type"), str):
            with naming(theirs):
                configs.check_numbers(config)
            return ModelSpec(name, config, folder, folder=folder)
    if path.is_file():
        config, images = configs.read_open_clip(path)
        return ModelSpec(name, config, folder, images, folder=folder)
    raise ProblemError(
        f"{line(folder)} holds neither {HF_CONFIG} with a model_type (transformers) nor "
        f"{OPEN_CLIP_CONFIG}, so how its weights are to be read is not known"
    )


def _transformers() -> ModuleType:
    """transformers, without its bars and warnings."""
    transformers = need("transformers", "clip-forgetting[transformers]")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers
