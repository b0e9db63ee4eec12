"""What CLIP has encoded before, on disk, kept apart by what it depends on.

Image embeddings depend on the weights, the preprocessing, the precision and the contents of the
image files; hidden states on the weights and the list of texts. Labels, templates and vocabularies
are in neither key, so a change of those never encodes an image again, and never gives a stale
result. Two processes that encode the same write the same files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clip.digests import digests
from clip.source import ClipSource
from datasets.reader import read_image
from engine.log import logger, progress
from engine.ray import LauncherSettings, spread
from forgetting.adapter import ModelIdentity
from forgetting.errors import ProblemError
from forgetting.io import container, read_safetensors, write_bytes
from forgetting.models.vocabulary import expand

SHARD = 512  # images; what a killed run loses at most
BATCH = {"cpu": 32, "cuda": 256}  # images that are encoded at once
COMPARED = 16  # images whose embeddings in another precision are compared with those of float32
Shards = Mapping[Path, Sequence[str]]  # file of embeddings -> its images


class FeatureCache:
    """Tensors of one ClipSource under `folder`; the model is loaded only for what is not there.

    Args:
        how: where images are encoded; None: here.
    """

    def __init__(
        self, source: ClipSource, folder: str | Path, how: LauncherSettings | None = None
    ) -> None:
        self.source, self.how, self.root = source, how, expand(folder)
        self.folder = self.root / "features" / source.arch.replace("/", "-")
        self.batch = BATCH.get(source.device.type, BATCH["cuda"])

    def projection(self) -> tuple[Tensor, Tensor | None, ModelIdentity]:
        """`text_projection` (w, d), `text_bias` (d,) or None, and what an adapter says of the
        model."""
        path = self._path("projection", [])
        with suppress(ProblemError, KeyError, TypeError, ValueError):
            metadata, tensors = read_safetensors(path)
            known = ModelIdentity(**json.loads(metadata["identity"]))
            return tensors["projection"], tensors.get("bias"), known
        projection, bias, known = self.source.projection, self.source.bias, self.source.identity
        tensors = {"projection": projection} | ({} if bias is None else {"bias": bias})
        write_bytes(container(tensors, {"identity": json.dumps(asdict(known))}), path)
        return projection, bias, known

    def texts(self, texts: list[str]) -> Tensor:
        """Hidden states (n, w) of `texts`."""
        return self._cached(self._path("texts", texts), lambda: self.source.encode_hidden(texts))

    def images(
        self, name: str, paths: Sequence[str], batch_size: int | None, workers: int
    ) -> Tensor:
        """Embeddings (N, d), L2-normalised, of the image files `paths`, in that order.

        `name` says whose they are, for people. Files may move: it is their contents that count.
        Shards are kept until all are there, so a killed run goes on where it was, as does one
        that stopped at a broken image.

        Raises:
            ProblemError: naming the first image that is missing or cannot be decoded.
        """
        try:
            contents = digests(paths, self.folder.parent / "images.json")
        except OSError as error:
            raise ProblemError(_broken(error.filename, error.strerror)) from error
        precision = [] if self.source.precision == "fp32" else [self.source.precision]
        entry = self._path(name, precision + contents)
        features = _read(entry)
        if features is None:
            shards = {}
            for i in range(0, len(paths), SHARD):
                key = precision + contents[i : i + SHARD]
                shards[self._path(f"{name}.parts/part", key)] = paths[i : i + SHARD]
            if self.how is not None and self.how.launcher != "local":
                self._spread(name, shards, batch_size)
            features = self.encode(name, shards, batch_size, workers)
            _write(entry, features)
            for part in shards:
                part.unlink(missing_ok=True)
            with suppress(OSError):  # parts of another run may be there, or no part at all
                next(iter(shards)).parent.rmdir()
        return features

    def encode(self, name: str, shards: Shards, batch_size: int | None, workers: int) -> Tensor:
        """Embeddings (N, d) of shards; each is written as soon as it is complete, and not encoded
        if it is there."""
        parts = {part: _read(part) for part in shards}
        missing = {part: shards[part] for part in shards if parts[part] is None}
        total = sum(map(len, shards.values()))
        done = total - sum(map(len, missing.values()))
        if missing and done:
            logger.info(f"clip: {name}: {done} of {total} images were encoded before, going on")
        self.batch = batch_size or self.batch
        chunks = [  # that are loaded together; none belongs to two shards
            paths[i : i + self.batch]
            for paths in missing.values()
            for i in range(0, len(paths), self.batch)
        ]
        loaded = self._loaded(chunks, workers)
        if missing and self.source.precision != "fp32":
            first = next(loaded)
            self._compare(name, first[:COMPARED])
            loaded = chain([first], loaded)
        with progress(desc=f"clip: {name}", total=total, initial=done, unit="images") as bar:
            for part, paths in missing.items():
                rows: list[Tensor] = []
                while sum(map(len, rows)) < len(paths):
                    pictures = next(loaded)
                    rows.append(self._embedded(pictures))
                    bar.update(len(pictures))
                parts[part] = torch.cat(rows)
                _write(part, parts[part])
        return torch.cat(list(parts.values()))

    def _embedded(self, pictures: Tensor) -> Tensor:
        """Embeddings (n, d) of pictures, half as many at once from where memory ends.

        Raises:
            ProblemError: memory does not hold one of them.
        """
        rows = []
        while len(pictures):
            try:
                rows.append(self.source.encode_images(pictures[: self.batch]))
                pictures = pictures[self.batch :]
            except torch.OutOfMemoryError as error:
                if self.batch == 1:
                    raise ProblemError("out of memory: not one image can be encoded") from error
                self.batch //= 2
        return torch.cat(rows)

    def _spread(self, name: str, shards: Shards, batch_size: int | None) -> None:
        """Have many workers write the shards that are not there yet. A worker computes on one of
        the cores that it requests, and loads images on the others."""
        missing = [(part, list(paths)) for part, paths in shards.items() if not part.exists()]
        workers = max(0, int(self.how.cpus) - 1)
        task = partial(_encode, self.source.recipe, str(self.root), name, batch_size, workers)
        total = sum(len(paths) for _, paths in missing)
        with progress(desc=f"clip: {name}, by workers", total=total, unit="images") as bar:
            for (_, paths), result in spread(task, missing, self.how) if missing else ():
                if isinstance(result, ProblemError):
                    raise result
                bar.update(len(paths))

    def _compare(self, name: str, pictures: Tensor) -> None:
        """Log how far the embeddings of a few pictures are from those of float32."""
        here, exact = (self.source.encode_images(pictures, x).double() for x in (False, True))
        cosine = float((here * exact).sum(dim=1).min())
        logger.info(
            f"clip: {name}: embeddings in {self.source.precision} differ from those in float32 by "
            f"at most {float((here - exact).abs().max()):.1g} in a component and "
            f"{max(0.0, 1 - cosine):.1g} in cosine (first {len(pictures)} images)"
        )

    def _loaded(self, chunks: list[Sequence[str]], workers: int) -> Iterator[Tensor]:
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


def _encode(
    recipe: dict[str, Any],
    root: str,
    name: str,
    batch_size: int | None,
    workers: int,
    shard: tuple[Path, list[str]],
) -> None:
    """Write one shard, in a worker. One that is begun again, after its worker died, is the same
    file."""
    part, paths = shard
    _cache(root, **recipe).encode(name, {part: paths}, batch_size, workers)


@lru_cache(maxsize=1)  # a worker encodes many shards with one model
def _cache(root: str, **recipe: Any) -> FeatureCache:
    return FeatureCache(ClipSource(**recipe), root)


def _broken(path: str, reason: object) -> str:
    return (
        f"image {path} cannot be read ({reason}); "
        "`python -m datasets.check ROOT` lists every broken image"
    )


def _read(path: Path) -> Tensor | None:
    """The tensor at `path`, or None if there is none or the file is damaged."""
    if not path.exists():
        return None
    try:
        return read_safetensors(path)[1]["features"]
    except (ProblemError, KeyError):
        logger.info(f"clip: {path} is damaged and is made again")
        return None


def _write(path: Path, tensor: Tensor) -> None:
    write_bytes(container({"features": tensor}, {}), path)
