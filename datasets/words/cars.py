"""Other words for StanfordCars' names by rule: a name is year, make, model and body, in this order.

`2012 Volkswagen Golf Hatchback` is also called `2012 VW Golf Hatchback`, and is a hatchback.
"""

import re

TWO_WORDS = ("AM General", "Aston Martin", "Land Rover")  # makes; all others are one word
SHORT = {"Chevrolet": "Chevy", "Mercedes-Benz": "Mercedes", "Volkswagen": "VW"}
# Last words of a name -> (other words for that body, what it is a kind of, what it looks like).
BODIES = {
    "Sedan": ("saloon", "car", "four doors and a separate boot"),
    "Coupe": ("two-door coupe", "car", "two doors and a fixed sloping roof"),
    "Convertible": ("cabriolet", "car", "a roof that folds away"),
    "Hatchback": ("hatch", "car", "a rear door that opens upwards"),
    "Wagon": ("estate car", "car", "a long roof over the luggage space"),
    "SUV": ("sport utility vehicle", "car", "a high body and large wheels"),
    "Minivan": ("people carrier", "motor vehicle", "one tall cabin for a family"),
    "Van": ("box van", "motor vehicle", "a tall closed body"),
    "Wagon Van": ("passenger van", "motor vehicle", "a tall closed body with windows"),
    "Cargo Van": ("delivery van", "motor vehicle", "a tall closed body for goods"),
    "Passenger Van": ("minibus", "motor vehicle", "a tall closed body with windows"),
    "Cab": ("cab pickup truck", "pickup truck", "an open bed behind the cab"),
    "SuperCab": ("extended cab pickup truck", "pickup truck", "an open bed behind the cab"),
}


def car_words(name: str) -> tuple[list[str], list[str], list[str]]:
    """Synonyms, hypernyms and descriptions of a car's name; none for a name without a year. The
    name without its year is a synonym: `StanfordCars.txt` names those where it is not."""
    parts = re.fullmatch(rf"(\d{{4}}) (({'|'.join(TWO_WORDS)}|\S+)(.*))", name)
    if not parts:
        return [], [], []
    year, car, make, model = (part.strip() for part in parts.groups())
    synonyms = [car, f"{car} {year}"]
    if make in SHORT:
        synonyms.append(f"{year} {SHORT[make]} {model}")
    body = max((body for body in BODIES if model.endswith(f" {body}")), key=len, default="")
    if not body:
        return synonyms, [f"{make} car", "car"], [f"a car that {make} built in {year}"]
    other, kind, looks = BODIES[body]
    model = model.removesuffix(body).strip()
    synonyms.append(f"{year} {make} {model} {other}")
    hypernyms = [f"{make} {model}", f"{make} {kind}", kind]
    return synonyms, hypernyms, [f"a {kind} that {make} built in {year}, with {looks}"]
