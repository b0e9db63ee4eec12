"""FeatureBundle: all that forgetting and evaluating need from CLIP for one backbone and data set.
The file BACKBONE/DATASET.safetensors is what people exchange; nothing in it is executed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from datasets.names import flaw, is_text
from engine.files import parse_json
from forgetting.adapter import ModelIdentity
from forgetting.errors import ProblemError, shown
from forgetting.io import container, naming, read_safetensors, write_bytes

FORMAT = "clip-forget-features/1"
SUFFIX = ".safetensors"
# Tensors by dimension: N images, C classes, M retained names, A other words, w, d as in CLIP.
SHAPES = {
    "text_projection": "wd",  # first: it fixes w and d, so that the tensor that differs is blamed
    "image_features": "Nd",
    "labels": "N",
    "class_hidden": "Cw",
    "forget_hidden": "Cw",
    "retain_hidden": "Mw",
    "neutral_hidden": "1w",
}
TEXT_BIAS = "text_bias"  # optional, as are other words for an audit: its tensor and lists, or none
AUDIT_HIDDEN = "audit_hidden"
AUDIT_LISTS = ("audit_texts", "audit_classes", "audit_kinds")
OPTIONAL = {TEXT_BIAS: "d", AUDIT_HIDDEN: "Aw"}
TEXT_KEYS = ("backbone", "weights", "dataset", "split", "template")
LIST_KEYS = ("classnames", "retain_names")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
TOLERANCE = 1e-2  # float16 rounding moves a unit norm by less than 1e-3


@dataclass(frozen=True)
class FeatureBundle:
    """Features of one data set split under one backbone; every tensor on the CPU.

    All floating tensors named here are float32, `labels` is int64. `extra` and `extra_tensors`
    hold what else the file had and are written back by `save`.
    """

    image_features: Tensor  # (N, d) L2-normalised; N may be 0
    labels: Tensor  # (N,) index into classnames
    class_hidden: Tensor  # (C, w) evaluation prompts
    forget_hidden: Tensor  # (C, w) bare class names
    retain_hidden: Tensor  # (M, w) retain vocabulary
    neutral_hidden: Tensor  # (1, w) empty prompt
    text_projection: Tensor  # (w, d)
    backbone: str
    weights: str
    dataset: str
    split: str
    template: str
    classnames: list[str]
    retain_names: list[str]
    text_bias: Tensor | None = None  # (d,), added to hidden @ text_projection
    extra: dict[str, str] = field(default_factory=dict)
    extra_tensors: dict[str, Tensor] = field(default_factory=dict)

    def embed(self, hidden: Tensor) -> Tensor:
        """Text embeddings (n, d) of hidden states (n, w), in their dtype, not normalised."""
        embedded = hidden @ self.text_projection.to(hidden.dtype)  # (n, w) @ (w, d)
        return embedded if self.text_bias is None else embedded + self.text_bias.to(embedded.dtype)

    @property
    def model(self) -> str:
        """SHA-256 of the model's config (`clip.architectures.identity`); empty if not known."""
        text = self.extra.get("model", "")
        return text and hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()

    @property
    def identity(self) -> ModelIdentity | None:
        """What an adapter says of the model; None if the bundle does not say."""
        if (text := self.extra.get("identity")) is None:
            return None
        try:
            return ModelIdentity(**json.loads(text))
        except (TypeError, ValueError, RecursionError) as error:
            raise ProblemError(f"identity does not say what the model is ({error})") from error

    @property
    def precision(self) -> str:
        """What the images were encoded in, see `clip.source.PRECISIONS`."""
        return self.extra.get("precision", "fp32")

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of its tensors by name."""
        bias = {} if self.text_bias is None else {TEXT_BIAS: self.text_bias}
        return {key: getattr(self, key) for key in SHAPES} | bias | self.extra_tensors

    @classmethod
    def load(cls, path: str | Path) -> FeatureBundle:
        """Read and check the bundle at `path`; ProblemError names the file and the key."""
        with naming(f"feature bundle {path}"):
            metadata, tensors = read_safetensors(path)
            found = metadata.pop("format", None)
            _require(found == FORMAT, f"its format is {shown(found)}, not {FORMAT!r}")
            for key in (*TEXT_KEYS, *LIST_KEYS, *SHAPES):
                _require(key in (tensors if key in SHAPES else metadata), f"{key} is missing")
            bundle = cls(
                **{key: tensors.pop(key) for key in SHAPES},
                **{key: metadata.pop(key) for key in TEXT_KEYS},
                **{key: _strings(key, metadata.pop(key)) for key in LIST_KEYS},
                text_bias=tensors.pop(TEXT_BIAS, None),
                extra=metadata,
                extra_tensors=tensors,
            )
        bundle.check(path)
        floats = {k: x.float() for k, x in bundle.tensors.items() if k in (*SHAPES, TEXT_BIAS)}
        return replace(bundle, **floats | {"labels": bundle.labels.long()})

    def save(self, path: str | Path) -> None:
        """Check the bundle and write it to `path`, whole or not at all; nothing is overwritten."""
        self.check(path)
        metadata = self.extra | {"format": FORMAT}
        metadata |= {key: getattr(self, key) for key in TEXT_KEYS}
        metadata |= {key: json.dumps(getattr(self, key), ensure_ascii=False) for key in LIST_KEYS}
        # safetensors refuses tensors that share memory, so each gets its own.
        tensors = {key: x.clone() for key, x in self.tensors.items()}
        write_bytes(container(tensors, metadata), path, overwrite=False)

    def check(self, where: str | Path) -> None:
        """ProblemError, naming `where` and the key, for a bundle that contradicts itself: wrong
        shapes or dtypes, NaN or inf, a label out of range, image features that are not normalised,
        a class without a name of its own, a template without the class's place."""
        with naming(f"feature bundle {where}"):
            _require(self.classnames, "classnames is empty")
            if problem := flaw(self.classnames):
                raise ProblemError(f"classnames {problem}; a class has a name of its own")
            # Prompts may be made by no template: a word says by what ("ensemble").
            template = self.template.count("{}") == 1 or self.template.isidentifier()
            _require(template, f"template is {self.template!r}: it must hold {{}} once")
            _ = self.identity
            sizes = {"1": 1, "C": len(self.classnames), "M": len(self.retain_names)}
            self._check_tensors(sizes | {"A": self._check_audit()})
            _require(self.text_projection.numel(), "text_projection is empty")
            if len(self.labels):
                low, high = int(self.labels.min()), int(self.labels.max())
                last = len(self.classnames) - 1
                message = f"labels run from {low} to {high}, not within 0 to {last}"
                _require(low >= 0 and high <= last, message)
                worst = float((self.image_features.float().norm(dim=1) - 1).abs().max())
                message = f"image_features are not L2-normalised (a norm is {worst:.3g} off 1)"
                _require(worst <= TOLERANCE, message)

    def _check_tensors(self, sizes: dict[str, int]) -> None:
        """Shapes fit `sizes` by dimension letter and one another; dtypes; finite numbers."""
        for key, letters in (SHAPES | OPTIONAL).items():
            if (tensor := self.tensors.get(key)) is None:
                continue
            expected = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
            for letter, size in zip(letters, tensor.shape, strict=False):
                sizes.setdefault(letter, size)
            shape = tuple(tensor.shape)
            fits = shape == tuple(sizes.get(letter) for letter in letters)
            _require(fits, f"{key} has shape {shape}, expected ({expected})")
            if key == "labels":
                _require(tensor.dtype in INTEGERS, f"{key} are {tensor.dtype}, not integers")
                continue
            _require(tensor.is_floating_point(), f"{key} is {tensor.dtype}, not floating point")
            finite = bool(torch.isfinite(tensor.float()).all())
            _require(finite, f"{key} holds NaN or infinite values")

    def _check_audit(self) -> int:
        """How many other words there are; all of their lists and tensor are there, or none."""
        if not {*AUDIT_LISTS, AUDIT_HIDDEN} & {*self.extra, *self.extra_tensors}:
            return 0
        for key in (*AUDIT_LISTS, AUDIT_HIDDEN):
            there = key in self.extra_tensors if key == AUDIT_HIDDEN else key in self.extra
            _require(there, f"{key} is missing, and the bundle has others of its kind")
        lists = {key: _strings(key, self.extra[key]) for key in AUDIT_LISTS}
        lengths = {key: len(values) for key, values in lists.items()}
        _require(len(set(lengths.values())) == 1, f"lists differ in length: {lengths}")
        unknown = sorted(set(lists["audit_classes"]) - set(self.classnames))
        _require(not unknown, f"audit_classes are no classes of the bundle: {shown(unknown)}")
        return lengths["audit_texts"]


def bundle_path(folder: str | Path, backbone: str, dataset: str) -> Path:
    """Where the bundle of a data set lies in a folder of bundles: BACKBONE/DATASET.safetensors."""
    return Path(folder) / backbone.replace("/", "-") / f"{dataset}{SUFFIX}"


def list_bundles(folder: str | Path, backbone: str) -> dict[str, Path]:
    """Data set -> file, sorted, of the bundles of `backbone` in `folder`; ProblemError if none."""
    folder = Path(folder)
    _require(folder.is_dir(), f"no folder of feature bundles at {folder}")
    place = bundle_path(folder, backbone, "").parent
    # No hidden file is a bundle: it is what a killed run left, or a data set called "..".
    found = {path.stem: path for path in place.glob(f"[!.]*{SUFFIX}")}
    others = ", ".join(sorted({path.parent.name for path in folder.glob(f"*/*{SUFFIX}")}))
    _require(found, f"no feature bundle of {backbone} in {folder}; backbones there: {others}")
    return dict(sorted(found.items()))


def load_bundle(folder: str | Path, backbone: str, dataset: str) -> FeatureBundle:
    """Load one bundle of a folder by its names; ProblemError if there is none, or if the file is of
    another backbone or data set than its place says."""
    bundles = list_bundles(folder, backbone)
    message = f"no feature bundle of {dataset!r} for {backbone} in {folder}; data sets there: "
    _require(dataset in bundles, message + ", ".join(bundles))
    bundle = FeatureBundle.load(bundles[dataset])
    for key, wanted in (("backbone", backbone), ("dataset", dataset)):
        found = getattr(bundle, key)
        message = f"feature bundle {bundles[dataset]}: {key} is {found!r}, but its place says "
        _require(found == wanted, message + repr(wanted))
    return bundle


def load_bundles(
    folder: str | Path, backbone: str, names: Iterable[str] | None = None
) -> dict[str, FeatureBundle]:
    """The bundles of one run, by name; all of the folder's if `names` is None. ProblemError names
    two files that one model did not make: all are evaluated with the projection of one."""
    names = list_bundles(folder, backbone) if names is None else names
    bundles = {name: load_bundle(folder, backbone, name) for name in names}
    for name, bundle in bundles.items():
        first = next(iter(bundles.values()))
        close = _close(first.text_projection, bundle.text_projection)
        same = {
            "weights": first.weights == bundle.weights,
            "projections": close and _close(first.text_bias, bundle.text_bias),
            "model configs (activation, preprocessing or tokenizer)": first.model == bundle.model
            or not (first.model and bundle.model),
            "precisions of the image encoder": first.precision == bundle.precision,
        }
        if differ := [what for what, is_same in same.items() if not is_same]:
            places = [bundle_path(folder, backbone, dataset) for dataset in (first.dataset, name)]
            which = f"feature bundles {places[0]} and {places[1]}"
            raise ProblemError(f"{which} were made with different {differ[0]}; a run has one model")
    return bundles


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are the same but for rounding to float16."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * a.abs().max())


def _require(holds: object, problem: str) -> None:
    if not holds:
        raise ProblemError(problem)


def _strings(key: str, text: str) -> list[str]:
    try:
        values = parse_json(text)
    except ValueError as error:
        raise ProblemError(f"{key} is not valid JSON ({error})") from error
    is_list = isinstance(values, list) and all(map(is_text, values))
    _require(is_list, f"{key} is not a JSON list of texts")
    return values
