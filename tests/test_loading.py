"""The loader of models: every form is read, nothing foreign is run, what is refused is one line."""

import builtins
import contextlib
import hashlib
import json
import os
import pickle
import socket
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from clip.architectures import architecture, preprocessing
from clip.source import ClipSource
from forgetting.errors import ProblemError
from forgetting.models import configs, loading
from forgetting.models.checkpoint import parse_tensors, read_checkpoint
from forgetting.models.loading import load_model
from tests.clip_fixtures import TEXT, hugging_face, open_clip_folder, random_model, tiny
from tests.conftest import REPOSITORY, one_line, refuses
from tests.encoder_fixtures import needs_transformers

TEXTS = ["", "sea horse", "a photo of a crab."]


@pytest.fixture
def mini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return tiny(monkeypatch, tmp_path / "mini")


def test_every_form_of_a_checkpoint_is_read(mini: Path, tmp_path: Path) -> None:
    state = random_model("mini").state_dict()
    half = {key: value.half() for key, value in state.items()}
    wrapped = {f"module.{key}": value for key, value in state.items()}
    forms = {
        "plain.pt": lambda path: torch.save(state, path),
        "legacy.pt": lambda path: torch.save(state, path, _use_new_zipfile_serialization=False),
        "trained.pt": lambda path: torch.save({"epoch": 3, "state_dict": wrapped}, path),
        "safetensors under another name.bin": lambda path: save_file(state, path),
        "half.pt": lambda path: torch.save(half, path),
        "openai.pt": lambda path: torch.save(state | {"context_length": torch.tensor(24)}, path),
    }
    for name, write in forms.items():
        write(tmp_path / name)
        source = ClipSource("mini", tmp_path / name, tmp_path / "cache", "cpu")
        expected = (half if "half" in name else state)["text_projection"].float()
        assert torch.equal(source.projection, expected), name
        assert {x.dtype for x in source.model.state_dict().values()} == {torch.float32}


@dataclass
class Trap:
    """A pickle that would make a folder when it is loaded."""

    folder: Path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.mkdir, (self.folder,)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_pickle_with_code_is_not_run(tmp_path: Path, form: str) -> None:
    trap, path = tmp_path / "trap", tmp_path / "evil.pt"
    content = {"text_projection": torch.ones(2, 2), "x": Trap(trap)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content["x"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with one_line("without running code", path):
        read_checkpoint([path])
    assert not trap.exists()
    if form != "pickle":  # negative control: the trap works
        torch.load(path, weights_only=False)
        assert trap.exists()


def program(path: Path, model: torch.nn.Module, *inputs: torch.Tensor) -> None:
    """A model as OpenAI publishes them."""
    with warnings.catch_warnings():  # deprecated, but the form of OpenAI's files
        warnings.simplefilter("ignore")
        torch.jit.trace(model, inputs, check_trace=False).save(path)


def test_a_published_archive_is_read_and_not_run(mini: Path, tmp_path: Path, monkeypatch) -> None:
    """Its SHA-256 says that it computes with QuickGELU; the program itself is never loaded."""
    model, path = random_model("mini"), tmp_path / "published.pt"
    mask = model.attn_mask
    del model.attn_mask  # a buffer that a state dict leaves out
    model.attn_mask = mask
    program(path, model, torch.zeros(1, 3, 16, 16), torch.zeros(1, 24, dtype=torch.int64))
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("the program was loaded"))
    refuses("none of the files that OpenAI published", load_model, f"openai:{path}")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(loading.OPENAI, sha256, "published")
    files = {"published-quickgelu": mini.with_suffix(".json")}
    monkeypatch.setattr(configs, "open_clip_configs", lambda: files)
    loaded, tokenizer = load_model(f"openai:{path}")
    assert torch.equal(loaded.encode_text(tokenizer(TEXTS)), model.encode_text(tokenizer(TEXTS)))
    refuses("no such file", load_model, f"openai:{tmp_path}/none.pt")


STARTS = [b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x02}q\x00", b"\x10" + 7 * b"\0"]


@settings(max_examples=80)
@given(
    part=st.floats(0, 0.999),
    form=st.sampled_from(["zip", "legacy", "safetensors", "jit"]),
    start=st.sampled_from(STARTS),
    noise=st.binary(max_size=60),
)
def test_torn_files_and_random_bytes_are_one_line(tmp_path_factory, part, form, start, noise):
    path = tmp_path_factory.mktemp("torn") / "w"
    state = {"text_projection": torch.randn(8, 4), "x": torch.randn(5)}
    if form == "safetensors":
        save_file(state, path)
    elif form == "jit":
        program(path, torch.nn.Linear(2, 2), torch.ones(1, 2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    assert parse_tensors(whole)
    for content in (whole[: int(part * len(whole))], start + noise):
        refuses(None, parse_tensors, content)


@pytest.mark.filterwarnings("ignore::UserWarning")  # nested and quantised tensors are announced so
def test_odd_tensors_are_one_line(tmp_path: Path) -> None:
    plain = torch.eye(3)
    odd = {
        "sparse": plain.to_sparse(),
        "complex": plain * 1j,
        "meta": plain.to("meta"),
        "quantised": torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([plain, plain[:2]]),
        "endless": torch.zeros(1).expand(10**6, 10**6),  # a stride of 0: 4 TB in a small file
        "number": 3,
    }
    path = tmp_path / "w.pt"
    for name, tensor in odd.items():
        torch.save({"ln_final.weight": tensor}, path)
        with one_line(r"ln_final|cannot be read", path):
            read_checkpoint([path])
        assert path.stat().st_size < 10_000, name
    for content in ([1], {}, {"a": 1}, {1: plain}, {"state_dict": {"a": "b"}}):
        torch.save(content, path)
        refuses("no state dict", read_checkpoint, [path])
    torch.save({"a": plain, "b": plain.to(torch.float8_e4m3fn), "c": plain.long()}, path)
    assert read_checkpoint([path])[0].keys() == {"a", "b", "c"}


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """A pipe would be waited for."""
    os.mkfifo(tmp_path / "pipe")
    for open_it in (
        lambda: read_checkpoint([tmp_path]),
        lambda: ClipSource("mini", tmp_path / "pipe", tmp_path / "cache"),
        lambda: load_model(f"open_clip:ViT-B-32-gelu/{tmp_path / 'pipe'}"),
        lambda: load_model(f"openai:{tmp_path / 'pipe'}"),
    ):
        refuses("no such file", open_it)


def test_weights_that_do_not_fit_are_described(mini: Path, tmp_path: Path) -> None:
    state = random_model("mini").state_dict()
    path = tmp_path / "weights.pt"
    for tensors, message in (
        ({"fc.weight": torch.ones(2)}, "Missing key"),
        (state | {"more": torch.ones(2)}, "Unexpected key"),
        (state | {"ln_final.weight": torch.full((8,), torch.nan)}, "ln_final.weight' holds NaN"),
    ):
        torch.save(tensors, path)
        with one_line(message, path):
            _ = ClipSource("mini", path, tmp_path / "cache", "cpu").model
    refuses("no such user", ClipSource, "mini", cache="~nobody-of-that-name/x")
    # What is hashed is what is loaded: a file that is exchanged between the two is refused.
    source = ClipSource("mini", mini, tmp_path / "cache", "cpu")
    assert source.weights_sha256
    torch.save(random_model("mini", seed=1).state_dict(), mini)
    with pytest.raises(ProblemError, match="has changed since"):
        _ = source.model


def test_what_is_no_model_is_one_line(tmp_path: Path) -> None:
    for name, content in {"torn": "{", "none": '{"model_cfg": {"embed_dim": 3}}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "open_clip_config.json").write_text(content)
    (tmp_path / "w.pt").touch()
    (tmp_path / "empty").mkdir()
    open_clip_folder(tmp_path / "bare", "ViT")
    (tmp_path / "bare/open_clip_model.safetensors").unlink()
    for name, message in {
        f"hf:{tmp_path / 'nowhere'}": "no such folder",
        "hf:": "no model",
        f"hf:{tmp_path / 'empty'}": "holds neither config.json",
        str(tmp_path / "torn"): "is not JSON",
        f"hf:{tmp_path / 'none'}": "no model_cfg",
        "open_clip:ViT-B-33": "did you mean 'ViT-B-32'",
        "open_clip:ViT-B-32/laion2b_s34b": "did you mean 'laion2b_s34b_b79k'",
        "open_clip:ViT-L-14-gelu/openai": "the other activation",
        str(tmp_path / "w.pt"): "does not say its activation",
        "nothing": "a model is hf:|unknown architecture",
        "open_clip:ViT-B-32": "has no weights",
        str(tmp_path / "bare"): "no folder with open_clip_model",
    }.items():
        refuses(message, load_model, name)
    refuses("'ViT-B/32'", architecture, "ViT-B/33")


def test_pretrained_tags_say_how_they_compute(tmp_path: Path, monkeypatch) -> None:
    laion = architecture("open_clip:ViT-B-32/laion2b_s34b_b79k")
    assert laion.explicit and not laion.model_config()["quick_gelu"]
    assert architecture("open_clip:ViT-B-32/openai").model_config()["quick_gelu"]
    siglip = architecture("open_clip:ViT-B-16-SigLIP/webli")
    assert preprocessing(siglip)["mean"] == [0.5, 0.5, 0.5]

    fail = mock.Mock(side_effect=OSError("no\nnetwork"))
    monkeypatch.setattr("open_clip.download_pretrained", fail)
    refuses("cannot be fetched", load_model, "open_clip:ViT-B-32/laion2b_s34b_b79k")


@needs_transformers
def test_a_model_of_the_hub_is_fetched_in_safetensors_if_it_has_them(tmp_path, monkeypatch) -> None:
    folder = hugging_face(tmp_path / "m", "CLIPModel")
    fetch = mock.Mock(return_value=str(folder))
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert load_model("hf:org/model")[0].get_text_features is not None
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    refuses("no folder with model", load_model, "hf:org/model")
    fetched = [call.kwargs["allow_patterns"][-1] for call in fetch.call_args_list]
    assert fetched == ["*.safetensors", "*.safetensors", "*.bin"]


def test_no_model_library_is_imported_for_a_name() -> None:
    """It takes seconds, and a run that finds all encoded needs none."""
    code = (
        "import sys, clip.features; from clip.source import ClipSource\n"
        "ClipSource('mini').fingerprint, ClipSource('ViT-B/16')\n"
        "print([m for m in ('open_clip', 'torchvision', 'transformers') if m in sys.modules])\n"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def features(name: str) -> torch.Tensor:
    model, tokenizer = load_model(name)
    return model.encode_text(tokenizer(TEXTS))


def test_weights_of_unknown_activation_are_refused(mini: Path, tmp_path, monkeypatch) -> None:
    """In the shapes of a small ViT-B/32."""
    config = json.loads(mini.with_suffix(".json").read_text())
    del config["quick_gelu"]
    files = {}
    for name, more in (("ViT-B-32", {}), ("ViT-B-32-quickgelu", {"quick_gelu": True})):
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps(config | more))
    monkeypatch.setattr(configs, "open_clip_configs", lambda: files)
    path = tmp_path / "laion.pt"
    torch.save(random_model("ViT-B/32").state_dict(), path)

    def source(arch: str) -> ClipSource:
        return ClipSource(arch, path, tmp_path / "cache", "cpu")

    for arch in ("ViT-B/32", "open_clip:ViT-B-32"):
        with one_line("how they compute is not known", path, f"{arch}-quickgelu", "-gelu"):
            _ = source(arch).fingerprint
    quick, gelu = source("ViT-B/32-quickgelu"), source("open_clip:ViT-B-32-gelu")
    apart = quick.encode_hidden(TEXTS) - gelu.encode_hidden(TEXTS)
    assert apart.abs().max() > 1e-3, "the two are different models"
    assert quick.fingerprint != gelu.fingerprint
    for name, same in (("quickgelu", quick), ("gelu", gelu)):
        found = features(f"open_clip:ViT-B-32-{name}/{path}")
        assert torch.allclose(found, same.encode_hidden(TEXTS) @ same.projection, atol=1e-5)
    # A config beside the weights says it; the other name is refused.
    beside = tmp_path / "laion.json"
    beside.write_text(json.dumps({"model_cfg": gelu.architecture.model_config()}))
    with pytest.raises(ProblemError, match="have quick_gelu"):
        _ = source("ViT-B/32").fingerprint
    plain = features(f"open_clip:ViT-B-32/{path}")
    assert torch.equal(plain, features(f"open_clip:ViT-B-32-gelu/{path}"))
    beside.unlink()
    # A file that OpenAI published is known; it is no GELU model, whoever says so.
    monkeypatch.setitem(loading.OPENAI, gelu.weights_sha256, "ViT-B-32")
    named = features(f"open_clip:ViT-B-32-quickgelu/{path}")
    assert torch.equal(named, features(f"openai:{path}"))
    refuses("have quick_gelu", features, f"open_clip:ViT-B-32-gelu/{path}")


EVIL = """
from pathlib import Path
Path({trap!r}).mkdir()
from transformers import AutoModel, PreTrainedConfig, PreTrainedTokenizerFast
class EvilTok(PreTrainedTokenizerFast): pass
class EvilConfig(PreTrainedConfig): model_type = "evil"
"""


def edit(path: Path, **changes: object) -> None:
    """Change a JSON file; `a__b` is the key b within a."""
    content = json.loads(path.read_text()) if path.exists() else {}
    for key, value in changes.items():
        *above, last = key.split("__")
        place = content
        for name in above:
            place = place[name]
        place[last] = value
    path.write_text(json.dumps(content))


def made(folder: Path, kind: str) -> tuple[Path, Path]:
    """A folder of open_clip or of Hugging Face, and the file of its config."""
    if kind == "ViT":
        return open_clip_folder(folder, kind), folder / "open_clip_config.json"
    return hugging_face(folder, kind), folder / "config.json"


def opened(folder: Path, match: str = "") -> list[str]:
    """What opens a folder of all that may; whatever else happens is one line."""
    done = []
    for name, load in (
        ("load_model", lambda: load_model(str(folder))),
        ("hf", lambda: load_model(f"hf:{folder}")),
        ("source", lambda: ClipSource(f"hf:{folder}", cache=f"{folder}-c").encode_hidden(["a"])),
    ):
        try:
            load()
            done.append(name)
        except ProblemError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000 and match in str(error)
    return done


TEXT_CFG, VISION_CFG = "model_cfg__text_cfg__", "model_cfg__vision_cfg__"
TRUST = {f"{TEXT_CFG}tokenizer_kwargs": {"trust_remote_code": True}}
TOKENIZER = {f"{TEXT_CFG}hf_tokenizer_name": "x"}
ATTACKS = {  # kind of the folder, changes of its config, and what its refusal names
    "open_clip tokenizer": ("ViT", TOKENIZER | TRUST, "trust_remote_code"),
    "open_clip tokenizer, unasked": ("ViT", TOKENIZER, ""),
    "text tower": ("ViT", {f"{TEXT_CFG}hf_model_name": "{folder}"}, "_model_name"),
    "image tower": ("ViT", {f"{VISION_CFG}timm_model_name": "local-dir:{folder}"}, "_model_name"),
    "bpe": ("ViT", {f"{TEXT_CFG}tokenizer_kwargs": {"bpe_path": "{folder}/pipe"}}, "bpe_path"),
    "hf unknown model": ("CLIPModel", {"model_type": "evil"}, ""),
    "hf known model": ("CLIPModel", {}, ""),
    "hf kernels": ("CLIPModel", {"attn_implementation": "org/evil-kernel"}, ""),
}


@needs_transformers
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_folder_runs_its_own_code_or_speaks_to_a_hub(attack, tmp_path, monkeypatch) -> None:
    """Refused, or loaded without it; and there is no prompt whether it may run."""
    kind, changes, names = ATTACKS[attack]
    trap = tmp_path / "trap"
    folder, config = made(tmp_path / "m", kind)
    (folder / "evil.py").write_text(EVIL.format(trap=str(trap)))
    auto = {"AutoTokenizer": ["evil.EvilTok", None]}
    edit(folder / "tokenizer_config.json", tokenizer_class="EvilTok", auto_map=auto)
    os.mkfifo(folder / "pipe")
    if kind != "ViT":
        auto = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}
        changes = {"auto_map": auto} | changes
    edit(config, **json.loads(json.dumps(changes).replace("{folder}", str(folder))))

    for module, name in ((builtins, "input"), (socket.socket, "connect")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a prompt, or a network"))
    # transformers 4 refuses the tokenizer of these two, 5 opens the folder without it
    assert bool(opened(folder, names)) <= (attack in ("hf known model", "hf kernels"))
    assert not trap.exists()
    if attack == "open_clip tokenizer":  # negative control: the trap works
        import transformers

        with contextlib.suppress(Exception):  # whatever such a tokenizer leads to
            transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert trap.exists()


ODD = (None, -1, "x", 0, 1.5, float("nan"), [], {}, True, 10**8, 10**30, ["CLIPTokenizer"], [0.5])
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")
ODD_KEYS = {
    "ViT": [
        *("model_cfg__embed_dim", "model_cfg__text_cfg", "model_cfg__vision_cfg"),
        *(f"{TEXT_CFG}{key}" for key in TEXT),
        *(f"{VISION_CFG}{key}" for key in ("layers", "image_size")),
        *(f"preprocess_cfg__{key}" for key in ("size", "mean", "std", "resize_mode")),
    ],
    "CLIPModel": [
        *("projection_dim", "text_config", "architectures", "model_type"),
        *(f"{side}__{n}" for side in ("text_config", "vision_config") for n in SIZES),
    ],
}


@needs_transformers
@pytest.mark.parametrize("kind", ODD_KEYS)
@settings(max_examples=40)
@given(data=st.data())
def test_odd_numbers_in_a_config_are_one_line(kind, tmp_path_factory, data) -> None:
    """Whatever number stands in a config, it is refused in one line and in no time, or it is what
    the model computes with."""
    folder, config = made(tmp_path_factory.mktemp("odd") / "m", kind)
    edit(config, **{data.draw(st.sampled_from(ODD_KEYS[kind])): data.draw(st.sampled_from(ODD))})
    opened(folder)


IMAGES = {
    "ViT": [
        *({"size": -32}, {"size": [32, 32.5]}, {"size": 0}, {"size": [32]}, {"std": [0.5, 0, 0.5]}),
        *({"mean": [0.5, float("nan"), 0.5]}, {"interpolation": "random"}, {"resize_mode": 3}),
    ],
    "CLIPModel": [
        *({"crop_size": 16}, {"resample": 99}, {"do_rescale": False}, {"image_mean": [0.5]}),
        *({"size": {"height": -32, "width": 32.5}, "do_center_crop": False}, {"image_mean": 3}),
        *({"rescale_factor": 1.0}, {"do_center_crop": False}),
    ],
}


@needs_transformers
@pytest.mark.parametrize("kind", IMAGES)
def test_impossible_preprocessing_is_one_line(kind, tmp_path) -> None:
    """Before any work."""
    folder, file = made(tmp_path / "m", kind)
    mode = preprocessing(architecture(f"hf:{folder}"))["resize_mode"]
    assert mode == ("squash" if kind == "ViT" else "shortest")  # what is made can be read
    file = file if kind == "ViT" else folder / "preprocessor_config.json"
    good = file.read_text()
    for change in IMAGES[kind]:
        file.write_text(good)
        before = "preprocess_cfg__" if kind == "ViT" else ""
        edit(file, **{before + key: value for key, value in change.items()})
        with one_line("preprocessing that is not known"):
            ClipSource(f"hf:{folder}", cache=tmp_path / "cache")
