"""The text encoder: padding is left out only where it changes nothing, threads do not meet; models
and tokenizers that are read, and those that are refused."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn

from forgetting.io import pack
from forgetting.models import encoder as encoding
from forgetting.models.encoder import read_encoder
from forgetting.models.identity import identity
from forgetting.models.vocabulary import FORMAT, generic_hidden
from tests.conftest import refuses
from tests.encoder_fixtures import (
    ALL,
    END,
    LENGTH,
    OUT,
    WIDTH,
    OwnEncoder,
    needs_transformers,
    tiny,
    tokenize,
)

TEXTS = ["owl", "", "a photo of a crab.", "!", "sea horse", "x" * 40, "wow!"]
WHOLE = ("CoCa", "Siglip")  # families whose hidden states depend on the padding


@pytest.mark.parametrize("family", ALL)
def test_hidden_states_are_those_of_whole_texts(family, monkeypatch) -> None:
    """In any batches, in any order, to rounding; and of the families that allow it shorter."""
    found = read_encoder(*tiny(family))
    whole = replace(found, padding=None)
    expected = whole.hidden(TEXTS)
    for batch in (1, 2, 256):
        monkeypatch.setattr(encoding, "BATCH", batch)
        hidden = found.hidden(TEXTS)
        assert ((hidden - expected).norm(dim=1) <= 1e-5 * expected.norm(dim=1)).all()
    assert torch.equal(found.hidden(TEXTS[::-1]), found.hidden(TEXTS).flip(0))
    assert (found.padding is None) == any(name in family for name in WHOLE)
    assert (expected[0] - expected[4]).norm() > 1e-3 * expected[0].norm(), "texts differ"
    with torch.no_grad():
        own = found.embeddings(TEXTS)
    product = expected @ found.projection.float()
    product = product if found.bias is None else product + found.bias
    product = nn.functional.normalize(product, dim=1) if found.normalised else product
    assert torch.allclose(own, product, atol=1e-4)


def test_padding_is_never_computed(monkeypatch) -> None:
    """Of 200 short texts and a long one, each batch is as long as its longest."""
    model, words = tiny("open_clip ViT")
    found, seen = read_encoder(model, words), []
    model.token_embedding.register_forward_pre_hook(lambda _, ids: seen.append(ids[0].numel()))
    monkeypatch.setattr(encoding, "BATCH", 50)
    found.hidden(["owl"] * 200 + ["x" * 40])
    assert seen == [250, 250, 250, 250, LENGTH]


def test_a_text_that_is_padded_with_its_end_keeps_it(monkeypatch) -> None:
    """As transformers pads for CLIP."""
    found = read_encoder(
        tiny("open_clip ViT")[0], lambda texts: (ids := tokenize(texts)).masked_fill(ids == 0, END)
    )
    assert (found.padding.token, found.padding.kept) == (END, 1)
    whole = replace(found, padding=None).hidden(TEXTS)
    monkeypatch.setattr(encoding, "BATCH", 1)
    assert torch.allclose(found.hidden(TEXTS), whole, atol=1e-5)


class Unmasked(OwnEncoder):
    """Reads padding like any other token."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, tokens):
        rows = self.table(tokens)
        read = (rows * (tokens > 0)[..., None]).sum(dim=1) + self.weight * rows.mean(dim=1)
        return torch.tanh(self.layer(read)) @ self.last


@pytest.mark.parametrize("weight", [1.0, 1e-3])
def test_a_model_that_reads_its_padding_gets_it(weight) -> None:
    assert read_encoder(Unmasked(weight).eval(), tokenize).padding is None
    assert read_encoder(OwnEncoder().eval(), tokenize).padding is not None


class Slow(nn.Dropout):
    def forward(self, rows):
        time.sleep(0.002)  # let another thread in
        return super().forward(rows)


def test_threads_read_a_training_model_in_evaluation_mode() -> None:
    """No thread restores the modes while another reads; each module's own comes back."""
    model = OwnEncoder()
    model.layer = nn.Sequential(Slow(0.5), model.layer)
    expected = read_encoder(model.eval(), tokenize).hidden(TEXTS)
    model.train()
    model.layer[1].eval()
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(lambda: read_encoder(model, tokenize).hidden(TEXTS)) for _ in range(8)]
        for run in runs:
            assert torch.equal(run.result(), expected)
    assert model.layer[0].training and not model.layer[1].training
    assert not torch.equal(model(tokenize(TEXTS)), model(tokenize(TEXTS))), "dropout matters"


def test_a_model_in_evaluation_mode_is_not_touched(monkeypatch) -> None:
    model, words = tiny("own")
    monkeypatch.setattr(nn.Module, "__setattr__", lambda *_: pytest.fail("the model is written to"))
    assert read_encoder(model, words).hidden(TEXTS).isfinite().all()


def test_odd_projections_are_refused() -> None:
    for projection in (torch.zeros(WIDTH, 0), torch.randn(WIDTH, OUT).to_sparse()):
        model = OwnEncoder().eval()
        model.last = nn.Parameter(projection)
        refuses(r"is empty|data pointer", read_encoder, model, tokenize)


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many texts were read, call by call."""
    seen, read = [], encoding.Encoder._read

    def count(self, texts, *more):
        seen.append(len(texts))
        return read(self, texts, *more)

    monkeypatch.setattr(encoding.Encoder, "_read", count)
    monkeypatch.setattr("forgetting.models.vocabulary.generic_names", lambda: ["a", "b", "c"])
    return seen


def test_the_vocabulary_is_encoded_once(encoded, tmp_path) -> None:
    model, words = tiny("own")
    names, first = generic_hidden(read_encoder(model, words), tmp_path)
    assert names == ["a", "b", "c"] and encoded == [3]
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    other = pack(FORMAT, {"texts": 3}, {"hidden": 2 * first})
    # In this process; in the next; of a file that is torn; of one that is looked at in vain.
    for content, count in ((whole, 1), (whole[:-4], 2), (other, 3), (whole, 5)):
        assert torch.equal(generic_hidden(read_encoder(model, words), tmp_path)[1], first)
        assert encoded == count * [3] and list(tmp_path.iterdir()) == [file]
        encoding._memories.clear()
        file.write_bytes(content)
    generic_hidden(read_encoder(model, lambda texts: tokenize([t.upper() for t in texts])), None)
    assert encoded == 6 * [3]


CHANGES = {
    "in place": lambda model: model.layer.weight.mul_(2),
    "by .data": lambda model: model.layer.weight.data.mul_(2),
    "replaced": lambda model: setattr(model, "layer", nn.Linear(24, 24)),
    "loaded": lambda model: model.load_state_dict(OwnEncoder().state_dict()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_remembered_is_of_the_model_as_it_is(change, encoded) -> None:
    model, words = tiny("own")
    first = read_encoder(model, words)
    before = generic_hidden(first, None)[1], first.fingerprint, identity(first)
    with torch.no_grad():
        first.weight.mul_(2)  # the projection is what changes: nothing depends on it
    same = read_encoder(model, words)
    assert torch.equal(generic_hidden(same, None)[1], before[0]) and encoded == [3]
    assert (same.fingerprint, identity(same)) == before[1:]
    with torch.no_grad():
        CHANGES[change](model)
    other = read_encoder(model, words)
    assert other.fingerprint != before[1] and identity(other) != before[2]
    assert not torch.equal(generic_hidden(other, None)[1], before[0]) and encoded == [3, 3]


def test_memories_end_with_their_model() -> None:
    model, words = tiny("own")
    read_encoder(model, words).remembered("x", lambda: 1)
    count = len(encoding._memories)
    del model
    assert len(encoding._memories) < count


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
    refuses(REFUSED[how], read_encoder, Odd(how).eval(), tokenize)


def test_quantised_scripted_and_absent_weights_are_refused():
    model = OwnEncoder().eval()
    model.layer.weight.requires_grad_(False)
    refuses("cannot read", read_encoder, torch.jit.trace(model, tokenize(["a"])), tokenize)
    refuses("meta", read_encoder, OwnEncoder().to("meta"), tokenize)
    refuses("must be a torch module", read_encoder, 3, tokenize)


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
    refuses(message, read_encoder, OwnEncoder().eval(), words)


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


@needs_transformers
def test_where_a_model_lies_is_no_part_of_its_fingerprint_and_how_it_computes_is():
    model, words = tiny("transformers CLIPModel")
    before = read_encoder(model, words).fingerprint
    model.config._name_or_path = model.config.text_config._name_or_path = "another/folder"
    assert read_encoder(model, words).fingerprint == before
    model.config.text_config.hidden_act = "gelu"
    assert read_encoder(model, words).fingerprint != before
