"""A model and its images while names are forgotten and given back, for somebody who looks on.

Nothing is written to the model: what is shown are its embeddings under the change. Every answer is
solved from the original, so that giving one name back is solving again without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from torch import Tensor
from torch.nn.functional import normalize

import datasets
from clip.cache import FeatureCache
from clip.features import build_bundle
from clip.source import ClipSource
from datasets.reader import read_image
from evaluation.live.uploads import FILES, read_upload, thumbnail
from evaluation.results import join_label, place
from evaluation.zero_shot import accuracy
from forgetting.api import TEMPLATES, Forgotten, forget
from forgetting.displacement import Forecast
from forgetting.errors import ProblemError, nearest
from forgetting.models.vocabulary import generic_names

TOP = 5  # names shown of an image, and neighbours of a name
PICTURES = 12  # of the set, shown at once
KEPT = 128  # answers and images that are remembered


class Change(NamedTuple):
    """Something of a name by the original model and now; None: it has no images."""

    name: str
    before: float | None
    now: float | None


class Picture(NamedTuple):
    """An image: its class, or its file's name if it is somebody's `own`; a data URI; and the names
    that it is taken for, each with the softmax's share, by the original model and now."""

    label: str
    own: bool
    data: str
    before: list[tuple[str, float]]
    now: list[tuple[str, float]]


@dataclass(frozen=True)
class View:
    """What there is to see.

    Attributes:
        found: the answer for what is forgotten; None if nothing is.
        asked: names that are about to be forgotten; forecast: of them and the forgotten, together.
        typed: those of both that are not on the list, each with the names of it that are alike.
        recognised: the share of images that are, of each of these names, then of all others.
        neighbours: of each of these names the nearest ones: their cosine with it, and the share of
            their own images.
        refused: files that cannot be read, a line each.
    """

    found: Forgotten | None
    asked: tuple[str, ...]
    forecast: Forecast | None
    typed: dict[str, list[str]]
    recognised: list[Change]
    neighbours: dict[str, list[tuple[Change, Change]]]
    pictures: list[Picture]
    refused: list[str]

    def html(self, part: str) -> str:
        """The part `forecast` or `result` of the page."""
        return _template().render(view=self, part=part)

    def save(self, folder: str | Path) -> Path | None:
        """Write the adapter into a folder, called by what it forgets; None if that is nothing."""
        if self.found is None:
            return None
        path = Path(folder) / f"{place(join_label(self.found.names))}.safetensors"
        self.found.save(path)
        return path


class Live:
    """One CLIP, names by which images are told apart, and images.

    Args:
        model: see `clip.architectures.architecture`. images: of one's own, a folder or a CSV file; without,
            `mini` has its four sets, and any other model no image and the common names.
        root: of the image sets; folder: for what is encoded once.

    Attributes:
        names: as they stand in texts; hidden: (C, w) of their prompts.
        items: the images; features: (N, d), unit norm; labels: (N,), numbers of names.

    Raises:
        ProblemError: a model or images that cannot be read.
    """

    def __init__(self, model: str, images: str, root: str | Path, folder: str | Path) -> None:
        self.source, self.folder = ClipSource(model, cache=folder), Path(folder)
        sets = [datasets.spec("", images).name] if images else []
        self.generic = self.source.arch != "mini"  # it was taught few names
        if not images and not self.generic:
            sets = [row.name for row in datasets.SETS.values() if row.rendered]
        bundles = [build_bundle(name, self.source, root, folder, own=images) for name in sets]
        self.items = [item for name in sets for item in datasets.load(name, root, images).test]
        self.template = bundles[0].template if sets else TEMPLATES[-1]
        self.names = [datasets.clean_name(name) for bundle in bundles for name in bundle.classnames]
        self.names = self.names or generic_names()
        self.hidden = FeatureCache(self.source, folder).texts(self._prompts(self.names))
        none = torch.empty(0, self.source.projection.shape[1])
        self.features = torch.cat([none, *(bundle.image_features for bundle in bundles)])
        labels = [self.names.index(datasets.clean_name(item.classname)) for item in self.items]
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self._ridges: dict[tuple[str, ...], float] = {}
        self.solve = lru_cache(KEPT)(self._solve)
        self._small = lru_cache(KEPT)(lambda path: thumbnail(read_image(path)))
        self._upload = lru_cache(KEPT)(self._encoded)

    def spelled(self, names: Sequence[str]) -> tuple[str, ...]:
        """Names as the list has them, where it does; each once."""
        listed = {datasets.key(name): name for name in self.names}
        found = (n if n in self.names else listed.get(datasets.key(n), n.strip()) for n in names)
        return tuple(dict.fromkeys(found))  # two names may differ in case alone

    def look(
        self,
        forgotten: Sequence[str] = (),
        asked: Sequence[str] = (),
        keep: Sequence[str] = (),
        target: str = "specific",
        beta: float = 0.0,
        uploads: Sequence[str | Path] = (),
    ) -> View:
        """What there is to see while some names are forgotten and others are about to be.

        Args:
            keep, target, beta: see `forgetting.api`; uploads: image files to show as well.

        Raises:
            ProblemError: names, a target or a beta that cannot be solved for.
        """
        forgotten, keep = self.spelled(forgotten), self.spelled(keep)
        asked = tuple(name for name in self.spelled(asked) if name not in forgotten)
        chosen = forgotten + asked
        found = self.solve(forgotten, keep, target, beta) if forgotten else None
        ahead = self.solve(chosen, keep, target, beta) if asked else None

        names = self.names + [name for name in chosen if name not in self.names]
        row = {name: number for number, name in enumerate(names)}
        texts = self._embedded(names, found)
        correct = [(self.features @ x.T).argmax(dim=1) == self.labels for x in texts]  # (N,) each

        def recognised(called: str, some: Sequence[str]) -> Change:
            mine = torch.isin(self.labels, torch.tensor([row[name] for name in some]))
            return Change(called, *(accuracy(x, mine) for x in correct))

        def cosine(a: str, b: str) -> Change:
            return Change(b, *(float(x[row[a]] @ x[row[b]]) for x in texts))

        def tops(image: Tensor) -> list[list[tuple[str, float]]]:
            return [_best((self._sharpness * (x @ image)).softmax(dim=0), names) for x in texts]

        near = {}
        for name in chosen:
            best = _best(texts[0] @ texts[0][row[name]], names, TOP + 1)
            near[name] = [other for other, _ in best if other != name][:TOP]
        pictures, refused = [], []
        for path in uploads[:FILES]:
            try:
                data, features = self._upload(path)
                pictures.append(Picture(Path(path).name, True, data, *tops(features)))
            except ProblemError as error:
                refused.append(str(error))
        if more := len(uploads[FILES:]):
            refused.append(f"{more} files beyond the first {FILES} are not shown")
        for number in self._shown(near):
            label, data = names[self.labels[number]], self._small(self.items[number].impath)
            pictures.append(Picture(label, False, data, *tops(self.features[number])))
        others = [name for name in self.names if name not in chosen]
        all_others = recognised(f"all {'others' if chosen else 'names'}", others)
        return View(
            found,
            asked,
            None if ahead is None else ahead.forecast,
            {name: nearest(name, self.names) for name in names[len(self.names) :]},
            [*(recognised(name, [name]) for name in chosen), all_others],
            {a: [(cosine(a, b), recognised(b, [b])) for b in near[a]] for a in chosen},
            pictures,
            refused,
        )

    def _solve(
        self, names: tuple[str, ...], keep: tuple[str, ...], target: str, beta: float
    ) -> Forgotten:
        found = forget(
            self.source.model,
            self.source.tokenizer,
            names,
            retain=self.names if self.items else None,  # common names are retained anyhow
            templates=(TEMPLATES[0], self.template),
            protect=keep,
            target=target,
            beta=beta,
            ridge=self._ridges.get(keep),
            generic=self.generic,
            cache=self.folder / "words",
            progress=False,
        )
        self._ridges[keep] = found.adapter.settings["ridge"]  # no request changes it: found once
        return found

    def _embedded(self, names: Sequence[str], found: Forgotten | None) -> list[Tensor]:
        """Unit-norm embeddings (C, d) of the list's names and those behind them, before and now."""
        new = self.source.encode_hidden(self._prompts(names[len(self.names) :]))
        hidden = torch.cat([self.hidden, new])
        before = now = hidden @ self.source.projection
        if self.source.bias is not None:
            before = now = before + self.source.bias
        if found is not None:
            left, right = found.adapter.left, found.adapter.right
            now = before + (hidden @ left) @ right
        return [normalize(x, dim=1) for x in (before, now)]

    def _prompts(self, names: Sequence[str]) -> list[str]:
        return [self.template.replace("{}", name) for name in names]

    def _encoded(self, path: str | Path) -> tuple[str, Tensor]:
        """A data URI of somebody's image, and its embedding (d,)."""
        image = read_upload(path)
        return thumbnail(image), self.source.encode_images(self.source.preprocess(image)[None])[0]

    @property
    def _sharpness(self) -> float:
        """By which the model multiplies cosines before the softmax."""
        scale = getattr(self.source.model, "logit_scale", None)
        return 100.0 if scale is None else float(scale.exp())

    def _shown(self, near: Mapping[str, Sequence[str]]) -> list[int]:
        """Images of the set: two of each name and one of its first two neighbours, or of names here
        and there."""
        wanted = {other: 1 for others in near.values() for other in others[:2]}
        wanted |= dict.fromkeys(near, 2)
        if not near:
            wanted = dict.fromkeys(self.names[:: -(-len(self.names) // PICTURES)], 1)
        rows = [
            row
            for name in sorted(wanted, key=wanted.__getitem__, reverse=True)
            if name in self.names
            for row in (self.labels == self.names.index(name)).nonzero()[: wanted[name], 0].tolist()
        ]
        return rows[:PICTURES]


def _best(values: Tensor, names: Sequence[str], count: int = TOP) -> list[tuple[str, float]]:
    """The names of the largest values (C,), with these."""
    best = values.topk(min(count, len(values)))
    return [(names[i], x) for i, x in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


@cache
def _template() -> Template:
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True
    ).get_template("page.html")
