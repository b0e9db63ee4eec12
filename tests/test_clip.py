"""clip/: the numbers are those of open_clip, and a full checkpoint is one that others load."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import build_model_from_openai_state_dict
from PIL import Image
from torch.nn.functional import normalize
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    Normalize,
    Resize,
    ToTensor,
)

from clip import ARCHITECTURES, ClipSource
from clip import apply as apply_command
from clip.apply import save_full_model
from clip.architectures import published
from forgetting.adapter import Adapter, projection_sha256, save_adapter
from forgetting.errors import ProblemError
from forgetting.models.checkpoint import read_tensors
from tests.clip_fixtures import (
    OPENAI,
    one_line,
    openai_state_dict,
    random_model,
    reduce_depth,
    save_openai,
    tiny,
)

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEXTS = ["", "sea horse", "a photo of a 2012 Ram C/V Cargo Van Minivan.", "größer " * 90]


@pytest.mark.parametrize("name", OPENAI)
def test_embeddings_are_those_of_open_clip(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reduce_depth(monkeypatch, tmp_path, name)
    state = openai_state_dict(name)
    save_openai(name, tmp_path / "openai.pt")
    untouched = build_model_from_openai_state_dict(dict(state)).float().eval()
    tokens = open_clip.get_tokenizer("RN50-quickgelu")(TEXTS)
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randint(256, (2, 3, 224, 224), generator=generator).to(torch.uint8)
    pictures[0, :, :100], pictures[1] = 0, pictures[1].clamp(128)  # random networks see brightness
    images = Normalize(OPENAI_MEAN, OPENAI_STD)(pictures / 255)
    with torch.no_grad():
        texts_expected = untouched.encode_text(tokens)
        images_expected = normalize(untouched.encode_image(images), dim=1)

    before = torch.get_rng_state()
    source = ClipSource(name, tmp_path / "openai.pt", tmp_path / "cache", "cpu")
    hidden = source.encode_hidden(TEXTS, batch_size=3)
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
    # Negative control: the three texts and the two images do differ by more than that.
    assert (texts[0] - texts[1]).abs().max() > 1e-3
    assert (images_expected[0] - images_expected[1]).abs().max() > 1e-3
    log = capsys.readouterr().out
    assert f"clip: {name} on cpu, float32, weights {source.weights_sha256[:16]}" in log
    assert log.count("warning") == 1 and "reads only the beginning of 'größer" in log


def test_hidden_states_times_projection_are_encode_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tiny(monkeypatch, tmp_path)
    source = ClipSource("mini", weights, tmp_path / "cache", "cpu")
    expected = source.model.encode_text(source.tokenizer(TEXTS))
    hidden = source.encode_hidden(TEXTS)
    assert (hidden @ source.projection - expected).abs().max() < 1e-5
    assert (hidden @ source.projection.flip(0) - expected).abs().max() > 1e-2
    assert source.encode_hidden([]).shape == (0, 8)


def test_openai_models_use_quick_gelu() -> None:
    for name in ("ViT-B/16", "ViT-B/32", "RN50"):
        with torch.device("meta"):
            blocks = ARCHITECTURES[name].build().transformer.resblocks
        assert {type(block.mlp.gelu).__name__ for block in blocks} == {"QuickGELU"}


def test_images_are_prepared_as_openai_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ClipSource("mini", tiny(monkeypatch, tmp_path), tmp_path / "cache", "cpu")
    picture = Image.effect_noise((40, 24), 60).convert("RGB")
    steps = [Resize(16, InterpolationMode.BICUBIC), CenterCrop(16), ToTensor()]
    expected = Compose([*steps, Normalize(OPENAI_MEAN, OPENAI_STD)])(picture)
    prepared = source.preprocess(picture)[None]
    assert prepared.dtype == torch.uint8 and torch.equal(source.scaled(prepared)[0], expected)


def openai_keys(name: str) -> set[str]:
    """Names of the tensors in OpenAI's own model code (openai/CLIP, clip/model.py)."""

    def block(prefix: str) -> set[str]:
        names = {f"{prefix}.attn.in_proj_weight", f"{prefix}.attn.in_proj_bias"}
        parts = ("attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
        return names | {f"{prefix}.{part}.{end}" for part in parts for end in ("weight", "bias")}

    def norm(prefix: str) -> set[str]:
        ends = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        return {f"{prefix}.{end}" for end in ends}

    keys = {"positional_embedding", "text_projection", "logit_scale", "token_embedding.weight"}
    keys |= {"ln_final.weight", "ln_final.bias"}
    for layer in range(12):
        keys |= block(f"transformer.resblocks.{layer}")
    if name != "RN50":
        keys |= {f"visual.{key}" for key in ("class_embedding", "positional_embedding", "proj")}
        keys |= {f"visual.{ln}.{end}" for ln in ("ln_pre", "ln_post") for end in ("weight", "bias")}
        keys |= {"visual.conv1.weight"}
        for layer in range(12):
            keys |= block(f"visual.transformer.resblocks.{layer}")
        return keys
    for number in (1, 2, 3):
        keys |= {f"visual.conv{number}.weight"} | norm(f"visual.bn{number}")
        for layer, depth in enumerate((3, 4, 6, 3), start=1):
            for index in range(depth):
                prefix = f"visual.layer{layer}.{index}"
                keys |= {f"{prefix}.conv{number}.weight"} | norm(f"{prefix}.bn{number}")
    for layer in (1, 2, 3, 4):
        prefix = f"visual.layer{layer}.0.downsample"
        keys |= {f"{prefix}.0.weight"} | norm(f"{prefix}.1")
    keys |= {"visual.attnpool.positional_embedding"}
    parts = [f"{part}_proj" for part in "kqvc"]
    return keys | {f"visual.attnpool.{part}.{end}" for part in parts for end in ("weight", "bias")}


@pytest.mark.parametrize("name", OPENAI)
def test_full_models_have_openais_key_layout(name: str) -> None:
    with torch.device("meta"):
        assert ARCHITECTURES[name].build().state_dict().keys() == openai_keys(name)


def test_addresses_are_those_that_open_clip_lists() -> None:
    for name in OPENAI:
        listed = open_clip.get_pretrained_url(str(ARCHITECTURES[name].config), "openai")
        assert published(ARCHITECTURES[name])[1] == listed


@pytest.fixture
def mini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return tiny(monkeypatch, tmp_path / "mini")


def adapter_for(source: ClipSource, path: Path) -> Adapter:
    width, dim = source.projection.shape
    random = torch.Generator().manual_seed(3)
    adapter = Adapter(
        left=torch.randn(width, 2, generator=random),
        right=torch.randn(2, dim, generator=random),
        projection_sha256=projection_sha256(source.projection),
        backbone=source.arch,
        weights=source.weights_sha256,
        dataset="Some",
        classes=["sea horse"],
        trainer="ForgetLoRA",
    )
    save_adapter(adapter, path)
    return adapter


def test_an_adapter_becomes_a_checkpoint_that_others_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(monkeypatch, tmp_path / "tiny", width=64)
    weights, out = tmp_path / "w.pt", tmp_path / "out.pt"
    torch.save(openai_state_dict("mini"), weights)
    cache = tmp_path / "cache"
    source = ClipSource("mini", weights, cache, "cpu")
    adapter = adapter_for(source, tmp_path / "a.safetensors")
    arguments = [str(tmp_path / "a.safetensors"), str(out), "--weights", str(weights)]
    apply_command.main([*arguments, "--cache", str(cache)])

    state, original = torch.load(out, weights_only=True), read_tensors(weights)
    assert state.keys() == original.keys()
    assert torch.equal(state["text_projection"], adapter.apply(source.projection))
    others = [key for key in state if key != "text_projection"]
    assert all(torch.equal(state[key], original[key]) for key in others)
    expected = source.encode_hidden(TEXTS) @ (source.projection + adapter.delta())
    tokens = source.tokenizer(TEXTS)
    model = ARCHITECTURES["mini"].build().eval()
    open_clip.load_checkpoint(model, str(out))
    assert torch.allclose(model.encode_text(tokens), expected, atol=1e-4, rtol=1e-5)
    # The loader for OpenAI's layout, as in OpenAI's own code, rounds to float16.
    model = build_model_from_openai_state_dict(dict(state)).float().eval()
    loaded = model.encode_text(tokens)
    assert (normalize(loaded, dim=1) - normalize(expected, dim=1)).abs().max() < 1e-3
    mine = ClipSource("mini", out, cache, "cpu")
    assert torch.allclose(mine.encode_hidden(TEXTS) @ mine.projection, expected, atol=1e-5)

    with pytest.raises(ProblemError, match="not overwritten"):
        apply_command.main([*arguments, "--cache", str(cache)])


def test_an_adapter_of_other_weights_is_refused(mini: Path, tmp_path: Path) -> None:
    source = ClipSource("mini", mini, tmp_path / "cache", "cpu")
    adapter_for(source, tmp_path / "a.safetensors")
    other, out = tmp_path / "other.pt", tmp_path / "out.pt"
    torch.save(random_model("mini", seed=1).state_dict(), other)
    arguments = [str(tmp_path / "a.safetensors"), str(out), "--cache", str(tmp_path / "cache")]
    with pytest.raises(ProblemError, match="adapter was made for") as error:
        apply_command.main([*arguments, "--weights", str(other)])
    one_line(error, other)
    assert not out.exists()
    (tmp_path / "a.safetensors").write_bytes(b"torn")
    with pytest.raises(ProblemError, match=r"a\.safetensors"):
        apply_command.main([*arguments, "--weights", str(mini)])


def test_a_change_of_another_shape_is_refused(mini: Path, tmp_path: Path) -> None:
    source = ClipSource("mini", mini, tmp_path / "cache", "cpu")
    with pytest.raises(ProblemError, match=r"\(2, 2\)"):
        none = Adapter(torch.zeros(2, 1), torch.zeros(1, 2), "0" * 64, "b", "w", "d", ["c"], "t")
        save_full_model(source, none, tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_the_embedded_weights_fit_their_configuration(tmp_path: Path) -> None:
    mini = ARCHITECTURES["mini"]
    assert Path(mini.weights).stat().st_size <= 8 * 2**20
    source = ClipSource("mini", cache=tmp_path, device="cpu")
    assert source.encode_hidden(["seven"]).shape == (1, source.projection.shape[0])
    assert published(mini) is None, "the default needs no network"
