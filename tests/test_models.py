"""Models of every family through the driver, and what a model must say of itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

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
from clip.architectures import ARCHITECTURES, OPENAI_FILES
from clip.bundle import bundle_path, load_bundles
from engine.config import paper_weights, settings
from evaluation.results import read_logs
from forgetting import load_adapter
from forgetting.errors import ProblemError
from tests.clip_fixtures import one_line, random_model, save_openai
from tests.conftest import BACKBONE, toy_bundle
from tests.encoder_fixtures import SIZE, _scaled, needs_transformers, tiny, transformers_tokenizer
from tests.test_datasets import picture
from utils import create_results

TEXTS = ["", "sea horse", "a photo of a crab."]
IMAGE = {"image_size": 32, "layers": 1, "width": 16, "patch_size": 16, "head_width": 8}
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
    model, _ = tiny(f"transformers {kind}")
    if kind == "SiglipModel":  # texts as wide as images
        model.config.text_config.projection_size = 32
        model = _scaled(type(model)(model.config)).eval()
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
    assert adapter.settings["model"] == architecture(f"hf:{folder}").sha
    if kind == "ViT":  # and back out, as a checkpoint that says how it computes
        made = tmp_path / "made.safetensors.pt"
        argv = [str(out / entry["crab"]["solver"]["adapter"]), str(made)]
        apply_command.main([*argv, "--cache", str(tmp_path / "cache")])
        assert json.loads(made.with_suffix(".json").read_text())["preprocess_cfg"]["size"] == 32
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
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ProblemError, match=r"no .*preprocessor_config\.json, so how"):
        architecture(f"hf:{folder}")


@needs_transformers
def test_broken_folders_of_hugging_face_are_one_line(tmp_path):
    folder = hugging_face(tmp_path / "m", "CLIPModel")
    path = folder / "preprocessor_config.json"
    good = json.loads(path.read_text())
    for change in ({"crop_size": 16}, {"resample": 99}, {"do_rescale": False}, {"image_mean": 3}):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ProblemError, match="not known here") as error:
            architecture(f"hf:{folder}")
        one_line(error)
    path.write_text(json.dumps(good))
    weights = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ProblemError, match="cannot be loaded") as error:
        _ = ClipSource(f"hf:{folder}", cache=tmp_path / "cache", device="cpu").model
    one_line(error)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(ProblemError):
        _ = ClipSource(f"hf:{folder}", cache=tmp_path / "cache", device="cpu").model


def test_what_is_no_model_folder_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/open_clip_config.json").write_text("{")
    (tmp_path / "none").mkdir()
    (tmp_path / "none/open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 3}}')
    odd = open_clip_folder(tmp_path / "odd", "ViT")
    open_clip_folder(tmp_path / "bare", "ViT")
    (tmp_path / "bare/open_clip_model.safetensors").unlink()
    path = odd / "open_clip_config.json"
    path.write_text(path.read_text().replace('"mean"', '"maen"'))
    for name, message in {
        f"hf:{tmp_path / 'nowhere'}": "no folder",
        f"hf:{tmp_path / 'empty'}": "holds neither config.json nor",
        f"hf:{tmp_path / 'torn'}": "is not JSON",
        f"hf:{tmp_path / 'none'}": "no model_cfg with",
        f"hf:{odd}": "preprocess_cfg must hold some of",
        f"hf:{tmp_path}/bare": "none of open_clip_model",
        "open_clip:ViT-B-33": "did you mean 'ViT-B-32'",
        "open_clip:ViT-B-32/laion2b_s34b": "did you mean 'laion2b_s34b_b79k'",
        "ViT-B/33": "did you mean 'ViT-B/32'",
        "mini-gelu": "unknown architecture",
    }.items():
        with pytest.raises(ProblemError, match=message) as error:
            architecture(name)
        one_line(error)


# What a model must say of itself


@pytest.fixture
def twin(tmp_path, monkeypatch) -> Path:
    """Weights in the shapes of ViT-B/32 with one layer, of which nobody knows the activation."""
    config = open_clip.get_model_config("ViT-B-32")
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 1
    for name in ("ViT-B-32", "ViT-B-32-quickgelu"):
        quick = {"quick_gelu": True} if "quick" in name else {}
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config | quick)
    path = tmp_path / "laion.pt"
    torch.save(random_model("ViT-B/32").state_dict(), path)
    return path


def test_the_gelu_twin_is_not_taken_for_quick_gelu(twin, tmp_path, monkeypatch):
    def source(arch: str) -> ClipSource:
        return ClipSource(arch, twin, tmp_path / "cache", "cpu")

    for arch in ("ViT-B/32", "open_clip:ViT-B-32"):
        with pytest.raises(ProblemError, match="how they compute is not known") as error:
            _ = source(arch).fingerprint
        one_line(error, twin, f"{arch}-quickgelu", f"{arch}-gelu")
    quick, plain = source("ViT-B/32-quickgelu"), source("open_clip:ViT-B-32-gelu")
    apart = quick.encode_hidden(TEXTS) - plain.encode_hidden(TEXTS)
    assert apart.abs().max() > 1e-3, "the two are different models"
    assert quick.fingerprint != plain.fingerprint
    same = source("open_clip:ViT-B-32-quickgelu")
    assert torch.equal(same.encode_hidden(TEXTS), quick.encode_hidden(TEXTS))
    # A config beside the weights says it; the other name is refused.
    beside = tmp_path / "laion.json"
    beside.write_text(json.dumps({"model_cfg": plain.architecture.model_config()}))
    for arch in ("ViT-B/32", "ViT-B/32-quickgelu"):
        with pytest.raises(ProblemError, match="quick_gelu is None, not True"):
            _ = source(arch).fingerprint
    assert source("open_clip:ViT-B-32").fingerprint
    images = {"mean": [0.5, 0.5, 0.5]}
    content = {"model_cfg": plain.architecture.model_config(), "preprocess_cfg": images}
    beside.write_text(json.dumps(content))
    with pytest.raises(ProblemError, match=r"whose preprocessing is .*mean is \[0\.5"):
        _ = source("open_clip:ViT-B-32").fingerprint
    beside.unlink()
    # A file that OpenAI published is known; it is no GELU model, whoever says so.
    monkeypatch.setitem(
        OPENAI_FILES, "ViT-B-32.pt", source("open_clip:ViT-B-32-gelu").weights_sha256
    )
    assert source("ViT-B/32").fingerprint
    with pytest.raises(ProblemError, match="compute with QuickGELU"):
        _ = source("ViT-B/32-gelu").fingerprint


def test_weights_of_another_name_of_openais(tmp_path, monkeypatch):
    monkeypatch.setitem(
        ARCHITECTURES,
        "RN50",
        replace(ARCHITECTURES["mini"], name="RN50", weights="RN50.pt", explicit=False),
    )
    monkeypatch.setitem(
        ARCHITECTURES, "RN101", replace(ARCHITECTURES["RN50"], name="RN101", weights="RN101.pt")
    )
    save_openai("RN50", tmp_path / "w.pt")
    source = ClipSource("RN101", tmp_path / "w.pt", tmp_path / "cache", "cpu")
    monkeypatch.setitem(OPENAI_FILES, "RN50.pt", source._sha256(tmp_path / "w.pt"))
    with pytest.raises(ProblemError, match=r"are OpenAI's RN50\.pt, not those of RN101"):
        _ = source.fingerprint


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


def test_pretrained_tags_say_how_they_compute():
    laion = architecture("open_clip:ViT-B-32/laion2b_s34b_b79k")
    assert laion.explicit and not laion.model_config()["quick_gelu"]
    assert architecture("open_clip:ViT-B-32/openai").model_config()["quick_gelu"]
    siglip = architecture("open_clip:ViT-B-16-SigLIP/webli")
    assert siglip.preprocessing()["mean"] == (0.5, 0.5, 0.5)
    with pytest.raises(ProblemError, match="were trained with QuickGELU") as error:
        architecture("open_clip:ViT-L-14-gelu/openai")
    one_line(error)


def test_weights_that_cannot_be_had_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(ProblemError, match="has no weights: pass --weights PATH") as error:
        _ = ClipSource("open_clip:ViT-B-32-gelu", cache=tmp_path).weights_path
    one_line(error)

    def fail(*_: object, **__: object) -> None:
        raise OSError("no\nnetwork")

    monkeypatch.setattr("open_clip.download_pretrained", fail)
    with pytest.raises(ProblemError, match="cannot fetch open_clip:ViT-B-32/laion2b") as error:
        _ = ClipSource("open_clip:ViT-B-32/laion2b_s34b_b79k", cache=tmp_path).weights_path
    one_line(error, "--weights PATH")


def test_weights_of_the_objective_for_any_model():
    for backbone in ("open_clip:ViT-B-32/laion2b_s34b_b79k", "ViT-L/14@336px", "hf:/a/b.c"):
        found = paper_weights(settings("ForgetLoRA", "StanfordDogs", backbone))
        assert found == {"lamb_forget": "auto", "lamb_preserve": 0.3, "lamb_weight": 1.0}
    for backbone in ("ViT-B/16", "ViT-B/16-quickgelu"):
        found = paper_weights(settings("ForgetLoRA", "StanfordDogs", backbone))
        assert found["lamb_forget"] == 1.3


def test_adapters_of_two_ways_to_compute_do_not_compose():
    from forgetting.compose import _check_fit

    def adapter(**settings: str) -> SimpleNamespace:
        same = {"backbone": "b", "trainer": "t", "projection_sha256": "p"}
        return SimpleNamespace(**same, recipe={"objective": "constrained"}, settings=settings)

    for other in (adapter(model="1"), adapter()):  # one of before does not say
        _check_fit(adapter(model="1"), "a", other, "b")
    with pytest.raises(ProblemError, match="model differs: '1' in a, '2' in b"):
        _check_fit(adapter(model="1"), "a", adapter(model="2"), "b")


def test_bundles_of_two_ways_to_compute_are_not_one_run(tmp_path):
    for name, model in (("ToyAnimals", "gelu"), ("ToyTools", "quick")):
        bundle = replace(toy_bundle(name), extra={"model": model})
        bundle.save(bundle_path(tmp_path, BACKBONE, name))
    with pytest.raises(ProblemError, match="different model configs"):
        load_bundles(tmp_path, BACKBONE)
