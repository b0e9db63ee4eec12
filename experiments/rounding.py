"""What rounding does to a forgotten class: whether it comes back, and whether text alone can tell.

    python -m experiments rounding [--features DIR] [--dataset SET] [--classes N|all] [--control]

Each class is forgotten alone. Then the projection is rounded, or an index of images, or (without
--features) the whole text tower of the embedded `mini`.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from datasets import clean_name
from experiments.hide import Index, Mini, in_both_spaces, index_parser, report, table_of, unit
from forgetting.displacement import rounding_error
from forgetting.io import need

Change = Callable[[Tensor], Tensor]
PER_BYTE = 8  # dimensions that product quantisation (PQ) keeps in a byte


def to_levels(x: Tensor, most: int, of: Tensor | None = None) -> Tensor:
    """The nearest of 2 `most` + 1 values, evenly spaced over each column of (N, m), x or `of`."""
    step = (x if of is None else of).abs().amax(dim=0) / most
    return (x / step).round().clamp(-most, most) * step


FORMATS: dict[str, Change] = {
    "float16": lambda x: x.half().to(x),
    "bfloat16": lambda x: x.bfloat16().to(x),
    "int8": partial(to_levels, most=127),
    "4 bits": partial(to_levels, most=7),
}
TOWERS = ("float16", "bfloat16", "4 bits", "int8 by torch", "int8 by ONNX")


@torch.no_grad()
def encode(way: str, model: nn.Module, tokens: Tensor, projection: Tensor) -> Tensor:
    """Text embeddings (n, d) of an open_clip model with another projection, rounded."""
    model = deepcopy(model)
    model.text_projection.copy_(projection)
    if way == "4 bits":  # of each output of all weights of the text side
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and not name.startswith("visual."):
                columns = weight if name == "text_projection" else weight.T  # a view
                columns.copy_(FORMATS[way](columns))
    elif way == "int8 by torch":  # Linear modules, of which the projection is none
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
        model.transformer.get_cast_dtype = lambda: torch.float32  # it looks at a Linear's weight
    elif way == "int8 by ONNX":  # all weights
        quantization, model.forward = need("onnxruntime.quantization"), model.encode_text
        with TemporaryDirectory() as folder:
            exact, small = Path(folder, "exact.onnx"), Path(folder, "small.onnx")
            torch.onnx.export(model, (tokens,), exact, dynamo=False, input_names=["text"])
            quantization.quantize_dynamic(exact, small)
            session = need("onnxruntime").InferenceSession(str(small))
        return torch.tensor(session.run(None, {"text": tokens.numpy()})[0]).double()
    else:
        model = model.to(getattr(torch, way))
    return model.encode_text(tokens).double()


@lru_cache(maxsize=1)
def stores(images: Tensor) -> dict[str, Change]:
    """Name -> what an index that was made for images (N, d) keeps of any (n, d)."""
    d = images.shape[1]
    product = need("faiss", "faiss-cpu").ProductQuantizer(d, d // PER_BYTE, 8)
    product.train(images.float().numpy())
    return {
        "int8": partial(to_levels, most=127, of=images),
        "PQ": lambda x: torch.from_numpy(product.decode(product.compute_codes(x.float().numpy()))),
    }


def percent(values: Tensor) -> float:
    return 100 * float(values.double().mean())


def rows_of(
    index: Index, dataset: str, classes: Sequence[str], settings: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """A row for each class and way: percent of its images that are found, points that rounding
    changes for the other classes of its set, and what text says; docs/truth.md has the columns."""
    bundle = index.bundles[dataset]
    w, labels = bundle.text_projection.double(), bundle.labels
    images = unit(bundle.image_features)

    def embed(projection: Tensor) -> Tensor:
        return index.changed(projection).embed(bundle.class_hidden)  # (C, d)

    def recognised(texts: Tensor, images: Tensor) -> Tensor:
        return (unit(images).float() @ unit(texts).float().T).argmax(dim=1) == labels  # (N,)

    # Way -> texts of a projection, images of an index
    ways = {
        f"projection in {name}": (lambda x, f=f: embed(f(x)), Tensor.clone)
        for name, f in FORMATS.items()
    }
    if isinstance(index, Mini):
        prompts = [bundle.template.format(clean_name(name)) for name in bundle.classnames]
        tokens, model = index.source.architecture.tokenizer()(prompts), index.source.model
        for way in TOWERS:
            ways[f"model in {way}"] = partial(encode, way, model, tokens), Tensor.clone
    for way, store in stores(index.images).items():
        ways |= dict.fromkeys((f"index in {way}", f"edited index in {way}"), (embed, store))
    untouched = {way: recognised(text(w), image(images)) for way, (text, image) in ways.items()}
    plain = recognised(embed(w), images)
    both = in_both_spaces(index, dataset, classes, settings)
    for name, (text, vectors) in zip(classes, both, strict=True):
        own = bundle.classnames.index(name)
        mine, move = labels == own, vectors.edit
        rest, others = ~mine, torch.arange(len(bundle.classnames)) != own
        moved = unit(images + (images @ move.right.T) @ move.left.T)
        for way, (text_way, image_way) in ways.items():
            is_edited = way.startswith("edited")
            projection, stored = (w, moved) if is_edited else (w + text.edit.delta, images)
            exact, after = (embed(projection), stored), (text_way(projection), image_way(stored))
            was, found = recognised(*exact), recognised(*after)
            margin = (vectors if is_edited else text).margins[0]
            error = max(map(rounding_error, exact, after))
            near = unit(after[0]) @ embed(w)[own]  # (C,)
            margin_after = float((near[others] - near[own]).max())
            yield {
                **{"data set": dataset, "class": name, "way": way},
                **{"left exact": percent(was[mine]), "left": percent(found[mine])},
                "rest": percent(found[rest]) - percent(was[rest]),
                "rest untouched": percent(untouched[way][rest]) - percent(plain[rest]),
                **{"margin": margin.margin, "error": error, "at risk": not margin.survives(error)},
                "margin after": torch.nan if is_edited else margin_after,
                "back": bool((found & ~was)[mine].any()),
            }


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Round what is forgotten in every way; returns the table."""
    parser = index_parser("rounding", __doc__)
    parser.add_argument("--control", action="store_true", help="beta 0: little is left of a text")
    args = parser.parse_args(argv)
    settings = {"target": "opposite", "min_margin": 0.0} if args.control else {}
    table = table_of("rounding", args, partial(rows_of, settings=settings))
    worst = table["margin after"].where(table["back"]).groupby(table["way"]).transform("max")
    table["suspects"] = table["margin after"] <= worst
    table["missed"] = table["back"] & ~table["at risk"]
    report(table, ["way"])
    counts = table.groupby("way", sort=False)[["back", "at risk", "suspects", "missed"]].sum()
    print(f"\nclasses\n{counts.to_string()}")
    return table
