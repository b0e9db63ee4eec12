"""clip/: the model is open_clip's own, and every file that cannot be loaded is one clear line."""

from __future__ import annotations

import hashlib
import http.server
import pickle
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import open_clip
import pytest
import torch
from clip_fixtures import OPENAI, openai_state_dict, random_model, reduce_depth, tiny
from open_clip.model import build_model_from_openai_state_dict
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import normalize
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    Normalize,
    Resize,
    ToTensor,
)

from clip import ARCHITECTURES, ClipSource, architecture
from clip import apply as apply_command
from clip.apply import save_full_model
from clip.architectures import OPENAI_FILES
from clip.checkpoint import describe, read_state_dict
from clip.download import download
from engine import UserError
from forgetting.adapter import Adapter, projection_sha256, save_adapter

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEXTS = ["", "sea horse", "a photo of a 2012 Ram C/V Cargo Van Minivan.", "größer " * 90]


def one_line(error: pytest.ExceptionInfo[UserError], *parts: object) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert str(part) in text


# --- The same numbers as open_clip -------------------------------------------------------------


@pytest.mark.parametrize("name", OPENAI)
def test_embeddings_are_those_of_open_clip(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reduce_depth(monkeypatch, tmp_path, name)
    state = openai_state_dict(name)
    torch.save(state, tmp_path / "openai.pt")
    untouched = build_model_from_openai_state_dict(dict(state)).float().eval()
    tokens = open_clip.get_tokenizer("RN50-quickgelu")(TEXTS)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    images[0, :, :100], images[1] = -1, 2 * images[1].abs()  # random networks see but brightness
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
    assert (source.encode_images(images) - images_expected).abs().max() < 1e-5
    # Negative control: the three texts and the two images do differ by more than that.
    assert (texts[0] - texts[1]).abs().max() > 1e-3
    assert (images_expected[0] - images_expected[1]).abs().max() > 1e-3
    log = capsys.readouterr().out
    assert f"clip: {name} on cpu, float32, weights {source.weights_sha256[:16]}" in log
    assert "is cut to 77" in log and log.count("warning") == 1


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
    assert torch.equal(source.preprocess(picture), expected)


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
        assert ARCHITECTURES[name].url == listed
    assert all(len(digest) == 64 for digest in OPENAI_FILES.values())


def test_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(UserError, match="ViT-B/16") as error:
        architecture("vit-b16")
    one_line(error)


# --- Files that people have --------------------------------------------------------------------


@pytest.fixture
def mini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return tiny(monkeypatch, tmp_path / "mini")


def test_every_form_of_a_checkpoint_is_read(mini: Path, tmp_path: Path) -> None:
    state = random_model("mini").state_dict()
    wrapped = {f"module.{key}": value for key, value in state.items()}
    forms = {
        "plain.pt": lambda path: torch.save(state, path),
        "legacy.pt": lambda path: torch.save(state, path, _use_new_zipfile_serialization=False),
        "trained.pt": lambda path: torch.save({"epoch": 3, "state_dict": wrapped}, path),
        "w.safetensors": lambda path: save_file(state, path),
        "safetensors under another name.bin": lambda path: save_file(state, path),
    }
    for name, write in forms.items():
        write(tmp_path / name)
        source = ClipSource("mini", tmp_path / name, tmp_path / "cache", "cpu")
        assert torch.equal(source.projection, state["text_projection"]), name


def test_float16_weights_are_computed_in_float32(mini: Path, tmp_path: Path) -> None:
    state = {key: value.half() for key, value in random_model("mini").state_dict().items()}
    save_file(state, tmp_path / "half.safetensors")
    source = ClipSource("mini", tmp_path / "half.safetensors", tmp_path / "cache", "cpu")
    assert {tensor.dtype for tensor in source.model.state_dict().values()} == {torch.float32}
    assert torch.equal(source.projection, state["text_projection"].float())


class Trap:
    """A pickle that would make a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.mkdir, (self.folder,)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_malicious_file_is_not_run(mini: Path, tmp_path: Path, form: str) -> None:
    trap, path = tmp_path / "trap", tmp_path / "evil.pt"
    content = {"text_projection": torch.ones(2, 2), "x": Trap(trap)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content["x"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match="run") as error:
        read_state_dict(path)
    one_line(error, path)
    assert not trap.exists()
    if form != "pickle":  # negative control: the trap works
        torch.load(path, weights_only=False)
        assert trap.exists()


def test_a_program_is_run_only_if_openai_published_it(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "program.pt"
    holder = torch.nn.Linear(2, 2)
    with pytest.warns(FutureWarning):  # deprecated, but the form of OpenAI's files
        torch.jit.trace(holder, torch.ones(1, 2)).save(path)
    with monkeypatch.context() as patch:
        patch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("the program was loaded"))
        with pytest.raises(UserError, match="none of OpenAI's published") as error:
            read_state_dict(path)
        one_line(error, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(OPENAI_FILES, "program.pt", digest)
    assert torch.equal(read_state_dict(path)["weight"], holder.weight)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_torn_file_is_one_line(mini: Path, tmp_path: Path, form: str) -> None:
    state = {"text_projection": torch.randn(8, 4), "x": torch.randn(5)}
    path = tmp_path / "torn"
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    data = path.read_bytes()
    assert read_state_dict(path).keys() == state.keys()
    for keep in {*range(0, len(data), max(1, len(data) // 40)), 1, 2, 9, len(data) - 1}:
        path.write_bytes(data[:keep])
        with pytest.raises(UserError) as error:
            read_state_dict(path)
        one_line(error, path)


def test_random_bytes_are_one_line(mini: Path, tmp_path: Path) -> None:
    path = tmp_path / "noise.pt"
    random = torch.Generator().manual_seed(0)
    starts = (b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x02}q\x00", b"\x10\0\0\0\0\0\0\0{")
    for number in range(200):
        noise = bytes(torch.randint(256, (60,), generator=random, dtype=torch.uint8).tolist())
        path.write_bytes(starts[number % len(starts)] + noise)
        with pytest.raises(UserError) as error:
            read_state_dict(path)
        one_line(error, path)


def test_what_is_no_checkpoint_is_one_line(mini: Path, tmp_path: Path) -> None:
    for path, message in ((tmp_path, "folder"), (tmp_path / "none.pt", "does not exist")):
        with pytest.raises(UserError, match=message) as error:
            ClipSource("mini", path, tmp_path / "cache")
        one_line(error, path)
    (tmp_path / "empty.pt").touch()
    with pytest.raises(UserError, match="empty"):
        read_state_dict(tmp_path / "empty.pt")
    for content, message in (([1], "list"), ({}, "dict"), ({"a": 1}, "int"), ({1: 2}, "1 is")):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(UserError, match=message) as error:
            read_state_dict(tmp_path / "other.pt")
        one_line(error, tmp_path / "other.pt")


def test_nan_weights_are_refused(mini: Path, tmp_path: Path) -> None:
    state = random_model("mini").state_dict()
    state["ln_final.weight"][3] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(UserError, match=r"ln_final\.weight holds NaN") as error:
        read_state_dict(tmp_path / "nan.pt")
    one_line(error)


@pytest.mark.parametrize("name", [*OPENAI, "mini"])
def test_weights_of_another_architecture_are_recognised(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        state = ARCHITECTURES[name].build().state_dict()
    assert describe(state) == name
    state["visual.conv1.weight"] = state["visual.conv1.weight"][:-1]
    assert describe(state) != name


def test_the_wrong_architecture_is_one_line(mini: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        _ = ClipSource("RN50", mini, tmp_path / "cache", "cpu").model
    one_line(error, mini, "not those of RN50", "look like mini")
    torch.save({"fc.weight": torch.ones(2)}, tmp_path / "fc.pt")
    with pytest.raises(UserError, match="no CLIP") as error:
        _ = ClipSource("mini", tmp_path / "fc.pt", tmp_path / "cache", "cpu").model
    one_line(error)


# --- Download ----------------------------------------------------------------------------------


@dataclass
class Server:
    address: str
    ranges: list[str | None]
    limit: int | None = None  # bytes after which the connection breaks


CONTENT = bytes(range(256)) * 40
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            if start >= len(CONTENT):
                self.send_error(416)
                return
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(CONTENT) - start))
            self.end_headers()
            self.wfile.write(CONTENT[start:][: state.limit])

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        state = Server(f"http://127.0.0.1:{httpd.server_port}/w.pt", [])
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield state
        httpd.shutdown()


def test_a_download_goes_on_where_it_broke_off(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "weights" / "w.pt"
    server.limit = 3000
    with pytest.raises(UserError) as error:
        download(server.address, DIGEST, path)
    one_line(error, server.address, path, "--weights")
    assert not path.exists()
    server.limit = None
    assert download(server.address, DIGEST, path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=3000-"]
    assert not path.with_name("w.pt.part").exists()
    download(server.address, DIGEST, path)
    assert len(server.ranges) == 2, "what is there is not fetched again"


def test_a_finished_part_needs_no_more_bytes(server: Server, tmp_path: Path) -> None:
    (tmp_path / "w.pt.part").write_bytes(CONTENT)
    assert download(server.address, DIGEST, tmp_path / "w.pt").read_bytes() == CONTENT


def test_a_download_of_other_content_is_thrown_away(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not 0000") as error:
        download(server.address, "0" * 64, tmp_path / "w.pt")
    one_line(error, server.address)
    assert not (tmp_path / "w.pt").exists() and not (tmp_path / "w.pt.part").exists()


def test_no_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip.architectures.OPENAI_URL", "http://127.0.0.1:9/models")
    with pytest.raises(UserError) as error:
        _ = ClipSource("RN50", cache=tmp_path).weights_sha256
    url = ARCHITECTURES["RN50"].url
    one_line(error, url, tmp_path / "weights" / "RN50.pt", "--weights PATH")


def test_a_wrong_file_put_there_by_hand_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "RN50.pt").write_bytes(b"something else")
    with pytest.raises(UserError, match="not the file that OpenAI published") as error:
        _ = ClipSource("RN50", cache=tmp_path).weights_sha256
    one_line(error, tmp_path / "weights" / "RN50.pt")


def test_the_hash_follows_the_file(mini: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = ClipSource("mini", mini, cache).weights_sha256
    assert first == hashlib.sha256(mini.read_bytes()).hexdigest()
    torch.save(random_model("mini", seed=1).state_dict(), mini)
    assert ClipSource("mini", mini, cache).weights_sha256 != first
    (cache / "weights" / "sha256.json").write_text("torn {")
    assert ClipSource("mini", mini, cache).weights_sha256 != first


# --- Full checkpoints --------------------------------------------------------------------------


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
    name = "ViT-B/32"
    reduce_depth(monkeypatch, tmp_path, name)
    weights, out = tmp_path / "w.pt", tmp_path / "new" / "out.pt"
    torch.save(openai_state_dict(name), weights)
    cache = tmp_path / "cache"
    source = ClipSource(name, weights, cache, "cpu")
    adapter = adapter_for(source, tmp_path / "a.safetensors")
    arguments = [str(tmp_path / "a.safetensors"), str(out), "--weights", str(weights)]
    apply_command.main([*arguments, "--cache", str(cache)])

    state, original = torch.load(out, weights_only=True), read_state_dict(weights)
    assert state.keys() == original.keys()
    assert torch.equal(state["text_projection"], source.projection + adapter.delta())
    others = [key for key in state if key != "text_projection"]
    assert all(torch.equal(state[key], original[key]) for key in others)
    # open_clip's own loader for OpenAI's layout, which is OpenAI's; it rounds to float16.
    model = build_model_from_openai_state_dict(dict(state)).float().eval()
    tokens = open_clip.get_tokenizer("RN50-quickgelu")(TEXTS)
    expected = source.encode_hidden(TEXTS) @ (source.projection + adapter.delta())
    loaded = model.encode_text(tokens)
    assert (normalize(loaded, dim=1) - normalize(expected, dim=1)).abs().max() < 1e-3
    mine = ClipSource(name, out, cache, "cpu")
    assert torch.allclose(mine.encode_hidden(TEXTS) @ mine.projection, expected, atol=1e-5)

    with pytest.raises(UserError, match="not overwritten"):
        apply_command.main([*arguments, "--cache", str(cache)])


def test_an_adapter_of_other_weights_is_refused(mini: Path, tmp_path: Path) -> None:
    source = ClipSource("mini", mini, tmp_path / "cache", "cpu")
    adapter_for(source, tmp_path / "a.safetensors")
    other, out = tmp_path / "other.pt", tmp_path / "out.pt"
    torch.save(random_model("mini", seed=1).state_dict(), other)
    arguments = [str(tmp_path / "a.safetensors"), str(out), "--cache", str(tmp_path / "cache")]
    with pytest.raises(UserError, match="made for other weights") as error:
        apply_command.main([*arguments, "--weights", str(other)])
    one_line(error, tmp_path / "a.safetensors", other)
    assert not out.exists()
    (tmp_path / "a.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"a\.safetensors"):
        apply_command.main([*arguments, "--weights", str(mini)])


def test_a_change_of_another_shape_is_refused(mini: Path, tmp_path: Path) -> None:
    source = ClipSource("mini", mini, tmp_path / "cache", "cpu")
    with pytest.raises(UserError, match=r"\(2, 2\)"):
        save_full_model(source, torch.zeros(2, 2), tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_the_embedded_weights_fit_their_configuration(tmp_path: Path) -> None:
    mini = ARCHITECTURES["mini"]
    assert Path(mini.weights).stat().st_size <= 8 * 2**20
    source = ClipSource("mini", cache=tmp_path, device="cpu")
    assert source.encode_hidden(["seven"]).shape == (1, source.projection.shape[0])
    assert replace(mini).url is None, "the default needs no network"
