"""Models of every family through the driver, and what a model must say of itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import get_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import normalize

import train
from clip import ClipSource, architecture
from clip import apply as apply_command
from clip.architectures import identity_sha256
from clip.bundle import bundle_path, load_bundles
from engine.config import paper_weights, settings
from evaluation.results import read_logs
from forgetting import load_adapter
from forgetting.errors import ProblemError
from forgetting.models.loading import load_model
from tests.clip_fixtures import (
    CONFIGS,
    TEXT,
    hugging_face,
    open_clip_folder,
)
from tests.conftest import BACKBONE, toy_bundle
from tests.encoder_fixtures import needs_transformers, transformers_tokenizer
from tests.test_datasets import picture
from utils import create_results

TEXTS = ["", "sea horse", "a photo of a crab."]


def embedded(source: ClipSource, texts: list[str]) -> torch.Tensor:
    found = source.encode_hidden(texts) @ source.projection
    return found if source.bias is None else found + source.bias


def images(root: Path) -> Path:
    for seed, name in enumerate(("sea horse", "crab", "owl")):
        picture(root / name / "1.png", seed)
    return root


def forget(tmp_path: Path, arch: str, *more: str) -> Path:
    argv = ["--images", str(tmp_path / "zoo"), "--backbone", arch, "--forget", "crab", *more]
    argv += ["--cache", str(tmp_path / "cache"), "--root", str(tmp_path)]
    return train.main([*argv, "--output-dir", str(tmp_path / "out")])


@pytest.mark.parametrize("kind", CONFIGS)
def test_open_clips_families_from_a_folder(tmp_path, kind):
    folder = open_clip_folder(tmp_path / "m", kind)
    source = ClipSource(f"hf:{folder}", cache=tmp_path / "cache", device="cpu")
    reference = open_clip.create_model(f"local-dir:{folder}").eval()
    model, tokenizer = load_model(str(folder))
    assert torch.equal(model.encode_text(tokenizer(TEXTS)), reference.encode_text(tokenizer(TEXTS)))
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    with torch.no_grad():
        expected = reference.encode_text(tokens)
    assert torch.allclose(embedded(source, TEXTS), expected, atol=1e-5)
    assert (source.bias is not None) == (kind == "custom with bias")
    random = np.random.default_rng(0).integers(0, 255, (50, 41, 3), dtype=np.uint8)
    prepared = source.preprocess(Image.fromarray(random))[None]
    own = image_transform_v2(PreprocessCfg(**get_model_preprocess_cfg(reference)), is_train=False)(
        Image.fromarray(random)
    )
    assert torch.equal(source.scaled(prepared)[0], own)
    with torch.no_grad():
        expected = normalize(reference.encode_image(own[None]), dim=1)
    assert torch.allclose(source.encode_images(prepared), expected, atol=1e-5)


def test_a_checkpoint_in_the_old_layout_is_that_of_a_custom_text_tower(tmp_path):
    folder = open_clip_folder(tmp_path / "m", "custom")
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    plain = open_clip.CLIP(**{k: v for k, v in config.items() if k != "custom_text"}).eval()
    state = plain.state_dict()
    save_file(state | {"logit_scale": torch.ones(1)}, folder / "open_clip_model.safetensors")
    source = ClipSource(f"hf:{folder}", cache=tmp_path / "cache", device="cpu")
    with torch.no_grad():
        expected = plain.encode_text(source.tokenizer(TEXTS))
    assert torch.allclose(embedded(source, TEXTS), expected, atol=1e-5)


@pytest.mark.parametrize("trainer", ["ForgetExact", "ForgetLoRA"])
@pytest.mark.parametrize("kind", ["ViT", "custom with bias"])
def test_the_driver_takes_a_folder(tmp_path, kind, trainer):
    images(tmp_path / "zoo")
    folder = open_clip_folder(tmp_path / "m", kind)
    steps = ["TRAINER.FORGETLORA.STEPS", "20", "TRAINER.FORGETLORA.MAX_TRIALS", "1"]
    out = forget(tmp_path, f"hf:{folder}", "--trainer", trainer, *steps)
    df, _ = create_results(out)
    assert df.name.tolist() == ["crab"]
    entry = read_logs(out)["zoo"]
    adapter = load_adapter(out / entry["crab"]["solver"]["adapter"])
    assert adapter.settings["model"] == identity_sha256(architecture(f"hf:{folder}"))
    if kind == "ViT":  # and back out, as a checkpoint that says how it computes
        made = tmp_path / "made.safetensors.pt"
        argv = [str(out / entry["crab"]["solver"]["adapter"]), str(made)]
        apply_command.main([*argv, "--cache", str(tmp_path / "cache")])
        assert json.loads(made.with_suffix(".json").read_text())["preprocess_cfg"]["size"] == [
            32,
            32,
        ]
        config = json.loads((folder / "open_clip_config.json").read_text())
        config["model_cfg"]["quick_gelu"] = False
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        with pytest.raises(ProblemError, match="other activation, preprocessing or tokenizer"):
            apply_command.main(
                [argv[0], str(tmp_path / "b.pt"), "--cache", str(tmp_path / "cache")]
            )
        with pytest.raises(ProblemError, match="with model '"):
            forget(tmp_path, f"hf:{folder}", "--trainer", trainer, *steps)


@needs_transformers
@pytest.mark.parametrize("kind", ["CLIPModel", "SiglipModel"])
def test_a_folder_of_hugging_face(tmp_path, kind):
    images(tmp_path / "zoo")
    folder = hugging_face(tmp_path / "m", kind)
    source = ClipSource(f"hf:{folder}", cache=tmp_path / "cache", device="cpu")
    import transformers

    model, tokenizer = transformers.AutoModel.from_pretrained(folder), transformers_tokenizer()
    padding = "max_length" if kind == "SiglipModel" else True
    read = tokenizer(TEXTS, padding=padding, truncation=True, max_length=24, return_tensors="pt")
    if kind == "SiglipModel":
        read.pop("attention_mask")
    read.pop("token_type_ids", None)
    with torch.no_grad():
        found = model.get_text_features(**read)
        expected = getattr(found, "pooler_output", found)
    assert torch.allclose(embedded(source, TEXTS), expected, atol=1e-5)
    assert (source.bias is not None) == (kind == "SiglipModel")
    assert (len(list(folder.glob("*-of-*.safetensors"))) > 1) == (kind == "CLIPModel")
    out = forget(tmp_path, f"hf:{folder}", "--trainer", "ForgetExact")
    df, _ = create_results(out)
    assert df.name.tolist() == ["crab"]


def test_identity_is_part_of_the_cache(tmp_path):
    folder = open_clip_folder(tmp_path / "m", "ViT")
    path = folder / "open_clip_config.json"
    content = json.loads(path.read_text())

    def fingerprint() -> str:
        return ClipSource(f"hf:{folder}", cache=tmp_path / "cache", device="cpu").fingerprint

    found = {fingerprint()}
    for part, key, value in (
        ("preprocess_cfg", "mean", [0.1, 0.1, 0.1]),
        ("preprocess_cfg", "resize_mode", "shortest"),
        ("model_cfg", "quick_gelu", False),
        ("model_cfg", "text_cfg", TEXT | {"context_length": 12}),
    ):
        changed = content | {part: content[part] | {key: value}}
        path.write_text(json.dumps(changed))
        found.add(fingerprint())
    (folder / "tokenizer.json").write_text("{}")
    found.add(fingerprint())
    assert len(found) == 6


def test_weights_of_the_objective_for_any_model():
    for backbone in ("open_clip:ViT-B-32/laion2b_s34b_b79k", "ViT-L/14@336px", "hf:/a/b.c"):
        found = paper_weights(settings("ForgetLoRA", "StanfordDogs", backbone))
        assert found == {"lamb_forget": "auto", "lamb_preserve": 0.3, "lamb_weight": 1.0}
    for backbone in ("ViT-B/16", "ViT-B/16-quickgelu"):
        found = paper_weights(settings("ForgetLoRA", "StanfordDogs", backbone))
        assert found["lamb_forget"] == 1.3


def test_bundles_of_two_ways_to_compute_are_not_one_run(tmp_path):
    for name, model in (("ToyAnimals", "gelu"), ("ToyTools", "quick")):
        bundle = replace(toy_bundle(name), extra={"model": model})
        bundle.save(bundle_path(tmp_path, BACKBONE, name))
    with pytest.raises(ProblemError, match="different model configs"):
        load_bundles(tmp_path, BACKBONE)
