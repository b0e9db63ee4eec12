"""Other words for the sets' classes: the lists, the rules, WordNet where it is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import datasets
import forget_cls
from clip.train_mini import TEMPLATES as TRAINED
from datasets import mini, vocabulary
from datasets.names import key
from datasets.words import lexicon, wordnet
from datasets.words.cars import car_words
from datasets.words.forms import cases, misspellings, plural
from datasets.words.lexicon import Words, halves, words_of
from datasets.words.paraphrases import KINDS, TEMPLATES, Paraphrase, paraphrases
from forgetting.errors import ProblemError
from tests.audit_fixtures import hide_wordnet

COUNTS = {"Caltech101": 100, "OxfordFlowers": 102, "StanfordDogs": 120, "StanfordCars": 14}
CUT = {"shih", "black", "wire", "soft", "flat", "curly", "german short"}  # by the published split
CARS = [
    *forget_cls.forget_classes_all["StanfordCars"],
    "2012 Volkswagen Golf Hatchback",
    "1991 Volkswagen Golf Hatchback",
    "2012 Ram C/V Cargo Van Minivan",
    "2012 Jaguar XK XKR",
    "2000 AM General Hummer SUV",
]


@pytest.fixture(autouse=True)
def no_wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_wordnet(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of lists in the place of the committed one."""
    lexicon.read_list.cache_clear()
    monkeypatch.setattr(lexicon, "FOLDER", tmp_path)
    yield tmp_path
    lexicon.read_list.cache_clear()


def classes(dataset: str) -> list[str]:
    return CARS if dataset == "StanfordCars" else list(lexicon.read_list(dataset))


# The committed lists


def test_a_checksum_holds_out_half_of_the_words_of_the_mini_sets(folder: Path, monkeypatch) -> None:
    for line in ("owl | a; b; c; d; e\n", "owl | e; d; c; b; a\n"):
        (folder / "Caltech101.txt").write_text(line)
        lexicon.read_list.cache_clear()
        assert halves("owl", "Caltech101") == (["c", "d", "b"], ["a", "e"])
    monkeypatch.undo()
    for dataset, names in mini.MINI.items():
        for name in names:
            trained, held_out = halves(name, dataset)
            listed = lexicon.committed(name, dataset).synonyms
            assert len(trained) == len(held_out) >= 4
            assert sorted(trained + held_out) == sorted(listed)


@pytest.mark.parametrize("dataset", COUNTS)
def test_lists_hold_every_class_that_is_known_of(dataset: str) -> None:
    lines = (lexicon.FOLDER / f"{dataset}.txt").read_text(encoding="utf-8").splitlines()
    assert sum(not line.startswith("#") for line in lines) == COUNTS[dataset]
    names = set(lexicon.read_list(dataset))
    if dataset == "OxfordFlowers":
        from torchvision.datasets import Flowers102

        assert names - {"pink-yellow dahlia"} == set(Flowers102.classes)
    if dataset != "StanfordCars":
        assert set(map(key, forget_cls.forget_classes_all[dataset])) <= names
        meant = set().union(*vocabulary._read(dataset).values())
        assert meant <= names
        assert dataset != "StanfordDogs" or names >= CUT


@pytest.mark.parametrize("dataset", datasets.SETS)
def test_a_word_means_one_class_and_every_class_has_paraphrases(dataset: str) -> None:
    names = classes(dataset)
    own = {key(name) for name in names}
    owner: dict[str, Words] = {}
    without = 0
    for name in names:
        words = words_of(name, dataset)
        assert words.hypernyms and words.descriptions, name
        without += not words.synonyms
        assert not own & set(map(key, words.synonyms + words.hypernyms)), name
        for word in words.synonyms:  # cut and full name of one class share a list
            assert owner.setdefault(key(word), words) == words, word
        marked = datasets.same_meaning([name], dataset) - {key(name)}
        if dataset != "StanfordCars":  # there the vocabulary calls a whole model a synonym
            assert not marked & set(map(key, words.hypernyms)), name
        found = paraphrases(name, dataset, classnames=names)
        texts, kinds = [entry.text for entry in found], [entry.kind for entry in found]
        assert len(set(texts)) == len(texts) and all(text == text.strip() for text in texts)
        assert kinds == sorted(kinds, key=KINDS.index)
        assert kinds.count("template") >= 24 and {"hypernym", "description", "case"} <= set(kinds)
        bare = datasets.clean_name(name)
        assert not {bare, datasets.spec(dataset).template.format(bare)} & set(texts)
        assert not (own - {key(name)}) & set(map(key, texts)), "no form is another class"
    assert without <= 0.03 * len(names)


@pytest.mark.parametrize(
    "text",
    [
        *("newt | eft\nowl\n", "newt | eft\nNewt | tadpole\n", "\n| eft\n", "\nnewt | | |\n"),
        *("\na | b | c | d | e\n", b"\xff\xfe"),
    ],
)
def test_a_broken_list_is_one_line(folder: Path, text) -> None:
    file = folder / "Caltech101.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ProblemError, match=r"Caltech101\.txt.* (line 2|UTF-8)") as error:
        words_of("newt", "Caltech101")
    assert "\n" not in str(error.value)


def test_a_list_is_read_as_it_is_written(folder: Path, monkeypatch) -> None:
    (folder / "Caltech101.txt").write_text(
        "# note\nsea_horse; sea pony | Hippo  campus;  | fish # why\n\nowl | | bird | big eyes\n"
    )
    expected = Words(["Hippo campus"], ["fish"], [])
    assert words_of("Sea Horse", "Caltech101") == words_of("sea_pony", "Caltech101") == expected
    assert words_of("owl", "Caltech101") == Words([], ["bird"], ["big eyes"])
    assert words_of("owl", "Caltech101", ["bird"]).hypernyms == []
    assert words_of("newt", "Caltech101") == words_of("owl", "OxfordFlowers") == Words([], [], [])
    # A set outside the table reads no file.
    (folder / "words").mkdir()
    for file in ("secret", "words/Elsewhere"):
        (folder / f"{file}.txt").write_text("owl | spy | bird\n")
    monkeypatch.setattr(lexicon, "FOLDER", folder / "words")
    for dataset in ("../secret", "Elsewhere", None):
        assert words_of("owl", dataset) == Words([], [], [])


# Rules


def test_words_of_a_car() -> None:
    golf = words_of("1991 Volkswagen Golf Hatchback", "StanfordCars")
    assert "1991 VW Golf Hatchback" in golf.synonyms
    assert "Volkswagen Golf Hatchback 1991" in golf.synonyms
    assert "Volkswagen Golf Hatchback" in golf.hypernyms, "two classes of the set bear this name"
    assert "Volkswagen Golf Hatchback" not in golf.synonyms
    assert {"Volkswagen Golf", "Volkswagen car", "car"} <= set(golf.hypernyms)
    spyker = words_of("2009 Spyker C8 Coupe", "StanfordCars")
    assert "Spyker C8 Coupe" in spyker.synonyms and "Spyker C8" in spyker.hypernyms
    hummer = words_of("2000 AM General Hummer SUV", "StanfordCars")
    assert hummer.hypernyms[0] == "AM General Hummer"
    assert "car" not in words_of("2011 Ford Ranger SuperCab", "StanfordCars").hypernyms
    assert car_words("Golf") == ([], [], [])
    assert words_of("1991 Volkswagen Golf Hatchback", "StanfordDogs") == Words([], [], [])


def test_plural() -> None:
    pairs = """
        toy poodle: toy poodles; watch: watches; phlox: phloxes; tiger lily: tiger lilies
        kidney: kidneys; snowman: snowmen; Doberman: Dobermans; oasis: oases; cheese: cheeses
        camera lens: camera lenses; bird of paradise: birds of paradise; fleur-de-lis: fleurs-de-lis
        latin capital letter s: latin capital letter s's; 2012 Buick Regal GS: 2012 Buick Regal GSs
    """
    for pair in pairs.strip().replace("\n", ";").split(";"):
        name, many = pair.strip().split(": ")
        assert plural(name) == many
    for name in ("starfish", "Pekinese", "scissors", "pink-yellow dahlia?", ""):
        assert plural(name) is None


def test_other_spellings() -> None:
    assert cases("red circle") == ["RED CIRCLE", "Red Circle"]
    assert cases("Shih-Tzu") == ["SHIH-TZU", "shih-tzu"]
    assert misspellings("euphonium") == ["eupohnium", "euphnium"]
    assert misspellings("toy poodle") == ["toy podole", "toy poole"]
    assert misspellings("ant") == ["annt", "at"]
    assert misspellings("C/V") == misspellings("") == []


WORDS = st.text("abcdeuvxYZ019", min_size=1, max_size=9)


@given(st.text("aeiortz", min_size=3, max_size=9), st.lists(WORDS, max_size=3))
def test_a_misspelling_is_one_mistake_inside_a_word(first: str, more: list[str]) -> None:
    name = " ".join([first, *more])
    forms = misspellings(name)
    assert 1 <= len(forms) <= 2 and forms == misspellings(name)
    for form in forms:
        pairs = list(zip(form.split(" "), name.split(" "), strict=True))
        ((wrong, right),) = [pair for pair in pairs if len(set(pair)) > 1]
        assert wrong[0] == right[0] and wrong[-1] == right[-1]
        assert sorted(wrong) == sorted(right) or abs(len(wrong) - len(right)) == 1


# All together


def test_templates_are_many_and_none_is_known_to_forgetting_or_training() -> None:
    assert len(set(TEMPLATES)) >= 24
    assert all(template.count("{}") == 1 for template in TEMPLATES)
    known = {row.template for row in datasets.SETS.values()} | set(TRAINED)
    assert not {text.rstrip(".") for text in known} & {text.rstrip(".") for text in TEMPLATES}


def test_words_stand_alone_and_in_the_prompt() -> None:
    found = paraphrases("Pekinese", "StanfordDogs")
    assert Paraphrase("Pekingese", "synonym") in found
    assert Paraphrase("a photo of a Pekingese.", "synonym") in found
    assert Paraphrase("a photo of a toy dog.", "hypernym") in found
    taken = paraphrases("Pekinese", "StanfordDogs", classnames=["Pekinese", "toy_dog"])
    assert [entry for entry in found if "toy dog" not in entry.text] == taken
    mine = paraphrases("Pekinese", "StanfordDogs", "this is my {}!")
    assert Paraphrase("this is my Pekingese!", "synonym") in mine
    poodle = paraphrases("toy_poodle")
    assert Paraphrase("a photo of toy poodles.", "plural") in poodle
    assert {entry.kind for entry in poodle} == {"template", "case", "plural", "misspelling"}


# WordNet


class Sense:
    """A synset with the methods of nltk (`lemma_names`) or wn (`lemmas`)."""

    def __init__(self, package: str, words: list[str], above: list[Sense] = ()) -> None:
        joined = [word.replace(" ", "_") for word in words] if package == "nltk" else words
        setattr(self, "lemma_names" if package == "nltk" else "lemmas", lambda: joined)
        self.hypernyms = lambda: list(above)


@pytest.fixture(params=["nltk", "wn"])
def stub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small WordNet behind either package."""
    sense = partial(Sense, request.param)
    machine = sense(["lifting device"], [sense(["machine"])])
    wader = sense(["crane", "long necked wader"], [sense(["bird"], [sense(["animal"])])])
    table = {
        "crane": [sense(["crane"], [machine]), sense(["Crane", "Stephen Crane"]), wader],
        "toy poodle": [sense(["toy poodle", "lap curl"], [sense(["house dog"], [sense(["Dog"])])])],
    }

    def synsets(name: str, pos: str, lang: str = "eng") -> list[Sense]:
        assert pos == "n" and lang == ("eng" if request.param == "nltk" else "en")
        return table.get(name.replace("_", " ") if request.param == "nltk" else name, [])

    error = LookupError if request.param == "nltk" else type("Error", (Exception,), {})
    reader = SimpleNamespace(synsets=synsets, Error=error)
    corpus = SimpleNamespace(wordnet=reader)
    modules = {"wn": reader, "nltk": SimpleNamespace(corpus=corpus), "nltk.corpus": corpus}
    for name in filter(lambda name: name.startswith(request.param), modules):
        monkeypatch.setitem(sys.modules, name, modules[name])
    return request.param


def test_wordnet_joins_the_lists_by_the_sense_that_agrees(stub: str, monkeypatch) -> None:
    assert wordnet.installed() == stub
    words = words_of("toy poodle", "StanfordDogs")
    assert words.synonyms[-1] == "lap curl" and words.hypernyms[-1] == "house dog"
    assert Paraphrase("lap curl", "synonym") in paraphrases("toy poodle", "StanfordDogs")
    assert "lap curl" not in words_of("toy poodle", None, ["Lap_Curl"]).synonyms
    assert words_of("toy poodle", None).synonyms == ["lap curl"], "a set without a list"
    crane = wordnet.wordnet_words
    assert crane("crane", [], ["animal"]) == (["crane", "long necked wader"], ["bird"])
    assert crane("crane", ["stephen crane"], ["animal"])[0][1] == "Stephen Crane"
    assert crane("crane", [], ["Machine"])[1] == ["lifting device"]
    assert crane("crane", [], ["plant"]) == ([], []), "none agrees"
    assert crane("crane") == ([], []), "which one is meant is not known"

    def absent(name: str, pos: str, lang: str = "eng") -> list[Sense]:
        raise module.Error("no data")

    module = sys.modules["nltk.corpus"].wordnet if stub == "nltk" else sys.modules["wn"]
    monkeypatch.setattr(module, "synsets", absent)
    assert wordnet.installed() is None
    assert words_of("toy poodle", None) == Words([], [], [])


def test_without_wordnet_the_lists_stand_alone() -> None:
    assert wordnet.installed() is None
    assert words_of("toy poodle", "StanfordDogs").hypernyms == ["poodle", "toy dog", "dog"]
