"""Other spellings of a name: another case, the plural, typing mistakes."""

import re

# fmt: off
IRREGULAR = {
    "calf": "calves", "child": "children", "dingo": "dingoes", "echo": "echoes", "foot": "feet",
    "goose": "geese", "half": "halves", "harvestman": "harvestmen", "hero": "heroes",
    "knife": "knives", "leaf": "leaves", "lens": "lenses", "life": "lives", "loaf": "loaves",
    "man": "men", "mouse": "mice", "ox": "oxen", "person": "people", "potato": "potatoes",
    "quiz": "quizzes", "scarf": "scarves", "shelf": "shelves", "snowman": "snowmen",
    "thief": "thieves", "tomato": "tomatoes", "tooth": "teeth", "wife": "wives", "wolf": "wolves",
    "woman": "women",
}
# fmt: on
SAME = {"bison", "bonsai", "chassis", "deer", "hairless", "malinois", "moose", "sheep", "snoopy"}
# Endings whose plural is the word itself: fish, peoples and breeds, and what is plural already.
SAME_ENDING = re.compile(r"(fish|[^e]ese|es|[bcdfgklmnprtwy]s)$")
HEAD = re.compile(r"(\S+)( of | in the |-de-)(.+)")  # "bird of paradise": its head comes first
RULES = (  # ending -> what replaces it; the first that fits
    (r"(?<=[aeiouy]s)is$", "es"),
    (r"(?<=[sxz])$|(?<=[cs]h)$", "es"),
    (r"(?<=[^aeiou])y$", "ies"),
    (r"$", "s"),
)
SHORTEST = 3  # letters of a word that a mistake leaves readable


def cases(name: str) -> list[str]:
    """The name in capitals, in small letters and with capital initials, without itself."""
    forms = [name.upper(), name.lower(), name.title()]
    return [form for form in dict.fromkeys(forms) if form != name]


def plural(name: str) -> str | None:
    """The plural of a name by the rules of English; None if it is plural already or no word."""
    *front, last = name.split(" ")
    small = last.lower()
    is_plural = small in SAME or SAME_ENDING.search(small)
    is_plural = is_plural and not last[-1:].isupper()  # an abbreviation: "Regal GS"
    if not last[-1:].isalnum() or (is_plural and small not in IRREGULAR):
        return None
    if head := HEAD.fullmatch(name):
        return _plural(head[1]) + head[2] + head[3]
    return " ".join([*front, _plural(last)])


def _plural(word: str) -> str:
    if word.lower() in IRREGULAR:
        return word[0] + IRREGULAR[word.lower()][1:]
    if len(word) == 1 and word.islower():
        return f"{word}'s"
    if word[-1:].isupper():
        return word + "s"
    rule, ending = next(pair for pair in RULES if re.search(pair[0], word, re.IGNORECASE))
    return re.sub(rule, ending, word, count=1, flags=re.IGNORECASE)


def misspellings(name: str) -> list[str]:
    """Two mistakes: two inner letters swapped in the longest word, one left out in the last one;
    fewer where no word is long enough. First and last letters of the words stay."""
    words = [match for match in re.finditer(r"[^\W\d_]+", name) if len(match[0]) >= SHORTEST]
    if not words:
        return []
    longest = max(words, key=lambda match: len(match[0]))
    middle = len(words[-1][0]) // 2
    forms = [
        name[: longest.start()] + _swap(longest[0]) + name[longest.end() :],
        name[: words[-1].start() + middle] + name[words[-1].start() + middle + 1 :],
    ]
    return [form for form in dict.fromkeys(forms) if form != name]


def _swap(word: str) -> str:
    """Exchange the two inner neighbours nearest to the middle that differ."""
    middle = (len(word) - 1) / 2
    places = [i for i in range(1, len(word) - 2) if word[i].lower() != word[i + 1].lower()]
    if not places:
        return word[:2] + word[1:]  # too short to swap: the second letter twice
    i = min(places, key=lambda i: (abs(i + 0.5 - middle), i))
    return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
