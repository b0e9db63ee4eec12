"""Anybody's text tower: where it ends in one linear map, and what enters that.

A model is run on a few texts, every matrix product with one of its own parameters is noted, and the
last one is taken for the text projection: whether it is a parameter (OpenAI, open_clip) or an
`nn.Linear`, with a bias or without. It is believed only where `hidden @ W + b` is what the model
itself says, whenever texts are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

from forgetting.errors import ProblemError, line
from forgetting.io import FLOATS, raw
from forgetting.models.modules import (
    maybe_transpose,
    quantised,
    share_memory,
    tensor_sha256,
    tensors,
    text_sha256,
    unwrap_compiled,
)
from forgetting.models.reading import BATCH, Tokenize, run, tokens

PROBES = ("", "a cat", "a photo of a dog on a red sofa.", "seven")  # of different lengths


@dataclass(frozen=True)
class Encoder:
    """A model that ends, for texts, in `hidden @ W (+ b)`. `read_encoder` makes one.

    Attributes:
        model: the model itself; tokenize: texts -> what it reads; name: of the projection's
            tensor within the model; weight: that tensor; transposed: whether it holds `W^T`.
        bias: (d,), or None; normalised: whether the model gives unit-norm embeddings.
    """

    model: nn.Module
    tokenize: Tokenize
    name: str
    weight: Tensor
    transposed: bool
    bias: Tensor | None
    normalised: bool

    @property
    def projection(self) -> Tensor:
        """`W` (w, d) as a view of the model's own tensor: what is written there is in the model."""
        return maybe_transpose(self.weight, self.transposed)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def kind(self) -> str:
        """The model in words: its class, and the projection's shape."""
        w, d = self.projection.shape
        return f"{type(self.model).__module__.split('.')[0]} {type(self.model).__name__} {w}x{d}"

    @property
    def bias_name(self) -> str | None:
        """Name of the bias's tensor within the model; None: there is no bias."""
        if self.bias is None:
            return None
        found = (name for name, x in tensors(self.model).items() if share_memory(x, self.bias))
        return next(found, None)

    def write(self, projection: Tensor) -> None:
        """Put `projection` (w, d) in the place of `W`, rounded once to the model's dtype.

        Raises:
            ProblemError: another shape, or a model that cannot be written to.
        """
        if projection.shape != self.projection.shape:
            raise ProblemError(
                f"a projection of shape {tuple(projection.shape)} is not one of "
                f"{tuple(self.projection.shape)}"
            )
        rounded = projection.to(self.device, self.dtype)
        if not torch.isfinite(rounded).all():
            raise ProblemError(f"the changed projection is out of the range of {self.dtype}")
        try:
            with torch.no_grad():
                self.projection.copy_(rounded)
        except RuntimeError as error:  # made in inference mode, or shared memory that is read-only
            raise ProblemError(f"the projection cannot be written ({line(error)})") from error

    def hidden(self, texts: Sequence[str], progress: str = "", batch: int = BATCH) -> Tensor:
        """What enters the last linear map, (n, w), on the CPU: float32, or float64 if the model is.

        Args:
            progress: the words beside a progress bar; none without.

        Raises:
            ProblemError: texts that the model cannot read, or embeddings that are not
                `hidden @ W + b`.
        """
        return self._read(texts, progress, batch)[0]

    def embeddings(self, texts: Sequence[str]) -> Tensor:
        """The model's own text features, (n, d), on the CPU."""
        return self._read(texts, "", BATCH)[1]

    def _read(self, texts: Sequence[str], progress: str, batch: int) -> tuple[Tensor, Tensor]:
        keep = torch.float64 if self.dtype == torch.float64 else torch.float32
        w, d = self.projection.shape
        rows, found = [torch.empty(0, w, dtype=keep)], [torch.empty(0, d, dtype=keep)]
        bar = tqdm(total=len(texts), desc=progress, unit="text", disable=not progress)
        with bar:
            for start in range(0, len(texts), batch):
                part = list(texts[start : start + batch])
                features, product = run(self.model, self.tokenize, part, self.weight)
                linear = product is not None and _is_linear(
                    features, product.entered, self.projection, self.bias, self.normalised
                )
                if not linear:
                    raise ProblemError(
                        f"the model's text features are not its hidden states times {self.name}"
                    )
                rows.append(product.entered.to("cpu", keep))
                found.append(features.to("cpu", keep))
                bar.update(len(part))
        return torch.cat(rows), torch.cat(found)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what a hidden state depends on: the text tower's tensors but the projection,
        and how it is built. Not of the tokenizer, which `tokens_sha256` stands for."""
        return text_sha256(self.model, self.weight)

    def tokens_sha256(self, texts: Sequence[str]) -> str:
        """SHA-256 of what the tokenizer makes of texts."""
        found = hashlib.sha256()
        for start in range(0, len(texts), BATCH):
            inputs = tokens(self.model, self.tokenize, list(texts[start : start + BATCH]))
            parts = inputs if isinstance(inputs, dict) else {"": inputs}
            for name, tensor in parts.items():
                found.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
                found.update(raw(tensor))
        return found.hexdigest()

    def hashes(self) -> dict[str, str]:
        """Name -> SHA-256 of every tensor of the model but the projection."""
        return {
            name: tensor_sha256(tensor)
            for name, tensor in tensors(self.model).items()
            if tensor is not self.weight
        }


def read_encoder(model: Any, tokenize: Tokenize) -> Encoder:
    """Find the last linear map of a model's text side.

    Args:
        model: open_clip's CLIP, CustomTextCLIP or CoCa; transformers' CLIPModel,
            CLIPTextModelWithProjection, SiglipModel, ChineseCLIPModel, AltCLIPModel and their like;
            OpenAI's own; any module with `encode_text`, `get_text_features` or a `forward` that
            gives text features.
        tokenize: from a list of texts to a tensor or a mapping of tensors; a tokenizer of
            transformers may be given as it is.

    Raises:
        ProblemError: one line with the reason: no single last linear map, tied or quantised
            weights, a projection that two modules share, weights that are not there.
    """
    model = unwrap_compiled(model)
    if not callable(tokenize):
        raise ProblemError(f"tokenize must be callable, from texts to tensors, not {tokenize!r}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ProblemError(
            "the model is a TorchScript program, whose last linear map cannot be seen; load it as "
            "a module (clip.load(name, jit=False), or openai:FILE)"
        )
    if found := quantised(model):
        raise ProblemError(f"quantised weights cannot be changed exactly: {found}")
    features, product = run(model, tokenize, list(PROBES))
    if product is None or product.entered.ndim != 2 or product.left.shape != features.shape:
        raise ProblemError(
            f"no single last linear map: the text features {tuple(features.shape)} of "
            f"{type(model).__name__} are not made by one product with a weight"
        )
    weight = product.parameter
    names = [name for name, tensor in tensors(model).items() if share_memory(tensor, weight)]
    projection = maybe_transpose(weight, product.transposed)
    bias = None if product.bias is None else product.bias.detach()
    for normalised in (False, True):
        if bias is None and not normalised:
            bias = _constant(model, features, product.entered, projection)
        if _is_linear(features, product.entered, projection, bias, normalised):
            break
    else:
        raise ProblemError(
            f"no single last linear map: the text features of {type(model).__name__} are not "
            f"hidden @ W + b with its last weight, {names[0]}"
        )
    if len(names) > 1:
        raise ProblemError(f"tied weights: the projection {names[0]} is {', '.join(names[1:])} too")
    if weight.dtype not in FLOATS or type(weight.data) is not Tensor:
        raise ProblemError(f"the projection {names[0]} is quantised or wrapped: {weight.dtype}")
    return Encoder(model, tokenize, names[0], weight, product.transposed, bias, normalised)


def _is_linear(
    features: Tensor,
    hidden: Tensor,
    projection: Tensor,
    bias: Tensor | None,
    normalised: bool,
) -> bool:
    """Whether features (n, d) are hidden (n, w) @ W + b: to half of the digits of their dtype, and
    to rounding of the sums where little is left of them."""
    if hidden.ndim != 2 or not torch.isfinite(features).all():
        return False
    h, w, found = hidden.double(), projection.double(), features.double()
    made = h @ w
    size = made.norm(dim=1)
    if bias is not None:
        made, size = made + bias.double(), size + bias.double().norm()
    if normalised:
        found = normalize(found, dim=1) * made.norm(dim=1, keepdim=True)
        if not torch.allclose(features.double().norm(dim=1), h.new_ones(()), atol=0.02):
            return False
    eps = torch.finfo(features.dtype).eps
    limit = eps**0.5 * size + 4 * eps * (h.abs() @ w.abs()).norm(dim=1)
    return bool(((found - made).norm(dim=1) <= limit).all())


def _constant(
    model: nn.Module, features: Tensor, hidden: Tensor, projection: Tensor
) -> Tensor | None:
    """A parameter (d,) that the model adds behind the product; None: it adds none."""
    rest = features.double() - hidden.double() @ projection.double()  # (n, d)
    limit = torch.finfo(features.dtype).eps ** 0.5 * features.double().norm(dim=1).max()
    if (rest.norm(dim=1) <= limit).all():
        return None
    for tensor in tensors(model).values():
        fits = tensor.shape == rest.shape[1:] and tensor.is_floating_point()
        if fits and ((rest - tensor.double()).norm(dim=1) <= limit).all():
            return tensor.detach()
    return None
