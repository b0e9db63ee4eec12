"""FeatureBundle: all that forgetting and evaluating need from CLIP, in one safetensors file.

Once hidden text states, text projection and image embeddings are known, CLIP itself is no longer
needed. A bundle holds them for one backbone and one data set split; as a file,
`BACKBONE/DATASET.safetensors`, it is what people exchange. Nothing in such a file is executed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from engine.errors import UserError, nearest
from engine.files import atomic_path

FORMAT = "clip-forget-features/1"
SUFFIX = ".safetensors"
# Rows of the tensors by dimension letter: N images, C classes, M retained names, w, d as in CLIP.
SHAPES = {
    "image_features": "Nd",
    "labels": "N",
    "class_hidden": "Cw",
    "forget_hidden": "Cw",
    "retain_hidden": "Mw",
    "neutral_hidden": "1w",
    "text_projection": "wd",
}
TEXT_KEYS = ("backbone", "weights", "dataset", "split", "template")
LIST_KEYS = ("classnames", "retain_names")
NORM_TOLERANCE = 1e-2  # float16 rounding moves a unit norm by less than 1e-3


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
    extra: dict[str, str] = field(default_factory=dict)
    extra_tensors: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> FeatureBundle:
        """Read and check the bundle at `path`.

        Raises UserError naming the file and the key: a file that is missing, truncated or no
        bundle, a missing key, a wrong shape, NaN or inf, a label out of range, image features
        that are not normalised.
        """
        path = Path(path)
        tensors, metadata = _read(path)
        if metadata.get("format") != FORMAT:
            raise _error(path, "format", f"is {metadata.get('format')!r}, not {FORMAT!r}")
        for key in (*TEXT_KEYS, *LIST_KEYS):
            if key not in metadata:
                raise _error(path, key, "is missing from the metadata")
        for key in SHAPES:
            if key not in tensors:
                raise _error(path, key, "is missing from the tensors")
        known = {"format", *TEXT_KEYS, *LIST_KEYS}
        bundle = cls(
            **{key: _canonical(path, key, tensors[key]) for key in SHAPES},
            **{key: metadata[key] for key in TEXT_KEYS},
            **{key: _names(path, key, metadata[key]) for key in LIST_KEYS},
            extra={key: value for key, value in metadata.items() if key not in known},
            extra_tensors={key: value for key, value in tensors.items() if key not in SHAPES},
        )
        bundle.check(path)
        return bundle

    def save(self, path: str | Path) -> None:
        """Check the bundle and write it to `path`, whole or not at all.

        Raises UserError if the bundle is not valid or `path` exists: nothing is overwritten.
        """
        path = Path(path)
        self.check(path)
        if path.exists():
            raise UserError(
                f"{path} exists and is not overwritten; move it or choose another folder"
            )
        metadata = {"format": FORMAT}
        metadata |= {key: getattr(self, key) for key in TEXT_KEYS}
        metadata |= {key: json.dumps(getattr(self, key), ensure_ascii=False) for key in LIST_KEYS}
        # safetensors refuses tensors that share memory, so each gets its own.
        tensors = {key: getattr(self, key) for key in SHAPES} | self.extra_tensors
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        with atomic_path(path) as temporary:
            temporary.write_bytes(save(tensors, metadata=self.extra | metadata))

    def check(self, where: str | Path) -> None:
        """Raise UserError naming `where` and the key if the bundle contradicts itself."""
        sizes = {"1": 1, "C": len(self.classnames), "M": len(self.retain_names)}
        named = {"C": "; classnames holds a name a row", "M": "; retain_names holds a name a row"}
        # The projection fixes w and d, so that the tensor that differs is the one blamed.
        for key in sorted(SHAPES, key=lambda name: name != "text_projection"):
            tensor, letters = getattr(self, key), SHAPES[key]
            expected = tuple(sizes.get(letter, letter) for letter in letters)
            if tensor.ndim == len(letters):
                for letter, size in zip(letters, tensor.shape, strict=True):
                    sizes.setdefault(letter, size)
            if tuple(tensor.shape) != tuple(sizes.get(letter) for letter in letters):
                shape = f"({', '.join(map(str, expected))}){named.get(letters[0], '')}"
                raise _error(where, key, f"has shape {tuple(tensor.shape)}, expected {shape}")
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise _error(where, key, "holds NaN or infinite values")
        for letter, key in (
            ("C", "classnames"),
            ("w", "text_projection"),
            ("d", "text_projection"),
        ):
            if sizes[letter] == 0:
                raise _error(where, key, "is empty")
        if sizes["N"]:
            low, high = int(self.labels.min()), int(self.labels.max())
            if low < 0 or high >= sizes["C"]:
                raise _error(
                    where, "labels", f"run from {low} to {high}, not within 0 to {sizes['C'] - 1}"
                )
            worst = float((self.image_features.norm(dim=1) - 1).abs().max())
            if worst > NORM_TOLERANCE:
                raise _error(
                    where, "image_features", f"are not L2-normalised (a norm is {worst:.3g} off 1)"
                )


def bundle_path(folder: str | Path, backbone: str, dataset: str) -> Path:
    """Where the bundle of a data set lies in a folder of bundles: BACKBONE/DATASET.safetensors."""
    return Path(folder) / backbone.replace("/", "-") / f"{dataset}{SUFFIX}"


def list_bundles(folder: str | Path, backbone: str) -> dict[str, Path]:
    """Data set name -> file, sorted by name, of every bundle of `backbone` in `folder`.

    Raises UserError if the folder is missing or holds no bundle of that backbone.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder of feature bundles at {folder}")
    found = {
        path.stem: path for path in bundle_path(folder, backbone, "*").parent.glob(f"*{SUFFIX}")
    }
    if not found:
        others = sorted({path.parent.name for path in folder.glob(f"*/*{SUFFIX}")})
        raise UserError(
            f"no feature bundle of {backbone} in {folder}; "
            f"backbones there: {', '.join(others) or 'none'}"
        )
    return dict(sorted(found.items()))


def load_bundle(folder: str | Path, backbone: str, dataset: str) -> FeatureBundle:
    """Load one bundle of a folder by its names.

    Raises UserError if there is none (naming the nearest), or if the file is of another backbone
    or data set than its place says.
    """
    bundles = list_bundles(folder, backbone)
    if dataset not in bundles:
        raise UserError(
            f"no feature bundle of {dataset!r} for {backbone} in {folder}; "
            f"nearest: {', '.join(nearest(dataset, list(bundles)))}"
        )
    path = bundles[dataset]
    bundle = FeatureBundle.load(path)
    for key, asked in (("backbone", backbone), ("dataset", dataset)):
        if getattr(bundle, key) != asked:
            raise _error(path, key, f"is {getattr(bundle, key)!r}, but its place says {asked!r}")
    return bundle


def _error(where: str | Path, key: str, problem: str) -> UserError:
    return UserError(f"feature bundle {where}: {key} {problem}")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and string metadata of a safetensors file."""
    if not path.is_file():
        kind = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise UserError(f"feature bundle {path} {kind}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            keys = file.keys()
            return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"feature bundle {path} is truncated or not a safetensors file ({reason})"
        ) from error


def _canonical(path: Path, key: str, tensor: Tensor) -> Tensor:
    """float32, or int64 for labels."""
    if key == "labels":
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise _error(path, key, f"are {tensor.dtype}, not integers")
        return tensor.to(torch.int64)
    if not tensor.is_floating_point():
        raise _error(path, key, f"is {tensor.dtype}, not floating point")
    return tensor.to(torch.float32)


def _names(path: Path, key: str, text: str) -> list[str]:
    try:
        names: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise _error(path, key, f"is not valid JSON ({error})") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _error(path, key, "is not a JSON list of strings")
    return names
