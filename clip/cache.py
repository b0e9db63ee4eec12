"""What CLIP has encoded before, on disk, kept apart by what it depends on.

Image embeddings depend on the weights, the preprocessing, the precision and the contents of the
image files; hidden states on the weights and the list of texts. Labels, templates and vocabularies
are in neither key, so a change of those never encodes an image again, and never gives a stale
result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clip.batches import BatchSize, encode
from clip.digests import digests
from clip.source import ClipSource
from datasets.reader import read_image
from engine.files import lock, readable
from engine.log import logger, progress
from engine.ray import LauncherSettings
from forgetting.errors import ProblemError
from forgetting.io import atomic_path

SHARD = 512  # images; what a killed run loses at most
CHUNK = 16  # images that are loaded together, where the size of a batch is still to be found


class FeatureCache:
    """Tensors of one ClipSource under `folder`; the model is loaded only for what is not there.

    Args:
        how: where images are encoded; None: here.
    """

    def __init__(
        self, source: ClipSource, folder: str | Path, how: LauncherSettings | None = None
    ) -> None:
        self.source, self.how, self.root = source, how, Path(folder)
        self.folder = self.root / "features" / source.arch.replace("/", "-")

    def projection(self) -> Tensor:
        """`text_projection` (w, d)."""
        path = self._path("projection", [])
        return self._cached(path, lambda: self.source.projection)

    def bias(self) -> Tensor | None:
        """`text_bias` (d,), or None."""
        path = self._path("bias", [])
        none = torch.empty(0)  # a model without is remembered too
        found = self._cached(path, lambda: none if self.source.bias is None else self.source.bias)
        return found if len(found) else None

    def texts(self, texts: list[str]) -> Tensor:
        """Hidden states (n, w) of `texts`."""
        return self._cached(self._path("texts", texts), lambda: self.source.encode_hidden(texts))

    def images(
        self, name: str, paths: Sequence[str], batch_size: int | None, workers: int
    ) -> Tensor:
        """Embeddings (N, d), L2-normalised, of the image files `paths`, in that order.

        `name` says whose they are, for people. Files may move: it is their contents that count.
        Shards are kept until all are there, so a killed run goes on where it was, as does one
        that stopped at a broken image. A second process waits for the first.

        Raises ProblemError naming the first image that is missing or cannot be decoded.
        """
        try:
            contents = digests(paths, self.folder.parent / "images.json")
        except OSError as error:
            raise ProblemError(_broken(error.filename, error.strerror)) from error
        mark = [self.source.precision] * (self.source.precision != "fp32")
        entry = self._path(name, mark + contents)
        features = _read(entry)
        if features is not None:
            return features
        shards = {
            self._path(f"{name}.parts/part", mark + contents[i : i + SHARD]): paths[i : i + SHARD]
            for i in range(0, len(paths), SHARD)
        }
        waiting = f"clip: another process is encoding {name}; waiting for it"
        with lock(entry, timeout=-1, waiting=waiting):  # encoding may take hours
            if self.how is not None and self.how.launcher == "ray" and not entry.exists():
                from clip.spread import encode_by_ray

                encode_by_ray(self, name, shards, batch_size)
            features = self._cached(entry, lambda: self.encode(name, shards, batch_size, workers))
            for part in shards:
                part.unlink(missing_ok=True)
            with suppress(OSError):  # parts of another run may be there, or no part at all
                next(iter(shards)).parent.rmdir()
        return features

    def encode(
        self,
        name: str,
        shards: Mapping[Path, Sequence[str]],
        batch_size: int | None,
        workers: int,
    ) -> Tensor:
        """Embeddings (N, d) of shards, path -> its images; each is written as soon as it is
        complete, and not encoded if it is there."""
        parts = {part: _read(part) for part in shards}
        missing = {part: shards[part] for part in shards if parts[part] is None}
        total = sum(map(len, shards.values()))
        done = total - sum(map(len, missing.values()))
        if missing and done:
            logger.info(f"clip: {name}: {done} of {total} images were encoded before, going on")
        chunk, size = batch_size or CHUNK, BatchSize(batch_size, self.source.device)
        chunks = self._chunks(
            [  # no chunk belongs to two shards
                paths[i : i + chunk]
                for paths in missing.values()
                for i in range(0, len(paths), chunk)
            ],
            workers,
        )
        if missing and self.source.precision != "fp32":
            first = next(chunks)
            self._compare(name, first[:CHUNK])
            chunks = chain([first], chunks)
        what = f"clip: {name}, image"
        with progress(desc=what, total=total, initial=done, unit="images") as bar:
            for part, paths in missing.items():
                rows: list[Tensor] = []
                for found in encode(self.source, chunks, len(paths), size):  # (b, d)
                    rows.append(found)
                    bar.update(len(found))
                    bar.set_postfix_str(f"{size.now} at once")
                parts[part] = torch.cat(rows)
                _write(part, parts[part])
        return torch.cat(list(parts.values()))

    def _compare(self, name: str, pictures: Tensor) -> None:
        """Say how far the embeddings of a few pictures are from those of float32."""
        here, exact = (self.source.encode_images(pictures, x).double() for x in (False, True))
        cosine = float((here * exact).sum(dim=1).min())
        logger.info(
            f"clip: {name}: embeddings in {self.source.precision} differ from those in float32 by "
            f"at most {float((here - exact).abs().max()):.1g} in a component and "
            f"{max(0.0, 1 - cosine):.1g} in cosine (first {len(pictures)} images)"
        )

    def _chunks(self, chunks: list[Sequence[str]], workers: int) -> Iterator[Tensor]:
        """The pictures (n, 3, side, side) uint8 of each list of paths."""
        for pictures in DataLoader(
            _Chunks(chunks, self.source.preprocess),
            batch_size=None,  # they are batches already
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=self.source.device.type == "cuda",
        ):
            if isinstance(pictures, str):
                raise ProblemError(pictures)
            yield pictures

    def _path(self, name: str, contents: list[Any]) -> Path:
        key = json.dumps([self.source.fingerprint, contents]).encode()
        return self.folder / f"{name}-{hashlib.sha256(key).hexdigest()[:24]}.safetensors"

    def _cached(self, path: Path, make: Callable[[], Tensor]) -> Tensor:
        tensor = _read(path)
        if tensor is None:
            tensor = make()
            _write(path, tensor)
        return tensor


class _Chunks(Dataset):
    """Pictures (n, 3, side, side) uint8 of lists of paths, or a line on the first that is broken.

    That line stands in for the chunk, because a loader's worker process would turn an exception
    into pages of traceback.
    """

    def __init__(
        self, chunks: list[Sequence[str]], transform: Callable[[Image.Image], Tensor]
    ) -> None:
        self.chunks, self.transform = chunks, transform

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> Tensor | str:
        images = []
        for path in self.chunks[index]:
            try:
                images.append(self.transform(read_image(path)))
            except ProblemError as error:
                return _broken(path, error)
        return torch.stack(images)


def _broken(path: str, reason: object) -> str:
    return (
        f"image {path} cannot be read ({reason}); "
        "`python -m datasets.check ROOT` lists every broken image"
    )


def _read(path: Path) -> Tensor | None:
    """The tensor at `path`, or None if there is none or the file is damaged."""
    try:
        with readable(path) as name:
            return load_file(name)["features"]
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, KeyError):
        logger.info(f"clip: {path} is damaged and is made again")
        return None


def _write(path: Path, tensor: Tensor) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(save({"features": tensor.contiguous()}))
