"""One forward pass of a model's text side, in which its last product with a parameter is noted.
No model library is imported."""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from forgetting.errors import ProblemError
from forgetting.io import foreign
from forgetting.models.modules import SENTENCE, is_sentence_transformer, tensors

PRODUCTS = ("linear", "matmul", "__matmul__", "mm")
SUMS = ("add", "__add__", "__radd__", "add_", "__iadd__")
LOCK = RLock()  # held while a model is read, so that threads do not meet in its modes

Tokenize = Callable[[list[str]], Any]
Tokens = dict[str, Tensor]  # (n, length) each; a tokenizer's only tensor is called ""


class Product(NamedTuple):
    """A product with a parameter: `result = entered @ W (+ bias)`."""

    parameter: Tensor
    transposed: bool
    entered: Tensor
    bias: Tensor | None
    result: Tensor


class _Observer(TorchFunctionMode):
    """Notes the last product with one of `parameters`, by identity, transposed views included.

    Where texts are shorter than the `context` of the model, its table of positions and its mask
    are cut to them; models that do not do so themselves would raise.
    """

    def __init__(self, parameters: Sequence[Tensor], length: int, context: int) -> None:
        super().__init__()
        self.known = {id(x) for x in parameters}
        self.length, self.context = length, context
        self.last: Product | None = None  # only that: what enters all layers is a lot of memory
        self.times: Counter[int] = Counter()  # products with each parameter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if self.length < self.context:
            if name in SUMS and len(args) > 1:
                a, b = args[:2]
                args = (self._cut(a, b), self._cut(b, a), *args[2:])
            mask = kwargs.get("attn_mask")
            if isinstance(mask, Tensor) and mask.shape[-2:] == (self.context, self.context):
                kwargs["attn_mask"] = mask[..., : self.length, : self.length]
        result = func(*args, **kwargs)
        match = self._parameter(args[1]) if name in PRODUCTS and len(args) > 1 else None
        if match is not None:
            parameter, is_view = match
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            self.last = Product(parameter, is_view != (name == "linear"), args[0], bias, result)
            self.times[id(parameter)] += 1
        return result

    def _parameter(self, value: Any) -> tuple[Tensor, bool] | None:
        """The parameter that `value` is, and whether it is a transposed view of it."""
        if id(value) in self.known:
            return value, False
        base = getattr(value, "_base", None)
        if id(base) in self.known and value.ndim == 2 and value.shape == base.shape[::-1]:
            same = value.data_ptr() == base.data_ptr() and value.stride() == base.stride()[::-1]
            return (base, True) if same else None
        return None

    def _cut(self, table: Any, x: Any) -> Any:
        """A table (context, w) as it is added to `x` (n, length, w)."""
        if not (isinstance(table, Tensor) and isinstance(x, Tensor)) or min(table.ndim, x.ndim) < 2:
            return table
        if table.shape[-1] == x.shape[-1] and table.shape[-2] == self.context != x.shape[-2]:
            return table[..., : x.shape[-2], :]
        return table


def run(
    model: nn.Module, inputs: Tokens, weight: Tensor | None = None, context: int = 0
) -> tuple[Tensor, Product | None]:
    """The features (n, d) of texts, and the product that made them, in evaluation mode. A model
    that is in that mode is not touched. ProblemError if it cannot read the tokens, or uses the
    parameter more than once. `weight`: the parameter of that product; None: of the last one.
    `context`: the number of tokens before padding was left out of `inputs`; 0: none was."""
    parameters = list(tensors(model).values())
    if any(x.is_meta for x in parameters):
        raise ProblemError("weights that are not there (on the device meta): load them first")
    device = (parameters[0] if weight is None else weight).device if parameters else "cpu"
    inputs = {name: x.to(device) for name, x in inputs.items()}
    length = token_ids(inputs).shape[-1]
    observer = _Observer(parameters if weight is None else [weight], length, context)
    no_autocast = torch.autocast(torch.device(device).type, enabled=False)
    with LOCK, torch.no_grad(), no_autocast:
        training = [module for module in model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            with observer, foreign(f"{type(model).__name__} cannot read what the tokenizer gives"):
                features = text_features(model, inputs)
        finally:
            for module in training:
                module.training = True
    if observer.last is not None and observer.times[id(observer.last.parameter)] > 1:
        raise ProblemError("the projection is used more than once for a text: shared by modules")
    return features, observer.last


def tokens(model: nn.Module, tokenize: Tokenize, texts: Sequence[str]) -> Tokens:
    """What a tokenizer makes of texts, as tensors on the CPU; ProblemError if it fails."""
    with foreign("the tokenizer fails"):
        found = tokenize(list(texts), **_options(model, tokenize))
        found = found if isinstance(found, Mapping) else {"": found}
        inputs = {str(name): torch.as_tensor(value).cpu() for name, value in found.items()}
        if not inputs or any(len(x) != len(texts) for x in inputs.values()):
            shapes = [tuple(x.shape) for x in inputs.values()]
            raise ValueError(f"tensors of shape {shapes} for {len(texts)} texts")
    if _is_siglip(model):  # trained without a mask
        inputs.pop("attention_mask", None)
    return inputs


def token_ids(inputs: Tokens) -> Tensor:
    """The numbers of the tokens, (n, length)."""
    return inputs.get("input_ids", next(iter(inputs.values())))


class Padding(NamedTuple):
    """What stands behind the end of a text, and may be left out."""

    token: int
    kept: int  # of them a text needs: 1 where the same token ends it

    def lengths(self, ids: Tensor) -> Tensor:
        """How many of the tokens (n, length) each text needs, (n,)."""
        place = torch.arange(1, ids.shape[1] + 1, device="cpu")
        return ((ids != self.token) * place).amax(dim=1).add(self.kept).clamp(2, ids.shape[1])


def select(inputs: Tokens, rows: Tensor, length: int) -> Tokens:
    """Some of the texts, and of these the first `length` tokens."""
    full = token_ids(inputs).shape
    cut = {name: x[:, :length] if x.shape == full else x for name, x in inputs.items()}
    return {name: x[rows] for name, x in cut.items()}


def _is_siglip(model: nn.Module) -> bool:
    """Whether the last token is read, so that texts must be padded to the model's length."""
    return "siglip" in str(getattr(getattr(model, "config", None), "model_type", ""))


def _options(model: nn.Module, tokenize: Any) -> dict[str, Any]:
    """What a tokenizer has to be given: transformers' to make padded tensors, OpenAI's to cut."""
    if not hasattr(tokenize, "model_input_names"):
        try:
            known = inspect.signature(tokenize).parameters
        except (TypeError, ValueError):
            return {}
        return {"truncate": True} if "truncate" in known else {}
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    lengths = tokenize.model_max_length, getattr(config, "max_position_embeddings", None)
    longest = min((x for x in lengths if isinstance(x, int) and 0 < x < 2**20), default=None)
    padding = "max_length" if _is_siglip(model) and longest else True
    options = {"truncation": True, "return_tensors": "pt", "padding": padding}
    return options | ({} if longest is None else {"max_length": longest})


def text_features(model: nn.Module, inputs: Tokens) -> Tensor:
    """Text features (n, d), by the method that the model has for them."""
    read = getattr(model, "encode_text", None) or getattr(model, "get_text_features", model)
    known = inspect.signature(model.forward if read is model else read).parameters
    ids = token_ids(inputs)
    options = {name: x for name, x in inputs.items() if name in known and x is not ids}
    if "normalize" in known:
        options["normalize"] = False
    whole = is_sentence_transformer(model)
    found = model(dict(inputs))[SENTENCE] if whole else read(ids, **options)
    for key in ("text_embeds", "pooler_output"):
        found = getattr(found, key, found)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor) or found.ndim != 2:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ProblemError(
            f"{type(model).__name__} gives no text features (n, d) for texts, but {shape}"
        )
    return found
