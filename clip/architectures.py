"""The CLIP models that the repository knows: one table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from engine.errors import unknown

HERE = Path(__file__).parent
OPENAI_URL = "https://openaipublic.azureedge.net/clip/models"
# File name -> SHA-256 of every model that OpenAI published (openai/CLIP, clip/clip.py).
OPENAI_FILES = {
    "RN50.pt": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101.pt": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "RN50x4.pt": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
    "RN50x16.pt": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
    "RN50x64.pt": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
    "ViT-B-32.pt": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B-16.pt": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L-14.pt": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L-14-336px.pt": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}


@dataclass(frozen=True)
class Architecture:
    """One model: how open_clip builds it and where its default weights come from."""

    name: str
    config: str | Path  # name of an open_clip config, or a JSON file of the same form
    weights: str | Path  # file name in OPENAI_FILES, or a file that this repository holds

    @property
    def sha256(self) -> str | None:
        """Published SHA-256 of the default weights; None for weights of this repository."""
        return OPENAI_FILES[self.weights] if isinstance(self.weights, str) else None

    @property
    def url(self) -> str | None:
        """Where the default weights are downloaded from; None if they need no network."""
        return f"{OPENAI_URL}/{self.sha256}/{self.weights}" if self.sha256 else None

    def configuration(self) -> str:
        """What the model is built from: the JSON text of a file, or the name of a config."""
        if isinstance(self.config, str):
            return self.config
        return self.config.read_text(encoding="utf-8")

    def build(self) -> nn.Module:
        """A randomly initialised open_clip CLIP of this architecture; no weights, no network."""
        # open_clip takes seconds to import, and runs on ready features never need it.
        from open_clip import CLIP, get_model_config

        text = self.configuration()
        return CLIP(
            **(get_model_config(text) if isinstance(self.config, str) else json.loads(text))
        )


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        # OpenAI trained with QuickGELU; the plain configs of the same names use GELU.
        Architecture("RN50", "RN50-quickgelu", "RN50.pt"),
        Architecture("ViT-B/16", "ViT-B-16-quickgelu", "ViT-B-16.pt"),
        Architecture("ViT-B/32", "ViT-B-32-quickgelu", "ViT-B-32.pt"),
        Architecture("mini", HERE / "mini.json", HERE / "mini.safetensors"),
    )
}


def architecture(name: str) -> Architecture:
    """The architecture called `name`; UserError with the nearest name if there is none."""
    if name not in ARCHITECTURES:
        raise unknown("architecture", name, list(ARCHITECTURES))
    return ARCHITECTURES[name]
