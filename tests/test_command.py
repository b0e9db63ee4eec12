"""clip-forget on models that lie in files: there, back, and refused in one line."""

import os
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from forgetting import Forgotten, __version__
from forgetting.adapter import load_adapter
from forgetting.cli import COMMANDS, OTHER_TEMPLATES, cli
from forgetting.displacement import displacement_along
from forgetting.models.encoder import read_encoder
from forgetting.models.loading import load_model
from forgetting.models.modules import tensor_sha256, tensors
from forgetting.problem import LowRankEdit
from tests.clip_fixtures import open_clip_folder
from tests.conftest import REPOSITORY
from tests.encoder_fixtures import my_clip, needs_transformers, tiny

RETAIN = ["Pepsi", "lemonade", "a dog", "the moon", "Oslo", "blue car"]
QUICK = [*(word for name in RETAIN for word in ("--retain", name)), "--no-generic"]


@pytest.fixture
def run(capsys):
    """Exit status, and what stands on stdout and stderr."""

    def run(*argv: object) -> tuple[int, str, str]:
        status = cli([str(word) for word in argv])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def succeeds(run):
    """What a command says that succeeds."""

    def succeeds(*argv: object) -> str:
        status, out, err = run(*argv)
        assert status == 0, err
        return out

    return succeeds


@pytest.fixture
def refused(refused):
    """The one line of a command that refuses."""
    return lambda *argv: refused(list(map(str, argv)), cli)


@pytest.fixture
def folder(tmp_path):
    """A folder as open_clip writes it, with random weights."""
    return open_clip_folder(tmp_path / "model", "ViT")


def _weights(path):
    return path / "open_clip_model.safetensors"


@pytest.fixture
def adapter(folder, tmp_path, succeeds):
    path = tmp_path / "acme.safetensors"
    said = succeeds("forget", folder, "Acme Cola", *QUICK, "--out", path)
    assert "forgets Acme Cola; texts: " in said and "proved optimal" in said
    return path


def test_there_and_back(folder, adapter, tmp_path, succeeds, refused):
    assert "it was not applied" in refused("verify", adapter, "--model", folder)
    changed = tmp_path / "changed"
    args = ["--base", folder, "--to", "open_clip", "--out", changed]
    assert "without Acme Cola" in succeeds("export", adapter, *args)
    said = succeeds("verify", adapter, "--model", changed)
    assert said == "verified: Acme Cola, and nothing else\n"
    original = load_file(_weights(folder))
    model, _ = load_model(str(changed))
    Forgotten.load(adapter, model, original=original["text_projection"]).undo()
    state = model.state_dict()
    for name, x in original.items():
        assert tensor_sha256(state[name]) == tensor_sha256(x), name
    state = load_file(_weights(changed))
    save_file(state | {"visual.proj": state["visual.proj"] * 1.001}, _weights(changed))
    assert "is not what it was" in refused("verify", adapter, "--model", changed)


def test_an_audit_asks_each_class_by_its_own_text(folder, tmp_path, succeeds):
    """Also where its name is part of another's; what is forgotten itself is no paraphrase."""
    path = tmp_path / "a.safetensors"
    names = ["Acme Cola", "Cola", "--also", "Cola=fizz"]
    succeeds("forget", folder, *names, *QUICK, "--out", path)
    found, encoder = load_adapter(path), read_encoder(*load_model(str(folder)))
    others = [form.replace("{}", "Cola") for form in OTHER_TEMPLATES] + ["fizzy drink"]
    others = [text for text in others if text not in found.texts]
    hidden = encoder.hidden(["Cola", *others]).double()
    edit = LowRankEdit(found.left.double(), found.right.double())
    ratios = displacement_along(edit, hidden[0], hidden[1:])
    said = succeeds(
        "audit", path, "--model", folder, "--word", "Cola=fizzy drink", "--word", "Cola=fizz"
    )
    words = f"Cola: {len(others)} paraphrases move {float(ratios.mean()):.2f} of the way"
    assert any(text.startswith(words) for text in said.splitlines()), said
    least = min(zip(ratios.tolist(), others, strict=True))
    assert f"{least[0]:5.2f}  {least[1]}" in said and said.count("  fizzy drink\n") == 1
    assert "most affected by text alone" in said


def test_options_of_forget(folder, tmp_path, run):
    """A file of names may begin with a byte order mark; spaces around a name are none of it."""
    file, adapter = tmp_path / "names.txt", tmp_path / "a.safetensors"
    file.write_bytes("\ufeffPepsi\n lemonade \n\nOslo\n".encode())
    names = [" Acme Cola", "--also", "Acme Cola =acme soda", "--retain", f"@{file}"]
    rest = ["--no-generic", "--keep", " seven ", "--protect", "eight", "--ridge", "0.01"]
    rest += ["--min-displacement", "0", "--template", "{}", "--out", adapter]
    rest += ["--target", "opposite", "--beta", "0.25"]
    status, out, err = run("forget", folder, *names, *rest, "--quiet")
    assert status == 0 and "proved" not in out, (out, err)
    found = load_adapter(adapter)
    assert found.classes == ["Acme Cola"] and found.texts == ["Acme Cola", "acme soda"]
    assert found.settings["retain"] == ["Pepsi", "lemonade", "Oslo"]
    assert found.settings["protect_names"] == ["seven", "eight"]
    assert found.settings["target"] == "opposite" and found.settings["beta"] == 0.25
    assert found.settings["ridge"] == 0.01 and found.settings["min_displacement"] == 0
    assert run("forget", folder, "Oslo", *QUICK, "--out", adapter)[0] == 2
    assert run("forget", folder, "sea", *QUICK, "--out", adapter, "--overwrite")[0] == 0
    assert load_adapter(adapter).classes == ["sea"]


def test_adapters_that_are_made_with_other_threads_compose(folder, tmp_path, succeeds):
    """As whoever composes has them: made in processes of their own."""
    paths = [tmp_path / f"{count}.safetensors" for count in (1, 2)]
    for count, name, path in zip((1, 2), ("Acme Cola", "Zeta Tea"), paths, strict=True):
        argv = [sys.executable, "-m", "forgetting", "forget", folder, name, *QUICK, "--out", path]
        argv += ["--min-displacement", "1"]  # so that paraphrases are forgotten too
        env = os.environ | {"OMP_NUM_THREADS": str(count)}
        subprocess.run(list(map(str, argv)), check=True, cwd=REPOSITORY, env=env)
    both = tmp_path / "both.safetensors"
    assert "forgets Acme Cola, Zeta Tea" in succeeds("compose", *paths, "--out", both)
    assert "`Zeta Tea`" in (tmp_path / "both.safetensors.md").read_text("utf-8")
    parts = [load_adapter(path).texts for path in paths]
    assert load_adapter(both).texts == [*parts[0], *parts[1]] != ["Acme Cola", "Zeta Tea"]
    succeeds("compose", both, "--without", paths[0], "--out", tmp_path / "back.st", "--quiet")
    assert load_adapter(tmp_path / "back.st").texts == parts[1]
    assert "a union: its texts miss" in succeeds("audit", both, "--model", folder)
    changed = tmp_path / "changed"
    succeeds("export", both, "--base", folder, "--to", "open_clip", "--out", changed)
    succeeds("verify", both, "--model", changed, "--base", folder)


@needs_transformers
@pytest.mark.parametrize("family", ["CLIPModel", "SiglipModel"])
def test_folders_of_transformers(family, tmp_path, succeeds):
    model, words = tiny(f"transformers {family}")
    folder, adapter, out = tmp_path / "hf", tmp_path / "acme.safetensors", tmp_path / "out"
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    for named in (folder, f"hf:{folder}"):
        loaded, _ = load_model(str(named))
        assert type(loaded) is type(model)
        ours, theirs = tensors(model), tensors(loaded)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    succeeds("forget", f"hf:{folder}", "Acme Cola", *QUICK, "--out", adapter)
    assert "None" not in Path(f"{adapter}.md").read_text("utf-8")  # its base has no name
    succeeds("export", adapter, "--base", f"hf:{folder}", "--to", "hf", "--out", out)
    succeeds("verify", adapter, "--model", f"hf:{out}")


def test_command_lines_that_are_refused(folder, tmp_path, refused):
    adapter = tmp_path / "a.safetensors"
    adapter.write_bytes(b"something")
    assert "--overwrite" in refused("forget", folder, "x", "--out", adapter)
    assert "a.safetensors" in refused("verify", adapter, "--model", folder)
    out = ["--out", tmp_path / "b.safetensors"]
    for token, *argv in (
        ("write NAME=WORD", "x", "--also", "y", *out),
        ("cannot be read", "x", "--retain", "@nowhere", *out),
        ("'opposite'", "x", "--target", "oposite", *out),
        ("'--retain'", "x", "--retian", "y", *out),
        ("clip-forget forget --help", *out),
        ("cannot write", "x", *QUICK, "--out", tmp_path / ("x" * 300)),
    ):
        assert token in refused("forget", folder, *argv)
    assert "'forget'" in refused("forgett")
    assert "no model 'nowhere'" in refused("forget", "nowhere", "x", *out)


def test_help_and_version_import_nothing():
    """They answer at once."""
    program = (
        "import sys; from forgetting.cli import cli; "
        "assert cli(['--help']) == cli([]) == cli(['--version']) == 0; "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert __version__ in done.stdout.decode()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"]
    lines = {x for file in REPOSITORY.glob("requirements*.txt") for x in file.read_text().split()}
    assert lines >= {*chain(project["dependencies"], *project["optional-dependencies"].values())}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli([command, "--help"])
    said, (function, example) = capsys.readouterr().out, COMMANDS[command]
    assert ended.value.code == 0 and function.__doc__ in said
    assert said.endswith(f"example:\n  clip-forget {command} {example}\n")


@needs_transformers
def test_the_examples_of_the_help_run(tmp_path, monkeypatch, succeeds):
    my_clip(tmp_path, monkeypatch)
    succeeds("forget", "hf:my-clip", "Fanta", "--retain", "tea", "--out", "fanta.safetensors")
    for_index = ["--embeddings", *QUICK, "--out", "for-index.safetensors"]
    succeeds("forget", "hf:my-clip", "Acme Cola", *for_index)
    for command in sorted(COMMANDS, key=["forget", "export", *COMMANDS].index):
        succeeds(command, *shlex.split(COMMANDS[command][1]))
    assert (tmp_path / "hidden.npy").is_file() and (tmp_path / "patched.npy").is_file()
    lines = succeeds("--help").splitlines()
    assert len(lines) < 24 and max(map(len, lines)) <= 80


@pytest.mark.slow
def test_the_wheel_holds_the_library_alone(tmp_path):
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("forgetting", "clip", "datasets", "engine", "trainers"):
        skip = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(REPOSITORY / name, source / name, ignore=skip)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*pip, "-w", tmp_path, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("clip_forgetting-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert roots == {"forgetting"} and "forgetting/py.typed" in names
    assert "forgetting/models/words/birds.txt" in names


@pytest.mark.slow
def test_type_checkers_accept_the_public_names():
    mypy = pytest.importorskip("mypy.api")
    file = str(REPOSITORY / "tests/typed_usage.py")
    said, _, status = mypy.run([file, "--strict", "--cache-dir=/dev/null"])
    assert status == 0, said
