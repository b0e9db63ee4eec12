"""What CLIP has encoded before, on disk, kept apart by what it depends on: images on weights,
preprocessing, precision and the contents of the files; hidden states on the weights and the
list of texts. So a change of labels, templates or vocabularies never encodes an image again, and
never gives a stale result. Two processes that encode the same write the same files."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clip.source import ClipSource, digests
from datasets.reader import read_image
from engine.log import logger, progress
from engine.ray import LauncherSettings, spread
from forgetting.errors import ProblemError
from forgetting.io import container, read_safetensors, write_bytes

SHARD = 512  # images; what a killed run loses at most
BATCH = {"cpu": 32, "cuda": 256}  # images that are encoded at once
Shards = Mapping[Path, Sequence[str]]  # file of embeddings -> its images


class FeatureCache:
    """Tensors of one ClipSource in its cache; the model is loaded only for what is not there.
    `how`: where images are encoded; None: here."""

    def __init__(self, source: ClipSource, how: LauncherSettings | None = None) -> None:
        self.source, self.how = source, how
        self.folder = source.cache / "features" / source.arch.replace("/", "-")

    def projection(self) -> tuple[Tensor, Tensor | None, str]:
        """`text_projection` (w, d), `text_bias` (d,) or None, and the model's identity in JSON."""
        path = self._path("projection", [])
        if (stored := _read(path)) is None:
            projection, bias = self.source.projection, self.source.bias
            tensors = {"projection": projection} | ({} if bias is None else {"bias": bias})
            stored = {"identity": json.dumps(asdict(self.source.identity))}, tensors
            write_bytes(container(stored[1], stored[0]), path)
        metadata, tensors = stored
        return tensors["projection"], tensors.get("bias"), metadata["identity"]

    def texts(self, texts: list[str]) -> Tensor:
        """Hidden states (n, w) of `texts`."""
        path = self._path("texts", texts)
        if (stored := _read(path)) is not None:
            return stored[1]["features"]
        return _write(path, self.source.encode_hidden(texts))

    def images(
        self, name: str, paths: Sequence[str], batch_size: int | None, workers: int
    ) -> Tensor:
        """Embeddings (N, d), L2-normalised, of the image files `paths`, in that order; `name` says
        whose they are, for people. Files may move: it is their contents that count. Shards are kept
        until all are there, so a killed run goes on where it was, as does one that stopped at a
        broken image, which a ProblemError names."""
        try:
            contents = digests(paths, self.folder.parent / "images.json")
        except OSError as error:
            raise ProblemError(_broken(error.filename, error.strerror)) from error
        precision = [] if self.source.precision == "fp32" else [self.source.precision]
        entry = self._path(name, precision + contents)
        if (stored := _read(entry)) is not None:
            return stored[1]["features"]
        shards = {}
        for i in range(0, len(paths), SHARD):
            key = precision + contents[i : i + SHARD]
            shards[self._path(f"{name}.parts/part", key)] = paths[i : i + SHARD]
        if self.how is not None and self.how.launcher != "local":
            self._spread(name, shards, batch_size)
        features = _write(entry, self.encode(name, shards, batch_size, workers))
        for part in shards:
            part.unlink(missing_ok=True)
        with suppress(OSError):  # parts of another run may be there, or no part at all
            next(iter(shards)).parent.rmdir()
        return features

    def encode(self, name: str, shards: Shards, batch_size: int | None, workers: int) -> Tensor:
        """Embeddings (N, d) of shards; each is written once complete, and read if it is there."""
        device = self.source.device.type
        batch = batch_size or BATCH.get(device, BATCH["cuda"])
        total = sum(map(len, shards.values()))
        parts = {part: _read(part) for part in shards}
        missing = {part: shards[part] for part in shards if parts[part] is None}
        done = total - sum(map(len, missing.values()))
        if missing and done:
            logger.info(f"clip: {name}: {done} of {total} images were encoded before, going on")
        chunks = [  # that are loaded together; none belongs to two shards
            paths[i : i + batch] for paths in missing.values() for i in range(0, len(paths), batch)
        ]
        loaded = self._loaded(chunks, workers)
        features = {part: stored[1]["features"] for part, stored in parts.items() if stored}
        with progress(desc=f"clip: {name}", total=total, initial=done, unit="images") as bar:
            for part, paths in missing.items():
                rows: list[Tensor] = []
                while sum(map(len, rows)) < len(paths):
                    try:
                        rows.append(self.source.encode_images(next(loaded)))
                    except torch.OutOfMemoryError as error:
                        raise ProblemError(
                            f"out of memory for {batch} images at once: lower "
                            "DATALOADER.TEST.BATCH_SIZE"
                        ) from error
                    bar.update(len(rows[-1]))
                features[part] = _write(part, torch.cat(rows))
        return torch.cat([features[part] for part in shards])

    def _spread(self, name: str, shards: Shards, batch_size: int | None) -> None:
        """Have many workers write the shards that are not there yet. A worker computes on one of
        the cores that it requests, and loads images on the others."""
        missing = [(part, list(paths)) for part, paths in shards.items() if not part.exists()]
        workers = max(0, int(self.how.cpus) - 1)
        task = partial(_encode, self.source.arguments, name, batch_size, workers)
        total = sum(len(paths) for _, paths in missing)
        with progress(desc=f"clip: {name}, by workers", total=total, unit="images") as bar:
            for (_, paths), result in spread(task, missing, self.how) if missing else ():
                if isinstance(result, ProblemError):
                    raise result
                bar.update(len(paths))

    def _loaded(self, chunks: list[Sequence[str]], workers: int) -> Iterator[Tensor]:
        """The pictures (n, 3, side, side) uint8 of each list of paths."""
        for pictures in DataLoader(
            _Chunks(chunks, self.source),
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


class _Chunks(Dataset):
    """Pictures (n, 3, side, side) uint8 of lists of paths, or a line on the first that is broken:
    a loader's worker process would turn an exception into pages of traceback."""

    def __init__(self, chunks: list[Sequence[str]], source: ClipSource) -> None:
        self.chunks, self.transform = chunks, source.preprocess

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
    source: tuple, name: str, batch_size: int | None, workers: int, shard: tuple[Path, list[str]]
) -> None:
    """Write one shard, in a worker; after a worker died it is begun again, as the same file."""
    part, paths = shard
    _cache(*source).encode(name, {part: paths}, batch_size, workers)


@lru_cache(maxsize=1)  # a worker encodes many shards with one model
def _cache(*source: Any) -> FeatureCache:
    return FeatureCache(ClipSource(*source))


def _broken(path: str, reason: object) -> str:
    return f"image {path} cannot be read ({reason}); `python -m datasets.check ROOT` lists them all"


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]] | None:
    """Metadata and tensors of a file, or None if there is none or it is damaged."""
    if path.exists():
        try:
            return read_safetensors(path)
        except ProblemError:
            logger.info(f"clip: {path} is damaged and is made again")
    return None


def _write(path: Path, features: Tensor) -> Tensor:
    write_bytes(container({"features": features}, {}), path)
    return features
