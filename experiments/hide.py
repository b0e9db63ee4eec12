"""What still finds a class that is forgotten by the model, hidden in an index, or filtered out.

    python -m experiments hide [--features DIR] [--dataset SET] [--classes N|all] [--out hide]
    python -m experiments hide --draw FILE

Each class is named alone. The images of all sets are searched together. Without --features they are
those of the embedded `mini`; --draw shows one broad search of theirs. docs/search.md has the table.
"""

import random
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize
from yacs.config import CfgNode

import datasets
from clip.audit_texts import audit_rows, with_audit
from clip.bundle import FeatureBundle, load_bundles
from clip.cache import FeatureCache
from clip.features import build_bundle
from clip.retain import GENERIC, exact_context
from clip.source import ClipSource
from datasets.mini import MINI
from datasets.reader import read_image
from engine.cli import COUNT, Parser
from engine.config import read_yaml
from engine.log import logger, progress
from evaluation.plots import COLOURS, drawing
from evaluation.tables import write_table
from forgetting.context import INDEX, Answer, ExactSettings
from forgetting.errors import ProblemError
from forgetting.flag import flag
from forgetting.models.vocabulary import generic_names
from forgetting.problem import LowRankEdit
from trainers.inputs import ALL, Plan, RunInputs

BROADER: dict[str, list[str]] = read_yaml(Path(__file__).with_name("broader.yaml"))
FALSE_ALARMS = 0.005  # of the flag
SAME = 0.9999  # cosine from which a common name is the class's own
FIRST = 100  # images of a broader search
PICTURE = ("MiniShapes", "purple heart", "purple shape")  # of --draw: set, class, query
SHOWN = 12  # images of a row
Encode = Callable[[list[str]], Tensor]  # n texts -> hidden states (n, w)


class Search(NamedTuple):
    """Vectors of images (N, d), queries (n, d) of hidden states (n, w), images not shown (N,)."""

    images: Tensor
    query: Callable[[Tensor], Tensor]
    flagged: Tensor

    def scores(self, queries: Tensor) -> Tensor:
        """(N, n) of queries (n, d); -inf of images that are not shown."""
        return (self.images @ queries.T).masked_fill(self.flagged[:, None], -torch.inf)


class Index:
    """The N images of several sets in one index, and their C classes. `bundles`: of one model, by
    set; `encode`: None without a model."""

    def __init__(self, bundles: dict[str, FeatureBundle], encode: Encode | None = None) -> None:
        self.bundles, self.encode, every = bundles, encode, list(bundles.values())
        pairs = [(dataset, name) for dataset, each in bundles.items() for name in each.classnames]
        self.label = {pair: number for number, pair in enumerate(pairs)}
        self.sets, names = zip(*pairs, strict=True)
        self.names = list(map(datasets.clean_name, names))
        self.set_of = torch.tensor(list(map(list(bundles).index, self.sets)))  # (C,)
        self.labels = torch.cat(
            [each.labels + self.label[name, each.classnames[0]] for name, each in bundles.items()]
        )  # (N,)
        self.images = unit(torch.cat([bundle.image_features for bundle in every]))  # (N, d)
        self.prompts = torch.cat([bundle.class_hidden for bundle in every])  # (C, w)
        self.bare = torch.cat([bundle.forget_hidden for bundle in every])  # (C, w)
        retained = [each.retain_hidden for each in every if each.retain_names] or [self.prompts]
        self.vocabulary = self.embed(torch.cat(retained).unique(dim=0))  # (m, d)
        self.plain = Search(self.images, self.embed, torch.zeros(len(self.labels)).bool())
        self.before = self.found(self.plain)

    def embed(self, hidden: Tensor) -> Tensor:
        """Unit-norm embeddings (n, d) of hidden states (n, w)."""
        return unit(next(iter(self.bundles.values())).embed(hidden.double()))

    def changed(self, projection: Tensor) -> Self:
        """The same with another text projection (w, d), by which texts are embedded."""
        index = copy(self)
        index.bundles = {k: replace(b, text_projection=projection) for k, b in self.bundles.items()}
        return index

    def found(self, search: Search) -> tuple[Tensor, Tensor]:
        """Whether each image is recognised in its own set, (N,), and each class's average precision
        (C,), by evaluation prompts."""
        scores = search.scores(search.query(self.prompts))  # (N, C)
        other_set = self.set_of[self.labels][:, None] != self.set_of  # (N, C)
        nearest = scores.masked_fill(other_set, -torch.inf).argmax(dim=1)
        relevant = self.labels[:, None] == torch.arange(len(self.names))  # (N, C)
        return (nearest == self.labels) & ~search.flagged, average_precision(scores, relevant)

    @cached_property
    def broader(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Broader name -> hidden state (1, w), and which classes it takes in, (C,), two or more."""
        known, found = {}, {}
        for bundle in self.bundles.values():
            known |= zip(bundle.retain_names, bundle.retain_hidden[:, None], strict=True)
        for name, members in BROADER.items():
            hidden = self.encode([name]) if self.encode else known.get(name)
            is_in = [
                word in members or name in word.split() or dataset in members
                for word, dataset in zip(self.names, self.sets, strict=True)
            ]
            if hidden is not None and sum(is_in) > 1:
                found[name] = hidden, torch.tensor(is_in)
        return found


def unit(vectors: Tensor) -> Tensor:
    return normalize(vectors.double(), dim=1)


def average_precision(scores: Tensor, relevant: Tensor) -> Tensor:
    """Of searches with scores and relevant images (N, n): (n,), NaN without a relevant image. An
    image of score -inf is never found."""
    order = scores.argsort(dim=0, descending=True, stable=True)
    hits = relevant.gather(0, order).double()
    precision = hits.cumsum(dim=0) / torch.arange(1, len(hits) + 1)[:, None]
    found = hits * scores.gather(0, order).isfinite()
    return (precision * found).sum(dim=0) / relevant.sum(dim=0)


def answers(
    index: Index, dataset: str, classes: Sequence[str], settings: ExactSettings
) -> list[Answer]:
    """Each class forgotten alone, as ForgetExact does it; other sets' names are listed."""
    inputs, own = RunInputs(), index.bundles[dataset]
    others = [name for name in index.bundles if name != dataset]
    requests = [[name] for name in classes]
    inputs.cfg, inputs.bundles, inputs.encode = CfgNode({"SEED": 0}), index.bundles, index.encode
    inputs.plan = Plan(dataset, own.classnames, requests, others, [], {}, own.retain_names)
    more = {GENERIC: (generic_names(), index.encode(generic_names()))} if index.encode else {}
    context = exact_context(settings, own, list(inputs.others.values()), more=more)
    return context.forget(inputs.with_paraphrases(list(map(inputs.request, requests))))


def of_embeddings(index: Index) -> Index:
    """The same in the space of embeddings: hidden states are unit-norm embeddings, W is I."""

    def embedded(bundle: FeatureBundle) -> FeatureBundle:
        tensors = bundle.tensors.items()
        rows = {name: index.embed(x).float() for name, x in tensors if name.endswith("_hidden")}
        words = {name: rows.pop(name) for name in bundle.extra_tensors if name in rows}
        rows["text_projection"] = torch.eye(bundle.image_features.shape[1])
        return replace(bundle, **rows, text_bias=None, extra_tensors=words)

    encode = index.encode and (lambda texts: index.embed(index.encode(texts)).float())
    return Index({name: embedded(bundle) for name, bundle in index.bundles.items()}, encode)


def in_both_spaces(
    index: Index, dataset: str, classes: Sequence[str], settings: Mapping[str, Any] = {}
) -> Iterator[tuple[Answer, Answer]]:
    """Of each class the answer for the text projection, and that in the space of embeddings."""
    spaces = (index, {}), (of_embeddings(index), INDEX)
    both = [answers(x, dataset, classes, ExactSettings(**how | settings)) for x, how in spaces]
    return zip(*both, strict=True)


def ways(index: Index, label: int, text: LowRankEdit, vectors: LowRankEdit) -> dict[str, Search]:
    """The ways to hide a class whose edits are given."""
    x, plain = index.images, index.embed
    w = index.bundles[index.sets[label]].text_projection.double()  # (w, d)
    name = plain(index.bare[[label]])  # (1, d)
    mean = unit(x[index.labels == label].mean(dim=0, keepdim=True))  # (1, d)

    def moved(left: Tensor, right: Tensor) -> Tensor:
        return x + (x @ right.T) @ left.T  # (N, d) @ (d, r) @ (r, d)

    def without(direction: Tensor) -> Tensor:
        return unit(x - (x @ direction.T) @ direction)

    edited, hidden = index.changed(w + text.delta).embed, moved(vectors.left, vectors.right)
    inverse = torch.linalg.pinv(w) @ text.left  # (d, r)
    common = index.vocabulary[(index.vocabulary @ name.T)[:, 0] < SAME]
    with warnings.catch_warnings(action="ignore"):  # of a rate that is measured here
        flags = flag(x, name[0], common, FALSE_ALARMS)[1]
    changes = {
        "nothing": {},
        "text edit": {"query": edited},
        "index edit": {"images": unit(hidden)},
        "index edit, dot product": {"images": hidden},
        "text and index edit": {"images": unit(hidden), "query": edited},
        "flag as a filter": {"flagged": flags},
        "query 3q - 2n": {"query": lambda hidden: unit(3 * plain(hidden) - 2 * name)},
        "projected off the name": {"images": without(name)},
        "projected off its images": {"images": without(mean)},
        "index edit by W^+": {"images": unit(moved(inverse, text.right))},
    }
    return {way: index.plain._replace(**change) for way, change in changes.items()}


def measure(index: Index, label: int, words: Tensor, search: Search) -> dict[str, Any]:
    """What is found of a class and what the others lose: percent, points, numbers of images.

    `left`: accuracy of its images; `words`, `worst word`: by other words (n, w); `rest`,
    `searches`, `worst search` (of the class `harmed`): changes of accuracy in its set, and of all
    other classes' average precision; `similar`: average precision of searches by its images;
    `mean`: its images that are nearest to its own mean; `NAME 100`: its images among the first of
    the search for a broader name; `NAME`: average precision of the others that this takes in.
    """
    mine, own_set = index.labels == label, index.set_of == index.set_of[label]
    recognised, precision = index.found(search)
    gain = recognised.double() - index.before[0].double()  # (N,)
    change = precision - index.before[1]  # (C,)
    change[label] = torch.nan
    harmed = int(change.nan_to_num(0.0).argmin())
    rivals = index.prompts[own_set & (torch.arange(len(own_set)) != label)]
    rivals = search.scores(search.query(rivals))[mine].amax(dim=1, keepdim=True)  # (n_c, 1)
    found = (search.scores(search.query(words))[mine] > rivals).double().mean(dim=0)  # (n,)
    row = {
        "left": recognised[mine].double().mean(),
        "words": found.mean(),
        "worst word": found.max() if len(words) else torch.nan,
        "rest": gain[own_set[index.labels] & ~mine].mean(),
        "searches": change.nanmean(),
        "worst search": change[harmed],
        "similar": similar(search, mine),
        "mean": nearest_mean(index, label, unit(search.images)),
    }
    row = {name: 100 * float(value) for name, value in row.items()}
    for name, (hidden, takes_in) in index.broader.items():
        if takes_in[label]:
            scores = search.scores(search.query(hidden))  # (N, 1)
            wanted = takes_in[index.labels] & ~mine
            row[name] = 100 * float(average_precision(scores, wanted[:, None]))
            first = scores[:, 0].argsort(descending=True, stable=True)[:FIRST]
            row[f"{name} {FIRST}"] = int((mine & ~search.flagged)[first].sum())
    return row | {"harmed": index.names[harmed]}


def similar(search: Search, mine: Tensor) -> Tensor:
    """The mean average precision of searches by each image of a class for the others of it."""
    rows = mine.nonzero()[:, 0]
    itself = torch.arange(len(mine))[:, None] == rows  # (N, n_c)
    scores = search.scores(search.images[rows]).masked_fill(itself, -torch.inf)
    return average_precision(scores, mine[:, None] & ~itself).nanmean()


def nearest_mean(index: Index, label: int, images: Tensor) -> Tensor:
    """Which part of a class's images is nearest to its mean, of all classes of its set; every
    second image of the index makes means, the others are judged."""
    learnt = torch.arange(len(images)) % 2 == 0
    judged = images[(index.labels == label) & ~learnt]
    sums = images.new_zeros(len(index.names), images.shape[1])
    means = unit(sums.index_add(0, index.labels[learnt], images[learnt]))  # (C, d)
    other_set = index.set_of != index.set_of[label]
    nearest = (judged @ means.T).masked_fill(other_set, -torch.inf).argmax(dim=1)
    return (nearest == label).double().mean()


def rows_of(index: Index, dataset: str, classes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What `measure` finds of each class under each of `ways`."""
    bundle, both = index.bundles[dataset], in_both_spaces(index, dataset, classes)
    words = audit_rows(with_audit(bundle, index.source) if isinstance(index, Mini) else bundle)
    for name, (text, vectors) in zip(progress(classes, f"{dataset}: searches"), both, strict=True):
        label, none = index.label[dataset, name], bundle.forget_hidden[:0]
        same = [row[None] for _, kind, row in words.get(name, ()) if kind != "hypernym"]
        for way, search in ways(index, label, text.edit, vectors.edit).items():
            found = measure(index, label, torch.cat([none, *same]), search)
            yield {"data set": dataset, "class": name, "way": way} | found


def report(table: pd.DataFrame, keys: Sequence[str]) -> None:
    """Print the mean, the least and the most of every number over the rows that share `keys`."""
    groups = table.groupby(list(keys), sort=False)
    for how in ("mean", "min", "max"):
        part = groups.agg(how, numeric_only=True)
        print(f"\n{how} of each group of rows")
        print(part.to_string(float_format="{:.2f}".format, na_rep="-", line_width=120))


class Mini(Index):
    """The four sets in a training of `mini`, the embedded one without a file of `weights`."""

    def __init__(self, weights: Path | None = None) -> None:
        self.source = ClipSource("mini", weights)
        bundles = {name: build_bundle(name, self.source, "data") for name in MINI}
        super().__init__(bundles, FeatureCache(self.source).texts)


def index_parser(name: str, description: str, features: bool = False) -> Parser:
    """The options of an experiment on an index; `features`: whether it needs bundles."""
    parser = Parser(prog=f"python -m experiments {name}", description=description)
    about = "folder of feature bundles" + ("" if features else "; default: mini's four sets")
    parser.add_argument("--features", required=features, help=about)
    parser.add_argument("--backbone", default="ViT-B/32", help="backbone of the bundles")
    about = "a set to forget from and to search (repeatable); default: every one there is"
    parser.add_argument("--dataset", metavar="SET", action="append", help=about)
    count = {"type": lambda text: None if text == ALL else COUNT(text), "metavar": "N"}
    parser.add_argument("--classes", help="random ones of each set; default: all", **count)
    parser.add_argument("--out", type=Path, default=Path(name), help="folder of the table")
    return parser


def table_of(name: str, args: Namespace, rows_of: Callable) -> pd.DataFrame:
    """What `rows_of` yields for some classes of each set of an index, also written to NAME.csv."""
    where, rows = (args.features, args.backbone, args.dataset), []
    index = Index(load_bundles(*where)) if args.features else Mini()
    for dataset in args.dataset or index.bundles:
        names = index.bundles[dataset].classnames
        count = min(args.classes or len(names), len(names))
        some = random.Random(dataset).sample(names, count)
        rows += rows_of(index, dataset, sorted(some, key=names.index))
    if not rows:
        raise ProblemError(f"{', '.join(index.bundles)}: no class with texts to measure by")
    table, path = pd.DataFrame(rows), args.out / f"{name}.csv"
    write_table(table, path)
    logger.info(f"table: {path}")
    return table


def draw(index: Index, path: Path) -> None:
    """The first images of a broad search of mini's; those of the class to hide are framed."""
    dataset, name, query = PICTURE
    ((text, vectors),) = in_both_spaces(index, dataset, [name])
    searches = ways(index, index.label[dataset, name], text.edit, vectors.edit)
    items = [item for each in index.bundles for item in datasets.load(each, "data").test]
    rows = {
        "nothing": "Before",
        "text edit": "After the text edit: the model is changed",
        "index edit": "After the index edit: the stored vectors are changed",
    }
    with drawing(path, 11, 4.9) as figure:
        title = f"Search for “{query}” while “{name}” (framed) is to be hidden"
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        for part, (way, title) in zip(figure.subfigures(3), rows.items(), strict=True):
            search = searches[way]
            scores = search.scores(search.query(index.encode([query])))[:, 0]
            first = [items[row] for row in scores.argsort(descending=True)[:SHOWN].tolist()]
            count = sum(item.classname == name for item in first)
            part.suptitle(f"{title} ({count} of {SHOWN})", x=0.01, ha="left")
            for axis, item in zip(part.subplots(1, SHOWN), first, strict=True):
                axis.imshow(read_image(item.impath), interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set(visible=item.classname == name, color=COLOURS[1], linewidth=5)
    logger.info(f"picture: {path}")


def main(argv: Sequence[str] | None = None) -> pd.DataFrame | None:
    """Measure every way on classes of each set, or draw one search; returns the table."""
    parser = index_parser("hide", __doc__)
    parser.add_argument("--draw", type=Path, metavar="FILE", help="draw a search of mini instead")
    args = parser.parse_args(argv)
    if args.draw:
        return draw(Mini(), args.draw)
    table = table_of("hide", args, rows_of)
    names = [name for name in BROADER if name in table]
    table["broader"] = table[names].mean(axis=1)
    table[f"broader {FIRST}"] = table[[f"{name} {FIRST}" for name in names]].mean(axis=1)
    report(table, ["data set", "way"])
    return table
