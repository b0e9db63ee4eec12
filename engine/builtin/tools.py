"""Small helpers by Dassl's names: seeds, images, JSON, folders, the environment."""

from __future__ import annotations

import json
import os
import platform
import random
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.files import write_json_atomic

REPORTED = ("torch", "torchvision", "open_clip_torch", "numpy", "pillow", "scikit-learn")


def set_random_seed(seed: int) -> None:
    """Seed `random`, numpy and torch (all devices). 0 is a seed like any other."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def read_image(path: str) -> Image.Image:
    """The image as RGB; OSError if it is missing or broken."""
    with Image.open(path) as image:
        return image.convert("RGB")


def read_json(fpath: str | os.PathLike[str]) -> Any:
    """What a JSON file holds."""
    with open(fpath, encoding="utf-8") as file:
        return json.load(file)


def write_json(obj: Any, fpath: str | os.PathLike[str]) -> None:
    """Write indented JSON; the folder is made if it is missing."""
    write_json_atomic(obj, fpath)


def mkdir_if_missing(dirname: str | os.PathLike[str]) -> None:
    """Make a folder and its parents."""
    os.makedirs(dirname, exist_ok=True)


def collect_env_info() -> str:
    """Versions, threads and the device, a line each.

    Not torch's own report, which Dassl prints: it starts a dozen other programs to ask.
    """
    lines = [f"Python: {platform.python_version()} on {platform.platform()}"]
    for package in REPORTED:
        try:
            lines.append(f"{package}: {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package}: missing")
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else platform.machine()
    lines.append(f"device: {'cuda' if cuda else 'cpu'} ({device})")
    lines.append(f"torch threads: {torch.get_num_threads()}")
    return "\n".join(lines)
