"""One forward pass of a model's text side, in which its last product with a parameter is noted.

No model library is imported: a tokenizer is given the options that its signature has, and a model
is called by whichever of the usual methods it has.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from forgetting.errors import ProblemError, reason
from forgetting.models.modules import tensors

PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "addmm")
SUMS = ("add", "__add__", "__radd__", "add_", "__iadd__")

Tokenize = Callable[[list[str]], Any]
Tokens = Tensor | dict[str, Tensor]  # (n, length), or several such by name


@dataclass
class Memory:
    """What this process knows of one model.

    Attributes:
        lock: held while the model is read, so that threads do not meet in its modes.
        stamp: tells the state of the model that `values` were computed in.
    """

    lock: Any = field(default_factory=RLock)
    stamp: Any = None
    values: dict[Any, Any] = field(default_factory=dict)


_memories: WeakKeyDictionary[nn.Module, Memory] = WeakKeyDictionary()
_memories_lock = Lock()


def memory_of(model: nn.Module) -> Memory:
    """The memory of a model, which ends with it."""
    with _memories_lock:
        return _memories.setdefault(model, Memory())


@dataclass(frozen=True)
class Product:
    """A product with a parameter: `result = entered @ W (+ bias)`."""

    parameter: Tensor
    transposed: bool
    entered: Tensor
    bias: Tensor | None
    result: Tensor


class _Observer(TorchFunctionMode):
    """Notes the last product with one of `parameters`, by identity, transposed views included.

    Where texts are shorter than the `context` of the model, its table of positions and its mask
    are cut to them; models that do not do so themselves would raise. Only calls of this thread are
    observed, and the model itself is not touched.
    """

    def __init__(self, parameters: Sequence[Tensor], length: int, context: int) -> None:
        super().__init__()
        self.known = {id(x) for x in parameters}
        self.length, self.context = length, context
        self.last: Product | None = None  # only that: what enters all layers is a lot of memory
        self.times: Counter[int] = Counter()  # products with each parameter
        self.lookups: set[int] = set()  # parameters that are read as a table

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if self.length < self.context:
            if name in SUMS and len(args) > 1:
                a, b = args[:2]
                args = (self._cut(a, b), self._cut(b, a), *args[2:])
            if isinstance(mask := kwargs.get("attn_mask"), Tensor):
                kwargs["attn_mask"] = self._cut_mask(mask)
        result = func(*args, **kwargs)
        if name == "embedding":
            self.lookups.add(id(kwargs.get("weight", args[1] if len(args) > 1 else None)))
        elif name in PRODUCTS and isinstance(result, Tensor):
            self._note(name, args, kwargs, result)
        return result

    def _note(self, name: str, args: tuple, kwargs: dict[str, Any], result: Tensor) -> None:
        named = [kwargs.get(key) for key in ("input", "weight", "other", "mat2", "bias")]
        given = [*args, *(x for x in named if x is not None)]
        if name == "addmm":  # bias, input, weight
            given = [given[1], given[2], given[0]]
        if len(given) > 1 and (match := self._parameter(given[1])) is not None:
            parameter, is_view = match
            bias = given[2] if len(given) > 2 and isinstance(given[2], Tensor) else None
            self.last = Product(parameter, is_view != (name == "linear"), given[0], bias, result)
            self.times[id(parameter)] += 1

    def _parameter(self, value: Any) -> tuple[Tensor, bool] | None:
        """The parameter that `value` is, and whether it is a transposed view of it."""
        if id(value) in self.known:
            return value, False
        base = getattr(value, "_base", None)
        if base is not None and id(base) in self.known and value.ndim == base.ndim == 2:
            same = value.data_ptr() == base.data_ptr() and value.shape == base.shape[::-1]
            if same and value.stride() == base.stride()[::-1]:
                return base, True
        return None

    def _cut(self, table: Any, x: Any) -> Any:
        """A table (context, w) as it is added to `x` (n, length, w)."""
        if not (isinstance(table, Tensor) and isinstance(x, Tensor)) or min(table.ndim, x.ndim) < 2:
            return table
        if table.shape[-1] == x.shape[-1] and table.shape[-2] == self.context != x.shape[-2]:
            return table[..., : x.shape[-2], :]
        return table

    def _cut_mask(self, mask: Tensor) -> Tensor:
        if mask.shape[-2:] == (self.context, self.context):
            return mask[..., : self.length, : self.length]
        return mask


def run(
    model: nn.Module, inputs: Tokens, weight: Tensor | None = None, context: int = 0
) -> tuple[Tensor, Product | None]:
    """The features (n, d) of texts, and the product that made them.

    Args:
        inputs: what `tokens` gives, perhaps without padding at the end.
        weight: the parameter of that product; None: of the last one.
        context: the number of tokens before padding was left out; 0: none was.

    Raises:
        ProblemError: a model that cannot read the tokens, or a projection that is tied.
    """
    parameters = list(tensors(model).values())
    if any(x.is_meta for x in parameters):
        raise ProblemError("weights that are not there (on the device meta): load them first")
    device = weight.device if weight is not None else next((x.device for x in parameters), None)
    device = device or torch.device("cpu")
    length = token_ids(inputs).shape[-1]
    observer = _Observer(parameters if weight is None else [weight], length, context)
    no_autocast = torch.autocast(device.type, enabled=False)
    with memory_of(model).lock, torch.no_grad(), _evaluating(model), no_autocast:
        try:
            with observer:
                features = text_features(model, inputs, device)
        except ProblemError:
            raise
        except Exception as error:  # whatever somebody's model raises
            raise ProblemError(
                f"{type(model).__name__} cannot read what the tokenizer gives ({reason(error)}); "
                "do the two belong together?"
            ) from error
    last = observer.last
    if last is None:
        return features, None
    if observer.times[id(last.parameter)] > 1:
        raise ProblemError("the projection is used more than once for a text: shared by modules")
    if id(last.parameter) in observer.lookups:
        raise ProblemError("tied weights: the projection is the table of token embeddings too")
    return features, last


def tokens(model: nn.Module, tokenize: Tokenize, texts: Sequence[str]) -> Tokens:
    """What a tokenizer makes of texts, as tensors on the CPU: one, or several by name.

    Raises:
        ProblemError: a tokenizer that fails, or gives something else.
    """
    try:
        found = tokenize(list(texts), **_options(model, tokenize))
    except Exception as error:  # whatever somebody's tokenizer raises
        raise ProblemError(f"the tokenizer fails ({reason(error)})") from error
    if not isinstance(found, Mapping):
        return _tensor(found, len(texts))
    named = {str(name): _tensor(value, len(texts)) for name, value in found.items()}
    if not named:
        raise ProblemError("the tokenizer gives nothing")
    if _wants_length(model):  # trained without a mask
        named.pop("attention_mask", None)
    return named


def token_ids(inputs: Tokens) -> Tensor:
    """The numbers of the tokens, (n, length)."""
    if isinstance(inputs, Tensor):
        return inputs
    return inputs.get("input_ids", next(iter(inputs.values())))


@dataclass(frozen=True)
class Padding:
    """What stands behind the end of a text, and may be left out.

    Attributes:
        token: its number; kept: how many of them a text needs (1 where the same token ends it).
    """

    token: int
    kept: int

    def lengths(self, ids: Tensor) -> Tensor:
        """How many of the tokens (n, length) each text needs, (n,)."""
        place = torch.arange(1, ids.shape[1] + 1, device="cpu")
        return ((ids != self.token) * place).amax(dim=1).add(self.kept).clamp(2, ids.shape[1])


def select(inputs: Tokens, rows: Tensor, length: int) -> Tokens:
    """Some of the texts, and of these the first `length` tokens."""
    width = token_ids(inputs).shape[-1]

    def some(x: Tensor) -> Tensor:
        return x[rows, :length] if x.ndim == 2 and x.shape[1] == width else x[rows]

    return {k: some(x) for k, x in inputs.items()} if isinstance(inputs, dict) else some(inputs)


def same_rows(a: Tokens, b: Tokens) -> Tensor:
    """Which texts have the same tokens in both, (n,) bool."""
    pairs = [(a, b)] if isinstance(a, Tensor) else [(a[name], b[name]) for name in a]
    if any(x.shape != y.shape for x, y in pairs):
        return torch.zeros(len(token_ids(a)), dtype=torch.bool)
    return torch.stack([(x == y).flatten(1).all(dim=1) for x, y in pairs]).all(dim=0)


def _options(model: nn.Module, tokenize: Any) -> dict[str, Any]:
    """What a tokenizer has to be given: transformers' to make padded tensors, OpenAI's to cut."""
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
    """Whether texts must be padded to the model's length: SigLIP reads the last token."""
    return "siglip" in str(getattr(getattr(model, "config", None), "model_type", ""))


def _context(model: nn.Module, tokenize: Any) -> int | None:
    """The largest number of tokens that a model of transformers reads."""
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
    if value.is_meta or value.layout != torch.strided or value.ndim < 1 or len(value) != count:
        raise ProblemError(
            f"the tokenizer gives a tensor of shape {tuple(value.shape)} on {value.device} for "
            f"{count} texts"
        )
    return value.cpu()


def text_features(model: nn.Module, inputs: Tokens, device: torch.device) -> Tensor:
    """Text features (n, d), by the method that the model has for them."""
    named = isinstance(inputs, dict)
    put = {k: x.to(device) for k, x in inputs.items()} if named else inputs.to(device)
    if callable(encode := getattr(model, "encode_text", None)):
        known = inspect.signature(encode).parameters
        options = {"normalize": False} if "normalize" in known else {}
        found = encode(put["input_ids"] if named else put, **options)
    else:
        read = getattr(model, "get_text_features", model)
        known = inspect.signature(read if read is not model else model.forward).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
        if named:
            found = read(**{k: x for k, x in put.items() if k in known or open_ended})
        else:
            found = read(input_ids=put) if "input_ids" in known else read(put)
    for key in ("text_embeds", "pooler_output"):
        if isinstance(value := getattr(found, key, None), Tensor):
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
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within, and every module's own mode again behind it. A model that is in
    evaluation mode is not touched."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
