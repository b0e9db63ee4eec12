"""A model run on texts, and the last product with one of its own parameters noted.

No library is imported for it: a tokenizer is told what its signature knows, and a model is called
in the way that it has.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from forgetting.errors import ProblemError, reason, shown
from forgetting.models.modules import tensors

BATCH = 256
LAST_LETTER = re.compile(r"(.*)[^\W_]", re.DOTALL)
PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "addmm")

Tokenize = Callable[[list[str]], Any]


@dataclass(frozen=True)
class Product:
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
        self.last: Product | None = None  # only that: what enters all layers is a lot of memory
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
                self.last = Product(parameter, transposed, given[0], bias, result)
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


def run(
    model: nn.Module, tokenize: Tokenize, texts: list[str], weight: Tensor | None = None
) -> tuple[Tensor, Product | None]:
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
                f"{type(model).__name__} cannot read what the tokenizer gives ({reason(error)})"
            ) from error
    last = notes.last
    if last is None:
        return features, None
    if notes.times[id(last.parameter)] > 1:
        raise ProblemError("the projection is used more than once for a text: shared by modules")
    if id(last.parameter) in notes.lookups:
        raise ProblemError("tied weights: the projection is the table of token embeddings too")
    return features, last


def tokens(model: nn.Module, tokenize: Tokenize, texts: list[str]) -> Tensor | dict[str, Tensor]:
    """What a tokenizer makes of texts, as tensors on the CPU: one, or several by name.

    Raises:
        ProblemError: a tokenizer that fails, or gives something else.
    """
    try:
        found = tokenize(texts, **_options(model, tokenize))
    except Exception as error:  # whatever somebody's tokenizer raises
        raise ProblemError(f"the tokenizer fails ({reason(error)})") from error
    if isinstance(found, Mapping):
        found = {str(name): _tensor(value, len(texts)) for name, value in found.items()}
        if _wants_length(model):  # they were trained without a mask
            found.pop("attention_mask", None)
        return found
    return _tensor(found, len(texts))


def cut(model: nn.Module, tokenize: Tokenize, texts: Sequence[str]) -> list[str]:
    """The texts of which the tokenizer does not read the end: without their last letter (or digit)
    they are the same tokens. Of a text without letters that cannot be told."""
    shorter = {text: found[1] for text in texts if (found := LAST_LETTER.match(text))}
    known, found = list(shorter), []
    for start in range(0, len(known), BATCH):
        part = known[start : start + BATCH]
        inputs = tokens(model, tokenize, [*part, *(shorter[text] for text in part)])
        same = torch.ones(len(part), dtype=torch.bool)
        for ids in inputs.values() if isinstance(inputs, dict) else (inputs,):
            whole, rest = ids.reshape(len(ids), -1).split(len(part))
            same &= (whole == rest).all(dim=1)
        found += [part[i] for i in same.nonzero()[:, 0].tolist()]
    return found


def warning_of(cut: Sequence[str]) -> str:
    """What to say of texts that `cut` found, of which there is at least one."""
    more = f" and of {len(cut) - 1} more" if len(cut) > 1 else ""
    return f"warning: the model reads only the beginning of {shown(cut[0])}{more}"


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
