"""Other texts for a class, to ask for it after it was forgotten. They are made from names alone, so
no data set need be there. A set's evaluation prompt and the bare name are never among them.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from datasets.names import clean_name, entries, key
from datasets.table import SETS, SetSpec
from datasets.words.forms import cases, misspellings, plural
from datasets.words.lexicon import words_of

TEMPLATES = tuple(text for _, text in entries(Path(__file__).with_name("templates.txt"), "texts"))
KINDS = ("template", "synonym", "hypernym", "description", "case", "plural", "misspelling")


class Paraphrase(NamedTuple):
    """A text that names or describes a class, and how it differs from the name: see `KINDS`."""

    text: str
    kind: str


def paraphrases(
    name: str,
    dataset: str | None = None,  # None or not of the table: no listed words
    template: str | None = None,  # the evaluation prompt with one `{}`; None: the set's own
    classnames: Iterable[str] = (),  # of the set; no word is the name of another class
) -> list[Paraphrase]:
    """Other texts for a class, each once, in the order of `KINDS`.

    Synonyms, hypernyms, plurals and misspellings come bare and in the evaluation prompt, so that
    they compete with the other classes' prompts on equal terms.
    """
    name = clean_name(name)
    template = template or (SETS[dataset].template if dataset in SETS else SetSpec.template)
    words = words_of(name, dataset, [other for other in classnames if key(other) != key(name)])
    many = plural(name)

    def bare_and_in_prompt(words: list[str]) -> list[str]:
        return [text for word in words for text in (word, template.replace("{}", word))]

    texts = {
        "template": [form.replace("{}", name) for form in TEMPLATES],
        "synonym": bare_and_in_prompt(words.synonyms),
        "hypernym": bare_and_in_prompt(words.hypernyms),
        "description": words.descriptions,
        "case": cases(name),
        "plural": [many, template.replace("a {}", "{}").replace("{}", many)] if many else [],
        "misspelling": bare_and_in_prompt(misspellings(name)),
    }
    kinds: dict[str, str] = {}
    for kind in KINDS:
        for text in texts[kind]:
            kinds.setdefault(text, kind)
    return [Paraphrase(text, kind) for text, kind in kinds.items()]
