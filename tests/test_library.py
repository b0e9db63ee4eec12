"""One call on anybody's model: every family that is here, and what is refused."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from forgetting import (
    forget,
)
from forgetting.context import MAX_ADDED, ExactSettings
from forgetting.errors import ProblemError
from forgetting.models.encoder import read_encoder
from forgetting.models.modules import tensor_sha256, tensors
from forgetting.models.vocabulary import generic_hidden
from tests.encoder_fixtures import (
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


def test_each_class_goes_as_far_as_it_needs():
    """One beta for a request would send a class elsewhere than where it goes alone."""
    model, words = tiny("own")
    names = ["Acme Cola", "Zeta Tea", "Oslo boat"]

    def displacement(names, margin):
        answer = forget(model, words, names, min_margin=margin, min_displacement=0.0, **PLAIN)
        return answer.adapter.recipe.displacement, answer.adapter.solver["beta"]

    (plain, none), (further, beta) = displacement(names, 0.0), displacement(names, 2.0)
    moved = [not torch.allclose(a, b) for a, b in zip(plain, further, strict=True)]
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
