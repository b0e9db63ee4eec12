"""What search engines run: SentenceTransformer's CLIP, large ONNX files, immich's models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from forgetting import Forgotten, forget
from forgetting.deploy.export import export
from forgetting.errors import ProblemError
from forgetting.models.loading import load_model
from tests.clip_fixtures import hugging_face
from tests.encoder_fixtures import OUT, WIDTH
from tests.test_export import EXACT, TEXTS, apart, graph, refused, run_onnx
from tests.test_patch import make_adapter

HUB = {"idx": 0, "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}


@pytest.mark.parametrize("kind", ["CLIP", "CLIP of the hub", "encoder and linear map"])
def test_sentence_transformer(tmp_path, monkeypatch, kind):
    """As sentence-transformers saves them, as the hub has clip-ViT-B-32, and as the multilingual
    text encoder for its images is."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    load = pytest.importorskip("sentence_transformers").SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    base, out, file = tmp_path / "base", tmp_path / "out", tmp_path / "a.safetensors"
    if kind == "CLIP of the hub":
        hugging_face(base / HUB["path"], "CLIPModel")
        (base / "modules.json").write_text(json.dumps([HUB | {"name": "0"}]))
    else:
        name = "CLIPModel" if kind == "CLIP" else "CLIPTextModelWithProjection"
        parts = [modules.Transformer(str(hugging_face(tmp_path / "transformers", name)))]
        if kind != "CLIP":
            linear = {"bias": False, "activation_function": nn.Identity()}
            parts += [modules.Pooling(WIDTH), modules.Dense(WIDTH, OUT, **linear)]
        load(modules=[*parts, modules.Normalize()]).save(str(base))
    model = load(str(base))
    before = torch.tensor(model.encode(TEXTS))
    answer = forget(model, None, ["crab"], retain=["owl", "red shoe", "blue car"], generic=False)
    answer.save(file)
    answer.apply()
    after = torch.tensor(model.encode(TEXTS))
    assert answer.verify() and apart(after, before) > 0.01
    export(answer.adapter, base, "sentence-transformers", out)
    changed = load(str(out))
    assert apart(torch.tensor(changed.encode(TEXTS)), after) < EXACT
    assert Forgotten.load(file, changed, answer.original).verify()
    answer.undo()
    state, given = changed.state_dict(), load(str(base)).state_dict()
    assert all(torch.equal(x, given[name]) for name, x in model.state_dict().items())
    assert sum(not torch.equal(x, state[name]) for name, x in given.items()) == 1
    if kind.startswith("CLIP"):  # read without the library, by its folder
        behind = load(modules=[model[0], modules.Dense(OUT, OUT)])
        with pytest.raises(ProblemError, match="images pass it too"):
            forget(behind, None, ["crab"])
        assert Forgotten.load(file, load_model(str(out))[0], answer.original).verify()
    else:
        with pytest.raises(ProblemError, match="2 modules of sentence-transformers: give"):
            load_model(str(base))
    for words, module in (("leads out", {"path": "../transformers"}), ("no list of", {})):
        (base / "modules.json").write_text(json.dumps([module]))
        refused(words, answer.adapter, base, "sentence-transformers", tmp_path / "other")


# --- ONNX: external data, and immich's layout

EXTERNAL = {"save_as_external_data": True, "size_threshold": 0}
KEPT = {"in it": {}, "beside it": EXTERNAL, "each": EXTERNAL | {"all_tensors_to_one_file": False}}


def text_tower(path: Path, kept: str) -> tuple[Any, Tensor]:
    """The graph `h @ W` with another weight before W, and where they are kept; onnx, and W."""
    onnx, weight = pytest.importorskip("onnx"), torch.randn(WIDTH, OUT)
    path.parent.mkdir(parents=True)
    model = onnx.load(graph(path, weight))
    model.graph.initializer.insert(0, onnx.numpy_helper.from_array(np.arange(5.0), "other"))
    onnx.save(model, path, **KEPT[kept])
    return onnx, weight


@pytest.mark.parametrize("kept", KEPT)
def test_immich(tmp_path, kept):
    """Weights stay where the base has them: in the graph or beside it."""
    base, out, text = tmp_path / "base", tmp_path / "out", "textual/model.onnx"
    onnx, weight = text_tower(base / text, kept)
    same = {"config.json", "textual/tokenizer.json", "visual/model.onnx", "visual/a/model.armnn"}
    for name in (*same, "textual/a/model.armnn", "textual/b/model.rknn"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("[]")
    before = {x: x.read_bytes() for x in base.rglob("*.*") if x.is_file()}
    adapter = make_adapter(weight)
    out.mkdir()
    export(adapter, base, "immich", out, overwrite=True)
    assert {x: x.read_bytes() for x in before} == before
    files = {str(x.relative_to(out)) for x in out.rglob("*") if x.is_file()}
    beside = set() if kept == "in it" else {f"{text}.data"}
    assert files == {"README.md", text, *same, *beside}
    assert all((out / name).read_text() == "[]" for name in same)
    hidden = torch.randn(3, WIDTH)
    assert apart(run_onnx(out / text, h=hidden), hidden @ (weight + adapter.delta())) < EXACT
    other = onnx.numpy_helper.to_array(onnx.load(out / text).graph.initializer[0])
    assert np.array_equal(other, np.arange(5.0))
    refused("no tensor is the text", adapter, out / text, "onnx", tmp_path / "a.onnx")
    (tmp_path / "a.onnx.data").touch()
    if beside:
        refused("a.onnx.data exists", adapter, base / text, "onnx", tmp_path / "a.onnx")
        assert not (tmp_path / "a.onnx").exists()


@pytest.mark.parametrize("place", [__file__, "link", "none", "short"])
def test_external_data_that_are_elsewhere_or_not_whole(tmp_path, place):
    base = tmp_path / "base/model.onnx"
    onnx, weight = text_tower(base, "beside it")
    model = onnx.load(base, load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = place
    onnx.save(model, base)
    (base.parent / "link").symlink_to(__file__)
    (base.parent / "short").write_bytes(bytes(100))
    words = "leads out of the folder" if place in (__file__, "link") else "cannot be read"
    refused(words, make_adapter(weight), base, "onnx", tmp_path / "out.onnx")
    assert not list(tmp_path.glob("*out.onnx*"))
