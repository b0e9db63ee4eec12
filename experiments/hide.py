"""What still finds a class that is forgotten by the model, hidden in an index, or filtered out.

    python -m experiments hide [--features DIR] [--dataset SET] [--classes N|all] [--out hide]
    python -m experiments hide --draw FILE

Each class is named alone. The images of all sets are searched together. Without --features they are
those of the embedded `mini`; --draw shows one broad search of theirs. What each broader name takes
in stands in broader.yaml. docs/search.md has the table, and `measure` says what its columns are.
"""

import random
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize
from yacs.config import CfgNode

import datasets
from clip.audit_texts import audit_rows, with_audit
from clip.bundle import AUDIT_HIDDEN, FeatureBundle, load_bundles
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
from forgetting.flag import flag
from forgetting.models.vocabulary import generic_names
from forgetting.problem import LowRankEdit
from trainers.inputs import ALL, Plan, RunInputs

BROADER: dict[str, list[str]] = read_yaml(Path(__file__).with_name("broader.yaml"))
FALSE_ALARMS = 0.005  # of the flag
SAME = 0.9999  # cosine from which a common name is the class's own
FIRST = (10, 100)
PRINTED = (
    *("left", "words", "own", "own 100", "broader 10", "broader 100", "broader"),
    *("rest", "others", "searches", "similar", "mean"),
)
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
        counts = torch.tensor([len(bundle.classnames) for bundle in every])
        first = counts.cumsum(0) - counts
        self.first = dict(zip(bundles, first.tolist(), strict=True))  # class of each set
        self.names = [datasets.clean_name(name) for each in every for name in each.classnames]
        self.set_of = torch.arange(len(every)).repeat_interleave(counts)  # (C,)
        self.labels = torch.cat([b.labels + i for b, i in zip(every, first, strict=True)])  # (N,)
        self.images = unit(torch.cat([bundle.image_features for bundle in every]))  # (N, d)
        self.prompts = torch.cat([bundle.class_hidden for bundle in every])  # (C, w)
        retained = [each.retain_hidden for each in every if each.retain_names] or [self.prompts]
        self.vocabulary = self.embed(torch.cat(retained).unique(dim=0))  # (m, d)
        self.plain = Search(self.images, self.embed, torch.zeros(len(self.labels)).bool())
        self.before = self.found(self.plain)

    def embed(self, hidden: Tensor) -> Tensor:
        """Unit-norm embeddings (n, d) of hidden states (n, w)."""
        return unit(next(iter(self.bundles.values())).embed(hidden.double()))

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
        sets, known, found = list(self.bundles), {}, {}
        for bundle in self.bundles.values():
            known |= zip(bundle.retain_names, bundle.retain_hidden[:, None], strict=True)
        for name, members in BROADER.items():
            hidden = self.encode([name]) if self.encode else known.get(name)
            is_in = [
                word in members or name in word.split() or sets[number] in members
                for word, number in zip(self.names, self.set_of.tolist(), strict=True)
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


def forget_each(
    index: Index, dataset: str, classes: Sequence[str], settings: ExactSettings
) -> list[LowRankEdit]:
    """The edits of `answers`."""
    return [answer.edit for answer in answers(index, dataset, classes, settings)]


def of_embeddings(index: Index) -> Index:
    """The same in the space of embeddings: hidden states are unit-norm embeddings, W is I."""

    def embedded(bundle: FeatureBundle) -> FeatureBundle:
        names = "class_hidden", "forget_hidden", "retain_hidden", "neutral_hidden"
        rows = {name: index.embed(getattr(bundle, name)).float() for name in names}
        extra = bundle.extra_tensors.items()
        words = {key: index.embed(x).float() for key, x in extra if key == AUDIT_HIDDEN}
        identity = torch.eye(bundle.image_features.shape[1])
        changed = {"text_projection": identity, "text_bias": None, "extra_tensors": words}
        return replace(bundle, **rows | changed)

    encode = index.encode and (lambda texts: index.embed(index.encode(texts)).float())
    return Index({name: embedded(bundle) for name, bundle in index.bundles.items()}, encode)


def both_edits(
    index: Index, dataset: str, classes: Sequence[str]
) -> list[tuple[LowRankEdit, LowRankEdit]]:
    """Of each class the edit of the text projection, and that in the space of embeddings."""
    texts = forget_each(index, dataset, classes, ExactSettings())
    vectors = forget_each(of_embeddings(index), dataset, classes, ExactSettings(**INDEX))
    return list(zip(texts, vectors, strict=True))


def ways(
    index: Index, dataset: str, own: int, text: LowRankEdit, vectors: LowRankEdit
) -> dict[str, Search]:
    """The ways to hide the class `own` of a set, whose edits are given."""
    x, plain, bundle = index.images, index.embed, index.bundles[dataset]
    name = plain(bundle.forget_hidden[[own]])  # (1, d)
    mean = unit(x[index.labels == index.first[dataset] + own].mean(dim=0, keepdim=True))  # (1, d)

    def edited(hidden: Tensor) -> Tensor:
        hidden = hidden.double()
        return unit(bundle.embed(hidden) + (hidden @ text.left) @ text.right)

    def moved(left: Tensor, right: Tensor) -> Tensor:
        return x + (x @ right.T) @ left.T  # (N, d) @ (d, r) @ (r, d)

    def without(direction: Tensor) -> Tensor:
        return unit(x - (x @ direction.T) @ direction)

    hidden = moved(vectors.left, vectors.right)
    inverse = torch.linalg.pinv(bundle.text_projection.double()) @ text.left  # (d, r)
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

    `left`: accuracy of its images; `words`, `worst word`: by other words (n, w); `rest`, `others`,
    `searches`, `worst search` (of the class `harmed`): changes of accuracy in its set and the other
    sets, and of the other classes' average precision; `similar`: average precision of searches by
    its images; `mean`: its images that are nearest to its own mean; `own N`, `NAME N`: its images
    among the first N of its search and of a broader name; `own`, `NAME`: average precision of its
    images, and of the others that the broader name takes in.
    """
    mine, kept = index.labels == label, torch.arange(len(index.names)) != label
    own_set, of_image = index.set_of == index.set_of[label], index.set_of[index.labels]
    recognised, precision = index.found(search)
    gain = recognised.double() - index.before[0].double()  # (N,)
    others = [gain[of_image == number].mean() for number in index.set_of[~own_set].unique()]
    change = precision - index.before[1]  # (C,)
    change[label] = torch.nan
    harmed = int(change.nan_to_num(0.0).argmin())
    rivals = search.scores(search.query(index.prompts[kept & own_set]))[mine]  # (n_c, C')
    under = search.scores(search.query(words))[mine] > rivals.amax(dim=1, keepdim=True)
    found = under.double().mean(dim=0)  # (n,)
    row = {
        "left": recognised[mine].double().mean(),
        "words": found.mean(),
        "worst word": found.max() if len(words) else torch.nan,
        "rest": gain[own_set[index.labels] & ~mine].mean(),
        "others": torch.stack(others).mean() if others else torch.nan,
        "searches": change.nanmean(),
        "worst search": change[harmed],
        "similar": similar(search, mine),
        "mean": nearest_mean(index, label, unit(search.images)),
    }
    counts, searched = {}, {"own": (index.prompts[[label]], mine)}
    for name, (hidden, takes_in) in index.broader.items():
        if takes_in[label]:
            searched[name] = hidden, takes_in[index.labels] & ~mine
    for name, (hidden, wanted) in searched.items():
        scores = search.scores(search.query(hidden))  # (N, 1)
        row[name] = average_precision(scores, wanted[:, None])[0]
        ranked = (mine & ~search.flagged)[scores[:, 0].argsort(descending=True, stable=True)]
        counts |= {f"{name} {number}": int(ranked[:number].sum()) for number in FIRST}
    row = {name: 100 * float(value) for name, value in row.items()}
    return row | counts | {"harmed": index.names[harmed]}


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
    bundle, edits = index.bundles[dataset], both_edits(index, dataset, classes)
    words, none = audit_rows(bundle), bundle.forget_hidden[:0]
    for name, pair in zip(progress(classes, f"{dataset}: searches"), edits, strict=True):
        own = bundle.classnames.index(name)
        same = [row[None] for _, kind, row in words.get(name, ()) if kind != "hypernym"]
        for way, search in ways(index, dataset, own, *pair).items():
            found = measure(index, index.first[dataset] + own, torch.cat([none, *same]), search)
            yield {"data set": dataset, "class": name, "way": way} | found


def report(table: pd.DataFrame) -> None:
    """Print means over the classes of each set, the worst of them, and every broader name."""
    names = [name for name in BROADER if name in table]
    for number in ("", " 10", " 100"):
        table[f"broader{number}"] = table[[name + number for name in names]].mean(axis=1)
    groups = table.groupby(["data set", "way"], sort=False)
    means = groups.mean(numeric_only=True)
    parts = {
        "means": means[list(PRINTED)],
        "most that is left": groups[["left", "worst word"]].max(),
        "most that is lost": groups[["rest", "others", "worst search"]].min(),
        "images of the class among the first 100": means[[f"{name} 100" for name in names]],
    }
    for title, part in parts.items():
        print(f"\n{title}\n{part.to_string(float_format='{:.2f}'.format, na_rep='-')}")


class Mini(Index):
    """The four sets in a training of `mini`, the embedded one without a file of `weights`; with
    `words` those for its classes too."""

    def __init__(self, weights: Path | None = None, words: bool = False) -> None:
        self.source = ClipSource("mini", weights)
        bundles = {name: build_bundle(name, self.source, "data") for name in MINI}
        if words:
            bundles = {name: with_audit(each, self.source) for name, each in bundles.items()}
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


def table_of(
    name: str, args: Namespace, rows_of: Callable, embedded: Callable[[], Index] = Mini
) -> pd.DataFrame:
    """What `rows_of` yields for some classes of each set of an index, also written to NAME.csv."""
    if args.features:
        index = Index(load_bundles(args.features, args.backbone, args.dataset))
    else:
        index = embedded()
    rows = []
    for dataset in args.dataset or index.bundles:
        names = index.bundles[dataset].classnames
        count = min(args.classes or len(names), len(names))
        some = random.Random(dataset).sample(names, count)
        rows += rows_of(index, dataset, sorted(some, key=names.index))
    table, path = pd.DataFrame(rows), args.out / f"{name}.csv"
    write_table(table, path)
    logger.info(f"table: {path}")
    return table


def draw(index: Index, path: Path) -> None:
    """The first images of a broad search of mini's; those of the class to hide are framed."""
    dataset, name, query = PICTURE
    own = index.bundles[dataset].classnames.index(name)
    searches = ways(index, dataset, own, *both_edits(index, dataset, [name])[0])
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
    table = table_of("hide", args, rows_of, partial(Mini, words=True))
    report(table)
    return table
