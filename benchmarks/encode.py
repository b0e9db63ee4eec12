"""Encoding images: this repository's loop against open_clip's plain one, in one run.

    python -m benchmarks encode [ARCH ...] [--images 512] [--rounds 3] [--precision bf16]

From JPEG files of 500 x 375 to embeddings, on the GPU if there is one. The plain loop is that of
open_clip's own evaluation: its transform in a DataLoader, a batch of 64, `encode_image` in
float32. Ours is that of `clip.features`, nothing cached, in float32 and in --precision. Rounds take
turns, so that a busy machine is so to all, and the fastest of each counts.
"""

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from benchmarks import timed
from clip.architectures import architecture
from clip.cache import FeatureCache
from clip.features import loaders
from clip.source import PRECISIONS, ClipSource
from engine.cli import COUNT, Parser
from engine.files import write_json_atomic
from engine.log import progress

PLAIN = "open_clip, fp32"
BATCH = 64  # of the plain loop


def photographs(folder: Path, count: int) -> list[str]:
    """JPEG files of smooth noise, which compresses about as a photograph does."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, paths = np.random.default_rng(0), []
    for number in range(count):
        pixels = rng.integers(0, 256, (47, 63, 3)) * rng.uniform(0.2, 1)  # light or dark
        coarse = Image.fromarray(pixels.astype(np.uint8))
        paths.append(str(folder / f"{number:05d}.jpg"))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


@torch.no_grad()
def plain(model: torch.nn.Module, loader: DataLoader, device: torch.device) -> Tensor:
    """Embeddings (N, d), by open_clip's loop."""
    rows = [model.encode_image(images.to(device)) for images, _ in loader]
    return normalize(torch.cat(rows), dim=-1).cpu()


def ours(source: ClipSource, paths: Sequence[str], workers: int) -> Tensor:
    """Embeddings (N, d), by what `clip.features` does."""
    with tempfile.TemporaryDirectory() as folder:
        source.cache = Path(folder)
        return FeatureCache(source).images("photographs", paths, None, workers)


def compare(sources: Sequence[ClipSource], paths: Sequence[str], rounds: int) -> pd.DataFrame:
    """A row for each way to encode: images a second, how many times the plain loop's that is, and
    how far its embeddings are from the plain loop's. `sources` are of several precisions, `paths`
    all files of a folder."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    source = sources[0]
    device, workers = source.device, loaders(source.device)
    model = source.architecture.build().eval().to(device)
    model.load_state_dict(source.model.state_dict())
    transform = image_transform_v2(PreprocessCfg(**source.reading), is_train=False)
    images = ImageFolder(Path(paths[0]).parents[1], transform)
    ways = {PLAIN: partial(plain, model, DataLoader(images, BATCH, num_workers=workers), device)}
    ways |= {f"ours, {each.precision}": partial(ours, each, paths, workers) for each in sources}
    seconds, found = dict.fromkeys(ways, float("inf")), {}
    for _ in progress(range(rounds), f"{source.arch}, round"):
        for name, encode in ways.items():
            taken, found[name] = timed(encode)
            seconds[name] = min(seconds[name], taken)
    exact = found[PLAIN]
    return pd.DataFrame(
        {
            "model": source.arch,
            "way": name,
            "images a second": len(paths) / seconds[name],
            "times": seconds[PLAIN] / seconds[name],
            "largest difference": float((rows - exact).abs().max()),
            "1 - cosine": 1 - float(cosine_similarity(rows.double(), exact.double()).min()),
        }
        for name, rows in found.items()
    )


def random_weights(arch: str, path: Path) -> Path:
    """A checkpoint of random weights, written to `path`; beside it how they compute."""
    write_json_atomic({"model_cfg": architecture(arch).model_config()}, path.with_suffix(".json"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(architecture(arch).build().state_dict(), path)
    return path


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Measure and print; returns a row for every model and way."""
    parser = Parser(prog="python -m benchmarks encode", description=__doc__.splitlines()[0])
    parser.add_argument("archs", nargs="*", metavar="ARCH", default=["RN50", "ViT-B/16"])
    parser.add_argument("--images", type=COUNT, default=512, help="how many")
    parser.add_argument("--rounds", type=COUNT, default=3, help="of which the fastest counts")
    choices = [p for p in PRECISIONS if p != "fp32"]
    parser.add_argument("--precision", choices=choices, default="bf16", help="beside fp32")
    args = parser.parse_args(argv)
    tables = []
    with tempfile.TemporaryDirectory() as folder:
        paths = photographs(Path(folder) / "images/noise", args.images)
        for arch in args.archs:
            weights = random_weights(arch, Path(folder) / "random.pt")
            precisions = ("fp32", args.precision)
            sources = [ClipSource(arch, weights, folder, precision=p) for p in precisions]
            tables.append(compare(sources, paths, args.rounds))
    table = pd.concat(tables, ignore_index=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"{args.images} images on {device}, {torch.get_num_threads()} CPU threads")
    print(table.to_string(index=False, float_format="{:.3g}".format))
    return table
