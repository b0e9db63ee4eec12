"""A model that adds a bias behind its projection: the driver's adapter changes W alone.

The embedding is `h W + b` and b is fixed, so an adapter of train.py is one of `forgetting` too: it
is loaded, applied, undone, composed and exported as any other.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import train
from clip.bundle import FeatureBundle, bundle_path, load_bundles
from clip.source import ClipSource
from evaluation.results import read_logs
from evaluation.zero_shot import ZeroShot
from forgetting import Forgotten
from forgetting.adapter import load_adapter, save_adapter
from forgetting.compose import compose
from forgetting.deploy.embeddings import patch
from forgetting.deploy.export import export
from forgetting.errors import ProblemError
from forgetting.models.encoder import Encoder, read_encoder
from forgetting.models.loading import load_model
from tests.clip_fixtures import hugging_face, images, open_clip_folder
from tests.conftest import BACKBONE, refuses, toy_bundle
from tests.encoder_fixtures import needs_transformers

TEXTS = ["crab", "owl", "a sea horse", "something else"]
KINDS = ["open_clip", pytest.param("hf", marks=needs_transformers)]
EXACT = "--trainer", "ForgetExact"


@pytest.fixture(params=KINDS)
def folder(request, tmp_path: Path) -> Path:
    """A model whose projection has a bias that matters."""
    if request.param == "open_clip":
        return open_clip_folder(tmp_path / "open_clip", "custom with bias")
    return hugging_face(tmp_path / "hf", "SiglipModel")


def opened(folder: Path) -> Encoder:
    return read_encoder(*load_model(str(folder)))


def adapters(folder: Path, tmp_path: Path, *more: str) -> list[Path]:
    """Adapters of two classes, forgotten one at a time by train.py."""
    images(tmp_path / "zoo")
    argv = ["--images", str(tmp_path / "zoo"), "--backbone", f"hf:{folder}", *more]
    argv += ["--forget", "crab", "--forget", "owl", "--cache", str(tmp_path / "cache")]
    out = train.main([*argv, "--root", str(tmp_path), "--output-dir", str(tmp_path / "out")])
    entries = read_logs(out)["zoo"]
    return [out / entries[name]["solver"]["adapter"] for name in ("crab", "owl")]


def test_the_drivers_adapters_are_composed_exported_applied_and_undone(folder, tmp_path):
    parts = {str(path): load_adapter(path) for path in adapters(folder, tmp_path, *EXACT)}
    path = tmp_path / "both.safetensors"
    save_adapter(compose(parts), path)
    encoder = opened(folder)
    assert encoder.bias.abs().max() > 0.1
    before = {name: x.clone() for name, x in encoder.model.state_dict().items()}
    adapter = load_adapter(path)
    changed = encoder.projection.double() + adapter.left.double() @ adapter.right.double()
    wanted = encoder.hidden(TEXTS).double() @ changed + encoder.bias.double()
    to = "open_clip" if folder.name == "open_clip" else "hf"
    made = opened(export(adapter, folder, to, tmp_path / "exported"))
    assert torch.allclose(made.embeddings(TEXTS).double(), wanted, atol=1e-4)
    assert torch.equal(made.bias, encoder.bias)
    forgotten = Forgotten.load(path, encoder.model)
    forgotten.apply()
    assert torch.allclose(encoder.embeddings(TEXTS).double(), wanted, atol=1e-4)
    changed = [k for k, x in encoder.model.state_dict().items() if not torch.equal(x, before[k])]
    assert changed == [encoder.name], "the bias is what it was"
    if folder.name == "hf":  # w < d, so cached embeddings say what the hidden states were
        base = opened(folder)
        run = base.projection, adapter.left, adapter.right, base.bias
        patched, _ = patch(base.embeddings(TEXTS), *run, normalised=False)
        assert torch.allclose(patched.double(), wanted, atol=1e-3)
    assert forgotten.verify() and Forgotten.load(path, opened(folder).model).adapter.model.bias
    with torch.no_grad():
        encoder.bias.add_(1e-3)
    refuses("is not what it was", forgotten.verify)
    with torch.no_grad():
        encoder.bias.copy_(before[encoder.bias_name])
    forgotten.undo()
    assert all(torch.equal(x, before[k]) for k, x in encoder.model.state_dict().items())


@pytest.mark.parametrize("trainer", ["ForgetExact", "ForgetLoRA", "ForgetUCE"])
def test_the_driver_judges_the_model_that_would_be_deployed(folder, tmp_path, trainer):
    """What the bundle says of a text after the change is what the changed model says."""
    steps = ["TRAINER.FORGETLORA.STEPS", "20", "TRAINER.FORGETLORA.MAX_TRIALS", "1"]
    target = ["FORGET.TARGET", "opposite", "FORGET.BETA", "0.5"]
    path, _ = adapters(folder, tmp_path, "--trainer", trainer, *steps, *target)
    source = ClipSource(f"hf:{folder}", cache=tmp_path / "cache", device="cpu")
    hidden = source.encode_hidden(["crab", "owl"])
    adapter = load_adapter(path)
    after = hidden @ source.projection + source.bias + (hidden @ adapter.left) @ adapter.right
    encoder = opened(folder)
    Forgotten.load(path, encoder.model).apply()
    assert torch.allclose(encoder.embeddings(["crab", "owl"]), after, atol=1e-4)
    if nearest := {"ForgetExact": 0.999, "ForgetUCE": 0.9}.get(trainer):
        before = opened(folder).embeddings(["crab"])[0]  # what lands: on -0.5 of it, bias and all
        assert nn.functional.cosine_similarity(after[0], -before, dim=0) > nearest


def test_a_bundle_holds_the_bias(tmp_path):
    plain = toy_bundle("ToyAnimals")
    bias = torch.linspace(-1, 1, plain.text_projection.shape[1])
    biased = replace(plain, text_bias=bias)
    assert torch.equal(biased.embed(plain.class_hidden), plain.embed(plain.class_hidden) + bias)
    path = bundle_path(tmp_path, BACKBONE, "ToyAnimals")
    biased.save(path)
    assert torch.equal(FeatureBundle.load(path).text_bias, bias)
    assert not torch.equal(ZeroShot(biased).texts.embeddings, ZeroShot(plain).texts.embeddings)
    for wrong in (bias[1:], bias / 0):
        with pytest.raises(ProblemError, match="text_bias"):
            replace(plain, text_bias=wrong).check("here")
    toy_bundle("ToyTools").save(bundle_path(tmp_path, BACKBONE, "ToyTools"))
    refuses("different projections", load_bundles, tmp_path, BACKBONE)
