"""`forget()`: one call on any model. What it solves stands in tests/test_context.py."""

import doctest
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from forgetting import api, forget
from forgetting.context import ExactSettings
from forgetting.errors import ProblemError
from forgetting.models.encoder import read_encoder
from tests.encoder_fixtures import OUT, needs_transformers, tiny

RETAIN = ["Pepsi", "lemonade", "a dog", "the moon", "Oslo", "blue car", "seven", "tree"]
PLAIN = {"retain": RETAIN, "generic": False, "progress": False, "cache": None}
ONCE = {"min_margin": 0.0, "min_displacement": 0.0}  # no second look


@pytest.fixture
def common(monkeypatch):
    """A generic vocabulary of forty names, one of them retained by name as well."""
    names = [f"w{i}" for i in range(39)] + ["PEPSI"]
    monkeypatch.setattr("forgetting.models.vocabulary.generic_names", lambda: names)
    return names


@pytest.mark.parametrize("target", ["text:a dog", "vector"])
@pytest.mark.parametrize("family", ["own", "own with bias"])
def test_targets_of_ones_own(family, target):
    model, words = tiny(family)
    encoder = read_encoder(model, words)
    vector, dog = torch.linspace(-1, 1, OUT), encoder.embeddings(["a dog"])[0]
    goal = vector if target == "vector" else target
    answer = forget(model, words, ["Acme Cola"], target=goal, **PLAIN)
    answer.apply()
    wanted = vector if target == "vector" else dog / dog.norm()
    assert torch.allclose(encoder.embeddings(["Acme Cola"])[0], wanted, atol=1e-4)
    assert answer.adapter.settings["target"] == target


def test_other_words_and_templates():
    """The first template forgets, the others are paraphrases; a text that two words share once."""
    model, words = tiny("own")
    also = {"Acme Cola": ["acme soda", "Acme Cola", "AcmeCola"]}
    forms = ["{}", "a {}", "the {}"]
    answer = forget(model, words, ["Acme Cola", "Oslo boat"], also, templates=forms, **PLAIN)
    assert answer.texts[:4] == ["Acme Cola", "acme soda", "AcmeCola", "Oslo boat"]
    assert answer.adapter.solver["paraphrases"]["checked"] == 2 * 4
    assert set(answer.texts[4:]) == set(answer.adapter.solver["paraphrases"]["added"])
    once = forget(model, words, ["Acme Cola", "Oslo boat"], also, templates=forms, **ONCE, **PLAIN)
    assert len(once.texts) == 4 and once.adapter.solver["paraphrases"]["checked"] == 0


def test_what_is_forgotten_is_not_retained():
    """A caller may name all classes of a classifier, the forgotten one among them."""
    model, words = tiny("open_clip ViT")
    also = {"Acme Cola": ["acme soda"]}
    all_classes = {**PLAIN, "retain": [*RETAIN, "ACME_cola", "acme soda"]}
    alone = forget(model, words, ["Acme Cola"], also, **PLAIN)
    both = forget(model, words, ["Acme Cola"], also, **all_classes)
    assert both.adapter.solver["excluded"] == ["ACME_cola", "acme soda"]
    assert not {one.name for one in both.forecast.affected} & {"ACME_cola", "acme soda"}
    assert any("not retained" in note and "ACME_cola" in note for note in both.notes)
    assert not any("not retained" in note for note in alone.notes)
    with pytest.raises(ProblemError, match="nothing to retain"):
        forget(model, words, ["Acme Cola"], **{**PLAIN, "retain": ["Acme Cola"]})


def test_protected_names_are_something_to_retain_and_are_affected_less():
    model, words = tiny("own")
    alone = PLAIN | {"retain": None}
    answer = forget(model, words, ["Acme Cola"], protect=["dog", "cat"], **alone)
    assert set(answer.forecast.unlisted) == {"protect"}

    def loss(**options) -> dict[str, float]:
        answer = forget(model, words, ["Acme Cola"], ridge=0.01, **options, **PLAIN)
        return {one.name: one.cosine_loss for one in answer.forecast.affected}

    before = loss()
    name = max(before, key=before.__getitem__)
    heavy = ExactSettings(protect=10.0)
    assert loss(protect=[name], settings=heavy).get(name, 0) < before[name]


def test_a_name_that_is_common_and_retained_is_looked_at_once(common, tmp_path):
    """Else its margin is that to itself, and any loss makes it likely to be misclassified."""
    model, words = tiny("own")
    answer = forget(model, words, ["Acme Cola"], retain=["Pepsi"], cache=None, progress=False)
    names = [one.name.casefold() for one in answer.forecast.affected]
    assert len(set(names)) == len(names)
    for one in answer.forecast.affected:
        assert one.margin > 1e-6
    also = {"Acme Cola": ["w5"]}  # not retained, since it means the same
    only = forget(model, words, ["Acme Cola", "w3"], also, cache=None, progress=False)
    assert not {"w3", "w5"} & {one.name for one in only.forecast.affected}


def test_what_becomes_of_protected_names_is_said(common):
    model, words = tiny("own")
    names = ["Jane Doe", "w7"]
    answer = forget(model, words, ["Acme Cola"], protect=names, cache=None, progress=False)
    affected = {one.name: one.cosine_loss for one in answer.forecast.affected}
    assert affected.keys() >= {*names} and len(affected) >= 5
    assert list(affected.values()) == sorted(affected.values(), reverse=True)
    (said,) = (note for note in answer.notes if note.startswith("protected: "))
    assert all(f"{name} (-{affected[name]:.3f} cosine)" in said for name in names)


def test_the_ridge_is_chosen_by_a_callers_list_where_it_is_long(common, monkeypatch):
    """And by no request, so that requests compose. Generic names limit it where they are alone, and
    images are classified among the caller's names where there are others."""
    found, among, choose, texts = [], [], api.choose_ridge, api.ClassifierTexts

    def record(retain, projection, likely, *rest):
        ridge = choose(retain, projection, likely, *rest)
        found.append((len(likely), retain.groups["generic"].limit_displacement, ridge))
        return ridge

    monkeypatch.setattr(api, "LIKELY", 5)
    monkeypatch.setattr(api, "choose_ridge", record)
    monkeypatch.setattr(api, "ClassifierTexts", lambda *a: among.append(a[3]) or texts(*a))
    for count, name in ((16, "Acme Cola"), (16, "Zeta Tea"), (15, "Acme Cola"), (0, "Acme Cola")):
        retain = [f"{i} things" for i in range(count)]
        forget(*tiny("own"), [name], retain=retain, cache=None, progress=False)
    assert [one[:2] for one in found] == [(6, False), (6, False), (5, False), (5, True)]
    assert found[0] == found[1] and among == [17, 17, 16, 41]


def test_a_second_request_computes_nothing_of_what_is_retained_again(monkeypatch):
    model, words = tiny("own")
    first = forget(model, words, ["Acme Cola"], **PLAIN)
    calls = []
    for name in ("choose_ridge", "RetainSet"):
        monkeypatch.setattr(f"forgetting.api.{name}", lambda *a, name=name: calls.append(name))
    again = forget(model, words, ["Acme Cola"], **PLAIN)
    assert torch.equal(again.adapter.delta(), first.adapter.delta()) and not calls
    second = forget(model, words, ["Zeta Tea"], **PLAIN)
    monkeypatch.undo()
    fresh = forget(*tiny("own"), ["Zeta Tea"], **PLAIN)
    assert torch.allclose(second.adapter.delta(), fresh.adapter.delta(), atol=1e-5)
    # Whatever it depends on makes it anew: names, weights, and the model itself.
    for options in ({"retain": RETAIN[1:]}, {"own": 0.3}, {"ridge": 1.0}):
        other = forget(model, words, ["Acme Cola"], **PLAIN | options)
        assert not torch.equal(other.adapter.delta(), first.adapter.delta()), options
    with torch.no_grad():
        model.last.mul_(2.0)
    other = forget(model, words, ["Acme Cola"], **PLAIN)
    assert torch.allclose(other.adapter.delta(), 2 * first.adapter.delta(), rtol=1e-3, atol=1e-4)


def test_threads_are_given_back_whoever_is_last():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            calls = [
                pool.submit(forget, *tiny("own"), ["Acme Cola"], **PLAIN | {"retain": retain})
                for retain in (RETAIN, None, RETAIN[:3], RETAIN) * 2
            ]
        assert [call.exception() is None for call in calls] == [True, False, True, True] * 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "family", ["own", pytest.param("transformers CLIPModel", marks=needs_transformers)]
)
def test_texts_that_are_cut_are_noted(family):
    """24 tokens, of which two are the start and the end; one that just fits is not too long."""
    model, words = tiny(family)
    fits, long = "a" * 22, "a" * 23
    notes = forget(model, words, ["Acme Cola", fits], templates=["{}"], **PLAIN).notes
    assert not any("beginning" in note for note in notes)
    (note,) = (n for n in forget(model, words, [long], **PLAIN).notes if "beginning" in n)
    assert f"the beginning of '{long}' and of 1 more" in note and "\n" not in note


@needs_transformers
def test_the_example_of_the_docstring_runs(common, tmp_path, monkeypatch):
    import transformers

    for part in tiny("transformers CLIPModel"):
        part.save_pretrained(tmp_path / "my-clip")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # where the vocabulary's hidden states are kept
    (example,) = doctest.DocTestFinder(recurse=False).find(forget)
    for name in ("AutoTokenizer", "CLIPModel"):
        example.globs[name] = getattr(transformers, name)
    done = doctest.DocTestRunner().run(example)
    assert done.attempted == 6 and not done.failed


ARGUMENTS = {
    "text for names": ({"names": "Acme"}, "names must be a list of texts"),
    "no name": ({"names": []}, "names is empty"),
    "empty name": ({"names": [" "]}, "none of them empty"),
    "template": ({"templates": ["a photo"]}, "templates"),
    "also": ({"also": {"Acme Coal": ["x"]}}, "did you mean 'Acme Cola'"),
    "two of one": ({"names": ["Acme Cola", "ACME COLA"]}, "stands for both"),
    "one name, two spellings": ({"names": ["sea_horse", "Sea  Horse"]}, "stands for both"),
    "protect": ({"protect": ["acme_cola"]}, "to be protected"),
    "same name": (
        {"names": ["cat", " cat "], "also": {"cat ": [" cat"]}, "protect": ["cat"]},
        "protected",
    ),
    "vector": ({"target": torch.zeros(3)}, "target"),
    "no setting": ({"betta": 0.1}, "did you mean 'beta'"),
    "tiny ridge": ({"ridge": 1e-30}, "ridge"),
    "settings": ({"settings": {"beta": 0.1}}, "settings must be ExactSettings"),
    "nothing": ({"retain": None, "generic": False}, "nothing to retain"),
    "no weight": ({"settings": ExactSettings(own=0.0)}, "nothing to retain"),
}


@pytest.mark.parametrize("row", ARGUMENTS)
def test_arguments_that_are_refused(row):
    given, token = ARGUMENTS[row]
    with pytest.raises(ProblemError, match=token):
        forget(*tiny("own"), **({"names": ["Acme Cola"]} | PLAIN | given))


def test_settings_come_whole_or_by_name():
    model, words = tiny("own")
    whole = ExactSettings(target="opposite", beta=0.2, ridge=0.01)
    a = forget(model, words, ["Acme Cola"], settings=whole, **PLAIN).adapter
    assert a.settings["ridge"] == pytest.approx(0.01)
    for options in (
        {"target": "opposite", "beta": 0.2, "ridge": 0.01},
        {"settings": replace(whole, beta=0.0), "beta": 0.2},
    ):
        same = forget(model, words, ["Acme Cola"], **options, **PLAIN).adapter
        assert torch.equal(a.delta(), same.delta())
