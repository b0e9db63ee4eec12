"""A model and its images while names are forgotten and restored, for somebody who looks on.

Nothing is written to the model: what is shown are its embeddings under the change. Every answer is
solved from the original, so that restoring one name is solving again without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from warnings import catch_warnings

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor
from torch.nn.functional import normalize

import datasets
from clip.cache import FeatureCache
from clip.features import build_bundle
from clip.source import ClipSource
from datasets.reader import read_image
from evaluation.plots import thumbnail
from evaluation.results import join_label, place
from evaluation.zero_shot import accuracy
from forgetting.api import TEMPLATES, Forgotten, forget
from forgetting.context import ExactSettings
from forgetting.deploy.embeddings import index_edit
from forgetting.displacement import Forecast
from forgetting.errors import ProblemError, nearest
from forgetting.models.text_embeddings import TextEmbeddings
from forgetting.models.vocabulary import generic_names

GUESSES, AFFECTED = 3, 3  # names that are shown for an image, and beside those forgotten
PICTURES, REMEMBERED = 6, 128  # images of no chosen name that are shown; answers in memory
FOUND, FALSE_ALARMS = 12, 0.005  # images that a search shows; share of others that may be flagged
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # none of them starts a program
UPLOADS, MEGABYTES, MEGAPIXELS = 12, 20, 50  # at most: at once, of a file, of what it unpacks to
THUMBNAIL = 192  # pixels of the longer side

_page = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
)
Names = tuple[str, ...]
# An image that a search finds: name, data URI, whether that is forgotten, whether it is flagged.
Hit = tuple[str, str, bool, bool]
Found = list[tuple[str, list[Hit] | str]]


@dataclass(frozen=True)
class View:
    """What there is to see."""

    answer: Forgotten | None  # for the names that are forgotten; None if none is
    chosen: tuple[str, ...]  # names that are about to be forgotten
    forecast: Forecast | None  # of them and the forgotten, together
    unlisted: dict[str, list[str]]  # those of both that are no classes: the nearest class names
    # A name, and the fraction of its images that are recognised before and now, None without
    # images: of these names, of all others together, and of those most affected and protected.
    recognised: list[tuple[str, float | None, float | None]]
    # An image's class or file name, a data URI, and names with probabilities before and now.
    pictures: list[tuple[str, str, list[tuple[str, float, float]]]]
    refused: list[str]  # files that cannot be read, one line each
    query: str  # a text to search images by
    found: Found  # what is changed for the search, and the first images, or why there are none
    doubt: bool  # whether too many of them may be flagged

    def html(self, part: str) -> str:
        """The part `forecast`, `search` or `result` of the page."""
        return _page.get_template("page.html").render(view=self, part=part)

    def save(self, folder: str | Path) -> Path | None:
        """Write the adapter, called by what it forgets, into a new folder below one; None if
        nothing is forgotten."""
        if self.answer is None:
            return None
        name = place(join_label(self.answer.adapter.classes))
        path = Path(mkdtemp(dir=folder)) / f"{name}.safetensors"
        self.answer.save(path)
        return path


class Live:
    """One CLIP, names that images are classified by, and images. `model`: see
    `clip.architectures.architecture`. `images`: of one's own, a folder or a CSV file; without,
    `mini` has its four sets, and any other model no image and the common names. `root`: of the
    image sets; `folder`: for what is encoded once."""

    def __init__(self, model: str, images: str, root: str | Path, folder: str | Path) -> None:
        self.source, self.folder = ClipSource(model, cache=folder), Path(folder)
        self.generic = self.source.arch != "mini"  # it was taught few names
        if images or self.generic:
            sets = [datasets.spec("", images).name] if images else []
        else:
            sets = [row.name for row in datasets.SETS.values() if row.rendered]
        bundles = [build_bundle(name, self.source, root, own=images) for name in sets]
        self.items = [item for name in sets for item in datasets.load(name, root, images).test]
        self.template = bundles[0].template if sets else TEMPLATES[-1]
        names = [datasets.clean_name(name) for each in bundles for name in each.classnames]
        self.names = names or generic_names()  # as they stand in texts
        self.hidden = FeatureCache(self.source).texts(self._prompts(self.names))  # (C, w)
        none = torch.empty(0, self.source.projection.shape[1])
        self.features = torch.cat([none, *(bundle.image_features for bundle in bundles)])  # (N, d)
        labels = [self.names.index(datasets.clean_name(item.classname)) for item in self.items]
        self.labels = torch.tensor(labels, dtype=torch.int64)  # (N,), numbers of names
        self._ridges: dict[Any, float] = {}
        self._solve = lru_cache(REMEMBERED)(self._forget)
        self._flagged = lru_cache(REMEMBERED)(self._flag)
        self._thumbnail = lru_cache(REMEMBERED)(lambda path: thumbnail(read_image(path), THUMBNAIL))
        self._upload = lru_cache(REMEMBERED)(self._encoded)

    def listed(self, names: Sequence[str]) -> Names:
        """Names as the list spells them, each once. The beginning of a class means that class, the
        shortest one if there are several; any other name is taken as it is. ProblemError if a name
        is no text."""
        spelled = {datasets.key(name): name for name in self.names}
        chosen = []
        for name in names:
            if not isinstance(name, str) or not (key := datasets.key(name)):
                raise ProblemError("a name must be a text that is not empty")
            if name not in self.names:  # two names may differ in case alone
                begun = [x for other, x in spelled.items() if self.items and other.startswith(key)]
                name = spelled.get(key) or min(begun, key=len, default=name.strip())
            chosen.append(name)
        return tuple(dict.fromkeys(chosen))

    def look(
        self,
        forgotten: Sequence[str] = (),
        chosen: Sequence[str] = (),
        protect: Sequence[str] = (),
        target: str = ExactSettings.target,
        beta: float = ExactSettings.beta,
        uploads: Sequence[str | Path] | None = None,
        query: str = "",
    ) -> View:
        """What there is to see while some names are forgotten and others are about to be, image
        files are shown as well, and images are searched. Raises ProblemError for what cannot be
        solved."""
        forgotten, protect = self.listed(forgotten), self.listed(protect)
        chosen = tuple(name for name in self.listed(chosen) if name not in forgotten)
        both = forgotten + chosen
        answer = self._solve(forgotten, protect, target, beta) if forgotten else None
        forecast = self._solve(both, protect, target, beta).forecast if both else None
        names = self.names + [name for name in both if name not in self.names]
        hidden = self.source.encode_hidden(self._prompts(names[len(self.names) :]))
        texts = self._embeddings(torch.cat([self.hidden, hidden]), answer)  # (C, d), before and now
        correct = [(self.features @ x.T).argmax(dim=1) == self.labels for x in texts]  # (N,) each

        scale = getattr(self.source.model, "logit_scale", None)
        sharpness = 100.0 if scale is None else float(scale.exp())  # that multiplies cosines

        def guesses(image: Tensor) -> list[tuple[str, float, float]]:
            before, now = [(sharpness * (x @ image)).softmax(dim=0) for x in texts]
            best = now.topk(min(GUESSES, len(names))).indices.tolist()
            best = [*dict.fromkeys([int(before.argmax()), *best])][:GUESSES]
            return [(names[i], float(before[i]), float(now[i])) for i in best]

        rest = [name for name in self.names if name not in both]
        near = [one.name for one in forecast.affected[:AFFECTED]] if forecast else []
        near = [name for name in dict.fromkeys([*near, *protect]) if name in rest]
        groups = {name: [name] for name in both} | {f"all {'other ' if both else ''}names": rest}
        table = []
        for title, some in (groups | {name: [name] for name in near}).items():
            images = torch.isin(self.labels, torch.tensor([names.index(name) for name in some]))
            table.append((title, accuracy(correct[0], images), accuracy(correct[1], images)))

        pictures, refused, uploads = [], [], uploads or ()
        for path in map(Path, uploads[:UPLOADS]):
            try:
                data, features = self._upload(path)
                pictures.append((f"{path.name} (yours)", data, guesses(features)))
            except ProblemError as error:
                refused.append(f"{path.name[-60:]}: {error}")
        if len(uploads) > UPLOADS:
            refused.append(f"{len(uploads) - UPLOADS} files more than {UPLOADS} are not shown")
        wanted = dict.fromkeys(both, 2) | dict.fromkeys(near, 1)  # images of each name
        wanted = wanted or dict.fromkeys(self.names[:: -(-len(self.names) // PICTURES)], 1)
        for name, count in wanted.items():
            for row in (self.labels == names.index(name)).nonzero()[:count, 0].tolist():
                data = self._thumbnail(self.items[row].impath)
                pictures.append((name, data, guesses(self.features[row])))
        unlisted = {name: nearest(name, self.names) for name in names[len(self.names) :]}
        found, doubt = [], False
        if (query := query.strip()) and self.items:
            found, doubt = self._search(query, forgotten, protect, target, beta)
        result = answer, chosen, forecast, unlisted, table, pictures, refused
        return View(*result, query, found, doubt)

    def _search(self, query: str, names: Names, *how: Any) -> tuple[Found, bool]:
        """What a query finds before and after names are forgotten, and `View.doubt`."""
        answer = self._solve(names, *how) if names else None
        before, now = self._embeddings(self.source.encode_hidden([query]), answer)  # (1, d) each
        flagged = [self._flagged(name) for name in names]

        def first(vectors: Tensor, text: Tensor) -> list[Hit]:
            hits = []
            for row in (vectors @ text[0]).topk(min(FOUND, len(vectors))).indices.tolist():
                name = self.names[self.labels[row]]
                data = self._thumbnail(self.items[row].impath)
                hits.append((name, data, name in names, any(flags[row] for flags, _ in flagged)))
            return hits

        found: Found = [("before", first(self.features, before))]
        if answer is not None:
            found.append(("text encoder changed", first(self.features, now)))
            try:
                hide = index_edit(self._solve(names, *how, index=True).adapter)
                found.append(("image index changed", first(hide(self.features), before)))
            except ProblemError as error:  # other settings are too much for an index
                found.append(("image index changed", str(error)))
        return found, any(doubt for _, doubt in flagged)

    def _flag(self, name: str) -> tuple[list[bool], bool]:
        """Which images are flagged for a name, and whether the library warns of that."""
        answer = self._solve((name,), (), ExactSettings.target, ExactSettings.beta)
        with catch_warnings(record=True, action="always") as caught:
            words = self.folder / "words"
            flags = answer.flag(self.features, FALSE_ALARMS, cache=words, progress=False)[1]
        return flags.tolist(), any("rate" in str(one.message) for one in caught)

    def _forget(
        self, names: Names, protect: Names, target: str, beta: float, index: bool = False
    ) -> Forgotten:
        """The answer for the text encoder, or for an index of images."""
        encoder = self.source.encoder
        answer = forget(
            self._texts if index else encoder.model,
            None if index else encoder.tokenize,
            names,
            retain=self.names if self.items else None,  # common names are retained anyhow
            templates=(TEMPLATES[0], self.template),
            protect=protect,
            target=target,
            beta=beta,
            ridge=self._ridges.get((protect, index)),
            generic=self.generic,
            cache=self.folder / "words",
            progress=False,
        )
        self._ridges[protect, index] = answer.adapter.settings["ridge"]  # whatever is forgotten
        return answer

    @cached_property
    def _texts(self) -> TextEmbeddings:
        return TextEmbeddings.of(self.source.model, self.source.encoder.tokenize)

    def _embeddings(self, hidden: Tensor, answer: Forgotten | None) -> list[Tensor]:
        """Unit-norm embeddings (n, d) of texts with hidden states (n, w), before and now."""
        before = now = hidden @ self.source.projection
        if self.source.bias is not None:
            before = now = before + self.source.bias
        if answer is not None:
            now = before + (hidden @ answer.adapter.left) @ answer.adapter.right
        return [normalize(x, dim=1) for x in (before, now)]

    def _prompts(self, names: Sequence[str]) -> list[str]:
        return [self.template.replace("{}", name) for name in names]

    def _encoded(self, path: Path) -> tuple[str, Tensor]:
        """A data URI of somebody's image, and its embedding (d,)."""
        if path.is_file() and path.stat().st_size > MEGABYTES * 1e6:
            raise ProblemError(f"larger than {MEGABYTES} MB")
        image = read_image(path, FORMATS, MEGAPIXELS, upright=True)
        features = self.source.encode_images(self.source.preprocess(image)[None])[0]
        return thumbnail(image, THUMBNAIL), features
