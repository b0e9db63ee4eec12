"""Encoding images: this repository's loop against open_clip's plain one, in one run.

    python -m benchmarks encode [ARCH ...] [--images 512] [--rounds 3] [--batch 64]
                                [--precision bf16] [--weights PATH]

From JPEG files of 500 x 375 to embeddings, on the GPU if there is one. The plain loop is that of
open_clip's own evaluation: its transform in a DataLoader, a batch of BATCH, `encode_image` in
float32. Ours is that of `clip.features`, nothing cached, in float32 and in each --precision. Both
have the same processes to load images. Rounds take turns, so that a busy machine is so to all, and
the fastest of each counts. Without --weights these are random: speed does not depend on them, and
how far another precision is off does a little.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from torch.utils.data import DataLoader, Dataset

from clip.architectures import architecture
from clip.cache import FeatureCache
from clip.features import loaders
from clip.source import ClipSource
from engine.cli import COUNT, Parser
from engine.files import write_json_atomic
from engine.log import progress
from forgetting.errors import ProblemError

ARCHITECTURES = ("RN50", "ViT-B/16")
SIDES = 500, 375  # pixels
PLAIN = "open_clip, fp32"


class Opened(Dataset):
    """Image files, opened and transformed."""

    def __init__(self, paths: Sequence[str], transform: Callable[[Image.Image], Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(Image.open(self.paths[index]))


def photographs(folder: Path, count: int) -> list[str]:
    """JPEG files of smooth noise, which compresses about as a photograph does."""
    rng, paths = np.random.default_rng(0), []
    for number in range(count):
        pixels = rng.integers(0, 256, (47, 63, 3)) * rng.uniform(0.2, 1)  # light or dark
        coarse = Image.fromarray(pixels.astype(np.uint8))
        paths.append(str(folder / f"{number:05d}.jpg"))
        coarse.resize(SIDES, Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


class Plain:
    """open_clip's loop with the weights of a source."""

    def __init__(self, source: ClipSource, batch: int) -> None:
        from open_clip.transform import PreprocessCfg, image_transform_v2

        arch, self.device, self.batch = source.architecture, source.device, batch
        self.transform = image_transform_v2(PreprocessCfg(**source.reading), is_train=False)
        self.model = arch.build().eval().to(self.device)
        self.model.load_state_dict(source.model.state_dict())

    @torch.no_grad()
    def encode(self, paths: Sequence[str], workers: int) -> Tensor:
        """Embeddings (N, d)."""
        loader = DataLoader(Opened(paths, self.transform), self.batch, num_workers=workers)
        encode, there = self.model.encode_image, self.device
        return torch.cat([normalize(encode(images.to(there)), dim=-1).cpu() for images in loader])


def ours(source: ClipSource, precision: str, paths: Sequence[str], workers: int) -> Tensor:
    """Embeddings (N, d), by what `clip.features` does."""
    if source.precision != precision:
        source.precision = precision
        vars(source).pop("_rounded", None)  # a copy in another
    with tempfile.TemporaryDirectory() as folder:
        source.cache = Path(folder)
        return FeatureCache(source).images("photographs", paths, None, workers)


def compare(
    source: ClipSource, paths: Sequence[str], rounds: int, batch: int, precisions: Sequence[str]
) -> pd.DataFrame:
    """A row for each way to encode: images a second, how many times the plain loop's that is (and
    in seconds of this process's own, which others on a CPU disturb less), and how far its
    embeddings are from the plain loop's."""
    workers = loaders(source.device)
    loop = Plain(source, batch)
    ways = {PLAIN: partial(loop.encode, paths, workers)}
    ways |= {f"ours, {p}": partial(ours, source, p, paths, workers) for p in precisions}
    clocks = time.perf_counter, time.process_time
    seconds, found = {name: [float("inf")] * 2 for name in ways}, {}
    for _ in progress(range(rounds), f"{source.arch}, round"):
        for name, encode in ways.items():
            started = [clock() for clock in clocks]
            found[name] = encode()
            took = [clock() - start for clock, start in zip(clocks, started, strict=True)]
            seconds[name] = list(map(min, seconds[name], took))
    exact = found[PLAIN]
    return pd.DataFrame(
        {
            "model": source.arch,
            "way": name,
            "images a second": len(paths) / seconds[name][0],
            "times": seconds[PLAIN][0] / seconds[name][0],
            "times, CPU seconds": seconds[PLAIN][1] / seconds[name][1],
            "largest difference": float((rows - exact).abs().max()),
            "1 - cosine": 1 - float(cosine_similarity(rows.double(), exact.double()).min()),
        }
        for name, rows in found.items()
    )


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Measure and print; returns a row for every model and way."""
    parser = Parser(prog="python -m benchmarks encode", description=__doc__.splitlines()[0])
    parser.add_argument("archs", nargs="*", metavar="ARCH", default=list(ARCHITECTURES))
    parser.add_argument("--images", type=COUNT, default=512, help="how many")
    parser.add_argument("--rounds", type=COUNT, default=3, help="of which the fastest counts")
    parser.add_argument("--batch", type=COUNT, default=64, help="of the plain loop")
    several = {"action": "append", "metavar": "PRECISION", "default": []}
    about = "bf16 or fp16, beside fp32 (repeatable; default: bf16)"
    parser.add_argument("--precision", help=about, **several)
    parser.add_argument("--weights", help="a checkpoint of ARCH; default: random weights")
    args = parser.parse_args(argv)
    if args.weights and len(args.archs) > 1:
        raise ProblemError("--weights are those of one ARCH; name it")
    precisions, tables = ["fp32", *(args.precision or ["bf16"])], []
    with tempfile.TemporaryDirectory() as folder:
        paths = photographs(Path(folder), args.images)
        for arch in args.archs:
            weights = args.weights or random_weights(arch, Path(folder) / "random.pt")
            for precision in precisions:  # refused before the work
                source = ClipSource(arch, weights, folder, precision=precision)
            tables.append(compare(source, paths, args.rounds, args.batch, precisions))
    table = pd.concat(tables, ignore_index=True)
    device = torch.cuda.get_device_name() if source.device.type == "cuda" else "cpu"
    print(f"{args.images} images on {device}, {torch.get_num_threads()} CPU threads")
    print(table.to_string(index=False, float_format="{:.3g}".format))
    return table


def random_weights(arch: str, path: Path) -> Path:
    """A checkpoint of random weights, written to `path`; beside it how they compute."""
    write_json_atomic({"model_cfg": architecture(arch).model_config()}, path.with_suffix(".json"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(architecture(arch).build().state_dict(), path)
    return path
