"""Any model's text side: where it ends in one linear map, and what enters that.

A model is run on a few texts, every matrix product with one of its own parameters is noted, and the
last one is taken for the text projection, if `hidden @ W + b` is what the model itself gives,
whenever texts are read. They are sorted by length and read without the padding behind their end,
where a few texts show that this changes no hidden state (by a mask over it, or a causal one).
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

from forgetting.errors import ProblemError, shown
from forgetting.io import FLOATS, raw
from forgetting.models import modules, reading
from forgetting.models.loading import load_model
from forgetting.models.modules import maybe_transpose, share_memory, tensors
from forgetting.models.reading import Padding, Product, Tokenize, Tokens

BATCH = 256  # texts of similar lengths that are read together
PROBES = ("", "a cat", "a photo of a dog on a red sofa.", "seven")  # of different lengths
PROBED = (0, 3)  # of them, read again without their padding
ROUNDING = 64  # units in the last place by which that may change a hidden state

T = TypeVar("T")
_memories: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Encoder:
    """A model whose text features are `hidden @ W (+ b)`. `read_encoder` makes one."""

    model: nn.Module
    tokenize: Tokenize | None  # None: it reads no texts
    name: str  # of the projection's tensor within the model
    weight: Tensor  # that tensor
    transposed: bool  # whether it holds `W^T`
    bias: Tensor | None  # (d,)
    normalised: bool  # whether the model gives unit-norm embeddings
    padding: Padding | None = None  # what may be left out behind the end of a text
    stamp: Any = None  # tells the state of the model, for `remembered`

    @property
    def projection(self) -> Tensor:
        """`W` (w, d) as a view of the model's own tensor: what is written there is in the model."""
        return maybe_transpose(self.weight, self.transposed)

    @property
    def kind(self) -> str:
        """The model in words: its package and class, and the projection's shape."""
        w, d = self.projection.shape
        return f"{type(self.model).__module__.split('.')[0]} {type(self.model).__name__} {w}x{d}"

    @property
    def bias_name(self) -> str | None:
        """Name of the bias's tensor within the model; None: there is no bias."""
        names = (k for k, x in tensors(self.model).items() if share_memory(x, self.bias))
        return None if self.bias is None else next(names, None)

    def write(self, projection: Tensor) -> None:
        """Put `projection` (w, d) in the place of `W`, rounded once to the model's dtype."""
        with torch.no_grad():
            self.projection.copy_(projection)

    def hidden(self, texts: Sequence[str], progress: str = "") -> Tensor:
        """What enters the last linear map, (n, w), on the CPU: float32, or float64 if the model is.
        `progress` stands beside a progress bar; there is none without. ProblemError for texts that
        the model cannot read, or embeddings that are not `hidden @ W + b`."""
        return self._read(texts, progress)[0]

    def embeddings(self, texts: Sequence[str]) -> Tensor:
        """The model's own text features, (n, d), on the CPU."""
        return self._read(texts, "")[1]

    def _read(self, texts: Sequence[str], progress: str) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        w, d = self.projection.shape
        hidden = torch.empty(len(texts), w, dtype=dtype, device="cpu")
        embeddings = torch.empty(len(texts), d, dtype=dtype, device="cpu")
        if not len(texts):
            return hidden, embeddings
        inputs = reading.tokens(self.model, self.tokenize, texts)
        ids = reading.token_ids(inputs)
        width = ids.shape[-1]
        lengths = torch.full((len(ids),), width, device="cpu")
        if self.padding is not None:
            lengths = self.padding.lengths(ids)
        with tqdm(total=len(texts), desc=progress, unit="text", disable=not progress) as bar:
            for rows in lengths.argsort(stable=True).split(BATCH):
                some = reading.select(inputs, rows, int(lengths[rows].max()))
                features, product = reading.run(self.model, some, self.weight, width)
                if product is None or not _is_linear(
                    features, product.entered, self.projection, self.bias, self.normalised
                ):
                    raise ProblemError(
                        f"the model's text features are not its hidden states times {self.name}"
                    )
                hidden[rows] = product.entered.to("cpu", dtype)
                embeddings[rows] = features.to("cpu", dtype)
                bar.update(len(rows))
        return hidden, embeddings

    def truncated(self, texts: Sequence[str]) -> list[str]:
        """The texts of which the tokenizer does not read the end: without their last letter or
        digit they are the same tokens. Of a text without letters that cannot be known."""
        known = [text for text in texts if re.search(r"\w", text)]
        if not known:
            return []
        shorter = [re.sub(r"\w\W*$", "", text) for text in known]
        both = [reading.tokens(self.model, self.tokenize, some) for some in (known, shorter)]
        whole, cut = map(reading.token_ids, both)
        if whole.shape != cut.shape:
            return []
        return [text for text, a, b in zip(known, whole, cut, strict=True) if torch.equal(a, b)]

    def remembered(self, key: Any, compute: Callable[[], T]) -> T:
        """What `compute` gives, once in a process for the model as it is now: a change of any
        tensor but the projection discards all that is remembered."""
        with reading.LOCK:
            memory = _memories.setdefault(self.model, {})
            if memory.get("stamp") != self.stamp:
                memory.clear()
                memory["stamp"] = self.stamp
            if key not in memory:
                memory[key] = compute()
            return memory[key]

    @property
    def others_sha256(self) -> str:
        """SHA-256 of all tensors of the model but the projection."""
        return self.remembered("others", lambda: modules.others_sha256(self.model, self.name))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what a hidden state depends on beside its tokens: all tensors but the
        projection, and how the model is built."""
        layers = [
            [name, type(module).__qualname__, module.extra_repr()]
            for name, module in self.model.named_modules()
        ]
        config = getattr(self.model, "config", None)
        config = getattr(config, "text_config", config)
        settings = config.to_dict() if hasattr(config, "to_dict") else {}
        for key in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
            settings.pop(key, None)
        parts = [self.others_sha256, layers, settings]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def tokens_sha256(self, texts: Sequence[str]) -> str:
        """SHA-256 of what the tokenizer makes of texts."""
        digest = hashlib.sha256()
        for start in range(0, len(texts), BATCH):
            inputs = reading.tokens(self.model, self.tokenize, texts[start : start + BATCH])
            for name, tensor in inputs.items():
                digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
                digest.update(raw(tensor))
        return digest.hexdigest()


def truncation_warning(truncated: Sequence[str]) -> str:
    """What to say of texts that `Encoder.truncated` gave, of which there is at least one."""
    more = f" and of {len(truncated) - 1} more" if len(truncated) > 1 else ""
    return f"warning: the model reads only the beginning of {shown(truncated[0])}{more}"


def read_encoder(model: Any, tokenize: Tokenize | None = None) -> Encoder:
    """Find the last linear map of a model's text side. ProblemError: there is no single one, or
    weights are tied, quantised, shared or absent.

    Args:
        model: a name, see `forgetting.models.loading`; or any module with `encode_text`,
            `get_text_features` or a `forward` that gives text features: of open_clip (CLIP,
            CustomTextCLIP, CoCa), of transformers (CLIPModel, SiglipModel, ...), OpenAI's own.
        tokenize: from a list of texts to a tensor or a mapping of tensors; a tokenizer of
            transformers may be given as it is. None: that of a named model, or of a
            SentenceTransformer.
    """
    model, tokenize = load_model(model, tokenize)
    model = modules.unwrap(model)
    if not callable(tokenize):
        raise ProblemError(f"tokenize must be callable, from texts to tensors, not {tokenize!r}")
    inputs = reading.tokens(model, tokenize, PROBES)
    features, product = reading.run(model, inputs)
    kind = type(model).__name__
    if product is None or product.entered.ndim != 2 or product.result.shape != features.shape:
        raise ProblemError(
            f"no single last linear map: the text features {tuple(features.shape)} of {kind} are "
            "not made by one product with a plain weight"
        )
    weight = product.parameter
    names = [name for name, tensor in tensors(model).items() if share_memory(tensor, weight)]
    plain = type(weight.data) is Tensor and weight.layout == torch.strided
    if weight.dtype not in FLOATS or not plain or not weight.numel():
        raise ProblemError(f"the projection {names[0]} is empty, sparse, quantised or wrapped")
    projection = maybe_transpose(weight, product.transposed)
    biases = [product.bias]
    if product.bias is None:  # a model may add a parameter behind the product
        biases += [x for x in tensors(model).values() if x.shape == features.shape[1:]]
    ways = [(bias, normalised) for normalised in (False, True) for bias in biases]
    fits = (way for way in ways if _is_linear(features, product.entered, projection, *way))
    bias, normalised = next(fits, (None, None))
    if normalised is None:
        raise ProblemError(
            f"no single last linear map: the text features of {kind} are not hidden @ W + b with "
            f"its last weight, {names[0]}"
        )
    if len(names) > 1:
        raise ProblemError(f"tied weights: the projection {names[0]} is {', '.join(names[1:])} too")
    padding, stamp = _padding(model, inputs, product), _stamp(model, tokenize, product)
    bias = None if bias is None else bias.detach()
    own = names[0], weight, product.transposed, bias, normalised
    return Encoder(model, tokenize, *own, padding, stamp)


def _padding(model: nn.Module, inputs: Tokens, product: Product) -> Padding | None:
    """What may be left out behind the end of a text without a change of hidden states, if any."""
    hidden, ids = product.entered, reading.token_ids(inputs)
    rows, width = torch.tensor(PROBED, device="cpu"), ids.shape[-1]

    def unchanged(inputs: Tokens, expected: Tensor) -> bool:
        try:
            again = reading.run(model, inputs, product.parameter, width)[1].entered
        except (ProblemError, AttributeError):  # it reads texts of one length alone
            return False
        limit = min(ROUNDING * torch.finfo(hidden.dtype).eps, 0.02) * expected.norm(dim=1)
        same = again.shape == expected.shape
        return same and bool(((again - expected).norm(dim=1) <= limit).all())

    if ids.ndim == 2:
        for kept in (0, 1):
            padding = Padding(int(ids[0, -1]), kept)  # the first text is the shortest
            length = int(padding.lengths(ids)[rows].max())
            if length < width and unchanged(reading.select(inputs, rows, length), hidden[rows]):
                return padding
    return None


def _stamp(model: nn.Module, tokenize: Tokenize, product: Product) -> Any:
    """What changes whenever another tensor than the projection does: where each lies and how often
    it was written to; and what the model reads in PROBES, for writing to `.data`."""
    places = [
        (name, x.data_ptr(), None if x.is_inference() else x._version)
        for name, x in tensors(model).items()
        if x is not product.parameter
    ]
    return tokenize, places, modules.tensor_sha256(product.entered)


def _is_linear(
    features: Tensor, hidden: Tensor, projection: Tensor, bias: Tensor | None, normalised: bool
) -> bool:
    """Whether features (n, d) are hidden (n, w) @ W + b: to half of the digits of their dtype."""
    if hidden.ndim != 2 or not torch.isfinite(features).all():
        return False
    h, w, given = hidden.double(), projection.double(), features.double()
    made = h @ w
    size = made.norm(dim=1)
    if bias is not None:
        made, size = made + bias.double(), size + bias.double().norm()
    if normalised:
        given = normalize(given, dim=1) * made.norm(dim=1, keepdim=True)
        if not torch.allclose(features.double().norm(dim=1), h.new_ones(()), atol=0.02):
            return False
    eps = torch.finfo(features.dtype).eps
    limit = eps**0.5 * size + 4 * eps * (h.abs() @ w.abs()).norm(dim=1)
    return bool(((given - made).norm(dim=1) <= limit).all())
