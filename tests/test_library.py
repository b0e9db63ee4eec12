"""One call on anybody's model: every family that is here, and what is refused."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from forgetting.errors import ProblemError
from forgetting.models.encoder import read_encoder
from forgetting.models.modules import tensor_sha256, tensors
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
    with pytest.raises(ProblemError, match="cannot read"):
        read_encoder(torch.jit.trace(model, tokenize(["a"])), tokenize)
    with pytest.raises(ProblemError, match="meta"):
        read_encoder(OwnEncoder().to("meta"), tokenize)
    with pytest.raises(ProblemError, match="must be a torch module"):
        read_encoder(3, tokenize)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (lambda texts: [[1, 2], [3]] * (len(texts) // 2), "the tokenizer fails"),
        (lambda texts: torch.zeros(1, 3), "of shape"),
        (lambda texts: 1 / 0, "the tokenizer fails"),
        (lambda texts: torch.full((len(texts), 4), 10**6), "cannot read what the tokenizer"),
    ],
)
def test_tokenizers_that_are_refused(words, message):
    with pytest.raises(ProblemError, match=message):
        read_encoder(OwnEncoder().eval(), words)


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
