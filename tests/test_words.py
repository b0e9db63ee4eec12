"""Other words for the sets' classes: the lists, the rules; and the generic vocabulary."""

import re
import unicodedata
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

import datasets
import forget_cls
from clip.train_mini import TEMPLATES as TRAINED
from datasets.names import key
from datasets.words import lexicon
from datasets.words.cars import car_words
from datasets.words.forms import cases, misspellings, plural
from datasets.words.lexicon import Words, halves, words_of
from datasets.words.paraphrases import KINDS, TEMPLATES, Paraphrase, paraphrases
from forgetting.models.vocabulary import generic_names
from tests.conftest import refuses


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of lists in the place of the committed one."""
    lexicon.read_list.cache_clear()
    monkeypatch.setattr(lexicon, "FOLDER", tmp_path)
    yield tmp_path
    lexicon.read_list.cache_clear()


def test_a_checksum_holds_out_half_of_the_words(folder: Path) -> None:
    for line in ("owl | a; b; c; d; e\n", "owl | e; d; c; b; a\n"):
        (folder / "Caltech101.txt").write_text(line)
        lexicon.read_list.cache_clear()
        assert halves("owl", "Caltech101") == (["c", "d", "b"], ["a", "e"])


@pytest.mark.parametrize("dataset", datasets.SETS)
def test_a_word_means_one_class_and_every_class_has_paraphrases(dataset: str) -> None:
    forgotten = forget_cls.forget_classes_all.get(dataset, [])
    # A rule makes the words of cars; their list holds hardly any class.
    names = forgotten if dataset == "StanfordCars" else list(lexicon.read_list(dataset))
    own = {key(name) for name in names}
    assert own >= set(map(key, forgotten))
    owner: dict[str, Words] = {}
    for name in names:
        words = words_of(name, dataset)
        assert words.hypernyms and words.descriptions, name
        assert not own & set(map(key, words.synonyms + words.hypernyms)), name
        for word in words.synonyms:  # cut and full name of one class share a list
            assert owner.setdefault(key(word), words) == words, word
        found = paraphrases(name, dataset, classnames=names)
        texts, kinds = [entry.text for entry in found], [entry.kind for entry in found]
        assert len(set(texts)) == len(texts) and all(text == text.strip() for text in texts)
        assert kinds == sorted(kinds, key=KINDS.index)
        assert kinds.count("template") >= 24 and {"hypernym", "description", "case"} <= set(kinds)
        bare = datasets.clean_name(name)
        assert not {bare, datasets.spec(dataset).template.format(bare)} & set(texts)
        assert not (own - {key(name)}) & set(map(key, texts)), "no form is another class"


@pytest.mark.parametrize(
    "text",
    [
        *(b"newt | eft\nowl\n", b"newt | eft\nNewt | tadpole\n", b"\n| eft\n"),
        *(b"\nnewt | | |\n", b"\na | b | c | d | e\n", b"\xff\xfe"),
    ],
)
def test_a_broken_list_is_one_line(folder: Path, text: bytes) -> None:
    (folder / "Caltech101.txt").write_bytes(text)
    refuses(r"Caltech101\.txt.* (line 2|UTF-8)", words_of, "newt", "Caltech101")


def test_a_list_is_read_as_it_is_written(folder: Path) -> None:
    (folder / "Caltech101.txt").write_text(
        "# note\nsea_horse; sea pony | Hippo  campus;  | fish # why\n\nowl | | bird | big eyes\n"
    )
    expected = Words(["Hippo campus"], ["fish"], [])
    assert words_of("Sea Horse", "Caltech101") == words_of("sea_pony", "Caltech101") == expected
    assert words_of("owl", "Caltech101") == Words([], ["bird"], ["big eyes"])
    assert words_of("owl", "Caltech101", ["bird"]).hypernyms == []
    assert words_of("newt", "Caltech101") == words_of("owl", "OxfordFlowers") == Words([], [], [])
    (folder / "Elsewhere.txt").write_text("owl | spy | bird\n")  # of no set in the table
    for dataset in ("Elsewhere", None):
        assert words_of("owl", dataset) == Words([], [], [])


def test_words_of_a_car() -> None:
    golf = words_of("1991 Volkswagen Golf Hatchback", "StanfordCars")
    assert {"1991 VW Golf Hatchback", "Volkswagen Golf Hatchback 1991"} <= {*golf.synonyms}
    model = "Volkswagen Golf Hatchback"  # two classes of the set bear this name
    assert model in golf.hypernyms and model not in golf.synonyms
    assert {"Volkswagen Golf", "Volkswagen car", "car"} <= {*golf.hypernyms}
    assert "Spyker C8 Coupe" in words_of("2009 Spyker C8 Coupe", "StanfordCars").synonyms
    hummer = words_of("2000 AM General Hummer SUV", "StanfordCars")
    assert hummer.hypernyms[0] == "AM General Hummer"
    assert "car" not in words_of("2011 Ford Ranger SuperCab", "StanfordCars").hypernyms
    assert car_words("Golf", {}) == ([], [], [])
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
    assert misspellings("book") == ["boook", "bok"], "equal letters are not swapped"
    assert misspellings("C/V") == misspellings("") == []


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


# Latin letters (with accents), digits, and what stands within names: O'Neill, AT&T, C-3PO, St. Paul
FORM = re.compile(r"[^\W_](?:[^\W_]|[ &.'-])*")
NAMES, A_KIND, WORDS, LENGTH = 5_000, 40, 5, 40


def test_vocabulary_has_no_fault_and_is_read_whole() -> None:
    """A file has a comment at its head, and nothing else but names, in order."""
    names = []
    for file in sorted(files("forgetting.models.words").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".txt"):
            text = file.read_text(encoding="utf-8")
            lines = text.removesuffix("\n").split("\n")
            assert text.endswith("\n") and lines[0].startswith("# "), file.name
            listed = [line for line in lines if not line.startswith("# ")]
            assert len(listed) >= A_KIND and listed == sorted(listed, key=str.casefold), file.name
            names += listed
    for name in names:
        assert FORM.fullmatch(name) and name == " ".join(name.split())
        assert name == unicodedata.normalize("NFC", name)
        assert len(name.split()) <= WORDS and len(name) <= LENGTH, name
    folded = {name.casefold() for name in names}
    assert len(folded) == len(names) >= NAMES
    assert generic_names() == names
