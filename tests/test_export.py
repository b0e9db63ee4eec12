"""Every format is loaded back by its own library and gives the texts that `W + Delta` gives."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from forgetting.adapter import ModelIdentity
from forgetting.deploy.export import FORMATS, _open_clip_config, export
from forgetting.deploy.onnx import export_text_encoder
from forgetting.errors import ProblemError
from forgetting.models.checkpoint import find, read_projection, read_tensors
from tests.export_fixtures import (
    D,
    W,
    hf_embed,
    hf_folder,
    hf_linear,
    hf_model,
    make_adapter,
    open_clip_folder,
    open_clip_model,
    open_clip_projection,
    reference,
    tokens,
)

EXACT, HALF = 1e-5, 1e-3
HF = ("CLIPModel", "CLIPTextModelWithProjection", "SiglipModel")


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
    with pytest.raises(ProblemError, match=words) as caught:
        export(*args, **options)
    assert "\n" not in str(caught.value)


def open_clip_reference(model: nn.Module, adapter, ids: Tensor) -> Tensor:
    """Hidden states of an open_clip CLIP times `W + Delta`, float64."""
    weight = model.text_projection.detach().clone()
    with torch.no_grad():
        model.text_projection.copy_(torch.eye(W)[:, :D])  # the first D columns of hidden states
        first = model.encode_text(ids)
        model.text_projection.copy_(torch.eye(W)[:, -D:])
        hidden = torch.cat([first[:, : W - D], model.encode_text(ids)], dim=1)
        model.text_projection.copy_(weight)
    return hidden.double() @ (weight.double() + adapter.left.double() @ adapter.right.double())


# --- OpenAI and open_clip


@pytest.mark.parametrize("half", [False, True])
def test_openai_state_dict(tmp_path, half):
    """The projection in float32, as it was measured; everything else as it was, to the bit."""
    pytest.importorskip("open_clip")
    from open_clip.model import build_model_from_openai_state_dict

    model, base = open_clip_model(), tmp_path / "base.pt"
    held = {name: x.half() if half else x for name, x in model.state_dict().items()}
    model.load_state_dict({name: x.float() for name, x in held.items()})
    adapter = make_adapter(held["text_projection"])
    extra = {"context_length": torch.tensor(10)}
    named = {f"module.{name}": x for name, x in held.items()}
    torch.save({"state_dict": named} if half else held | extra, base)
    before = base.read_bytes()
    state = torch.load(export(adapter, base, "openai", tmp_path / "out.pt"), weights_only=True)
    loaded = build_model_from_openai_state_dict(dict(state), cast_dtype=torch.float32).eval()
    wanted = open_clip_reference(model, adapter, tokens())
    with torch.no_grad():
        assert apart(loaded.encode_text(tokens()), wanted) < HALF  # as OpenAI's code computes
        loaded.float().load_state_dict(state)
        assert apart(loaded.encode_text(tokens()), wanted) < EXACT
    assert state["text_projection"].dtype == torch.float32
    for name, value in held.items():
        assert torch.equal(state[name], value) == (name != "text_projection")
    assert base.read_bytes() == before
    assert sorted(x.name for x in tmp_path.iterdir()) == ["base.pt", "out.pt"]


def test_a_torchscript_archive_is_read_and_not_run(tmp_path):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.text_projection = nn.Parameter(torch.randn(W, D).half())
            self.visual = nn.Sequential(nn.Conv2d(3, 8, 2), nn.BatchNorm2d(8))
            self.visual.add_module("conv1", nn.Conv2d(3, 8, 2))
            self.mask = torch.ones(3, 3)  # no weight

        def forward(self, x):
            return (self.visual(x) * self.mask.sum()) @ self.text_projection.float()

    tower = Encoder()
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(tower).save(str(tmp_path / "archive.pt"))
    held = read_tensors(tmp_path / "archive.pt")
    assert held.keys() == tower.state_dict().keys()
    assert all(torch.equal(held[name], x) for name, x in tower.state_dict().items())
    adapter = make_adapter(tower.text_projection.detach())
    out = export(adapter, tmp_path / "archive.pt", "openai", tmp_path / "out.pt")
    assert torch.load(out, weights_only=True).keys() == held.keys()


@pytest.mark.parametrize("bias", [False, True])
def test_open_clip_checkpoint(tmp_path, bias):
    open_clip = pytest.importorskip("open_clip")
    model = open_clip_model(bias=bias)
    base = open_clip_folder(tmp_path / "base", model, bias=bias)
    adapter = make_adapter(open_clip_projection(model, bias))
    out = export(adapter, base, "open_clip", tmp_path / "out")
    assert sorted(x.name for x in out.iterdir()) == [
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "tokenizer.json",
    ]  # and not the unchanged weights of another tool
    loaded, transform = open_clip.create_model_from_pretrained(f"local-dir:{out}")
    loaded.eval()
    assert loaded.visual.preprocess_cfg["mean"] == (0.5, 0.5, 0.5) or transform
    ids = tokens()
    if bias:
        linear = model.text.text_projection
        wanted = reference(linear, lambda: model.encode_text(ids), adapter)
    else:
        wanted = open_clip_reference(model, adapter, ids)
    with torch.no_grad():
        assert apart(loaded.encode_text(ids), wanted) < EXACT
        assert apart(model.encode_text(ids), wanted) > 0.01  # the change is no small one
        image = torch.randn(2, 3, 16, 16)
        assert torch.equal(loaded.encode_image(image), model.encode_image(image))


def test_open_clip_of_a_file_takes_a_config(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    model = open_clip_model()
    base = open_clip_folder(tmp_path / "base", model)
    adapter = make_adapter(open_clip_projection(model))
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    plain = tmp_path / "plain.pt"
    refused("name the architecture", adapter, plain, "open_clip", tmp_path / "out")
    refused("knows no", adapter, plain, "open_clip", tmp_path / "out", config="ViT-Z-1")
    refused("embed_dim 512", adapter, plain, "open_clip", tmp_path / "out", config="ViT-B-32")
    (tmp_path / "no.json").write_text("[]")
    no = str(tmp_path / "no.json")
    refused(r"no\.json: is no config", adapter, plain, "open_clip", tmp_path / "out", config=no)
    config = str(base / "open_clip_config.json")
    for to in ("hf", "peft", "openai"):
        refused(
            "for a checkpoint of open_clip", adapter, plain, to, tmp_path / "out", config=config
        )
    refused("for a checkpoint", adapter, tmp_path / "a.onnx", "onnx", tmp_path / "o", config=config)
    export(adapter, plain, "open_clip", tmp_path / "out", config=config)
    loaded = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    with torch.no_grad():
        given = loaded.encode_text(tokens())
    assert apart(given, open_clip_reference(model, adapter, tokens())) < EXACT


# --- transformers and peft


@pytest.mark.parametrize("kind", HF)
def test_hugging_face_folder(tmp_path, kind):
    pytest.importorskip("transformers")
    model = hf_model(kind)
    base = hf_folder(tmp_path / "base", model)
    before = {x.name: x.read_bytes() for x in base.iterdir()}
    linear = hf_linear(model)
    adapter = make_adapter(linear.weight.detach().T)
    out = export(adapter, base, "hf", tmp_path / "out")
    loaded = type(model).from_pretrained(out).eval()
    wanted = reference(linear, lambda: hf_embed(model, tokens()), adapter)
    assert apart(hf_embed(loaded, tokens()), wanted) < EXACT
    assert apart(hf_embed(model, tokens()), wanted) > 0.01
    old, new = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    assert len(changed) == 1 and old.keys() == new.keys()
    assert {x.name for x in out.iterdir()} == before.keys() - {"tf_model.h5"}
    for name in ("config.json", "tokenizer.json", "merges.txt"):
        assert (out / name).read_bytes() == before[name]
    assert {x.name: x.read_bytes() for x in base.iterdir()} == before


def test_hugging_face_in_half_precision(tmp_path):
    pytest.importorskip("transformers")
    model = hf_model()
    base = hf_folder(tmp_path / "half", hf_model().half())
    held = load_file(base / "model.safetensors")["text_projection.weight"]
    adapter = make_adapter(held.T)
    out = export(adapter, base, "hf", tmp_path / "out")
    loaded = type(model).from_pretrained(out, dtype=torch.float32).eval()
    original = type(model).from_pretrained(base, dtype=torch.float32).eval()
    linear = hf_linear(original)
    wanted = reference(linear, lambda: hf_embed(original, tokens()), adapter)
    assert EXACT < apart(hf_embed(loaded, tokens()), wanted) < HALF
    # An adapter made from the float32 original, and its float16 copy.
    adapter = make_adapter(hf_linear(model).weight.detach().T)
    refused("another one.*--original", adapter, base, "hf", tmp_path / "out2")
    full = hf_folder(tmp_path / "full", model)
    export(adapter, base, "hf", tmp_path / "out2", original=full)
    loaded = type(model).from_pretrained(tmp_path / "out2", dtype=torch.float32).eval()
    wanted = reference(hf_linear(model), lambda: hf_embed(model, tokens()), adapter)
    assert apart(hf_embed(loaded, tokens()), wanted) < HALF
    refused("changed already", adapter, tmp_path / "out2", "hf", tmp_path / "o3", original=full)


@pytest.mark.parametrize("form", ["shards", "bin"])
def test_hugging_face_weights_in_other_files(tmp_path, form):
    pytest.importorskip("transformers")
    model = hf_model()
    size = "60KB" if form == "shards" else "1GB"
    base = hf_folder(tmp_path / "base", model, max_shard_size=size)
    if form == "bin":
        torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
    else:
        assert len(list(base.glob("model-*"))) > 2
    adapter = make_adapter(hf_linear(model).weight.detach().T)
    out = export(adapter, base, "hf", tmp_path / "out")
    loaded = type(model).from_pretrained(out).eval()
    wanted = reference(hf_linear(model), lambda: hf_embed(model, tokens()), adapter)
    assert apart(hf_embed(loaded, tokens()), wanted) < EXACT
    assert not list(out.glob("*.bin*"))
    assert len(list(out.glob("*.index.json"))) == (form == "shards")


@pytest.mark.parametrize("kind", HF)
def test_peft_adapter(tmp_path, kind):
    peft = pytest.importorskip("peft")
    pytest.importorskip("transformers")
    model = hf_model(kind)
    base = hf_folder(tmp_path / "base", model)
    adapter = make_adapter(hf_linear(model).weight.detach().T)
    out = export(adapter, base, "peft", tmp_path / "out")
    assert sorted(x.name for x in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    wrapped = peft.PeftModel.from_pretrained(type(model).from_pretrained(base).eval(), out)
    wanted = reference(hf_linear(model), lambda: hf_embed(model, tokens()), adapter)
    assert apart(hf_embed(wrapped.base_model.model, tokens()), wanted) < EXACT
    merged = wrapped.merge_and_unload()
    assert apart(hf_embed(merged, tokens()), wanted) < EXACT
    state = model.state_dict()
    differ = [k for k, v in merged.state_dict().items() if not torch.equal(v, state[k])]
    assert len(differ) == 1 and state[differ[0]].shape == hf_linear(model).weight.shape


# --- ONNX


def run_onnx(path: Path, **inputs: Tensor) -> Tensor:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = {x.name for x in session.get_inputs()}
    fed = {name: x.numpy() for name, x in inputs.items() if name in names}
    return torch.from_numpy(session.run(None, fed)[0])


@pytest.mark.parametrize("kind", HF)
def test_onnx_tower_of_transformers(tmp_path, kind):
    pytest.importorskip("transformers")
    pytest.importorskip("onnxscript")
    model = hf_model(kind)
    base = hf_folder(tmp_path / "base", model)
    adapter = make_adapter(hf_linear(model).weight.detach().T)
    out = export(adapter, base, "onnx", tmp_path / "text.onnx")
    for count in (1, 6):  # any number of texts
        ids = tokens(count, seed=count)
        wanted = reference(hf_linear(model), lambda ids=ids: hf_embed(model, ids), adapter)
        given = run_onnx(out, input_ids=ids, attention_mask=torch.ones_like(ids))
        assert apart(given, wanted) < EXACT
    assert sorted(x.name for x in tmp_path.iterdir()) == ["base", "text.onnx"]


@pytest.mark.parametrize("bias", [False, True])
def test_onnx_tower_of_open_clip_and_a_patch_of_it(tmp_path, bias):
    pytest.importorskip("open_clip")
    pytest.importorskip("onnxscript")
    model = open_clip_model(bias=bias)
    base = open_clip_folder(tmp_path / "base", model, bias=bias)
    adapter = make_adapter(open_clip_projection(model, bias))
    out = export(adapter, base, "onnx", tmp_path / "text.onnx")
    ids = tokens()
    if bias:
        linear = model.text.text_projection
        wanted = reference(linear, lambda: model.encode_text(ids), adapter)
    else:
        wanted = open_clip_reference(model, adapter, ids)
    assert apart(run_onnx(out, input_ids=ids), wanted) < EXACT
    # Two ways to one model: the unchanged tower in ONNX, patched.
    export_text_encoder(model, tmp_path / "unchanged.onnx")
    export(adapter, tmp_path / "unchanged.onnx", "onnx", tmp_path / "patched.onnx")
    assert apart(run_onnx(tmp_path / "patched.onnx", input_ids=ids), wanted) < EXACT
    refused("already|no tensor", adapter, out, "onnx", tmp_path / "twice.onnx")


GRAPHS = {  # how `h @ W` is written: W as it is kept, and the nodes that follow
    "matmul": (False, [("MatMul", ["h", "W"], {})]),
    "transpose": (True, [("Transpose", ["W"], {"perm": [1, 0]}), ("MatMul", ["h", "0"], {})]),
    "gemm": (False, [("Gemm", ["h", "W"], {})]),
    "gemm transposed": (True, [("Gemm", ["h", "W"], {"transB": 1})]),
    "used twice": (False, [("MatMul", ["h", "W"], {}), ("Transpose", ["W"], {})]),
    "constant": (False, [("Constant", [], {}), ("MatMul", ["h", "W"], {})]),
}


def graph(path: Path, weight: Tensor, form: str, dtype: torch.dtype = torch.float32) -> Path:
    """A graph of another tool, whose weight is called anything."""
    onnx = pytest.importorskip("onnx")
    kinds = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}
    transposed, nodes = GRAPHS[form]
    kept = (weight.T if transposed else weight).to(dtype).contiguous()
    tensor = onnx.TensorProto(name="onnx::MatMul_1", dims=kept.shape)
    tensor.data_type = kind = getattr(onnx.TensorProto, kinds[dtype])
    if form == "gemm":  # not as raw bytes
        tensor = onnx.helper.make_tensor(tensor.name, kind, kept.shape, kept.numpy().ravel())
    else:
        tensor.raw_data = kept.view(torch.uint8).numpy().tobytes()
    made = []
    for i, (what, given, more) in enumerate(nodes):
        out = "y" if "h" in given else tensor.name if what == "Constant" else str(i)
        more = {"value": tensor} if what == "Constant" else more
        names = [tensor.name if name == "W" else name for name in given]
        made.append(onnx.helper.make_node(what, names, [out], **more))
    info = onnx.helper.make_tensor_value_info
    ends = info("h", kind, ["n", len(weight)]), info("y", kind, ["n", weight.shape[1]])
    initial = [] if form == "constant" else [tensor]
    whole = onnx.helper.make_graph(made, "tower", [ends[0]], [ends[1]], initial)
    model = onnx.helper.make_model(whole, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 9
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", [form for form in GRAPHS if form != "used twice"])
def test_patched_graph(tmp_path, form, dtype):
    """A copy in half precision is found by its rounded values, and rounded once more."""
    onnx = pytest.importorskip("onnx")
    if (form, dtype) == ("gemm", torch.bfloat16):
        pytest.skip("numpy knows no bfloat16")
    size = (W, W) if "transpose" in form else (W, D)  # a square one, too
    weight = torch.randn(size, generator=torch.Generator().manual_seed(1)) / 8
    adapter, out, original = make_adapter(weight), tmp_path / "out.onnx", None
    base = graph(tmp_path / "a.onnx", weight, form, dtype)
    if dtype != torch.float32:
        refused("--original", adapter, base, "onnx", out)
        original = tmp_path / "original.safetensors"
        save_file({"text_projection": weight}, original)
    export(adapter, base, "onnx", out, original=original)
    held = onnx.load(out).graph
    tensor = held.initializer[0] if held.initializer else held.node[0].attribute[0].t
    data = torch.frombuffer(bytearray(tensor.raw_data), dtype=dtype).reshape(*tensor.dims)
    wanted = (weight.double() + adapter.left.double() @ adapter.right.double()).to(dtype)
    assert torch.equal(data, wanted.T if GRAPHS[form][0] else wanted)
    refused("no tensor", adapter, out, "onnx", tmp_path / "b.onnx", original=original)
    if dtype == torch.float32:
        hidden = torch.randn(5, size[0])
        assert apart(run_onnx(out, h=hidden), hidden @ wanted) < EXACT


def test_graphs_that_are_refused(tmp_path):
    weight = torch.randn(W, D)
    adapter, out = make_adapter(weight), tmp_path / "out.onnx"
    other = graph(tmp_path / "other.onnx", torch.randn(W, D), "matmul")
    refused("no tensor", adapter, other, "onnx", out)
    used = graph(tmp_path / "used.onnx", weight, "used twice")
    refused("MatMul, Transpose", adapter, used, "onnx", out)
    (tmp_path / "text.onnx").write_text("no graph")
    refused("not a readable ONNX", adapter, tmp_path / "text.onnx", "onnx", out)
    refused("no such file", adapter, tmp_path / "none.onnx", "onnx", out)
    assert not out.exists()


def test_a_graph_within_a_graph(tmp_path):
    onnx = pytest.importorskip("onnx")
    weight, other = torch.randn(W, D), torch.randn(W, D)
    info, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node

    def build(name: str, *weights: Tensor) -> Path:
        branches = []
        for held in weights:
            model = onnx.load(graph(tmp_path / "part.onnx", held, "constant"))
            del model.graph.input[:]
            branches.append(model.graph)
        both = node("If", ["long"], ["e"], then_branch=branches[0], else_branch=branches[1])
        inputs = [info("h", 1, ["n", W]), info("long", onnx.TensorProto.BOOL, [])]
        whole = onnx.helper.make_graph([both], "g", inputs, [info("e", 1, ["n", D])])
        model = onnx.helper.make_model(whole, opset_imports=[onnx.helper.make_opsetid("", 17)])
        model.ir_version = 9
        (tmp_path / name).write_bytes(model.SerializeToString())
        return tmp_path / name

    adapter, out, hidden = make_adapter(weight), tmp_path / "out.onnx", torch.randn(3, W)
    export(adapter, build("a.onnx", weight, other), "onnx", out)
    for long, used in ((True, adapter.apply(weight)), (False, other)):
        assert apart(run_onnx(out, h=hidden, long=torch.tensor(long)), hidden @ used) < EXACT
    both = build("b.onnx", weight, weight)  # of the same name, in two places
    refused("more than once", adapter, both, "onnx", tmp_path / "out2.onnx")


def test_a_graph_that_other_tools_made(tmp_path):
    """onnxruntime's optimiser and its converter to float16, on an unchanged tower."""
    runtime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("transformers")
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model, ids = hf_model(), tokens()
    adapter = make_adapter(hf_linear(model).weight.detach().T)
    wanted = reference(hf_linear(model), lambda: hf_embed(model, ids), adapter)
    export_text_encoder(model, tmp_path / "plain.onnx")
    options = runtime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    runtime.InferenceSession(tmp_path / "plain.onnx", options, ["CPUExecutionProvider"])
    half = convert_float_to_float16(onnx.load(tmp_path / "plain.onnx"), keep_io_types=True)
    onnx.save(half, tmp_path / "half.onnx")
    base = hf_folder(tmp_path / "base", model)
    for name, original, limit in (("optimised", None, EXACT), ("half", base, HALF)):
        file, out = tmp_path / f"{name}.onnx", tmp_path / f"{name}_out.onnx"
        export(adapter, file, "onnx", out, original=original)
        given = run_onnx(out, input_ids=ids, attention_mask=torch.ones_like(ids))
        assert apart(given, wanted) < limit, name
        unchanged = run_onnx(file, input_ids=ids, attention_mask=torch.ones_like(ids))
        assert apart(unchanged, wanted) > 0.01


# --- Which pipelines read what was changed (docs/deploy.md)


def test_what_other_pipelines_read(tmp_path):
    """Stable Diffusion 1.x and 2.x and FLUX load CLIPTextModel, SDXL the one with projection,
    LLaVA CLIPVisionModel."""
    transformers = pytest.importorskip("transformers")
    model = hf_model()
    base = hf_folder(tmp_path / "base", model)
    adapter = make_adapter(hf_linear(model).weight.detach().T)
    out = export(adapter, base, "hf", tmp_path / "out")
    ids, images = tokens(), torch.randn(2, 3, 16, 16)

    def read(kind: str, given: Tensor):
        with torch.no_grad():
            return [
                getattr(transformers, kind)
                .from_pretrained(folder)
                .eval()(given, output_hidden_states=True)
                for folder in (base, out)
            ]

    old, new = read("CLIPTextModel", ids)
    assert torch.equal(old.last_hidden_state, new.last_hidden_state)
    assert torch.equal(old.pooler_output, new.pooler_output)
    old, new = read("CLIPTextModelWithProjection", ids)
    assert torch.equal(old.hidden_states[-2], new.hidden_states[-2])
    assert apart(old.text_embeds, new.text_embeds) > 0.01
    old, new = read("CLIPVisionModel", images)
    assert all(map(torch.equal, old.hidden_states, new.hidden_states))


# --- What is refused everywhere


def small(folder: Path, to: str, weight: Tensor) -> Path:
    """A base of a format with nothing but a projection, as far as an export looks."""
    folder.mkdir(exist_ok=True)
    if to == "onnx":
        return graph(folder / "a.onnx", weight, "matmul")
    (folder / "config.json").write_text("{}")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"embed_dim": D, "quick_gelu": True}})
    )
    save_file({"text_projection.weight": weight.T.contiguous()}, folder / "model.safetensors")
    save_file(
        {"text_projection": weight, "visual.conv1.weight": torch.ones(1)},
        folder / "open_clip_model.safetensors",
    )
    return folder


def test_bases_that_are_not_of_the_format_are_refused(tmp_path):
    weight = torch.randn(W, D)
    adapter, out, base = make_adapter(weight), tmp_path / "out", small(tmp_path / "b", "hf", weight)
    torch.save({"text_projection": weight}, tmp_path / "a.pt")
    refused("no torch.nn.Linear", adapter, tmp_path / "a.pt", "peft", out)
    refused("not in OpenAI's layout", adapter, tmp_path / "a.pt", "openai", out)
    gelu = {"model_cfg": {"embed_dim": D, "quick_gelu": False}}
    (base / "open_clip_config.json").write_text(json.dumps(gelu))
    refused("always computes QuickGELU", adapter, base, "openai", out)
    (base / "model.safetensors").rename(tmp_path / "outside.safetensors")
    for part in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), ["x"], None):
        index = {"weight_map": {"text_projection.weight": part}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
        refused("index.json", adapter, base, "hf", out)
    assert not out.exists()


@pytest.mark.parametrize("to", FORMATS)
def test_wrong_changed_and_taken(tmp_path, to):
    weight = torch.randn(W, D)
    adapter = make_adapter(weight)
    out = tmp_path / "out"
    base = small(tmp_path / "right", to, weight)
    # Another model's projection, and one that is changed already.
    for name, other in (("other", torch.randn(W, D)), ("changed", adapter.apply(weight))):
        refused(
            "no tensor is the text projection",
            adapter,
            small(tmp_path / name, to, other),
            to,
            out,
        )
    assert not out.exists()
    export(adapter, base, to, out)
    kept = {x: x.read_bytes() for x in tmp_path.rglob("*") if x.is_file()}
    refused("exists and is not overwritten", adapter, base, to, out)
    (tmp_path / "empty").mkdir()
    refused("exists", adapter, base, to, tmp_path / "empty")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused("exists", adapter, base, to, tmp_path / "link")
    assert {x: x.read_bytes() for x in tmp_path.rglob("*") if x.is_file()} == kept
    assert not [x for x in tmp_path.rglob(".tmp*")]
    again = make_adapter(weight, seed=9)
    export(again, base, to, out, overwrite=True)
    files = [out] if out.is_file() else list(out.iterdir())
    assert any(x.read_bytes() != kept[x] for x in files) and set(files) <= kept.keys()
    refused("no such|no folder", adapter, tmp_path / "none", to, tmp_path / "out2")


def test_links_that_lead_out_of_the_folder_are_not_followed(tmp_path):
    """But for those of the hub's cache, which keeps files as ../../blobs/HASH."""
    weight = torch.randn(W, D)
    adapter = make_adapter(weight)
    (tmp_path / "secret").write_text("secret")
    for to in ("hf", "open_clip"):
        base = small(tmp_path / to, to, weight)
        (base / "notes.json").symlink_to(tmp_path / "secret")
        refused("notes.json is a link", adapter, base, to, tmp_path / "out")
    blobs, snapshot = tmp_path / "hub/blobs", tmp_path / "hub/snapshots/1"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    for file in list((tmp_path / "hf").iterdir()):
        if not file.is_symlink():
            file.rename(blobs / f"hash-{file.name}")
            (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    out = export(adapter, snapshot, "hf", tmp_path / "out")
    assert (out / "config.json").read_text() == "{}" and not (out / "config.json").is_symlink()


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["CLIPTokenizer"]},
        {"architectures": ["AutoModel"], "auto_map": {"AutoModel": "evil.Evil"}},
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}},
        {"text_config": {"hidden_size": -1}},
        {"text_config": None, "quantization_config": {"quant_method": "x"}},
    ],
)
def test_odd_configs_are_one_line_and_run_no_code(tmp_path, config, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("onnx")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # to run what it finds
    model = hf_model()
    base = hf_folder(tmp_path / "base", model)
    (base / "evil.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Evil: pass\n")
    held = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(held | config))
    adapter = make_adapter(hf_linear(model).weight.detach().T)
    if "architectures" in config:  # no model of transformers: it is what its model_type says
        assert export(adapter, base, "onnx", tmp_path / "out.onnx").is_file()
    else:
        refused("base cannot be loaded", adapter, base, "onnx", tmp_path / "out.onnx")
        assert not (tmp_path / "out.onnx").exists()
    assert not (tmp_path / "sprung").exists()


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    weight = torch.randn(W, D)
    base = small(tmp_path / "base", "hf", weight)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("forgetting.deploy.export._save", full)
    refused("cannot write.*No space", make_adapter(weight), base, "hf", tmp_path / "out")
    assert [x.name for x in tmp_path.iterdir()] == ["base"]


def test_a_named_config_brings_the_preprocessing_of_its_weights():
    pytest.importorskip("open_clip")
    found = _open_clip_config("ViT-B-16-SigLIP", Path("nowhere"))
    assert found["model_cfg"]["embed_dim"] == 768
    assert found["preprocess_cfg"]["mean"] == (0.5, 0.5, 0.5) == found["preprocess_cfg"]["std"]
    assert found["preprocess_cfg"]["resize_mode"] == "squash"
    with pytest.raises(ProblemError, match=r"differ in how images are prepared.*ViT-L-14/TAG"):
        _open_clip_config("ViT-L-14", Path("nowhere"))
    one = _open_clip_config("ViT-L-14/laion2b_s32b_b82k", Path("nowhere"))
    assert one["preprocess_cfg"]["mean"] == (0.5, 0.5, 0.5)
    with pytest.raises(ProblemError, match="knows no configuration 'ViT-L-14/x'"):
        _open_clip_config("ViT-L-14/x", Path("nowhere"))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnx", None)
    (tmp_path / "a.onnx").write_bytes(b"")
    adapter = make_adapter(torch.randn(W, D))
    refused(r"clip-forgetting\[onnx\]", adapter, tmp_path / "a.onnx", "onnx", tmp_path / "b.onnx")


def test_shared_and_hidden_projections():
    weight = torch.randn(W, W)
    adapter = make_adapter(weight)
    assert find({"a": torch.randn(W, W), "b": weight.T.clone()}, adapter).transposed
    assert not find({"a": weight, "b": weight + 1}, adapter).transposed
    with pytest.raises(ProblemError, match="more than once"):
        find({"a": weight, "b": weight.T}, adapter)
    with pytest.raises(ProblemError, match="no tensor"):
        find({"a": weight.long(), "b": torch.full((W, W), torch.nan)}, adapter)


def test_projection_with_its_bias(tmp_path):
    weight, bias = torch.randn(W, D), torch.randn(D)
    adapter = make_adapter(weight)
    save_file({"head.weight": weight.T.contiguous(), "head.bias": bias}, tmp_path / "a.safetensors")
    found, beside = read_projection(tmp_path / "a.safetensors", adapter)
    assert torch.equal(found, weight) and torch.equal(beside, bias)
    save_file({"text_projection": weight, "bias": bias}, tmp_path / "b.safetensors")
    assert read_projection(tmp_path / "b.safetensors", adapter)[1] is None
    # An adapter that `forget` made says what it is called.
    named = replace(adapter, model=ModelIdentity("text_projection", False, "bias", "0" * 64))
    assert torch.equal(read_projection(tmp_path / "b.safetensors", named)[1], bias)
    named = replace(adapter, model=ModelIdentity("text_projection", False, "shift", "0" * 64))
    with pytest.raises(ProblemError, match="has a bias, shift, which is not in it"):
        read_projection(tmp_path / "b.safetensors", named)


def test_the_transposed_weight_is_recognised():
    weight = torch.randn(W, D)
    adapter = make_adapter(weight)
    with pytest.raises(ProblemError, match=r"transposed \(48, 64\).*weight\.T"):
        adapter.apply(weight.T)
    square = torch.randn(W, W)
    with pytest.raises(ProblemError, match="transposed"):
        make_adapter(square).apply(square.T)
    with pytest.raises(ProblemError, match="another text projection"):
        make_adapter(square).apply(torch.randn(W, W))
