"""clip-forget on models that lie in files: there, back, and refused in one line."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from forgetting import load_adapter, save_adapter
from forgetting.cli import OTHER_TEMPLATES, cli
from forgetting.displacement import displacement_along
from forgetting.models.encoder import read_encoder
from forgetting.models.loading import load_model
from forgetting.models.modules import tensor_sha256, tensors
from forgetting.problem import LowRankEdit
from tests.encoder_fixtures import IMAGE, LENGTH, OUT, needs_transformers, tiny

RETAIN = ["Pepsi", "lemonade", "a dog", "the moon", "Oslo", "blue car"]
QUICK = [*(word for name in RETAIN for word in ("--retain", name)), "--no-generic"]


@pytest.fixture
def run(capsys):
    """Exit status, and what stands on stdout and stderr."""

    def run(*argv: object) -> tuple[int, str, str]:
        status = cli([str(word) for word in argv])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def refused(run):
    def refused(*argv: object) -> str:
        status, _, err = run(*argv)
        lines = [text for text in err.splitlines() if text.startswith("error:")]
        assert status == 2 and len(lines) == 1 and "Traceback" not in err, err
        return lines[0]

    return refused


TEXT = {"context_length": LENGTH, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 2}
CONFIG = {"model_cfg": {"embed_dim": OUT, "vision_cfg": IMAGE, "text_cfg": TEXT}}


@pytest.fixture
def folder(tmp_path):
    """A folder as open_clip writes it, with random weights."""
    import open_clip

    path = tmp_path / "model"
    path.mkdir()
    (path / "open_clip_config.json").write_text(json.dumps(CONFIG | {"preprocess_cfg": {}}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.model.CLIP(OUT, dict(IMAGE), dict(TEXT))
        for x in (model.token_embedding.weight, model.positional_embedding):
            torch.nn.init.normal_(x, std=0.5)
    save_file({k: x.contiguous() for k, x in model.state_dict().items()}, _weights(path))
    return path


def _weights(path):
    return path / "open_clip_model.safetensors"


def test_there_and_back(folder, tmp_path, run):
    adapter = tmp_path / "acme.safetensors"
    also = ["--also", "Acme Cola=acme soda"]
    status, out, err = run("forget", folder, "Acme Cola", *also, *QUICK, "--out", adapter)
    assert status == 0, err
    assert "forgets Acme Cola by" in out and "proved optimal" in out
    assert load_adapter(adapter).solver["texts"][:2] == ["Acme Cola", "acme soda"]
    status, out, err = run("audit", adapter, "--model", folder, "--word", "fizzy drink")
    assert status == 0 and "of the way on average" in out and "names like own" in out, err

    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "open_clip_config.json").write_bytes((folder / "open_clip_config.json").read_bytes())
    state = load_file(_weights(folder))
    found = load_adapter(adapter)
    save_file(state | {"text_projection": found.apply(state["text_projection"])}, _weights(changed))
    status, out, err = run("verify", adapter, "--model", changed)
    assert status == 0 and out == "verified: Acme Cola, and nothing else\n", err

    back = tmp_path / "back.safetensors"
    args = ["undo", adapter, "--model", changed, "--base", folder, "--out", back]
    status, out, err = run(*args)
    assert status == 0, err
    restored = load_file(back)
    for name, x in state.items():
        assert tensor_sha256(restored[name]) == tensor_sha256(x), name


def test_verify_refuses_a_model_with_another_change(folder, tmp_path, refused, run):
    adapter = tmp_path / "acme.safetensors"
    assert run("forget", folder, "Acme Cola", *QUICK, "--out", adapter)[0] == 0
    assert "is the original: nothing was applied" in refused("verify", adapter, "--model", folder)
    state = load_file(_weights(folder))
    state["text_projection"] = load_adapter(adapter).apply(state["text_projection"])
    state["visual.proj"] = state["visual.proj"] * 1.001
    save_file(state, _weights(folder))
    assert "visual.proj: not what it was" in refused("verify", adapter, "--model", folder)


def test_an_audit_asks_each_class_by_its_own_text(folder, tmp_path, run):
    """Also where its name is part of another's; what the model reads as the same text is none."""
    adapter = tmp_path / "a.safetensors"
    assert run("forget", folder, "Acme Cola", "Cola", *QUICK, "--out", adapter)[0] == 0
    found, tower = load_adapter(adapter), read_encoder(*load_model(str(folder)))
    others = [form.replace("{}", "Cola") for form in OTHER_TEMPLATES]
    others = [text for text in others if text not in found.texts]
    hidden = tower.hidden(["Cola", *others]).double()  # "COLA" and "cola" are the same tokens
    edit = LowRankEdit(found.left.double(), found.right.double())
    shares = displacement_along(edit, hidden[0], hidden[1:])
    status, out, err = run("audit", adapter, "--model", folder)
    said = f"Cola: {len(others)} other wordings go {float(shares.mean()):.2f} of the way"
    assert status == 0 and said in out.splitlines()[6], (said, out, err)


def test_adapters_of_the_driver_are_audited_and_undone(folder, tmp_path, run, refused):
    """Their settings name the model by a hash."""
    adapter, back = tmp_path / "a.safetensors", tmp_path / "back.safetensors"
    assert run("forget", folder, "Acme Cola", *QUICK, "--out", adapter)[0] == 0
    found = replace(load_adapter(adapter), settings={"model": "0" * 64})
    save_adapter(found, adapter)
    assert run("audit", adapter, "--model", folder)[0] == 0
    changed = tmp_path / "changed"
    args = ["--base", folder, "--to", "open_clip", "--out", changed]
    assert run("export", adapter, *args)[0] == 0
    line = refused("verify", adapter, "--model", changed, "--base", folder)
    assert "does not say what the rest of its model is" in line
    status, _, err = run("undo", adapter, "--model", changed, "--base", folder, "--out", back)
    assert status == 0, err
    assert torch.equal(*(load_file(x)["text_projection"] for x in (back, _weights(folder))))


def test_an_export_in_half_precision_is_verified_and_undone(folder, tmp_path, run):
    """Computed with in float32, it keeps its precision in files."""
    adapter, changed = tmp_path / "a.safetensors", tmp_path / "changed"
    halves = {name: x.half() for name, x in load_file(_weights(folder)).items()}
    save_file(halves, _weights(folder))
    assert run("forget", folder, "Acme Cola", *QUICK, "--out", adapter)[0] == 0
    args = ["--base", folder, "--to", "open_clip", "--out", changed]
    assert run("export", adapter, *args)[0] == 0
    assert load_file(_weights(changed))["text_projection"].dtype == torch.float16
    for more in ([], ["--base", folder]):
        status, _, err = run("verify", adapter, "--model", changed, *more)
        assert status == 0, err
    back = tmp_path / "back.safetensors"
    status, _, err = run("undo", adapter, "--model", changed, "--base", folder, "--out", back)
    assert status == 0, err
    assert torch.equal(load_file(back)["text_projection"], halves["text_projection"].float())


def test_names_of_a_file_and_a_quiet_command(folder, tmp_path, run):
    """A file may begin with a byte order mark; spaces around a name are none of it."""
    file, adapter = tmp_path / "names.txt", tmp_path / "a.safetensors"
    file.write_bytes("\ufeffPepsi\n lemonade \n\nOslo\n".encode())
    names = [" Acme Cola", "--also", "Acme Cola =acme soda", "--retain", f"@{file}"]
    rest = ["--no-generic", "--keep", " seven ", "--out", adapter]
    status, out, err = run("--quiet", "forget", folder, *names, *rest)
    assert status == 0 and "proved" not in out, (out, err)
    found = load_adapter(adapter)
    assert found.classes == ["Acme Cola"] and found.texts[:2] == ["Acme Cola", "acme soda"]
    assert found.settings["retain"] == ["Pepsi", "lemonade", "Oslo"]
    assert found.settings["protect_names"] == ["seven"]
    assert run("audit", adapter, "--model", folder, "--quiet")[0] == 0


def test_composed_adapters_are_verified_with_the_original(folder, tmp_path, run):
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for name, path in zip(("Acme Cola", "Zeta Tea"), paths, strict=True):
        also = ["--also", f"{name}=the other {name}"]
        assert run("forget", folder, name, *also, *QUICK, "--out", path)[0] == 0
    both = tmp_path / "both.safetensors"
    status, out, err = run("compose", *paths, "--out", both)
    assert status == 0 and "forgets Acme Cola, Zeta Tea" in out and "texts" not in out, err
    parts = [load_adapter(path).texts for path in paths]
    assert load_adapter(both).texts == [*parts[0], *parts[1]] != ["Acme Cola", "Zeta Tea"]
    args = ["--without", paths[0], "--out", tmp_path / "back.safetensors", "--quiet"]
    assert run("compose", both, *args)[0] == 0
    assert load_adapter(tmp_path / "back.safetensors").texts == parts[1]
    status, out, err = run("audit", both, "--model", folder)
    assert status == 0 and "no forecast: a union" in out, err


def test_exports_and_patches_are_reached(folder, tmp_path, run, refused):
    adapter = tmp_path / "acme.safetensors"
    assert run("forget", folder, "Acme Cola", *QUICK, "--out", adapter)[0] == 0
    out = tmp_path / "exported"
    status, said, err = run("export", adapter, "--base", folder, "--to", "open_clip", "--out", out)
    assert status == 0 and "without Acme Cola" in said, err
    status, said, err = run("verify", adapter, "--model", out)
    assert status == 0, err
    cached = tmp_path / "cached.safetensors"
    save_file({"texts": torch.eye(OUT)}, cached)
    args = ["--base", folder, "--out", tmp_path / "p.safetensors"]
    assert "no full row rank" in refused("patch", adapter, cached, *args)


@needs_transformers
@pytest.mark.parametrize("family", ["CLIPModel", "SiglipModel"])
def test_folders_of_transformers(family, tmp_path, run):
    model, words = tiny(f"transformers {family}")
    folder, adapter = tmp_path / "hf", tmp_path / "acme.safetensors"
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    for named in (folder, f"hf:{folder}"):
        loaded, _ = load_model(str(named))
        assert type(loaded) is type(model)
        ours, theirs = tensors(model), tensors(loaded)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    status, out, err = run("forget", f"hf:{folder}", "Acme Cola", *QUICK, "--out", adapter)
    assert status == 0 and "forgets Acme Cola" in out, err
    found = load_adapter(adapter)
    weight = dict(model.named_parameters())[found.settings["model"]["projection"]]
    with torch.no_grad():
        weight.copy_(found.apply(weight.T).T)
    model.save_pretrained(folder)
    status, out, err = run("verify", adapter, "--model", folder)
    assert status == 0, err


MODELS = {
    "nowhere": ("nowhere", "no model 'nowhere'; a model is hf:DIR_OR_ID"),
    "empty": ("hf:", "hf: names nothing"),
    "folder": ("{tmp}", "holds neither config.json"),
    "hf folder": ("hf:{tmp}", "holds neither config.json"),
    "hf absent": ("hf:./nowhere", "no such folder"),
    "openai": ("openai:{tmp}/w.pt", "none of the files that OpenAI published"),
    "openai absent": ("openai:{tmp}/v.pt", "no such file"),
    "plain file": ("{tmp}/w.pt", "does not say its activation"),
    "name": ("open_clip:ViT-B-33/x", "unknown open_clip model 'ViT-B-33'"),
    "no weights": ("open_clip:ViT-B-32", "has no weights"),
    "tag": ("open_clip:ViT-B-32/laion9b", "pretrained tag"),
}


@pytest.mark.parametrize("row", MODELS)
def test_models_that_are_refused(row, tmp_path, refused):
    pytest.importorskip("open_clip")
    if row.startswith("hf") and row != "hf folder":
        pytest.importorskip("transformers")
    (tmp_path / "w.pt").write_bytes(b"weights")
    name, message = MODELS[row]
    given = name.replace("{tmp}", str(tmp_path))
    line = refused("forget", given, "cat", "--out", tmp_path / "a.safetensors")
    assert re.search(re.escape(message), line), line
    assert not (tmp_path / "a.safetensors").exists()


def test_command_lines_that_are_refused(folder, tmp_path, refused):
    adapter = tmp_path / "a.safetensors"
    adapter.write_bytes(b"something")
    assert "exists and is not overwritten" in refused("forget", folder, "x", "--out", adapter)
    assert "not a readable" in refused("verify", adapter, "--model", folder)
    out = ["--out", tmp_path / "b.safetensors"]
    assert "write NAME=WORD" in refused("forget", folder, "x", "--also", "y", *out)
    assert "cannot be read" in refused("forget", folder, "x", "--retain", "@nowhere", *out)
    assert "did you mean 'opposite'" in refused("forget", folder, "x", "--target", "oposite", *out)
    assert "unknown option '--targett'" in refused("forget", folder, "x", "--targett", "y", *out)
    assert "invalid choice" in refused("forgett")
    assert "required" in refused()
