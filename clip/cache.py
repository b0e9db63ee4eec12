"""What CLIP has encoded before, on disk, kept apart by what it depends on.

Image embeddings depend on the weights, the preprocessing and the list of image files; hidden
states on the weights and the list of texts. Labels, templates and vocabularies are in neither
key, so a change of those never encodes an image again, and never gives a stale result.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clip.source import ClipSource
from engine import UserError, atomic_path, lock

SHARD = 512  # images; what a killed run loses at most
# What PIL raises for files that are no image, torn, or larger than it dares to decode.
BROKEN_IMAGE = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    struct.error,
    Image.DecompressionBombError,
)


class FeatureCache:
    """Tensors of one ClipSource under `folder`; the model is loaded only for what is not there."""

    def __init__(self, source: ClipSource, folder: str | Path) -> None:
        self.source = source
        self.folder = Path(folder) / "features" / source.arch.replace("/", "-")

    def projection(self) -> Tensor:
        """`text_projection` (w, d)."""
        path = self._path("projection", [])
        return self._cached(path, lambda: self.source.projection)

    def texts(self, texts: list[str]) -> Tensor:
        """Hidden states (n, w) of `texts`."""
        return self._cached(self._path("texts", texts), lambda: self.source.encode_hidden(texts))

    def images(
        self,
        name: str,
        paths: Sequence[str],
        root: str | Path,
        batch_size: int,
        workers: int,
        progress: bool,
    ) -> Tensor:
        """Embeddings (N, d), L2-normalised, of the image files `paths`, in that order.

        `name` says whose they are, for people; `root` is the folder that may move without making
        the entry stale. Shards are kept until all are there, so a killed run goes on where it
        was, as does one that stopped at a broken image. A second process waits for the first.

        Raises UserError naming the first image that is missing or cannot be decoded.
        """
        root = Path(root).expanduser()
        files = [[os.path.relpath(path, root), _size(path)] for path in paths]
        entry = self._path(name, files)
        features = _read(entry)
        if features is not None:
            return features
        starts = range(0, len(paths), SHARD)
        shards = {
            self._path(f"{name}.parts/part", files[i : i + SHARD]): paths[i : i + SHARD]
            for i in starts
        }
        with _alone(entry):
            features = self._cached(
                entry, lambda: self._encode(name, shards, batch_size, workers, progress)
            )
            for part in shards:
                part.unlink(missing_ok=True)
            with suppress(OSError):  # parts of another run may be there, or no part at all
                next(iter(shards)).parent.rmdir()
        return features

    def _encode(
        self,
        name: str,
        shards: Mapping[Path, Sequence[str]],
        batch_size: int,
        workers: int,
        progress: bool,
    ) -> Tensor:
        """Embeddings (N, d) of all images; each shard is written as soon as it is complete."""
        parts = {part: _read(part) for part in shards}
        missing = [part for part in shards if parts[part] is None]
        if missing:
            paths = [path for part in missing for path in shards[part]]
            total = sum(map(len, shards.values()))
            done = total - len(paths)
            if done:
                print(f"clip: {name}: {done} of {total} images were encoded before, going on")
            loader = DataLoader(
                _ImageFiles(paths, self.source.preprocess),
                batch_size=batch_size,
                num_workers=workers,
                pin_memory=self.source.device.type == "cuda",
            )
            rows = torch.empty(0, self.source.projection.shape[1])  # encoded, not yet written
            with tqdm(
                total=total,
                initial=done,
                unit="image",
                desc=f"clip: {name}",
                disable=not progress,
            ) as bar:
                for batch in loader:
                    for problem in filter(None, batch["problem"]):
                        raise UserError(problem)
                    features = self.source.encode_images(batch["img"])  # (b, d)
                    bar.update(len(features))
                    rows = torch.cat([rows, features])
                    while missing and len(rows) >= (size := len(shards[missing[0]])):
                        part = missing.pop(0)
                        parts[part], rows = rows[:size], rows[size:]
                        _write(part, parts[part])
        return torch.cat(list(parts.values()))

    def _path(self, name: str, contents: list[Any]) -> Path:
        key = json.dumps([self.source.fingerprint, contents]).encode()
        return self.folder / f"{name}-{hashlib.sha256(key).hexdigest()[:24]}.safetensors"

    def _cached(self, path: Path, make: Callable[[], Tensor]) -> Tensor:
        tensor = _read(path)
        if tensor is None:
            tensor = make()
            _write(path, tensor)
        return tensor


class _ImageFiles(Dataset):
    """Preprocessed images of a list of paths, with a line on what is wrong with each.

    A problem travels beside the image, because a loader's worker process would turn an exception
    into pages of traceback.
    """

    def __init__(self, paths: Sequence[str], transform: Callable[[Image.Image], Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                return {"img": self.transform(image.convert("RGB")), "problem": ""}
        except BROKEN_IMAGE as error:
            blank = self.transform(Image.new("RGB", (1, 1)))
            return {"img": blank, "problem": _broken_image(path, error)}


def _broken_image(path: str, error: Exception) -> str:
    return (
        f"image {path} cannot be read ({str(error).splitlines()[0]}); "
        "`python -m datasets.check ROOT` lists every broken image"
    )


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError as error:
        raise UserError(_broken_image(path, error)) from error


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold `path` against other processes. Encoding may take hours, so waiting has no limit."""
    guard = lock(path, timeout=0)
    try:
        guard.acquire()
    except UserError:
        print(f"clip: another process is encoding {path.stem}; waiting for it")
        guard.acquire(timeout=-1)
    try:
        yield
    finally:
        guard.release()


def _read(path: Path) -> Tensor | None:
    """The tensor at `path`, or None if there is none or the file is damaged."""
    try:
        return load_file(path)["features"]
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, KeyError):
        print(f"clip: {path} is damaged and is made again")
        return None


def _write(path: Path, tensor: Tensor) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(save({"features": tensor.contiguous()}))
