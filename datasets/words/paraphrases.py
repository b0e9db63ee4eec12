"""The same class in other words, for an audit after the class was forgotten.

Texts are made from names alone, so no data set need be there. A set's evaluation prompt is never
among them, nor the bare name: both are in its bundle.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from datasets.names import clean_name, key
from datasets.table import SETS, SetSpec
from datasets.words.forms import cases, misspellings, plural
from datasets.words.lexicon import words_of

# In the manner of the prompts that CLIP was first measured with, in words of our own.
TEMPLATES = (
    "a snapshot in which a {} can be seen",
    "a close-up view of one {}",
    "a blurred picture with a {} in it",
    "a sharp, well-lit picture of the {}",
    "a dark, grainy photograph showing a {}",
    "a black and white photograph of one {}",
    "an old, faded photograph of the {}",
    "a heavily cropped photograph: part of a {}",
    "a tiny {} in the far distance",
    "a huge {} that fills the whole frame",
    "a {} seen from the side",
    "a {} seen from above",
    "several of them: one {} beside another",
    "a pencil sketch after a {}",
    "an oil painting whose subject is a {}",
    "a watercolour with a {} in the foreground",
    "a woodcut print of the {}",
    "a comic-book drawing of some {}",
    "a computer-rendered {}",
    "a plastic model in the shape of a {}",
    "a {} embroidered on cloth",
    "a statue that represents a {}",
    "a wall sprayed with a picture of a {}",
    "a postage stamp with the {} on it",
    "a lovely {}, photographed outdoors",
    "an odd-looking {}, photographed indoors",
    "this picture was taken of my {}",
    "what you see here is called {}",
)
KINDS = ("template", "synonym", "hypernym", "description", "case", "plural", "misspelling")


class Paraphrase(NamedTuple):
    """A text that names or describes a class, and how it differs from the name: see `KINDS`."""

    text: str
    kind: str


def paraphrases(
    name: str,
    dataset: str | None = None,
    template: str | None = None,
    classnames: Iterable[str] = (),
) -> list[Paraphrase]:
    """Other texts for a class, each once, in the order of `KINDS`.

    Synonyms, hypernyms, plurals and misspellings come bare and in the evaluation prompt, so that
    they compete with the other classes' prompts on equal terms. CLIP's own tokenizer reads small
    letters only: under it another case is no other text.

    Args:
        dataset: the set of the class, for its words and its prompt; None or one that is not in the
            table: only what follows from the name, and from WordNet where it is installed.
        template: the evaluation prompt with one `{}`; None for the set's own.
        classnames: the set's classes; a word that is the name of another class is left out.

    Raises:
        ProblemError: a list of words that cannot be read (see `datasets.words.lexicon`).
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
