"""Every format is loaded back by its own library and gives the texts that `W + Delta` gives."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from forgetting.adapter import Adapter, ModelIdentity
from forgetting.deploy.export import FORMATS, _open_clip_config, export
from forgetting.models.checkpoint import find, read_projection
from forgetting.models.encoder import Encoder, read_encoder
from forgetting.models.loading import load_model
from forgetting.models.reading import text_features, tokens
from tests.clip_fixtures import hugging_face, open_clip_folder
from tests.conftest import refuses
from tests.encoder_fixtures import SIZE
from tests.test_patch import make_adapter

W, D = 24, 16
EXACT, HALF = 1e-5, 2e-3
OPEN_CLIP = ("ViT", "custom with bias")
HF = ("CLIPModel", "CLIPTextModelWithProjection", "SiglipModel")  # the first is in several files
TEXTS = ["crab", "photo of a sea horse.", "owls", "x", "the colour blue"]


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference of normalised embeddings."""
    a, b = (nn.functional.normalize(x.double(), dim=1) for x in (a, b))
    return float((a - b).abs().max())


def refused(words: str, *args, **options) -> None:
    refuses(words, export, *args, **options)


def base_of(tmp_path: Path, kind: str) -> tuple[Path, Encoder, Adapter]:
    """A folder as its library writes it, the model in it, and an adapter for that."""
    make = open_clip_folder if kind in OPEN_CLIP else hugging_face
    if kind in HF:
        pytest.importorskip("transformers")
    folder = make(tmp_path / "base", kind)
    encoder = read_encoder(*load_model(str(folder)))
    return folder, encoder, make_adapter(encoder.projection)


def wanted(encoder: Encoder, adapter: Adapter) -> Tensor:
    """Hidden states times `W + Delta` (plus the bias), float64."""
    weight = encoder.projection.double() + adapter.left.double() @ adapter.right.double()
    found = encoder.hidden(TEXTS).double() @ weight
    assert apart(encoder.embeddings(TEXTS), found) > 0.01  # the change is no small one
    return found if encoder.bias is None else found + encoder.bias.double()


def opened(folder: Path, encoder: Encoder) -> Tensor:
    """The texts of an exported folder as its own library loads it."""
    if (folder / "open_clip_config.json").is_file():
        import open_clip

        model = open_clip.create_model(f"local-dir:{folder}").eval()
    else:
        model = type(encoder.model).from_pretrained(folder, dtype=torch.float32).eval()
    return read_encoder(model, encoder.tokenize).embeddings(TEXTS)


# --- OpenAI, open_clip and transformers


def test_openai_state_dict(tmp_path):
    """The projection in float32, as it was measured; everything else as it was, to the bit."""
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 16, "layers": 1, "width": 64, "head_width": 64, "patch_size": 8}
    text = {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    model = open_clip.CLIP(48, vision, text, quick_gelu=True).eval()
    base, words = tmp_path / "base.pt", open_clip.SimpleTokenizer(context_length=24)
    held = {name: x.half() for name, x in model.state_dict().items()}
    model.load_state_dict({name: x.float() for name, x in held.items()})
    adapter = make_adapter(held["text_projection"])
    torch.save(held, base)
    state = torch.load(export(adapter, base, "openai", tmp_path / "out.pt"), weights_only=True)
    build = open_clip.model.build_model_from_openai_state_dict
    loaded = build(dict(state), cast_dtype=torch.float32).eval()
    expected = wanted(read_encoder(model, words), adapter)
    with torch.no_grad():
        loaded.float().load_state_dict(state)
        assert apart(loaded.encode_text(words(TEXTS)), expected) < EXACT
    assert state["text_projection"].dtype == torch.float32
    for name, value in held.items():
        assert torch.equal(state[name], value) == (name != "text_projection")


@pytest.mark.parametrize("kind", [*OPEN_CLIP, *HF])
def test_folders(tmp_path, kind):
    base, encoder, adapter = base_of(tmp_path, kind)
    (base / "tokenizer.json").write_text('{"a": 1}')
    (base / "other_tool.h5").write_bytes(b"the unchanged model")
    (base / "README.md").write_text("---\nlicense: mit\n---\nThe unchanged model.")
    before = {x.name: x.read_bytes() for x in base.iterdir()}
    to = "open_clip" if kind in OPEN_CLIP else "hf"
    out = export(adapter, base, to, tmp_path / "out")
    assert apart(opened(out, encoder), wanted(encoder, adapter)) < EXACT
    assert {x.name: x.read_bytes() for x in base.iterdir()} == before
    (weights,) = out.glob("*.safetensors")
    old = {k: x for file in base.glob("*.safetensors") for k, x in load_file(file).items()}
    new = load_file(weights)
    assert old.keys() == new.keys()
    assert sum(not torch.equal(x, new[name]) for name, x in old.items()) == 1
    # Neither the unchanged weights of another tool nor an index of files that are not there.
    copied = {name for name in before if not name.endswith((".safetensors", ".h5", ".index.json"))}
    assert {x.name for x in out.iterdir()} == {*copied, weights.name}
    assert "unchanged model" not in (out / "README.md").read_text("utf-8")
    for name in copied - {"open_clip_config.json", "README.md"}:
        assert (out / name).read_bytes() == before[name]
    if kind in OPEN_CLIP:
        names = ("preprocess_cfg", "model_cfg")
        a, b = (json.loads((x / "open_clip_config.json").read_text()) for x in (base, out))
        assert [a[name] for name in names] == [b[name] for name in names]


def test_weights_in_a_bin_file_and_in_half_precision(tmp_path):
    base, encoder, adapter = base_of(tmp_path, "CLIPTextModelWithProjection")
    state = load_file(base / "model.safetensors")
    (base / "model.safetensors").rename(tmp_path / "full.safetensors")
    torch.save(state, base / "pytorch_model.bin")
    out = export(adapter, base, "hf", tmp_path / "out")
    assert apart(opened(out, encoder), wanted(encoder, adapter)) < EXACT
    assert not list(out.glob("*.bin*"))
    # A float16 copy of what the adapter was made from is known by the original.
    torch.save({name: x.half() for name, x in state.items()}, base / "pytorch_model.bin")
    refused("another model.*--original", adapter, base, "hf", tmp_path / "half")
    full = tmp_path / "full.safetensors"
    half = export(adapter, base, "hf", tmp_path / "half", original=full)
    assert EXACT < apart(opened(half, encoder), wanted(encoder, adapter)) < HALF
    assert load_file(half / "model.safetensors")["text_projection.weight"].dtype == torch.float16
    refused("changed already", adapter, half, "hf", tmp_path / "twice", original=full)


def test_open_clip_of_a_file_takes_a_config(tmp_path):
    base, encoder, adapter = base_of(tmp_path, "ViT")
    plain, out = base.rename(tmp_path / "was") / "open_clip_model.safetensors", tmp_path / "out"
    plain = plain.rename(tmp_path / "plain.safetensors")
    config, no = str(tmp_path / "was/open_clip_config.json"), tmp_path / "no.json"
    no.write_text("[]")
    for words, named in (
        ("name a configuration", None),
        ("unknown open_clip model", "ViT-Z-1"),
        ("name its weights too", "ViT-B-32"),
        ("embed_dim 512", "ViT-B-32/openai"),
        ("no.json: no model_cfg", str(no)),
    ):
        refused(words, adapter, plain, "open_clip", out, config=named)
    for to in ("hf", "peft", "openai", "onnx"):
        refused("for a checkpoint of open_clip", adapter, plain, to, out, config=config)
    export(adapter, plain, "open_clip", out, config=config)
    assert apart(opened(out, encoder), wanted(encoder, adapter)) < EXACT
    _, images = _open_clip_config("ViT-B-16-SigLIP/webli", Path("nowhere"))
    assert images["resize_mode"] == "squash" and images["mean"] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("kind", HF)
def test_peft_adapter(tmp_path, kind):
    peft = pytest.importorskip("peft")
    base, encoder, adapter = base_of(tmp_path, kind)
    out = export(adapter, base, "peft", tmp_path / "out")
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(x.name for x in out.iterdir()) == names
    model = type(encoder.model).from_pretrained(base).eval()
    wrapped, expected = peft.PeftModel.from_pretrained(model, out), wanted(encoder, adapter)
    read = {"input_ids": tokens(encoder.model, encoder.tokenize, TEXTS)["input_ids"]}
    with torch.no_grad():
        assert apart(text_features(wrapped.base_model.model, read), expected) < EXACT
    merged = wrapped.merge_and_unload()
    assert apart(read_encoder(merged, encoder.tokenize).embeddings(TEXTS), expected) < EXACT
    state = encoder.model.state_dict()
    differ = [k for k, v in merged.state_dict().items() if not torch.equal(v, state[k])]
    assert differ == [encoder.name]


# --- ONNX


def run_onnx(path: Path, **inputs: Tensor) -> Tensor:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {k: x.numpy() for k, x in inputs.items()})[0])


GRAPHS = {  # how `h @ W` is written: operation, inputs and output of each node
    "matmul": ["MatMul h W y"],
    "transposed": ["Transpose W t", "MatMul h t y"],
    "gemm": ["Gemm h W y"],
    "passed on": ["Identity W t", "MatMul h t y"],
    "constant": ["MatMul h W y"],
}


def graph(path: Path, weight: Tensor, nodes: str = "matmul", dtype=torch.float32) -> Path:
    """A graph of another tool."""
    helper = pytest.importorskip("onnx").helper
    kept = (weight.T if nodes == "transposed" else weight).to(dtype).contiguous()
    kind = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}[dtype]
    raw = nodes != "gemm"
    data = kept.view(torch.uint8).numpy().tobytes() if raw else kept.float().numpy().ravel()
    tensor = helper.make_tensor("W", kind, kept.shape, data, raw=raw)
    made = [helper.make_node("Constant", [], ["W"], value=tensor)] if nodes == "constant" else []
    for operation, *inputs, output in map(str.split, GRAPHS.get(nodes) or nodes.split("; ")):
        made.append(helper.make_node(operation, inputs, [output]))
    ends = [
        helper.make_tensor_value_info(name, kind, ["n", size])
        for name, size in zip("hy", weight.shape, strict=True)
    ]
    whole = helper.make_graph(
        made, "g", ends[:1], ends[1:], [] if nodes == "constant" else [tensor]
    )
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nodes", GRAPHS)
def test_patched_graph(tmp_path, nodes, dtype):
    """A copy in half precision is found by its rounded values, and rounded once more."""
    onnx = pytest.importorskip("onnx")
    size = (W, W) if nodes == "transposed" else (W, D)  # a square one, too
    weight = torch.randn(size, generator=torch.Generator().manual_seed(1)) / 8
    adapter, out = make_adapter(weight), tmp_path / "out.onnx"
    base, original = graph(tmp_path / "a.onnx", weight, nodes, dtype), tmp_path / "original"
    save_file({"text_projection": weight}, original)
    if dtype != torch.float32:
        refused("--original", adapter, base, "onnx", out)
    export(adapter, base, "onnx", out, original=original)
    held = onnx.load(out).graph
    tensor = held.initializer[0] if held.initializer else held.node[0].attribute[0].t
    assert not tensor.float_data and not tensor.int32_data
    data = torch.frombuffer(bytearray(tensor.raw_data), dtype=dtype).reshape(*tensor.dims)
    wanted = (weight.double() + adapter.left.double() @ adapter.right.double()).to(dtype)
    assert torch.equal(data, wanted.T if nodes == "transposed" else wanted)
    refused("no tensor", adapter, out, "onnx", tmp_path / "b.onnx", original=original)
    if dtype == torch.float32:
        hidden = torch.randn(5, W)
        assert apart(run_onnx(out, h=hidden), hidden @ wanted) < EXACT


def test_graphs_that_are_refused(tmp_path):
    weight, file = torch.randn(W, D), tmp_path / "a.onnx"
    adapter, out = make_adapter(weight), tmp_path / "out.onnx"
    refused("no such file", adapter, file, "onnx", out)
    for nodes, words in (
        ("MatMul h W y; Transpose W t", "MatMul, Transpose"),
        ("Add h h y", "nothing in its graph"),
    ):
        refused(words, adapter, graph(file, weight, nodes), "onnx", out)
    refused("no tensor", adapter, graph(file, torch.randn(W, D)), "onnx", out)
    onnx = pytest.importorskip("onnx")
    model = onnx.load(graph(file, weight))
    for name, words in (("W", "MatMul, MatMul"), ("copy", "more than once")):
        branch = onnx.helper.make_graph(
            [onnx.helper.make_node("MatMul", ["h", name], ["z"])], "b", [], []
        )
        if name != "W":
            branch.initializer.add().CopyFrom(model.graph.initializer[0])
            branch.initializer[0].name = name
        twice = onnx.ModelProto()
        twice.CopyFrom(model)
        branches = {"then_branch": branch, "else_branch": onnx.helper.make_graph([], "e", [], [])}
        twice.graph.node.append(onnx.helper.make_node("If", ["c"], ["z"], **branches))
        file.write_bytes(twice.SerializeToString())
        refused(words, adapter, file, "onnx", out)
    model.graph.output.add(name="W")
    file.write_bytes(model.SerializeToString())
    refused("the output", adapter, file, "onnx", out)
    file.write_text("no graph")
    refused("not a readable ONNX", adapter, file, "onnx", out)
    assert not out.exists()


# --- Which pipelines read what was changed (docs/your-clip.md)


def test_what_other_pipelines_read(tmp_path):
    """Stable Diffusion 1.x and 2.x and FLUX load CLIPTextModel, SDXL the one with projection,
    LLaVA CLIPVisionModel."""
    transformers = pytest.importorskip("transformers")
    base, encoder, adapter = base_of(tmp_path, "CLIPModel")
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["projection_dim"] = D
    (base / "config.json").write_text(json.dumps(config))
    out = export(adapter, base, "hf", tmp_path / "out")
    ids = tokens(encoder.model, encoder.tokenize, TEXTS)["input_ids"]

    def read(kind: str, given: Tensor):
        for folder in (base, out):
            model = getattr(transformers, kind).from_pretrained(folder).eval()
            with torch.no_grad():
                yield model(given, output_hidden_states=True)

    old, new = read("CLIPTextModel", ids)
    assert torch.equal(old.last_hidden_state, new.last_hidden_state)
    assert torch.equal(old.pooler_output, new.pooler_output)
    old, new = read("CLIPTextModelWithProjection", ids)
    assert torch.equal(old.hidden_states[-2], new.hidden_states[-2])
    assert apart(old.text_embeds, new.text_embeds) > 0.01
    old, new = read("CLIPVisionModel", torch.randn(2, 3, SIZE, SIZE))
    assert all(map(torch.equal, old.hidden_states, new.hidden_states))


# --- What is refused everywhere


CONFIG = {"embed_dim": D, "vision_cfg": {}, "text_cfg": {}}


def small(folder: Path, to: str, weight: Tensor, quick_gelu: bool = True) -> Path:
    """A base of a format with nothing but a projection, as far as an export looks."""
    folder.mkdir(exist_ok=True)
    if to == "onnx":
        return graph(folder / "a.onnx", weight)
    if to == "immich":
        (folder / "visual").mkdir(exist_ok=True)
        (folder / "visual/model.onnx").write_bytes(b"images")
        (folder / "textual").mkdir(exist_ok=True)
        graph(folder / "textual/model.onnx", weight)
    (folder / "modules.json").write_text('[{"path": ""}]')
    (folder / "config.json").write_text("{}")
    config = {"model_cfg": CONFIG | {"quick_gelu": quick_gelu}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file({"text_projection.weight": weight.T.contiguous()}, folder / "model.safetensors")
    state = {"text_projection": weight, "visual.conv1.weight": torch.ones(1)}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def test_bases_that_are_not_of_the_format_are_refused(tmp_path):
    weight, out = torch.randn(W, D), tmp_path / "out"
    adapter, plain = make_adapter(weight), tmp_path / "a.pt"
    torch.save({"text_projection": weight}, plain)
    refused("no torch.nn.Linear", adapter, plain, "peft", out)
    refused("not in OpenAI's layout", adapter, plain, "openai", out)
    refused("no folder of transformers", adapter, plain, "hf", out)
    gelu = small(tmp_path / "gelu", "openai", weight, quick_gelu=False)
    refused("always computes QuickGELU", adapter, gelu, "openai", out)
    refused("unknown format 'onxx'", adapter, plain, "onxx", out)
    assert not out.exists()


@pytest.mark.parametrize("to", FORMATS)
def test_wrong_changed_and_taken(tmp_path, to):
    weight, out = torch.randn(W, D), tmp_path / "out"
    adapter = make_adapter(weight)
    for name, other in (("other", torch.randn(W, D)), ("changed", adapter.apply(weight))):
        base = small(tmp_path / name, to, other)
        refused("no tensor is the text projection", adapter, base, to, out)
    assert not out.exists()
    base = small(tmp_path / "right", to, weight)
    export(adapter, base, to, out)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    kept = {x: x.read_bytes() for x in tmp_path.rglob("*") if x.is_file()}
    for taken in (out, tmp_path / "right", tmp_path / "link"):
        refused("exists; choose", adapter, base, to, taken)
    assert {x: x.read_bytes() for x in tmp_path.rglob("*") if x.is_file()} == kept
    assert not [x for x in tmp_path.rglob(".tmp*")]
    export(make_adapter(weight, seed=9), base, to, out, overwrite=True)
    files = [out] if out.is_file() else [x for x in out.rglob("*") if x.is_file()]
    assert any(x.read_bytes() != kept[x] for x in files) and set(files) <= kept.keys()
    none, words = tmp_path / "none", "no such|no folder|no model in immich's layout"
    refused(words, adapter, none, to, tmp_path / "out2")


def test_links_that_lead_out_of_the_folder_are_not_followed(tmp_path):
    """But for those of the hub's cache, which keeps files as ../../blobs/HASH."""
    weight = torch.randn(W, D)
    adapter = make_adapter(weight)
    (tmp_path / "secret").write_text("secret")
    for to in ("hf", "open_clip", "sentence-transformers", "immich"):
        base = small(tmp_path / to, to, weight)
        (base / "notes.json").symlink_to(tmp_path / "secret")
        refused("notes.json leads out of the folder", adapter, base, to, tmp_path / "out")
    blobs, snapshot = tmp_path / "hub/blobs", tmp_path / "hub/snapshots/1"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    for file in list((tmp_path / "hf").iterdir()):
        if not file.is_symlink():
            file.rename(blobs / f"hash-{file.name}")
            (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    out = export(adapter, snapshot, "hf", tmp_path / "out")
    assert (out / "config.json").read_text() == "{}" and not (out / "config.json").is_symlink()


def test_shared_and_hidden_projections():
    weight = torch.randn(W, W)
    adapter = make_adapter(weight)
    assert find({"a": torch.randn(W, W), "b": weight.T.clone()}, adapter).transposed
    assert not find({"a": weight, "b": weight + 1}, adapter).transposed
    refuses("more than once", find, {"a": weight, "b": weight.T}, adapter)
    refuses("no tensor", find, {"a": weight.long(), "b": torch.full((W, W), torch.nan)}, adapter)


def test_projection_with_its_bias(tmp_path):
    """That which stands beside it, or which an adapter that `forget` made names."""
    weight, bias = torch.randn(W, D), torch.randn(D)
    adapter, path = make_adapter(weight), tmp_path / "a.safetensors"
    save_file({"head.weight": weight.T.contiguous(), "head.bias": bias}, path)
    found, beside = read_projection(path, adapter)
    assert torch.equal(found, weight) and torch.equal(beside, bias)
    save_file({"text_projection": weight, "shift": bias}, path)
    assert read_projection(path, adapter)[1] is None
    named = ModelIdentity("text_projection", False, "shift", "0" * 64)
    assert torch.equal(read_projection(path, replace(adapter, model=named))[1], bias)
    adapter = replace(adapter, model=replace(named, bias="other"))
    refuses("has a bias, other, which is not in it", read_projection, path, adapter)
