"""The numbers are those of open_clip and transformers, and a checkpoint is one that others load."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import build_model_from_openai_state_dict, get_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import normalize
from torchvision.transforms import Normalize

import train
from clip.architectures import ARCHITECTURES, IMAGES, architecture, identity_sha256, openai_url
from clip.source import ClipSource
from evaluation.results import read_logs
from forgetting.adapter import load_adapter
from forgetting.errors import ProblemError
from forgetting.models.encoder import read_encoder
from forgetting.models.loading import load_model
from tests import clip_fixtures as fixtures
from tests.clip_fixtures import hugging_face, open_clip_folder, openai_state_dict
from tests.conftest import refuses
from tests.encoder_fixtures import needs_transformers, transformers_tokenizer
from utils import create_results

TEXTS = ["", "sea horse", "a photo of a 2012 Ram C/V Cargo Van Minivan.", "größer " * 90]
SHORT = ["", "sea horse", "a photo of a crab."]


def embedded(source: ClipSource, texts: list[str]) -> torch.Tensor:
    found = source.encode_hidden(texts) @ source.projection
    return found if source.bias is None else found + source.bias


def source_of(tmp_path: Path, name: str, weights: Path | None = None) -> ClipSource:
    return ClipSource(name, weights, tmp_path / "cache", "cpu")


@pytest.mark.parametrize("name", fixtures.OPENAI)
def test_embeddings_of_openais_models(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    fixtures.reduce_depth(monkeypatch, tmp_path, name)
    state = openai_state_dict(name)
    fixtures.save_openai(name, tmp_path / "openai.pt")
    untouched = build_model_from_openai_state_dict(dict(state)).float().eval()
    tokens = open_clip.get_tokenizer("RN50-quickgelu")(TEXTS)
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randint(256, (2, 3, 224, 224), generator=generator).to(torch.uint8)
    pictures[0, :, :100], pictures[1] = 0, pictures[1].clamp(128)  # random networks see brightness
    scaled = Normalize(IMAGES["mean"], IMAGES["std"])(pictures / 255)
    with torch.no_grad():
        texts_expected = untouched.encode_text(tokens)
        images_expected = normalize(untouched.encode_image(scaled), dim=1)

    before = torch.get_rng_state()
    source = source_of(tmp_path, name, tmp_path / "openai.pt")
    hidden = source.encode_hidden(TEXTS)
    assert torch.equal(torch.get_rng_state(), before), "building the model drew random numbers"
    width, dim = untouched.text_projection.shape
    assert hidden.shape == (len(TEXTS), width) and source.projection.shape == (width, dim)
    assert hidden.dtype == source.projection.dtype == torch.float32
    texts = normalize(hidden @ source.projection, dim=1)
    assert (texts - normalize(texts_expected, dim=1)).abs().max() < 1e-5
    assert (source.encode_images(pictures) - images_expected).abs().max() < 1e-5
    source.precision = "bf16"
    half = source.encode_images(pictures)
    assert half.dtype == torch.float32 and 1e-5 < (half - images_expected).abs().max() < 1e-2
    # Negative control: the texts and the two images do differ by more than that.
    assert (texts[0] - texts[1]).abs().max() > 1e-3
    assert (images_expected[0] - images_expected[1]).abs().max() > 1e-3
    log = capsys.readouterr().out
    assert source.weights_sha256[:16] in log
    assert log.count("warning") == 1 and "only the beginning of 'größer" in log
    assert source.encode_hidden([]).shape == (0, width)
    listed = open_clip.get_pretrained_url(f"{name.replace('/', '-')}-quickgelu", "openai")
    assert openai_url(ARCHITECTURES[name]) == listed and openai_url(ARCHITECTURES["mini"]) is None


@pytest.mark.parametrize("kind", fixtures.CONFIGS)
def test_open_clips_families_from_a_folder(tmp_path, kind):
    folder = open_clip_folder(tmp_path / "m", kind)
    source = source_of(tmp_path, f"hf:{folder}")
    reference = open_clip.create_model(f"local-dir:{folder}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(SHORT)
    model, tokenizer = load_model(str(folder))
    with torch.no_grad():
        expected = reference.encode_text(tokens)
        assert torch.equal(model.encode_text(tokenizer(SHORT)), expected)
    assert torch.allclose(embedded(source, SHORT), expected, atol=1e-5)
    assert (source.bias is not None) == (kind == "custom with bias")
    random = np.random.default_rng(0).integers(0, 255, (50, 41, 3), dtype=np.uint8)
    prepared = source.preprocess(Image.fromarray(random))[None]
    transform = image_transform_v2(PreprocessCfg(**get_model_preprocess_cfg(reference)), False)
    own = transform(Image.fromarray(random))
    assert prepared.dtype == torch.uint8 and torch.equal(source.scaled(prepared)[0], own)
    with torch.no_grad():
        expected = normalize(reference.encode_image(own[None]), dim=1)
    assert torch.allclose(source.encode_images(prepared), expected, atol=1e-5)


def test_a_checkpoint_in_the_old_layout_is_that_of_a_custom_text_encoder(tmp_path):
    folder = open_clip_folder(tmp_path / "m", "custom")
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    plain = open_clip.CLIP(**{k: v for k, v in config.items() if k != "custom_text"}).eval()
    state = plain.state_dict() | {"logit_scale": torch.ones(1)}
    save_file(state, folder / "open_clip_model.safetensors")
    source = source_of(tmp_path, f"hf:{folder}")
    with torch.no_grad():
        expected = plain.encode_text(source.encoder.tokenize(SHORT))
    assert torch.allclose(embedded(source, SHORT), expected, atol=1e-5)


@needs_transformers
@pytest.mark.parametrize("kind", ["CLIPModel", "SiglipModel"])
def test_a_folder_of_hugging_face(tmp_path, kind):
    import transformers

    folder = hugging_face(tmp_path / "m", kind)
    source = source_of(tmp_path, f"hf:{folder}")
    model, tokenizer = transformers.AutoModel.from_pretrained(folder), transformers_tokenizer()
    padding = "max_length" if kind == "SiglipModel" else True
    read = tokenizer(SHORT, padding=padding, truncation=True, max_length=24, return_tensors="pt")
    if kind == "SiglipModel":
        read.pop("attention_mask")
    read.pop("token_type_ids", None)
    with torch.no_grad():
        found = model.get_text_features(**read)
        expected = getattr(found, "pooler_output", found)
    assert torch.allclose(embedded(source, SHORT), expected, atol=1e-5)
    assert (source.bias is not None) == (kind == "SiglipModel")
    assert (len(list(folder.glob("*-of-*.safetensors"))) > 1) == (kind == "CLIPModel")


@needs_transformers
def test_a_folder_brings_its_weights_and_reads_images(tmp_path):
    folder = hugging_face(tmp_path / "m", "CLIPTextModelWithProjection")
    refuses("brings its weights", source_of, tmp_path, f"hf:{folder}", folder / "model.safetensors")
    with pytest.raises(ProblemError, match="reads no images"):
        _ = source_of(tmp_path, f"hf:{folder}").model
    assert read_encoder(str(folder)).embeddings(SHORT).shape == (3, 16), "texts it does read"


def test_identity_is_part_of_the_cache(tmp_path):
    folder = open_clip_folder(tmp_path / "m", "ViT")
    path = folder / "open_clip_config.json"
    content = json.loads(path.read_text())
    found = {source_of(tmp_path, f"hf:{folder}").fingerprint}
    for part, key, value in (
        ("preprocess_cfg", "mean", [0.1, 0.1, 0.1]),
        ("preprocess_cfg", "resize_mode", "shortest"),
        ("model_cfg", "quick_gelu", False),
        ("model_cfg", "text_cfg", fixtures.TEXT | {"context_length": 12}),
    ):
        path.write_text(json.dumps(content | {part: content[part] | {key: value}}))
        found.add(source_of(tmp_path, f"hf:{folder}").fingerprint)
    (folder / "tokenizer.json").write_text("{}")
    found.add(source_of(tmp_path, f"hf:{folder}").fingerprint)
    assert len(found) == 6


def test_the_driver_takes_a_folder_and_gives_a_checkpoint(tmp_path):
    folder, cache = open_clip_folder(tmp_path / "m", "ViT"), ["--cache", str(tmp_path / "cache")]
    zoo = fixtures.images(tmp_path / "zoo")
    argv = ["--images", str(zoo), "--backbone", f"hf:{folder}", *cache]
    argv += ["--forget", "crab", "--root", str(tmp_path), "--output-dir", str(tmp_path / "out")]
    argv += ["TRAINER.FORGETLORA.STEPS", "20", "TRAINER.FORGETLORA.MAX_TRIALS", "1"]
    out = train.main(argv)
    df, _ = create_results(out)
    assert df.name.tolist() == ["crab"]
    path = out / read_logs(out)["zoo"]["crab"]["solver"]["adapter"]
    sha256 = identity_sha256(architecture(f"hf:{folder}"))
    assert load_adapter(path).settings["model"] == sha256
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = False
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    refuses("with model '", train.main, argv)
