"""Models and tokenizers that are read, and those that are refused."""

import pytest
import torch
from torch import nn

from forgetting.errors import ProblemError
from forgetting.models.encoder import read_encoder
from tests.encoder_fixtures import (
    FAMILIES,
    OUT,
    WIDTH,
    OwnEncoder,
    needs_transformers,
    tiny,
    tokenize,
)


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
        summed = self.table(tokens).sum(dim=1)
        if self.how == "table":
            return torch.tanh(self.layer(summed))[:, :OUT]
        if self.how == "computed":
            return self.layer(summed) @ (self.last * 1.5)
        if self.how == "shared":
            return self.first(self.first(summed))
        found = super().forward(tokens)
        if self.how == "tokens":
            return found[:, None].expand(-1, 3, -1)
        return torch.tanh(found) if self.how == "nonlinear" else found


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
@pytest.mark.parametrize("how", ["bare", "tensors", "lists", "filled up"])
def test_tokenizers_of_transformers(how):
    """SigLIP reads the last token, so that its texts are filled up to the model's length."""
    model, bare = tiny(
        "transformers SiglipModel" if how == "filled up" else "transformers CLIPModel"
    )
    cut = {"padding": True, "truncation": True, "max_length": 24}
    texts, words = ["Acme Cola", "a dog"], bare
    if how in ("tensors", "lists"):
        options = cut | ({"return_tensors": "pt"} if how == "tensors" else {})
        words = lambda t: bare(t, **options)  # noqa: E731
    full = cut | {"return_tensors": "pt", "padding": "max_length"}
    with torch.no_grad():
        given = model.get_text_features(input_ids=bare(texts, **full)["input_ids"])
    given = getattr(given, "pooler_output", given)
    assert torch.allclose(read_encoder(model, words).embeddings(texts), given, atol=1e-5)


def test_the_families_are_told_apart():
    fingerprints = {read_encoder(*tiny(family)).fingerprint for family in FAMILIES}
    assert len(fingerprints) >= len(FAMILIES) - 1  # RN and ViT may share a text tower


@needs_transformers
def test_where_a_model_lies_is_no_part_of_its_fingerprint_and_how_it_computes_is():
    model, words = tiny("transformers CLIPModel")
    before = read_encoder(model, words).fingerprint
    model.config._name_or_path = model.config.text_config._name_or_path = "another/folder"
    assert read_encoder(model, words).fingerprint == before
    model.config.text_config.hidden_act = "gelu"
    assert read_encoder(model, words).fingerprint != before
