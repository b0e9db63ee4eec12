"""Checkpoints in OpenAI's format with random weights, and small image sets to encode."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.model import convert_weights_to_fp16
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from clip.architectures import ARCHITECTURES, architecture
from tests import encoder_fixtures
from tests.encoder_fixtures import IMAGE, SIZE, transformers_tokenizer

OPENAI = ("RN50", "ViT-B/16", "ViT-B/32")


def reduce_depth(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str) -> None:
    """Give an OpenAI architecture one layer a stage for the length of a test, widths kept."""
    config = ARCHITECTURES[name].model_config()
    config["vision_cfg"]["layers"] = [1, 1, 1, 1] if name == "RN50" else 1
    config["text_cfg"]["layers"] = 1
    file = folder / f"{name.replace('/', '-')}.json"
    file.write_text(json.dumps(config))
    monkeypatch.setitem(ARCHITECTURES, name, replace(ARCHITECTURES[name], config=file))


def random_model(name: str, seed: int = 0) -> nn.Module:
    """An open_clip model in which every tensor matters: none is left at 0 or 1 by its
    initialisation, as the last batch normalisation of a block would be."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ARCHITECTURES[name].build().eval()
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.ndim == 1:
                    tensor.add_(0.1 * torch.rand_like(tensor))
    return model


def openai_state_dict(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Random weights as OpenAI's archives hold them: partly float16, with three integers."""
    model = random_model(name, seed)
    size, context, words = np.max(model.visual.image_size), model.context_length, model.vocab_size
    convert_weights_to_fp16(model)
    integers = {"input_resolution": size, "context_length": context, "vocab_size": words}
    return model.state_dict() | {k: torch.tensor(int(x)) for k, x in integers.items()}


def save_openai(name: str, path: Path, seed: int = 0) -> None:
    """Random weights in OpenAI's format, with the config beside them that says how they compute."""
    torch.save(openai_state_dict(name, seed), path)
    config = {"model_cfg": ARCHITECTURES[name].model_config()}
    path.with_suffix(".json").write_text(json.dumps(config))


def tiny(monkeypatch: pytest.MonkeyPatch, folder: Path, width: int = 8) -> Path:
    """Make `mini` a model that encodes hundreds of images a second; returns random weights.

    With a width of 64 it is one that OpenAI's code could build: heads of 64, QuickGELU.
    """
    vision = {"image_size": 16, "layers": 1, "width": width, "head_width": width, "patch_size": 8}
    text = TEXT | {"width": width, "heads": 1}
    config = {"embed_dim": 12, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mini.json").write_text(json.dumps(config))
    weights = folder / "mini.pt"
    small = replace(ARCHITECTURES["mini"], config=folder / "mini.json", weights=weights)
    monkeypatch.setitem(ARCHITECTURES, "mini", small)
    torch.save(random_model("mini").state_dict(), weights)
    return weights


TEXT = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
CONFIGS = {
    "ResNet": {"vision_cfg": IMAGE | {"layers": [1, 1, 1, 1], "patch_size": None}},
    "ViT": {"quick_gelu": True},
    "custom": {"custom_text": True},
    "custom with bias": {"custom_text": True, "text_cfg": TEXT | {"proj_bias": True}},
    "no mask": {"text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "last"}},
}
READING = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3], "interpolation": "bilinear"}
READING |= {"resize_mode": "squash"}


def open_clip_folder(folder: Path, kind: str, **images: object) -> Path:
    """A tiny random model as open_clip saves it for the hub."""
    config = {"embed_dim": 12, "vision_cfg": IMAGE, "text_cfg": TEXT} | CONFIGS[kind]
    folder.mkdir()
    content = {"model_cfg": config, "preprocess_cfg": images or READING}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    (folder / "open_clip_model.safetensors").touch()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = architecture(f"hf:{folder}").build().state_dict()
        if (bias := state.get("text.text_projection.bias")) is not None:
            bias.normal_()
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def hugging_face(folder: Path, kind: str) -> Path:
    """A tiny random model as transformers saves it."""
    model, _ = encoder_fixtures.tiny(f"transformers {kind}")
    if kind == "SiglipModel":  # texts as wide as images
        model.config.text_config.projection_size = 32
        model = encoder_fixtures._scaled(type(model)(model.config)).eval()
        torch.nn.init.normal_(model.text_model.head.bias)
    model.save_pretrained(folder, max_shard_size="20KB" if kind == "CLIPModel" else "1GB")
    transformers_tokenizer().save_pretrained(folder)
    size = {"size": {"height": SIZE, "width": SIZE}, "do_center_crop": False, "resample": 2}
    if kind == "CLIPModel":
        size = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
        size |= {"do_center_crop": True, "resample": 3}
    content = size | {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return folder


def images(root: Path) -> Path:
    """A folder with an image of each of three classes."""
    for number, name in enumerate(("sea horse", "crab", "owl")):
        picture(root / name / "1.png", number)
    return root


def picture(path: Path, seed: int = 0) -> None:
    """An image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def caltech(
    root: Path,
    images_per_class: int = 30,
    names: Sequence[str] = ("crab", "sea_horse", "wild_cat", "yin_yang"),
) -> Path:
    """A tiny Caltech101 in CoOp's layout, classes of noise; returns `root`."""
    folder = root / "caltech-101"
    test = []
    for label, name in enumerate(names):
        for number in range(images_per_class):
            path = f"{name}/image_{number:04d}.jpg"
            picture(folder / "101_ObjectCategories" / path, 1000 * label + number)
            test.append([path, label, name])
    split = {"train": [], "val": [], "test": test}
    (folder / "split_zhou_Caltech101.json").write_text(json.dumps(split))
    return root
