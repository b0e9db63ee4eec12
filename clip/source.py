"""ClipSource: texts to hidden states, images to embeddings, with one set of CLIP weights."""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clip.architectures import architecture, identity, openai_url, preprocessing
from engine.files import sha256_file
from engine.log import logger, progress
from forgetting.adapter import ModelIdentity
from forgetting.errors import ProblemError, reason, unknown
from forgetting.io import naming, write_bytes
from forgetting.models.checkpoint import combined_sha256, read_json
from forgetting.models.encoder import BATCH, Encoder, read_encoder, truncation_warning
from forgetting.models.identity import identity as identity_of
from forgetting.models.loading import fetch
from forgetting.models.vocabulary import expand

# Arithmetic of the image encoder. Texts are always read in float32: forgetting starts from them.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# To be changed with `preprocess` or `encode_hidden`: what was cached before is then not used.
ENCODING = "open_clip's preprocessing of the model's own config; state before the projection; 3"


class ClipSource:
    """The CLIP of a name that `architecture` knows, loaded when something must be encoded and not
    before. Without `weights` its published or embedded ones; without a `device` the GPU if there is
    one. Images are encoded in a precision of `PRECISIONS`, by a copy of the model.

    Raises ProblemError: an unknown name, a missing file, or a precision that the device lacks.
    """

    def __init__(
        self,
        arch: str,
        weights: str | Path | None = None,
        cache: str | Path = "cache",
        device: str | torch.device | None = None,
        precision: str = "fp32",
    ) -> None:
        self.arch, self.cache, self.precision = arch, expand(cache), precision
        self.arguments = arch, weights, cache, None, precision  # of another process's source
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if precision not in PRECISIONS:
            raise unknown("precision", precision, PRECISIONS)
        if precision == "fp16" and self.device.type == "cpu":
            raise ProblemError("--precision fp16 needs a GPU; on a CPU take bf16, or fp32")
        self.architecture = architecture(arch)
        if weights is not None:
            if self.architecture.folder is not None:
                raise ProblemError(f"{arch} brings its weights: leave out --weights {weights}")
            if not Path(weights).is_file():
                raise ProblemError(f"weights {weights}: no such file")
            self.architecture = replace(self.architecture, weights=Path(weights), sha256="")
        self.reading = preprocessing(self.architecture)  # refuses what is none, before any work

    @cached_property
    def weights_files(self) -> list[Path]:
        """The files of the checkpoint; downloaded first if need be."""
        folder = self.cache / "weights"
        self.architecture = fetch(self.architecture, folder)
        if (url := openai_url(self.architecture)) is not None:
            path = folder / Path(url).name
            if not path.is_file():
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    torch.hub.download_url_to_file(url, str(path), self.architecture.sha256)
                except Exception as error:  # of the network, or a file with another SHA-256
                    raise ProblemError(
                        f"cannot download {url} ({reason(error)}); put the file at {path} by hand, "
                        "or pass --weights PATH"
                    ) from error
            self.architecture = replace(self.architecture, weights=path)
        return self.architecture.files()

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of the checkpoint file, in hex; of those of its parts if it has several.
        ProblemError for weights that the name does not fit, or that are not what was published."""
        files = self.weights_files
        found = combined_sha256(digests(files, self.cache / "weights" / "sha256.json"))
        if self.architecture.sha256 not in ("", found):
            raise ProblemError(
                f"{files[0]} is not the file that OpenAI published for {self.arch} (SHA-256 "
                f"{found}); delete it, or pass it by --weights PATH"
            )
        self.architecture.check_activation(found)
        return found

    @cached_property
    def fingerprint(self) -> str:
        """Changes with all that an encoding depends on: weights, configuration, preprocessing."""
        parts = [ENCODING, identity(self.architecture), self.weights_sha256]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def model(self) -> nn.Module:
        """The model: float32, `eval()`, on `device`."""
        sha256, file = self.weights_sha256, self.weights_files[0]
        spec = replace(self.architecture, sha256=sha256)
        with naming(f"weights {file}"):
            model = spec.make(spec.read()[0])
        if not hasattr(model, "encode_image") and not hasattr(model, "get_image_features"):
            raise ProblemError(f"{self.arch} is a {type(model).__name__}, which reads no images")
        if self.device.type == "cuda":  # TensorFloat-32 keeps 10 bits of 23
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
        images = "" if self.precision == "fp32" else f", images in {self.precision}"
        about = f"{self.arch} on {self.device}, float32{images}"
        logger.info(f"clip: {about}, weights {sha256[:16]} from {file}")
        model = model.float().eval().requires_grad_(False)
        return model.to(self.device, memory_format=torch.channels_last)  # faster convolutions

    @cached_property
    def encoder(self) -> Encoder:
        """The text side of the model, which ends in one linear map; ProblemError if it does not."""
        with naming(self.arch):
            return read_encoder(self.model, self.architecture.tokenizer())

    @cached_property
    def projection(self) -> Tensor:
        """The last linear map of texts, (w, d), float32 on the CPU."""
        return self.encoder.projection.cpu().float().clone()

    @cached_property
    def bias(self) -> Tensor | None:
        """What the model adds to `hidden @ projection`, (d,) float32 on the CPU; None: nothing."""
        bias = self.encoder.bias
        return None if bias is None else bias.detach().cpu().float().clone()

    @property
    def identity(self) -> ModelIdentity:
        """What an adapter says of the model that it was made for."""
        return identity_of(self.encoder)

    def encode_hidden(self, texts: list[str]) -> Tensor:
        """Hidden states of `texts`, (n, w) float32 on the CPU: the model's text embeddings are
        `hidden @ projection + bias`."""
        if truncated := self.encoder.truncated(texts):
            logger.warning(f"clip: {truncation_warning(truncated)}")
        with naming(self.arch):
            title = "clip: texts" if len(texts) > 10 * BATCH else ""
            return self.encoder.hidden(texts, title).float()

    @cached_property
    def preprocess(self) -> Any:
        """PIL image -> (3, side, side) uint8: resize and crop of the model. Bytes, which are a
        quarter of the floats that `scaled` makes of them on the device."""
        from open_clip.transform import PreprocessCfg, image_transform_v2
        from torchvision.transforms import Compose, PILToTensor

        *shape, _, _ = image_transform_v2(PreprocessCfg(**self.reading), is_train=False).transforms
        return Compose([*shape, PILToTensor()])

    def scaled(self, pictures: Tensor) -> Tensor:
        """Pictures (b, 3, side, side) uint8 as the model takes them: float32, on the device."""
        colours = torch.tensor([self.reading["mean"], self.reading["std"]], device=self.device)
        mean, std = colours[:, :, None, None]
        images = pictures.to(self.device).float().div_(255).sub_(mean).div_(std)
        return images.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def encode_images(self, pictures: Tensor) -> Tensor:
        """Embeddings of pictures (b, 3, side, side) uint8, as `preprocess` gives them: (b, d)
        float32, L2-normalised, on the CPU."""
        model = self.model if self.precision == "fp32" else self._rounded
        images = self.scaled(pictures).to(PRECISIONS[self.precision])
        if self.architecture.is_transformers:
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


def digests(paths: Sequence[str | Path], register: Path) -> list[str]:
    """The SHA-256 of each file, in hex.

    The JSON file `register` remembers them by size, times and inode, for hashing 350 MB takes a
    second. Where it cannot be written, the files are read again next time. Raises OSError for a
    file that cannot be read.
    """
    known, found = _read(register), {}
    absolute = [os.path.abspath(path) for path in paths]
    for path in progress(absolute, "reading files"):
        stat = os.stat(path)
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        entry = known.get(path, [None])
        found[path] = entry if entry[:-1] == stamp else [*stamp, sha256_file(path)]
    if any(known.get(path) != entry for path, entry in found.items()):
        with suppress(ProblemError):
            write_bytes(json.dumps(_read(register) | found).encode(), register)
    return [found[path][-1] for path in absolute]


def _read(register: Path) -> dict[str, list]:
    """What is remembered; nothing if the file is damaged or missing."""
    with suppress(ProblemError):
        if isinstance(content := read_json(register), dict):
            return content
    return {}
