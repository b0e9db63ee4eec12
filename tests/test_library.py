"""One call on anybody's model: every family that is here, and what is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import replace

import pytest
import torch
from torch import nn

from forgetting import (
    Adapter,
    Forgotten,
    compose,
    forget,
    load_adapter,
    projection_sha256,
    save_adapter,
)
from forgetting.adapter import read_parts
from forgetting.context import MAX_ADDED, ExactSettings
from forgetting.errors import ProblemError
from forgetting.models.encoder import read_encoder
from forgetting.models.modules import tensor_sha256, tensors
from forgetting.models.vocabulary import generic_hidden
from tests.conftest import REPOSITORY
from tests.encoder_fixtures import (
    ALL,
    FAMILIES,
    OUT,
    WIDTH,
    OwnEncoder,
    needs_transformers,
    tiny,
    tokenize,
)

NAME = "text_projection"
LIBRARY = sys.modules["forgetting.api"]
RETAIN = ["Pepsi", "lemonade", "a dog", "the moon", "Oslo", "blue car", "seven", "tree"]
ALSO = {"Acme Cola": ["acme soda", "AcmeCola"]}
PLAIN = {"retain": RETAIN, "generic": False, "progress": False, "cache": None}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in tensors(model).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of what differs, bit by bit."""
    assert a.keys() == b.keys()
    return [name for name in a if tensor_sha256(a[name]) != tensor_sha256(b[name])]


@pytest.mark.parametrize("family", ALL)
def test_a_round_trip_of_every_family(family, tmp_path):
    model, words = tiny(family)
    before, tower = state(model), read_encoder(model, words)
    texts = ["Acme Cola", "acme soda", "Pepsi"]
    was = tower.embeddings(texts).double()
    answer = forget(model, words, ["Acme Cola"], ALSO, target="opposite", beta=0.1, **PLAIN)
    assert not same(before, state(model))  # reading changes nothing
    assert answer.certificate.gap < 1e-6 and answer.texts[:3] == [*ALSO, *ALSO["Acme Cola"]]
    assert set(answer.forecast.unlisted) == {"own"} and answer.forecast.affected
    answer.apply()
    answer.apply()  # once is enough
    assert same(before, state(model)) == [tower.name]
    now = tower.embeddings(texts).double()
    if tower.normalised:
        assert torch.allclose(now[:2], -was[:2], atol=1e-3)
    else:
        assert torch.allclose(now[:2], -0.1 * was[:2], atol=1e-3 * float(was.norm(dim=1).max()))
    assert not torch.allclose(was[:2], now[:2], atol=1e-2)
    assert answer.verify() and answer.verify(model)
    file = tmp_path / "acme.safetensors"
    answer.save(file)
    answer.undo()
    assert not same(before, state(model))
    again = Forgotten.load(file, model)
    again.apply()
    assert again.verify(model) and torch.equal(tower.embeddings(texts).double(), now)
    again.undo()
    assert not same(before, state(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["open_clip ViT", "own with bias"])
def test_other_precisions(family, dtype):
    model, words = tiny(family)
    model = model.to(dtype)
    before, tower = state(model), read_encoder(model, words)
    was = tower.embeddings(["Acme Cola"])
    answer = forget(model, words, ["Acme Cola"], target="opposite", **PLAIN)
    answer.apply()
    assert same(before, state(model)) == [tower.name] and tower.dtype == dtype
    left = float(tower.embeddings(["Acme Cola"]).norm() / was.norm())
    assert left < {torch.float16: 0.02, torch.bfloat16: 0.15, torch.float64: 1e-5}[dtype]
    assert answer.verify()
    answer.undo()
    assert not same(before, state(model))


@pytest.mark.parametrize("target", ["specific", "orthogonal", "empty", "text:a dog", "vector"])
@pytest.mark.parametrize("family", ["own", "own with bias"])
def test_targets(family, target):
    model, words = tiny(family)
    tower = read_encoder(model, words)
    was, dog = tower.embeddings(["Acme Cola"])[0], tower.embeddings(["a dog"])[0]
    vector = torch.randn(OUT, generator=torch.Generator().manual_seed(0))
    goal = vector if target == "vector" else target
    answer = forget(model, words, ["Acme Cola"], target=goal, **PLAIN)
    answer.apply()
    now = tower.embeddings(["Acme Cola"])[0]
    if target == "vector":
        assert torch.allclose(now, vector, atol=1e-4)
    elif target == "text:a dog":
        assert torch.allclose(now, dog / dog.norm(), atol=1e-4)
    elif target == "specific":
        assert float(torch.cosine_similarity(was, now, dim=0)) < 0.9
        assert answer.adapter.solver["beta"] >= 0
    else:
        assert float(now.norm()) == pytest.approx(1, abs=1e-3)


def test_a_bias_counts():
    """`P = 0` is reached with the bias, which stays; without it the text would end at b."""
    model, words = tiny("own with bias")
    shift = model.shift.detach().clone()
    forget(model, words, ["Acme Cola"], target="opposite", **PLAIN).apply()
    assert float(read_encoder(model, words).embeddings(["Acme Cola"]).norm()) < 1e-3
    assert torch.equal(shift, model.shift) and float(shift.norm()) > 1


@pytest.mark.parametrize("change", ["other", "projection", "nothing", "new"])
def test_verify_sees_what_was_tampered_with(change):
    model, words = tiny("open_clip CustomTextCLIP")
    answer = forget(model, words, ["Acme Cola"], **PLAIN)
    answer.apply()
    assert answer.verify(model)
    with torch.no_grad():
        if change == "other":
            bias = model.visual.ln_post.bias
            bias.view(torch.int32)[0] ^= 1  # one bit of the image tower
            message = "visual.ln_post.bias: not what it was"
        elif change == "projection":
            model.text.text_projection.view(torch.int32)[0, 0] ^= 1
            message = "text.text_projection is neither"
        elif change == "nothing":
            answer.undo()
            message = "is the original: nothing was applied"
        else:
            model.register_buffer("more", torch.zeros(1))
            message = "has other tensors"
    with pytest.raises(ProblemError, match=message):
        answer.verify(model)


def test_what_an_adapter_says_of_its_model_is_checked(tmp_path):
    model, words = tiny("own with bias")
    answer = forget(model, words, ["Acme Cola"], **PLAIN)
    known = answer.adapter.settings["model"]
    for wrong in ({"hashes": 3}, known | {"projection": None}, known | {"transposed": "no"}):
        settings = answer.adapter.settings | {"model": wrong}
        save_adapter(replace(answer.adapter, settings=settings), tmp_path / "a", overwrite=True)
        with pytest.raises(ProblemError, match=r"^model.* must be"):
            Forgotten.load(tmp_path / "a", model)
    answer.save(tmp_path / "b")
    flat = torch.nn.Module()
    flat.register_parameter(known["projection"], torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(ProblemError, match="does not hold the projection"):
        Forgotten.load(tmp_path / "b", flat)


def test_an_adapter_is_refused_by_another_model(tmp_path):
    model, words = tiny("own")
    answer = forget(model, words, ["Acme Cola"], **PLAIN)
    answer.save(tmp_path / "a.safetensors")
    other, _ = tiny("own", seed=1)
    with pytest.raises(ProblemError, match="neither the projection"):
        Forgotten.load(tmp_path / "a.safetensors", other)
    with pytest.raises(ProblemError, match="does not hold the projection"):
        Forgotten.load(tmp_path / "a.safetensors", nn.Linear(3, 3))
    alone = Forgotten.load(tmp_path / "a.safetensors")
    assert alone.texts == answer.texts and alone.certificate == answer.certificate
    assert alone.forecast == answer.forecast
    with pytest.raises(ProblemError, match="no model to apply"):
        alone.apply()
    answer.apply()
    changed = Forgotten.load(tmp_path / "a.safetensors", model)
    assert changed.verify()
    with pytest.raises(ProblemError, match="original projection is not known"):
        changed.undo()
    given = Forgotten.load(tmp_path / "a.safetensors", model, original=answer.original)
    given.undo()
    assert torch.equal(model.last, answer.original)


def test_two_answers_compose(tmp_path):
    model, words = tiny("open_clip ViT")
    paths = []
    for name in ("Acme Cola", "Zeta Tea"):
        paths.append(tmp_path / f"{name}.safetensors")
        forget(model, words, [name], min_margin=0.0, min_displacement=0.0, **PLAIN).save(paths[-1])
    both = forget(
        model, words, ["Acme Cola", "Zeta Tea"], min_margin=0.0, min_displacement=0.0, **PLAIN
    )
    out = tmp_path / "both.safetensors"
    assert compose.cli([*map(str, paths), "--out", str(out)]) == 0
    joined = load_adapter(out).delta()
    assert torch.allclose(
        joined, both.adapter.delta(), atol=1e-5 * float(joined.abs().max()) + 1e-6
    )
    both.save(tmp_path / "at once.safetensors")
    argv = [str(tmp_path / "at once.safetensors"), "--without", str(paths[1])]
    assert compose.cli([*argv, "--out", str(tmp_path / "given back.safetensors")]) == 0
    given_back = Forgotten.load(tmp_path / "given back.safetensors", model)
    given_back.apply()
    assert given_back.verify()
    given_back.undo()
    union = Forgotten.load(out, model)
    assert union.certificate is None and union.forecast is None
    union.apply()
    assert union.verify()
    union.undo()


def test_cached_embeddings_are_patched():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OwnEncoder()
        model.last = nn.Parameter(torch.randn(WIDTH, WIDTH) / 5)
    tower = read_encoder(model.eval(), tokenize)
    texts = ["Acme Cola", *RETAIN]
    cached = nn.functional.normalize(tower.embeddings(texts), dim=1)
    answer = forget(model, tokenize, ["Acme Cola"], target="opposite", beta=0.3, **PLAIN)
    patched = answer.patch(cached)
    answer.apply()
    now = nn.functional.normalize(tower.embeddings(texts), dim=1)
    assert torch.allclose(patched, now, atol=1e-4)
    assert not torch.allclose(cached, now, atol=1e-2)


def test_a_bias_is_found_again_when_embeddings_are_patched(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OwnEncoder(bias=True).eval()
        model.last = nn.Parameter(torch.randn(WIDTH, WIDTH) / 5)
        model.shift = nn.Parameter(torch.randn(WIDTH))
    tower, file = read_encoder(model, tokenize), tmp_path / "a.safetensors"
    cached = tower.embeddings(["Acme Cola", *RETAIN])
    forget(model, tokenize, ["Acme Cola"], target="opposite", **PLAIN).save(file)
    loaded = Forgotten.load(file, model)
    patched = loaded.patch(cached, normalised=False)
    loaded.apply()
    now = tower.embeddings(["Acme Cola", *RETAIN])
    assert torch.allclose(patched, now, atol=1e-3)
    alone = Forgotten.load(file, original=loaded.original)
    with pytest.raises(ProblemError, match="has a bias"):
        alone.patch(cached, normalised=False)


def test_training_mode_comes_back():
    model, words = tiny("own")
    model.train()
    model.layer.eval()
    read_encoder(model, words)
    assert model.training and not model.layer.training


class Odd(OwnEncoder):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        if how == "tied":
            self.again = self.last
        if how == "shared":
            self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        if how == "table":
            self.table = nn.Embedding(300, OUT)
            self.layer = nn.Linear(OUT, WIDTH)
        if how == "view":
            self.register_buffer("part", self.last.detach()[:2])

    def forward(self, tokens):
        if self.how == "table":
            return torch.tanh(self.layer(self.table(tokens).sum(dim=1)))[:, :OUT]
        if self.how == "computed":
            return self.layer(self.table(tokens).sum(dim=1)) @ (self.last * 1.5)
        found = super().forward(tokens)
        if self.how == "nonlinear":
            return torch.tanh(found)
        if self.how == "shared":
            hidden = self.first(self.first(self.table(tokens).sum(dim=1)))
            return hidden
        if self.how == "tokens":
            return found[:, None].expand(-1, 3, -1)
        return found


REFUSED = {
    "nonlinear": "no single last linear map",
    "tied": "tied weights: the projection last is again",
    "view": "tied weights: the projection last is part",
    "shared": "used more than once",
    "tokens": "gives no text features",
    "computed": "no single last linear map",
    "table": "no single last linear map",
}


@pytest.mark.parametrize("how", REFUSED)
def test_models_that_are_refused(how):
    with pytest.raises(ProblemError, match=REFUSED[how]) as refused:
        read_encoder(Odd(how).eval(), tokenize)
    assert "\n" not in str(refused.value)


def test_quantised_scripted_and_absent_weights_are_refused():
    model = OwnEncoder().eval()
    model.layer.weight.requires_grad_(False)
    with pytest.raises(ProblemError, match="TorchScript"):
        read_encoder(torch.jit.trace(model, tokenize(["a"])), tokenize)
    with pytest.raises(ProblemError, match="meta"):
        read_encoder(OwnEncoder().to("meta"), tokenize)
    model.register_buffer("packed_weight", torch.zeros(3, dtype=torch.int8))
    with pytest.raises(ProblemError, match="quantised"):
        read_encoder(model, tokenize)
    with pytest.raises(ProblemError, match="must be a torch module"):
        read_encoder("ViT-B/32", tokenize)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (lambda texts: [[1, 2], [3]] * (len(texts) // 2), "different lengths"),
        (lambda texts: torch.zeros(1, 3), "of shape"),
        (lambda texts: 1 / 0, "the tokenizer fails"),
        (lambda texts: torch.full((len(texts), 4), 10**6), "cannot read what the tokenizer"),
    ],
)
def test_tokenizers_that_are_refused(words, message):
    with pytest.raises(ProblemError, match=message):
        read_encoder(OwnEncoder().eval(), words)


@pytest.mark.parametrize(
    "family", ["own", pytest.param("transformers CLIPModel", marks=needs_transformers)]
)
def test_of_long_texts_it_is_said_that_they_are_cut(family):
    """24 tokens, of which two are the start and the end; one that just fits is no long one."""
    model, words = tiny(family)
    fits, long = "a" * 22, "a" * 23
    assert read_encoder(model, words).truncated(["", "dog", "!?", fits, long, f"{long}!?", "x" * 300]) == [
        long, f"{long}!?", "x" * 300
    ]  # fmt: skip
    notes = forget(model, words, ["Acme Cola", fits], templates=["{}"], **PLAIN).notes
    assert not any("beginning" in note for note in notes)
    (note,) = (n for n in forget(model, words, [long], **PLAIN).notes if "beginning" in n)
    assert f"the beginning of '{long}' and of 1 more" in note and "\n" not in note


ARGUMENTS = {
    "text for names": ({"names": "Acme"}, "names must be a list of texts"),
    "no name": ({"names": []}, "names is empty"),
    "empty name": ({"names": [" "]}, "not empty"),
    "template": ({"templates": ["a photo"]}, "templates"),
    "also": ({"also": {"Acme Coal": ["x"]}}, "did you mean 'Acme Cola'"),
    "two of one": ({"names": ["Acme Cola", "ACME COLA"]}, "stands for both"),
    "one name, two spellings": ({"names": ["sea_horse", "Sea  Horse"]}, "stands for both"),
    "protect": ({"protect": ["acme_cola"]}, "to be protected"),
    "same name": (
        {"names": ["cat", " cat "], "also": {"cat ": [" cat"]}, "protect": ["cat"]},
        "protected",
    ),
    "target": ({"target": "oposite"}, "did you mean 'opposite'"),
    "no text": ({"target": "text: "}, "unknown target"),
    "list as target": ({"target": [1.0]}, "no target"),
    "complex": ({"target": torch.zeros(OUT, dtype=torch.complex64)}, "target"),
    "vector": ({"target": torch.zeros(3)}, "target"),
    "beta": ({"beta": -2.0}, "beta"),
    "beta of none": ({"target": "empty", "beta": 0.1}, "beta"),
    "no setting": ({"betta": 0.1}, "did you mean 'beta'"),
    "huge weight": ({"own": 1e30}, "own"),
    "tiny ridge": ({"ridge": 1e-30}, "ridge"),
    "negative ridge": ({"ridge": -1.0}, "ridge"),
    "displacement": ({"max_displacement": 0.0}, "max_displacement"),
    "settings": ({"settings": {"beta": 0.1}}, "settings must be ExactSettings"),
    "nothing": ({"retain": None, "generic": False}, "nothing to retain"),
    "no weight": ({"settings": ExactSettings(own=0.0)}, "nothing to retain"),
    "cache": ({"cache": 3}, "cache"),
    "progress": ({"progress": 1}, "progress"),
    "generic": ({"generic": 0}, "generic"),
}


@pytest.mark.parametrize("row", ARGUMENTS)
def test_arguments_that_are_refused(row):
    given, message = ARGUMENTS[row]
    model, words = tiny("own")
    with pytest.raises(ProblemError, match=message):
        forget(model, words, **({"names": ["Acme Cola"]} | PLAIN | given))


def test_the_generic_vocabulary_is_encoded_once(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "forgetting.models.vocabulary.generic", lambda: {"a": [f"w{i}" for i in range(40)]}
    )
    model, words = tiny("open_clip ViT")
    tower = read_encoder(model, words)
    names, rows = generic_hidden(tower, tmp_path, progress=False)
    assert len(names) == len(rows) == 40 and len(list(tmp_path.iterdir())) == 1
    read = []
    count = type(tower).hidden

    def counted(self, texts, *args, **kwargs):
        read.extend(texts)
        return count(self, texts, *args, **kwargs)

    monkeypatch.setattr(type(tower), "hidden", counted)
    _, again = generic_hidden(tower, tmp_path)
    assert torch.equal(rows, again) and len(read) <= 8
    answer = forget(model, words, ["Acme Cola"], cache=tmp_path, progress=False)
    answer.apply()  # the projection is no part of what a hidden state depends on
    generic_hidden(read_encoder(model, words), tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert set(answer.forecast.unlisted) == {"generic"}
    with torch.no_grad():  # another text tower, or tokenizer: another file
        model.positional_embedding[0] += 1
    generic_hidden(read_encoder(model, words), tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 2
    generic_hidden(read_encoder(model, lambda t: words([x.upper() for x in t])), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    (file, *_) = tmp_path.iterdir()
    file.write_bytes(b"damaged")
    generic_hidden(read_encoder(model, words), tmp_path)  # is made anew


@needs_transformers
@pytest.mark.parametrize("how", ["bare", "tensors", "lists"])
def test_tokenizers_of_transformers(how):
    model, bare = tiny("transformers CLIPModel")
    cut = {"padding": True, "truncation": True, "max_length": 24}
    ways = {
        "bare": bare,
        "tensors": lambda t: bare(t, **cut, return_tensors="pt"),
        "lists": lambda t: bare(t, **cut),
    }
    texts = ["Acme Cola", "a dog"]
    with torch.no_grad():
        given = model.get_text_features(**bare(texts, padding=True, return_tensors="pt"))
    given = getattr(given, "pooler_output", given)
    assert torch.allclose(read_encoder(model, ways[how]).embeddings(texts), given, atol=1e-5)


@needs_transformers
def test_siglip_is_filled_up():
    model, bare = tiny("transformers SiglipModel")
    full = bare(["a dog"], padding="max_length", max_length=24, return_tensors="pt")
    with torch.no_grad():
        given = model.get_text_features(input_ids=full["input_ids"])
    given = getattr(given, "pooler_output", given)
    assert torch.allclose(read_encoder(model, bare).embeddings(["a dog"]), given, atol=1e-5)


def test_the_families_are_told_apart():
    fingerprints = {read_encoder(*tiny(family)).fingerprint for family in FAMILIES}
    assert len(fingerprints) >= len(FAMILIES) - 1  # RN and ViT may share a text tower


def _wheel(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("forgetting", "clip", "datasets", "engine", "trainers"):
        skip = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(REPOSITORY / name, source / name, ignore=skip)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*pip, "-w", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_the_wheel_holds_the_library_alone(tmp_path):
    pytest.importorskip("setuptools")
    wheel = _wheel(tmp_path)
    assert wheel.name.startswith("clip_forgetting-")
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert roots == {"forgetting"} and "forgetting/py.typed" in names
    assert "forgetting/models/words/birds.txt" in names
    venv.create(tmp_path / "bare", with_pip=True)
    python = tmp_path / "bare/bin/python"
    install = [str(python), "-m", "pip", "install", "-q", str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no package index: {done.stderr.splitlines()[-1]}")
    program = (
        "import torch, forgetting, sys, importlib.util as u\n"
        "from forgetting import Forgotten, forget\n"
        "from forgetting.models.vocabulary import generic_names\n"
        "assert len(generic_names()) > 5000\n"
        "assert not [n for n in ('clip', 'datasets', 'utils', 'yaml') if u.find_spec(n)]\n"
        "class M(torch.nn.Module):\n"
        "    def __init__(s):\n"
        "        super().__init__()\n"
        "        s.t = torch.nn.Embedding(256, 8); s.p = torch.nn.Linear(8, 8)\n"
        "    def forward(s, x): return s.p(torch.tanh(s.t(x).sum(1)))\n"
        "def tok(t): return torch.tensor([[*x.encode()[:9]] + [0] * (9 - len(x.encode()[:9]))"
        " for x in t])\n"
        "m = M(); a = forget(m, tok, ['cat'], cache='cache'); a.apply(); a.verify()\n"
        "a.save('a.safetensors'); Forgotten.load('a.safetensors', m).verify(); a.undo()\n"
    )
    run = subprocess.run([str(python), "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    command = tmp_path / "bare/bin/clip-forget"
    run = subprocess.run([str(command), "--help"], capture_output=True, text=True)
    assert run.returncode == 0 and "verify" in run.stdout


def test_changes_do_not_add_up(tmp_path):
    """A second name is not forgotten on top of the first; undone, the model is as it was."""
    model, words = tiny("open_clip ViT")
    first = forget(model, words, ["Acme Cola"], **PLAIN)
    first.apply()
    on_top = forget(model, words, ["Zeta Tea"], **PLAIN)
    first.undo()
    with pytest.raises(ProblemError, match="neither the projection"):
        on_top.apply()
    second = forget(model, words, ["Zeta Tea"], **PLAIN)
    assert second.names == ["Zeta Tea"] and len(repr(second)) < 1000
    path = tmp_path / "acme.safetensors"
    first.save(path)
    first.save(path)
    with pytest.raises(ProblemError):
        second.save(path)
    assert Forgotten.load(path).names == ["Acme Cola"]


def test_each_class_goes_as_far_as_it_needs():
    """One beta for a request would send a class elsewhere than where it goes alone."""
    model, words = tiny("own")
    names = ["Acme Cola", "Zeta Tea", "Oslo boat"]

    def parts(names, margin):
        answer = forget(model, words, names, min_margin=margin, min_displacement=0.0, **PLAIN)
        return read_parts(answer.adapter, "a"), answer.adapter.solver["beta"]

    (plain, none), (further, beta) = parts(names, 0.0), parts(names, 2.0)
    moved = [
        not torch.allclose(a.tensors["displacement"], b.tensors["displacement"])
        for a, b in zip(plain, further, strict=True)
    ]
    assert none == 0 and beta == 0.4 and moved == [True, True, False]


def test_three_wordings_of_a_class_may_join(monkeypatch):
    """Also where another class needs none."""

    monkeypatch.setattr(
        "forgetting.context.ForgetContext._ratios",
        lambda context, answer, index: [float(index)] * 9,
    )
    model, words = tiny("own")
    forms = ["{}", *(f"{{}} {i}" for i in range(9))]
    answer = forget(model, words, ["Acme Cola", "Zeta Tea"], templates=forms, **PLAIN)
    assert len(answer.texts) == 2 + MAX_ADDED and not [t for t in answer.texts[2:] if "Zeta" in t]


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_an_opposite_goes_further_where_something_is_left_of_it(beta):
    model, words = tiny("own")
    wanted = {"target": "opposite", "beta": beta, "min_margin": 1000.0, "templates": ["{}"]}
    answer = forget(model, words, ["Acme Cola"], **wanted, **PLAIN)
    assert answer.adapter.solver["beta"] == (0.4 if beta else 0.0)
    assert (answer.forecast.margin is None) == (not beta)


def test_names_to_keep_are_something_to_retain():
    model, words = tiny("own")
    alone = PLAIN | {"retain": None}
    answer = forget(model, words, ["Acme Cola"], protect=["dog", "cat"], **alone)
    assert set(answer.forecast.unlisted) == {"protect"}


def test_a_change_that_changes_nothing_leaves_the_model_free():
    model, words = tiny("own")
    answer = forget(model, words, ["Acme Cola"], **PLAIN)
    none = replace(answer, adapter=replace(answer.adapter, left=answer.adapter.left * 0))
    none.apply()
    assert forget(model, words, ["Zeta Tea"], **PLAIN).names == ["Zeta Tea"]


def test_a_projection_that_was_replaced_is_found_by_its_name():
    model, words = tiny("own")
    answer = forget(model, words, ["Acme Cola"], target="opposite", **PLAIN)
    model.load_state_dict(state(model), assign=True)
    answer.apply()
    assert answer.verify() and not torch.equal(model.last, answer.original)
    model.load_state_dict(state(model), assign=True)
    answer.undo()
    assert torch.equal(model.last, answer.original)
    model.last = None
    with pytest.raises(ProblemError, match="no such projection any more"):
        answer.apply()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_change_that_a_file_in_half_precision_rounds_is_that_change(half, tmp_path):
    """Such a checkpoint is computed with in float32, and keeps its precision when exported."""
    model, words = tiny("open_clip ViT")
    model.to(half).float()
    answer = forget(model, words, ["Acme Cola"], target="opposite", **PLAIN)
    answer.save(tmp_path / "a.safetensors")
    before = state(model)
    rounded = answer.adapter.apply(model.text_projection.to(half)).float()
    with torch.no_grad():
        model.text_projection.copy_(rounded)
    assert answer.verify(model) and not torch.equal(rounded, answer.adapter.apply(before[NAME]))
    loaded = Forgotten.load(tmp_path / "a.safetensors", model, original=before[NAME])
    assert loaded.verify()
    loaded.undo()
    assert not same(before, state(model))
    exact, words = tiny("open_clip ViT")  # has digits that are lost in half precision
    answer = forget(exact, words, ["Acme Cola"], target="opposite", **PLAIN)
    with torch.no_grad():
        exact.text_projection.copy_(answer.adapter.changed(exact.text_projection.to(half)))
    with pytest.raises(ProblemError, match="neither changed by this"):
        answer.verify(exact)


def test_compiled_models_and_no_models_are_verified():
    model, words = tiny("own")
    compiled = torch.compile(model)
    answer = forget(compiled, words, ["Acme Cola"], **PLAIN)
    answer.apply()
    assert answer.verify(compiled)
    with pytest.raises(ProblemError, match="must be a torch module, not 'x'"):
        answer.verify("x")


def test_the_original_may_lie_either_way(tmp_path):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    projection = model[0].weight.detach().T.clone()
    settings = {"projection": "0.weight", "transposed": True, "bias": None, "hashes": ""}
    adapter = Adapter(
        torch.randn(WIDTH, 1), torch.randn(1, WIDTH), projection_sha256(projection), "b", "w",
        "d", ["c"], "t", settings={"model": settings | {"names_sha256": "0" * 64}},
    )  # fmt: skip
    save_adapter(adapter, tmp_path / "a")
    with torch.no_grad():
        model[0].weight.copy_(adapter.changed(projection).T)
    for given in (projection, projection.T):
        loaded = Forgotten.load(tmp_path / "a", model, original=given)
        assert torch.equal(loaded.original, projection.T)
        assert torch.equal(Forgotten.load(tmp_path / "a", original=given).original, projection.T)
    with pytest.raises(ProblemError, match="not the one of the adapter"):
        Forgotten.load(tmp_path / "a", model, original=projection + 1)
    with pytest.raises(ProblemError, match="original must be a torch tensor"):
        Forgotten.load(tmp_path / "a", model, original=[1.0])


def test_adapters_of_the_driver_say_no_more_of_their_model(tmp_path):
    """Their settings name a model by a hash: applied, patched and undone, and not verified."""
    model, words = tiny("own")
    answer = forget(model, words, ["Acme Cola"], target="opposite", **PLAIN)
    settings = {"model": "0" * 64, "template": "{}"}
    save_adapter(replace(answer.adapter, settings=settings), tmp_path / "a.safetensors")
    loaded = Forgotten.load(tmp_path / "a.safetensors", model)
    loaded.apply()
    with pytest.raises(ProblemError, match="does not say what the rest of its model is"):
        loaded.verify()
    loaded.undo()
    assert torch.equal(model.last, answer.original)


def test_what_is_forgotten_is_not_retained():
    """A caller may name all classes of a classifier, the forgotten one among them."""
    model, words = tiny("open_clip ViT")
    also = {"Acme Cola": ["acme soda"]}
    plain = {**PLAIN, "retain": [*PLAIN["retain"], "ACME cola", "acme soda"]}
    alone = forget(model, words, ["Acme Cola"], also=also, **PLAIN)
    both = forget(model, words, ["Acme Cola"], also=also, **plain)
    assert not {one.name for one in both.forecast.affected} & {"ACME cola", "acme soda"}
    assert any("not retained" in note and "ACME cola" in note for note in both.notes)
    assert not any("not retained" in note for note in alone.notes)
    only = {**PLAIN, "retain": ["Acme Cola"]}
    with pytest.raises(ProblemError, match="nothing to retain"):
        forget(model, words, ["Acme Cola"], **only)
