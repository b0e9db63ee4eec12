"""ClipSource: texts to hidden states, images to embeddings, with one set of CLIP weights."""

from __future__ import annotations

import hashlib
import json
import warnings
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clip.architectures import ARCHITECTURES, OPEN_CLIP, architecture
from clip.checkpoint import check_fit, load_into, read_state_dict, require_file
from clip.digests import digests
from clip.download import download
from engine.files import sha256_file
from engine.log import logger, progress
from forgetting.errors import ProblemError, reason, unknown
from forgetting.models.encoder import Encoder, read_encoder, truncation_warning

# Arithmetic of the image encoder. Texts are always read in float32: forgetting starts from them.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# To be changed with `preprocess` or `encode_hidden`: what was cached before is then not used.
ENCODING = "open_clip's preprocessing of the model's own config; state before the projection; 3"


class ClipSource:
    """One CLIP, loaded when something must be encoded and not before.

    Args:
        arch: a name that `architecture` knows.
        weights: a checkpoint of that architecture; None for its published or embedded weights.
        cache: folder for downloads.
        device: None for the GPU if there is one, else the CPU.
        precision: of `PRECISIONS`, what images are encoded in, by a copy of the model.

    Raises:
        ProblemError: an unknown name, a missing file, or a precision that the device lacks.
    """

    def __init__(
        self,
        arch: str,
        weights: str | Path | None = None,
        cache: str | Path = "cache",
        device: str | torch.device | None = None,
        precision: str = "fp32",
    ) -> None:
        self.architecture = architecture(arch)
        self.arch = arch
        self.cache = Path(cache)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if precision not in PRECISIONS:
            raise unknown("precision", precision, PRECISIONS)
        if precision == "fp16" and self.device.type == "cpu":
            raise ProblemError("--precision fp16 needs a GPU; on a CPU take bf16, or fp32")
        self.precision = precision
        self._weights = None if weights is None else Path(weights)
        if self._weights is not None:
            if self.architecture.folder is not None:
                raise ProblemError(f"{arch} brings its weights: leave out --weights {weights}")
            require_file(self._weights)

    @property
    def recipe(self) -> dict[str, Any]:
        """The arguments by which another process makes the same source; not the device, which is
        that process's own."""
        known = {"arch": self.arch, "weights": self._weights, "cache": self.cache}
        return known | {"precision": self.precision}

    @cached_property
    def weights_path(self) -> Path:
        """The checkpoint file; downloaded first if need be.

        Raises:
            ProblemError: weights of which it is not known how they are to be computed with.
        """
        arch = self.architecture
        if self._weights is not None:
            try:
                arch.require_identity(self._weights, self._sha256(self._weights))
            except ProblemError:
                with torch.device("meta"):  # weights of other shapes are told as such
                    model = arch.build()
                check_fit(model, read_state_dict(self._weights), arch, self._weights)
                raise
            return self._weights
        if isinstance(arch.weights, Path):
            require_file(arch.weights)
            return arch.weights
        if arch.weights is None:
            return self._from_open_clip()
        path = download(arch.url, arch.sha256, self.cache / "weights" / arch.weights)
        if self._sha256(path) != arch.sha256:
            raise ProblemError(
                f"{path} is not the file that OpenAI published for {arch.name} (SHA-256 "
                f"{self._sha256(path)}); delete it, or pass it by --weights PATH"
            )
        return path

    def _from_open_clip(self) -> Path:
        """The file of a pretrained tag, fetched by open_clip."""
        from open_clip import download_pretrained
        from open_clip.pretrained import get_pretrained_cfg

        arch = self.architecture
        if not arch.pretrained:
            raise ProblemError(f"{arch.name} has no weights: pass --weights PATH")
        model, _, tag = arch.name.removeprefix(OPEN_CLIP).partition("/")
        known = get_pretrained_cfg(model, tag) or get_pretrained_cfg(model.rpartition("-")[0], tag)
        try:
            return Path(download_pretrained(known, cache_dir=str(self.cache / "weights")))
        except Exception as error:  # of the network, or of the hub
            raise ProblemError(
                f"open_clip cannot fetch {arch.name} ({reason(error)}); pass the file by "
                "--weights PATH"
            ) from error

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of the checkpoint file, in hex; of those of its parts if it has several."""
        path = self.weights_path
        parts = sorted(path.parent.glob(f"{path.stem.split('-')[0]}-*-of-*{path.suffix}"))
        if not parts or self.architecture.folder is None:
            return self._sha256(path)
        return hashlib.sha256(
            json.dumps([self._sha256(part) for part in parts]).encode()
        ).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """Changes with all that an encoding depends on: weights, configuration, preprocessing."""
        parts = [ENCODING, self.architecture.identity(), self.weights_sha256]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _sha256(self, path: Path) -> str:
        return digests([path], self.cache / "weights" / "sha256.json")[0]

    @cached_property
    def model(self) -> nn.Module:
        """The model: float32, `eval()`, on `device`."""
        path, arch = self.weights_path, self.architecture
        # Random initialisation must not move the caller's random numbers: a run that finds
        # everything cached would otherwise differ from one that does not.
        with torch.random.fork_rng(devices=[]):
            if arch.transformers:
                model = self._from_transformers()
            else:
                state = read_state_dict(path)
                model = arch.build()
                load_into(model, _in_todays_form(model, state), arch, path)
        if self.device.type == "cuda":  # TensorFloat-32 keeps 10 bits of 23
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
        digest = self.weights_sha256[:16]
        images = "" if self.precision == "fp32" else f", images in {self.precision}"
        logger.info(
            f"clip: {self.arch} on {self.device}, float32{images}, weights {digest} from {path}"
        )
        model = model.float().eval().requires_grad_(False)
        return model.to(self.device, memory_format=torch.channels_last)  # faster convolutions

    def _from_transformers(self) -> nn.Module:
        """A model of a local folder; nothing is fetched, and no code of the folder is run."""
        transformers = _transformers(self.arch)
        place = {"local_files_only": True, "trust_remote_code": False}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model, found = transformers.AutoModel.from_pretrained(
                    self.architecture.folder, output_loading_info=True, **place
                )
        except Exception as error:  # of a config or weights that somebody wrote
            raise ProblemError(f"{self.arch} cannot be loaded ({reason(error)})") from error
        for what in ("missing_keys", "mismatched_keys"):
            if found.get(what):
                first = str(next(iter(found[what])))
                raise ProblemError(
                    f"{self.arch}: the weights do not fit its config ({what}: {first})"
                )
        if not hasattr(model, "get_image_features"):
            raise ProblemError(
                f"{self.arch} is a {type(model).__name__}, which reads no images and texts alike"
            )
        return model

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own: open_clip's byte-pair tokenizer at the model's context length, or what
        its config or folder names."""
        arch = self.architecture
        try:
            if arch.transformers:
                return _transformers(self.arch).AutoTokenizer.from_pretrained(
                    arch.folder, local_files_only=True, trust_remote_code=False
                )
            from open_clip import SimpleTokenizer, get_tokenizer

            text = arch.model_config()["text_cfg"]
            if "hf_tokenizer_name" in text:
                _transformers(self.arch)
                name = self.arch.removeprefix(OPEN_CLIP).partition("/")[0]
                return get_tokenizer(f"local-dir:{arch.folder}" if arch.folder else name)
            return SimpleTokenizer(
                context_length=self.model.context_length, **text.get("tokenizer_kwargs", {})
            )
        except ProblemError:
            raise
        except Exception as error:
            raise ProblemError(
                f"{self.arch}: its tokenizer cannot be had ({reason(error)})"
            ) from error

    @cached_property
    def preprocess(self) -> Any:
        """PIL image -> (3, side, side) uint8: resize and crop of the model. Bytes, which are a
        quarter of the floats that `scaled` makes of them on the device."""
        from torchvision.transforms import Compose, PILToTensor

        *shape, _, _ = self._transforms
        return Compose([*shape, PILToTensor()])

    @cached_property
    def _transforms(self) -> list[Any]:
        """open_clip's, of which the last two make floats of pixels and normalise them."""
        from open_clip.transform import PreprocessCfg, image_transform_v2

        images = {"size": self.architecture.preprocessing()["size"]} | self.architecture.images
        return image_transform_v2(PreprocessCfg(**images), is_train=False).transforms

    @cached_property
    def _scale(self) -> Tensor:
        """Mean and standard deviation of the model's pixels, (2, 3, 1, 1)."""
        last = self._transforms[-1]
        return torch.tensor([last.mean, last.std], device=self.device)[:, :, None, None]

    def scaled(self, pictures: Tensor) -> Tensor:
        """Pictures (b, 3, side, side) uint8 as the model takes them: float32, on the device."""
        mean, std = self._scale
        images = pictures.to(self.device).float().div_(255).sub_(mean).div_(std)
        return images.contiguous(memory_format=torch.channels_last)

    @cached_property
    def tower(self) -> Encoder:
        """The text side of the model, which ends in one linear map; ProblemError if it does not."""
        try:
            return read_encoder(self.model, self.tokenizer)
        except ProblemError as error:
            raise ProblemError(f"{self.arch}: {error}") from error

    @cached_property
    def projection(self) -> Tensor:
        """The last linear map of texts, (w, d), float32 on the CPU."""
        if _is_plain(self.model):
            return self.model.text_projection.detach().cpu().clone()
        return self.tower.projection.cpu().float().clone()

    @cached_property
    def bias(self) -> Tensor | None:
        """What the model adds to `hidden @ projection`, (d,) float32 on the CPU; None: nothing."""
        if _is_plain(self.model) or self.tower.bias is None:
            return None
        return self.tower.bias.detach().cpu().float().clone()

    @torch.no_grad()
    def encode_hidden(self, texts: list[str], batch_size: int = 256) -> Tensor:
        """Hidden states of `texts`, (n, w) float32 on the CPU: the model's text embeddings are
        `hidden @ projection + bias`."""
        if truncated := self.tower.truncated(texts):
            logger.warning(f"clip: {truncation_warning(truncated)}")
        if not _is_plain(self.model):
            try:
                return self.tower.hidden(texts, batch=batch_size).float()
            except ProblemError as error:
                raise ProblemError(f"{self.arch}: {error}") from error
        rows = [torch.empty(0, self.model.ln_final.weight.shape[0])]
        for start in progress(range(0, len(texts), batch_size), f"texts, {batch_size} at once"):
            tokens = self.tokenizer(texts[start : start + batch_size]).to(self.device)
            rows.append(hidden_states(self.model, tokens).cpu())
        return torch.cat(rows)

    @torch.no_grad()
    def encode_images(self, pictures: Tensor, exactly: bool = False) -> Tensor:
        """Embeddings of pictures (b, 3, side, side) uint8, as `preprocess` gives them: (b, d)
        float32, L2-normalised, on the CPU. `exactly`: in float32, whatever the precision."""
        dtype = torch.float32 if exactly else PRECISIONS[self.precision]
        model = self.model if dtype == torch.float32 else self._rounded
        images = self.scaled(pictures).to(dtype)
        if self.architecture.transformers:
            found = model.get_image_features(pixel_values=images)
            for key in ("image_embeds", "pooler_output"):
                found = found if isinstance(found, Tensor) else getattr(found, key, found)
        else:
            found = model.encode_image(images)
        return normalize(found.float(), dim=-1).cpu()

    @cached_property
    def _rounded(self) -> nn.Module:
        """The model in its own precision. Not by autocast, which rounds all weights again for every
        batch: on a CPU that makes ViT-B/16 slower than in float32."""
        return deepcopy(self.model).to(PRECISIONS[self.precision])


def _in_todays_form(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of earlier open_clip, or of makers that it knows, as its model has it now."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    own = model.state_dict()
    state = {
        name: value.reshape(own[name].shape)
        if name in ("logit_scale", "logit_bias") and name in own and value.numel() == 1
        else value
        for name, value in state.items()
    }
    old = "text.transformer.embeddings.position_ids"  # transformers keeps them no more
    return {name: value for name, value in state.items() if name != old or old in own}


def _transformers(arch: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ProblemError(
            f"{arch} needs the package transformers: pip install transformers"
        ) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _is_plain(model: nn.Module) -> bool:
    """Whether texts can be read as `hidden_states` does, in half the time: OpenAI's form."""
    pooled = getattr(model, "text_pool_type", None) == "argmax"
    masked = isinstance(getattr(model, "attn_mask", None), Tensor)
    return pooled and masked and isinstance(getattr(model, "text_projection", None), nn.Parameter)


def hidden_states(model: nn.Module, tokens: Tensor) -> Tensor:
    """Hidden states (n, w) of tokens (n, context), after `ln_final` at the end of text and before
    projection, so that `hidden_states(model, tokens) @ projection` is the model's `encode_text`."""
    from open_clip.transformer import text_global_pool

    # The mask is causal: padding behind the last end of text reaches no state in front of it, and
    # leaving it out halves the cost.
    length = int(tokens.argmax(dim=1).max()) + 1
    tokens = tokens[:, :length]  # (n, l)
    x = model.token_embedding(tokens) + model.positional_embedding[:length]  # (n, l, w)
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    return text_global_pool(model.ln_final(x), tokens, model.text_pool_type, model.text_eos_id)


def named(text: str, cache: str | Path = "cache") -> ClipSource:
    """The CLIP that `text` names, as a command line of the library does: hf:DIR or a folder,
    open_clip:NAME/PRETRAINED or /FILE, openai:FILE; or an architecture that brings its weights.

    Raises:
        ProblemError: there is none, or it is not known how a file is to be computed with.
    """
    kind, _, rest = text.partition(":")
    name, _, file = text.partition("/")
    if kind == "openai":
        require_file(Path(rest))
        digest = sha256_file(rest)
        known = [row.name for row in ARCHITECTURES.values() if row.sha256 == digest]
        if not known:
            raise ProblemError(
                f"{rest} is none of the files that OpenAI published ({digest[:16]}…)"
            )
        return ClipSource(known[0], rest, cache)
    if kind == "open_clip" and Path(file).is_file():
        return ClipSource(name, file, cache)
    if text not in ARCHITECTURES and Path(text).is_dir():
        text = f"hf:{text}"
    try:
        return ClipSource(text, cache=cache)
    except ProblemError as error:
        if str(error).startswith("unknown architecture"):
            raise ProblemError(f"{error}, openai:FILE or a folder") from error
        raise
