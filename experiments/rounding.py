"""What rounding does to a forgotten class: whether it comes back, and whether text alone can tell.

    python -m experiments rounding [--features DIR] [--dataset SET] [--classes N|all]
        [--target TARGET] [--margin X] [--out rounding]

Each class is forgotten alone. Then the projection is rounded, or an index of images, or (without
--features) the whole text tower of the embedded `mini`. docs/truth.md has the tables.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from datasets import clean_name
from experiments.hide import Index, Mini, in_both_spaces, index_parser, table_of, unit
from forgetting.displacement import rounding_error
from forgetting.io import need

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
LEVELS = {"int8": 127, "4 bits": 7}  # on each side of zero
TOWERS = (*DTYPES, "4 bits", "int8 by torch", "int8 by ONNX")
PER_BYTE = 8  # dimensions that product quantisation (PQ) keeps in a byte
Change = Callable[[Tensor], Tensor]


def to_levels(x: Tensor, most: int, of: Tensor | None = None) -> Tensor:
    """The nearest of 2 `most` + 1 values, evenly spaced over each column of (N, m), x or `of`."""
    step = (x if of is None else of).abs().amax(dim=0) / most
    return (x / step).round().clamp(-most, most) * step


def rounded(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """(n, m) in a format, and by how much that changes each number at most."""
    if name in LEVELS:
        return to_levels(x, LEVELS[name]), (x.abs().amax(dim=0) / LEVELS[name] / 2).expand_as(x)
    limits = torch.finfo(DTYPES[name])
    return x.to(DTYPES[name]).to(x), x.abs().clamp_min(limits.tiny) * limits.eps / 2


@torch.no_grad()
def encode(way: str, model: nn.Module, tokens: Tensor, projection: Tensor) -> Tensor:
    """Text embeddings (n, d) of an open_clip model with another projection, rounded."""
    model = deepcopy(model)
    model.text_projection.copy_(projection)
    if way in DTYPES:
        model = model.to(DTYPES[way])
    elif way in LEVELS:  # of each output of all weights of the text side
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and not name.startswith("visual."):
                columns = weight if name == "text_projection" else weight.T  # a view
                columns.copy_(to_levels(columns, LEVELS[way]))
    elif way == "int8 by torch":  # Linear modules, of which the projection is none
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
        model.transformer.get_cast_dtype = lambda: torch.float32  # it looks at a Linear's weight
    else:  # all weights
        quantization, model.forward = need("onnxruntime.quantization"), model.encode_text
        with TemporaryDirectory() as folder:
            exact, small = Path(folder, "exact.onnx"), Path(folder, "small.onnx")
            torch.onnx.export(model, (tokens,), exact, dynamo=False, input_names=["text"])
            quantization.quantize_dynamic(exact, small)
            session = need("onnxruntime").InferenceSession(str(small))
        return torch.tensor(session.run(None, {"text": tokens.numpy()})[0]).double()
    return model.encode_text(tokens).double()


@lru_cache(maxsize=1)
def stores(images: Tensor) -> dict[str, Change]:
    """Name -> what an index that was made for images (N, d) keeps of any (n, d)."""
    dims = images.shape[1]
    quantiser = need("faiss", "faiss-cpu").ProductQuantizer(dims, dims // PER_BYTE, 8)
    quantiser.train(images.float().numpy())

    def product(x: Tensor) -> Tensor:
        return torch.from_numpy(quantiser.decode(quantiser.compute_codes(x.float().numpy())))

    return {"int8": partial(to_levels, most=LEVELS["int8"], of=images), "PQ": product}


def rows_of(
    index: Index, dataset: str, classes: Sequence[str], settings: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """A row for each class and way. In percent: `left exact` and `left`, its images that are found
    without rounding and with it. In points: `rest`, what rounding changes for the other classes of
    its set, and `rest untouched`, the same in the untouched model. `back`: whether it finds an
    image again. `margin`: the forecast's; `margin after`: that of the rounded texts. `error`: see
    `rounding_error`; `bound`: the most that it can be in the format. Printed: `missed`, classes
    that are back and were not at risk; `suspects`, those whose margin after is no larger than that
    of any that is back."""
    bundle = index.bundles[dataset]
    w, hidden = bundle.text_projection.double(), bundle.class_hidden.double()
    images, labels = unit(bundle.image_features), bundle.labels

    def embed(projection: Tensor) -> Tensor:
        return replace(bundle, text_projection=projection).embed(hidden)  # (C, d)

    def recognised(texts: Tensor, images: Tensor) -> Tensor:
        return (unit(images).float() @ unit(texts).float().T).argmax(dim=1) == labels  # (N,)

    formats = {f"projection in {name}": partial(rounded, name) for name in (*DTYPES, *LEVELS)}
    ways = {way: (lambda x, f=f: embed(f(x)[0]), Tensor.clone) for way, f in formats.items()}
    if isinstance(index, Mini):
        source, names = index.source, map(clean_name, bundle.classnames)
        tokens = source.architecture.tokenizer()([bundle.template.format(name) for name in names])
        for way in TOWERS:
            ways[f"model in {way}"] = partial(encode, way, source.model, tokens), Tensor.clone
    for way, store in stores(index.images).items():
        ways |= dict.fromkeys((f"index in {way}", f"edited index in {way}"), (embed, store))
    untouched = {way: recognised(text(w), image(images)) for way, (text, image) in ways.items()}
    plain = recognised(embed(w), images).double()
    both = in_both_spaces(index, dataset, classes, settings)
    for name, (text, vectors) in zip(classes, both, strict=True):
        own, edit, move = bundle.classnames.index(name), text.edit, vectors.edit
        mine = labels == own
        moved = unit(images + (images @ move.right.T) @ move.left.T)
        states = {False: (text, w + edit.left @ edit.right, images), True: (vectors, w, moved)}
        before = {key: recognised(embed(state[1]), state[2]) for key, state in states.items()}
        for way, (text_way, image_way) in ways.items():
            answer, projection, stored = states[is_edited := way.startswith("edited")]
            texts, after = embed(projection), (text_way(projection), image_way(stored))
            was, found, bound = before[is_edited], recognised(*after), torch.nan
            if way in formats:
                most = (hidden.abs() @ formats[way](projection)[1]).norm(dim=1)
                bound = 2 * float((most / texts.norm(dim=1)).max())
            error = max(map(rounding_error, (texts, stored), after))
            shares = {
                "left exact": was[mine].double(),
                "left": found[mine].double(),
                "rest": (found.double() - was.double())[~mine],
                "rest untouched": (untouched[way].double() - plain)[~mine],
            }
            margin = answer.margins[0]
            cosines = unit(after[0]) @ unit(embed(w))[own]  # (C,)
            others = cosines.index_fill(0, torch.tensor(own), -1.0)
            margin_after = float(others.max() - cosines[own])
            yield {
                **{"data set": dataset, "class": name, "way": way},
                **{key: 100 * float(values.mean()) for key, values in shares.items()},
                **{"margin": margin.margin, "error": error, "bound": bound},
                "margin after": torch.nan if is_edited else margin_after,
                "at risk": not margin.survives(error),
                "at risk by bound": way in formats and not margin.survives(bound),
                "back": bool((found & ~was)[mine].any()),
            }


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Round what is forgotten in every way; returns the table."""
    parser = index_parser("rounding", __doc__)
    parser.add_argument("--target", default="specific", help="where a text is sent")
    about = "beta is raised until the margin is so many times the gap before"
    parser.add_argument("--margin", type=float, default=1.0, help=about)
    args = parser.parse_args(argv)
    settings = {"target": args.target, "min_margin": args.margin}
    table = table_of("rounding", args, partial(rows_of, settings=settings))
    shown = table.assign(missed=table["back"] & ~table["at risk"], most=table["left"])
    how = dict.fromkeys(["left exact", "left", "rest", "rest untouched"], "mean")
    how |= {"class": "size", "most": "max", "margin": "min", "error": "max", "bound": "max"}
    how |= dict.fromkeys(["at risk", "at risk by bound", "back", "missed", "suspects"], "sum")
    worst = shown["margin after"].where(shown["back"]).groupby(shown["way"]).transform("max")
    shown["suspects"] = shown["margin after"] <= worst
    groups = shown.groupby("way", sort=False)
    print(groups.agg(how).to_string(float_format="{:.3f}".format, na_rep="-"))
    return table
