"""Other words for StanfordCars' names by rule: a name is year, make, model and body, in this order.

`2012 Volkswagen Golf Hatchback` is also called `2012 VW Golf Hatchback`, and is a hatchback.
"""

import re
from collections.abc import Mapping, Sequence

TWO_WORDS = ("AM General", "Aston Martin", "Land Rover")  # makes; all others are one word
SHORT = {"Chevrolet": "Chevy", "Mercedes-Benz": "Mercedes", "Volkswagen": "VW"}


def car_words(
    name: str, bodies: Mapping[str, Sequence[list[str]]]
) -> tuple[list[str], list[str], list[str]]:
    """Synonyms, hypernyms and descriptions of a car's name; none for a name without a year. The
    name without its year is a synonym: `StanfordCars.txt` names those where it is not. `bodies`:
    last words of a name in small letters -> the same three of that body, from `bodies.txt`."""
    parts = re.fullmatch(rf"(\d{{4}}) (({'|'.join(TWO_WORDS)}|\S+)(.*))", name)
    if not parts:
        return [], [], []
    year, car, make, model = (part.strip() for part in parts.groups())
    synonyms = [car, f"{car} {year}"]
    if make in SHORT:
        synonyms.append(f"{year} {SHORT[make]} {model}")
    endings = [body for body in bodies if model.casefold().endswith(f" {body}")]
    body = max(endings, key=len, default="")
    if not body:
        return synonyms, [f"{make} car", "car"], [f"a car that {make} built in {year}"]
    (other,), (kind,), (looks,) = bodies[body]
    model = model[: -len(body)].strip()
    synonyms.append(f"{year} {make} {model} {other}")
    hypernyms = [f"{make} {model}", f"{make} {kind}", kind]
    return synonyms, hypernyms, [f"a {kind} that {make} built in {year}, with {looks}"]
