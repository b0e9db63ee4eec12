"""A change that is put into a model, taken out again to the bit, verified and patched."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from forgetting import Forgotten, forget
from forgetting.adapter import save_adapter
from forgetting.compose import compose
from forgetting.errors import ProblemError
from forgetting.models.encoder import read_encoder
from forgetting.models.modules import tensor_sha256, tensors
from tests.conftest import refuses
from tests.encoder_fixtures import ALL, OwnEncoder, tiny
from tests.test_forget import PLAIN, RETAIN

ALSO = {"Acme Cola": ["acme soda", "AcmeCola"]}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in tensors(model).items()}


def different(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of what differs, bit by bit."""
    assert a.keys() == b.keys()
    return [name for name in a if tensor_sha256(a[name]) != tensor_sha256(b[name])]


@pytest.fixture
def acme(tmp_path):
    """A tiny model, its tokenizer, the answer that forgets Acme Cola in it, and a file of that."""

    def acme(family: str = "own", change=lambda model: model, **options):
        model, words = tiny(family)
        answer = forget(change(model), words, ["Acme Cola"], **PLAIN | options)
        answer.save(tmp_path / "a.safetensors", overwrite=True)
        return model, words, answer, tmp_path / "a.safetensors"

    return acme


def flip_bit(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.view(torch.int32).view(-1)[0] ^= 1


@pytest.mark.parametrize("family", ALL)
def test_a_round_trip_of_every_family(family, tmp_path):
    model, words = tiny(family)
    before, encoder = state(model), read_encoder(model, words)
    texts = ["Acme Cola", "acme soda", "Pepsi"]
    was = encoder.embeddings(texts).double()
    answer = forget(model, words, ["Acme Cola"], ALSO, target="opposite", beta=0.1, **PLAIN)
    assert not different(before, state(model))  # reading changes nothing
    assert answer.certificate.gap < 1e-6 and answer.texts[:3] == [*ALSO, *ALSO["Acme Cola"]]
    assert set(answer.forecast.unlisted) == {"own"} and answer.forecast.affected
    answer.apply()
    answer.apply()  # once is enough
    assert different(before, state(model)) == [encoder.name]
    now = encoder.embeddings(texts).double()
    if encoder.normalised:
        assert torch.allclose(now[:2], -was[:2], atol=1e-3)
    else:
        assert torch.allclose(now[:2], -0.1 * was[:2], atol=1e-3 * float(was.norm(dim=1).max()))
    assert answer.verify() and answer.verify(model)
    file = tmp_path / "acme.safetensors"
    answer.save(file)
    answer.undo()
    answer.undo()
    assert not different(before, state(model))
    again = Forgotten.load(file, model)
    assert again.certificate == answer.certificate and again.forecast == answer.forecast
    assert again.texts == answer.texts and again.notes == answer.notes
    again.apply()
    assert again.verify(model) and torch.equal(encoder.embeddings(texts).double(), now)
    again.undo()
    assert not different(before, state(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["open_clip ViT", "own with bias"])
def test_other_precisions(family, dtype, acme):
    model, words, answer, _ = acme(family, lambda model: model.to(dtype), target="opposite")
    before, encoder = state(model), read_encoder(model, words)
    was = encoder.embeddings(["Acme Cola"])
    answer.apply()
    left = float(encoder.embeddings(["Acme Cola"]).norm() / was.norm())
    assert left < {torch.float16: 0.02, torch.bfloat16: 0.15, torch.float64: 1e-5}[dtype]
    assert answer.verify() and encoder.weight.dtype == dtype
    answer.undo()
    assert not different(before, state(model))


TAMPERED = {  # a change of the model, and what verify says
    "other": (lambda m, _: flip_bit(m.visual.ln_post.bias), "is not what it was"),  # of images
    "projection": (lambda m, _: flip_bit(m.text.text_projection), "is not what this change"),
    "nothing": (lambda _, answer: answer.undo(), "was not applied"),
    "new": (lambda m, _: m.register_buffer("more", torch.zeros(1)), "is not what it was"),
    "gone": (lambda m, _: setattr(m.text, "text_projection", None), "was not applied"),
}


@pytest.mark.parametrize("change", TAMPERED)
def test_verify_sees_what_was_tampered_with(change, acme):
    model, _, answer, _ = acme("open_clip CustomTextCLIP")
    answer.apply()
    assert answer.verify(model)
    tamper, message = TAMPERED[change]
    tamper(model, answer)
    refuses(message, answer.verify, model)


def test_an_adapter_is_refused_by_another_model(acme):
    _, _, answer, file = acme()
    other, _ = tiny("own", seed=1)
    refuses("neither the projection", Forgotten.load, file, other)
    refuses("no tensor is the text projection", Forgotten.load, file, nn.Linear(3, 3))
    refuses("must be a torch module", answer.verify, "x")
    with pytest.raises(ProblemError, match="there is no model"):
        Forgotten.load(file).apply()


def test_a_model_that_is_changed_already(acme):
    """In another process, say: known, not added to, and undone with the original alone."""
    model, words, answer, file = acme()
    answer.apply()
    elsewhere = OwnEncoder().eval()  # no mark of ours on it
    elsewhere.load_state_dict(model.state_dict())
    changed = Forgotten.load(file, elsewhere)
    changed.apply()
    assert changed.verify() and torch.equal(elsewhere.last, model.last)
    refuses("has forgotten Acme Cola already", forget, elsewhere, words, ["Zeta Tea"], **PLAIN)
    refuses("the original W is not known", changed.undo)
    Forgotten.load(file, elsewhere, original=answer.original).undo()
    assert torch.equal(elsewhere.last, answer.original)
    with torch.no_grad():  # whatever becomes of it now, it is free
        elsewhere.last.mul_(2)
    assert forget(elsewhere, words, ["Zeta Tea"], **PLAIN).names == ["Zeta Tea"]


def test_changes_do_not_add_up(acme):
    """A second name is not forgotten on top of the first, in whatever precision and copy."""
    model, words, first, _ = acme("open_clip ViT")
    second = forget(model, words, ["Zeta Tea"], **PLAIN)
    first.apply()
    refuses("neither the projection", second.apply)
    for changed in (model, copy.deepcopy(model), copy.deepcopy(model).half(), torch.compile(model)):
        refuses("has forgotten Acme Cola already", forget, changed, words, ["Zeta Tea"], **PLAIN)
    # Another text tower with the same projection is another model.
    other, _ = tiny("open_clip ViT", seed=1)
    with torch.no_grad():
        other.text_projection.copy_(model.text_projection)
    assert forget(other, words, ["Zeta Tea"], **PLAIN).names == ["Zeta Tea"]
    # What gives the original back, by `undo` or not, gives the model free.
    model.load_state_dict({"text_projection": first.original}, strict=False)
    assert forget(model, words, ["Zeta Tea"], **PLAIN).names == ["Zeta Tea"]
    assert len(repr(second)) < 1000


def test_tied_weights_are_refused_where_they_would_change_too(acme):
    model, _, answer, file = acme()
    before = state(model)
    model.again = model.last
    for act in (answer.apply, lambda: Forgotten.load(file, model)):
        refuses(r"tied weights: the projection (last|again)", act)
    del model.again
    assert not different(before, state(model))
    Forgotten.load(file, model).apply()


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_adapters_of_wrapped_models_are_those_of_the_plain_ones(wrap, acme):
    model, _, answer, file = acme(change=wrap)
    plain = Forgotten.load(file, model)
    plain.apply()
    assert plain.verify() and plain.verify(wrap(model)) and answer.verify()
    assert answer.adapter.model == plain.adapter.model and answer.adapter.model.projection == "last"


def test_a_projection_that_was_replaced_is_found_by_its_name(acme):
    model, _, answer, _ = acme(target="opposite")
    model.load_state_dict(state(model), assign=True)
    answer.apply()
    assert answer.verify() and not torch.equal(model.last, answer.original)
    model.load_state_dict(state(model), assign=True)
    answer.undo()
    assert torch.equal(model.last, answer.original)
    model.last = None
    refuses("no such projection any more", answer.apply)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_change_that_a_file_in_half_precision_rounds_is_that_change(half, acme):
    """Such a checkpoint is computed with in float32, and keeps its precision when exported."""
    model, _, answer, file = acme("open_clip ViT", lambda model: model.to(half).float())
    before = state(model)
    rounded = answer.adapter.apply(model.text_projection.to(half)).float()
    assert not torch.equal(rounded, answer.adapter.apply(before["text_projection"]))
    with torch.no_grad():
        model.text_projection.copy_(rounded)
    assert answer.verify(model) and Forgotten.load(file, model).verify()
    loaded = Forgotten.load(file, model, original=before["text_projection"])
    loaded.undo()
    assert not different(before, state(model))
    exact, _, answer, _ = acme("open_clip ViT")  # has digits that are lost in half precision
    with torch.no_grad():
        exact.text_projection.copy_(answer.adapter.changed(exact.text_projection.to(half)))
    refuses("is not what this change", answer.verify, exact)


def test_the_original_of_a_linear_layer(acme):
    model, _, answer, file = acme("open_clip CustomTextCLIP with bias")
    answer.apply()
    Forgotten.load(file, model, original=answer.original).undo()
    assert torch.equal(model.text.text_projection.weight.T, answer.original)
    with pytest.raises(ProblemError, match=r"another text projection.*weight\.T"):
        Forgotten.load(file, model, original=answer.original.T)


def test_adapters_of_the_driver_say_no_more_of_their_model(acme):
    """Found by what it holds, applied and undone, and not verified."""
    model, _, answer, file = acme()
    save_adapter(replace(answer.adapter, model=None), file)
    loaded = Forgotten.load(file, model)
    loaded.apply()
    refuses("does not say what the rest of its model is", loaded.verify)
    loaded.undo()
    assert torch.equal(model.last, answer.original)


def test_a_union_is_applied_verified_and_undone(tmp_path):
    """Of two answers, and the first of it given back."""
    model, words = tiny("open_clip ViT")
    options = PLAIN | {"min_margin": 0.0, "min_displacement": 0.0}
    a, b = (forget(model, words, [name], **options) for name in ("Acme Cola", "Zeta Tea"))
    both = forget(model, words, ["Acme Cola", "Zeta Tea"], **options)
    made = compose({"a": a.adapter, "b": b.adapter})
    for adapter, expected in (
        (made, both.adapter.delta()),
        (compose({"both": both.adapter}, {"b": b.adapter}), a.adapter.delta()),
    ):
        limit = 1e-5 * float(expected.abs().max()) + 1e-6
        assert torch.allclose(adapter.delta(), expected, atol=limit)
        save_adapter(adapter, tmp_path / "made.st")
        found, before = Forgotten.load(tmp_path / "made.st", model), state(model)
        assert found.certificate is None and found.forecast is None
        found.apply()
        assert found.verify()
        found.undo()
        assert not different(before, state(model))


@pytest.mark.parametrize("change", ["tokenizer", "prompts", "names", "weights", "ridge"])
def test_answers_that_were_not_made_alike_do_not_compose(change):
    model, words = tiny("own")
    options = {"tokenizer": {}, "weights": {"own": 0.5}, "ridge": {"ridge": 0.3}}
    options |= {"prompts": {"templates": ["{}", "the {}"]}, "names": {"retain": RETAIN[:-1]}}
    upper = (lambda texts: words([x.upper() for x in texts])) if change == "tokenizer" else words
    a = forget(model, words, ["Acme Cola"], **PLAIN).adapter
    b = forget(model, upper, ["Zeta Tea"], **(PLAIN | options[change])).adapter
    part = {"tokenizer": "encoder", "prompts": "prompts", "names": "retained names"}
    refuses(f"{part.get(change, change)}.* differs", compose, {"a": a, "b": b})
