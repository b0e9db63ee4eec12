"""Anybody's text tower: where it ends in one linear map, and what enters that.

No library is imported for it. A model is run on a few texts, every matrix product with one of its
own parameters is noted, and the last one is taken for the text projection: whether it is a
parameter (OpenAI, open_clip) or an `nn.Linear`, with a bias or without. It is believed only where
`hidden @ W + b` is what the model itself says, whenever texts are read.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from forgetting.checks import FLOATS, ProblemError, line, shown
from forgetting.files import raw

PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "addmm")
PROBES = ("", "a cat", "a photo of a dog on a red sofa.", "seven")  # of different lengths
# Names of what a text never meets; whatever else a model holds counts as its text tower.
NOT_TEXT = (
    *("visual", "vision", "image", "logit_scale", "logit_bias", "text_decoder", "input_resolution"),
    *("trunk", "context_length", "vocab_size"),
)
BATCH = 256
QUANTISED = ("quantized", "bitsandbytes", "torchao", "awq", "gptq", "hqq", "quanto")
SHORT = 16  # hex digits of a tensor's hash that are kept

Tokenize = Callable[[list[str]], Any]


@dataclass(frozen=True)
class _Product:
    """A product of something with a parameter: `entered @ W (+ bias)`."""

    parameter: Tensor
    transposed: bool
    entered: Tensor
    bias: Tensor | None
    left: Tensor


class _Notes(TorchFunctionMode):
    """Note the last product with one of `parameters` (by identity, transposed views too)."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.known = {id(x) for x in parameters}
        self.last: _Product | None = None  # only that: what enters all layers is a lot of memory
        self.times: Counter[int] = Counter()  # products with each parameter
        self.lookups: set[int] = set()  # parameters that are read as a table

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "embedding":
            table = kwargs.get("weight", args[1] if len(args) > 1 else None)
            self.lookups.add(id(table))
        elif name in PRODUCTS and isinstance(result, Tensor):
            named = [kwargs.get(k) for k in ("input", "weight", "other", "mat2", "bias")]
            given = [*args, *(x for x in named if x is not None)]
            if name == "addmm":  # bias, input, weight
                given = [given[1], given[2], given[0]]
            if len(given) > 1 and (found := self._parameter(given[1])) is not None:
                parameter, flipped = found
                bias = given[2] if len(given) > 2 and isinstance(given[2], Tensor) else None
                transposed = flipped != (name == "linear")
                self.last = _Product(parameter, transposed, given[0], bias, result)
                self.times[id(parameter)] += 1
        return result

    def _parameter(self, value: Any) -> tuple[Tensor, bool] | None:
        """The parameter that `value` is, and whether it is a transposed view of it."""
        if id(value) in self.known:
            return value, False
        base = getattr(value, "_base", None)
        if base is not None and id(base) in self.known and value.ndim == base.ndim == 2:
            turned = value.data_ptr() == base.data_ptr() and value.stride() == base.stride()[::-1]
            if turned and value.shape == base.shape[::-1]:
                return base, True
        return None


@dataclass(frozen=True)
class Tower:
    """A model that ends, for texts, in `hidden @ W (+ b)`. `read_tower` makes one.

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
        weight = self.weight.detach()
        return weight.T if self.transposed else weight

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
        found = (name for name, x in tensors(self.model).items() if _shares(x, self.bias))
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
                features, product = _run(self.model, self.tokenize, part, self.weight)
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
        found = hashlib.sha256(json.dumps(_described(self.model)).encode())
        for name, tensor in tensors(self.model).items():
            root = name.split(".")[0]
            if tensor is not self.weight and not root.startswith(NOT_TEXT):
                found.update(json.dumps([name, tensor_sha256(tensor)]).encode())
        return found.hexdigest()

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


def read_tower(model: Any, tokenize: Tokenize) -> Tower:
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
    if not isinstance(model, nn.Module):
        raise ProblemError(f"model must be a torch module, not {shown(model)}")
    if not callable(tokenize):
        raise ProblemError(f"tokenize must be callable, from texts to tensors, not {tokenize!r}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ProblemError(
            "the model is a TorchScript program, whose last linear map cannot be seen; load it as "
            "a module (clip.load(name, jit=False), or openai:FILE)"
        )
    model = getattr(model, "_orig_mod", model)  # torch.compile keeps the module there
    if quantised := _quantised(model):
        raise ProblemError(f"quantised weights cannot be changed exactly: {quantised}")
    features, product = _run(model, tokenize, list(PROBES))
    if product is None or product.entered.ndim != 2 or product.left.shape != features.shape:
        raise ProblemError(
            f"no single last linear map: the text features {tuple(features.shape)} of "
            f"{type(model).__name__} are not made by one product with a weight"
        )
    weight = product.parameter
    names = [name for name, tensor in tensors(model).items() if _shares(tensor, weight)]
    projection = weight.detach().T if product.transposed else weight.detach()
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
    return Tower(model, tokenize, names[0], weight, product.transposed, bias, normalised)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its names, also where two names are one tensor."""
    found = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes, row by row."""
    tensor = tensor.detach()
    head = json.dumps([str(tensor.dtype), list(tensor.shape)]).encode()
    found = hashlib.sha256(head)
    found.update(raw(tensor))
    return found.hexdigest()


def tokens(model: nn.Module, tokenize: Tokenize, texts: list[str]) -> Tensor | dict[str, Tensor]:
    """What a tokenizer makes of texts, as tensors on the CPU: one, or several by name.

    Raises:
        ProblemError: a tokenizer that fails, or gives something else.
    """
    try:
        found = tokenize(texts, **_options(model, tokenize))
    except Exception as error:  # whatever somebody's tokenizer raises
        raise ProblemError(f"the tokenizer fails ({_reason(error)})") from error
    if isinstance(found, Mapping):
        found = {str(name): _tensor(value, len(texts)) for name, value in found.items()}
        if _wants_length(model):  # they were trained without a mask
            found.pop("attention_mask", None)
        return found
    return _tensor(found, len(texts))


def _options(model: nn.Module, tokenize: Any) -> dict[str, Any]:
    """What a tokenizer has to be told: transformers' to make padded tensors, OpenAI's to cut."""
    if hasattr(tokenize, "model_input_names") and hasattr(tokenize, "pad"):
        limit = _context(model, tokenize)
        options: dict[str, Any] = {"truncation": True, "return_tensors": "pt", "padding": True}
        if limit is not None:
            options["max_length"] = limit
            if _wants_length(model):
                options["padding"] = "max_length"
        return options
    try:
        known = inspect.signature(tokenize).parameters
    except (TypeError, ValueError):
        return {}
    return {"truncate": True} if "truncate" in known else {}


def _wants_length(model: nn.Module) -> bool:
    """Whether texts have to be filled up to the model's length: SigLIP reads the last token."""
    return "siglip" in str(getattr(getattr(model, "config", None), "model_type", ""))


def _context(model: nn.Module, tokenize: Any) -> int | None:
    """The most tokens that a model of transformers reads."""
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    places = getattr(config, "max_position_embeddings", None)
    limits = [getattr(tokenize, "model_max_length", None)]
    if isinstance(places, int):
        kind = str(getattr(config, "model_type", ""))  # RoBERTa counts places from padding on
        offset = getattr(config, "pad_token_id", 0) or 0
        roberta = "roberta" in kind or "altclip" in kind
        limits.append(places - offset - 1 if roberta else places)
    sizes = [x for x in limits if isinstance(x, int) and 0 < x < 2**20]
    return min(sizes, default=None)


def _tensor(value: Any, count: int) -> Tensor:
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ProblemError(
                "the tokenizer gives texts of different lengths, or no numbers; let it fill them "
                "up (padding)"
            ) from error
    if value.ndim < 1 or len(value) != count:
        raise ProblemError(
            f"the tokenizer gives a tensor of shape {tuple(value.shape)} for {count} texts"
        )
    return value.cpu()


def _run(
    model: nn.Module, tokenize: Tokenize, texts: list[str], weight: Tensor | None = None
) -> tuple[Tensor, _Product | None]:
    """The features (n, d) of texts, and the product that made them: the last one, or that with
    `weight`."""
    inputs = tokens(model, tokenize, texts)
    parameters = list(tensors(model).values())
    device = next((x.device for x in parameters if x is weight), None)
    device = device or next((x.device for x in parameters), torch.device("cpu"))
    if any(x.is_meta for x in parameters):
        raise ProblemError("weights that are not there (on the device meta): load them first")
    notes = _Notes(parameters if weight is None else [weight])
    calm = torch.autocast(device.type, enabled=False)
    with torch.no_grad(), _eval(model), calm:
        try:
            with notes:
                features = _features(model, inputs, device)
        except ProblemError:
            raise
        except Exception as error:  # whatever somebody's model raises
            raise ProblemError(
                f"{type(model).__name__} cannot read what the tokenizer gives ({_reason(error)})"
            ) from error
    last = notes.last
    if last is None:
        return features, None
    if notes.times[id(last.parameter)] > 1:
        raise ProblemError("the projection is used more than once for a text: shared by modules")
    if id(last.parameter) in notes.lookups:
        raise ProblemError("tied weights: the projection is the table of token embeddings too")
    return features, last


def _features(model: nn.Module, inputs: Any, device: torch.device) -> Tensor:
    """Text features (n, d) by the model's own way."""
    named = isinstance(inputs, dict)
    put = {k: x.to(device) for k, x in inputs.items()} if named else inputs.to(device)
    if callable(encode := getattr(model, "encode_text", None)):
        ids = put["input_ids"] if named else put
        known = inspect.signature(encode).parameters
        found = encode(ids, **({"normalize": False} if "normalize" in known else {}))
    else:
        read = getattr(model, "get_text_features", model)
        known = inspect.signature(read if read is not model else model.forward).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
        if named:
            put = {k: x for k, x in put.items() if k in known or open_ended}
            found = read(**put)
        else:
            found = read(input_ids=put) if "input_ids" in known else read(put)
    for key in ("text_embeds", "pooler_output"):
        value = getattr(found, key, None)
        if isinstance(value, Tensor):
            found = value
            break
    if isinstance(found, tuple | list) and found and isinstance(found[0], Tensor):
        found = found[0]
    if not isinstance(found, Tensor) or found.ndim != 2:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ProblemError(
            f"{type(model).__name__} gives no text features (n, d) for texts, but {shape}"
        )
    return found


@contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within, and every module's own mode again behind it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


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


def _shares(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers in memory, or some of them."""
    if a is b:
        return True
    try:
        if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr() or not a.numel():
            return False
    except (RuntimeError, NotImplementedError):
        return False
    spans = [
        (x.data_ptr(), x.data_ptr() + (x.element_size() * _extent(x) if x.numel() else 0))
        for x in (a, b)
    ]
    return spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]


def _extent(x: Tensor) -> int:
    return 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))


def _quantised(model: nn.Module) -> str:
    """The first module whose weights are quantised, in words; empty: none."""
    for name, module in model.named_modules():
        where = type(module).__module__.lower()
        packed = hasattr(module, "_packed_params")
        if packed or any(word in where for word in QUANTISED):
            return f"{name or 'the model'} is a {type(module).__name__}"
    for name, x in tensors(model).items():
        if x.is_quantized or (name.endswith("weight") and x.dtype in (torch.int8, torch.uint8)):
            return f"{name} is {x.dtype}"
    return ""


def _described(model: nn.Module) -> list[Any]:
    """How a model is built, as far as its numbers do not say: classes, activations, settings."""
    parts = [
        [name, type(module).__qualname__, module.extra_repr()]
        for name, module in model.named_modules()
        if not name.split(".")[0].startswith(NOT_TEXT)
    ]
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    text = config.to_dict() if hasattr(config, "to_dict") else {}
    drop = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    return [parts, {k: str(v) for k, v in sorted(text.items()) if k not in drop}]


def _reason(error: Exception) -> str:
    """An error in one line."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return line(text[:200])
