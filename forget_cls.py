"""The classes to forget, edited by hand.

`all_ds` and `mini_ds` are groups of data sets: when classes of one set are forgotten, the other
sets of its group are evaluated too. `forget_classes_all` names the classes of each set; they are
forgotten one by one, each from the original model, or all of a set at once with MULTICLASS 1.
Names may be spelled with underscores or in another case than the data set's own.
`--forget NAME` on the command line replaces a set's list for one run.
`forget_prompts` may give a class several texts: templates with {} for its name, synonyms,
descriptions. Without an entry a class is forgotten by its bare name.
`protect` names what must not be harmed, such as a near neighbour of a forgotten class
(ForgetExact).
"""

all_ds = ["StanfordCars", "StanfordDogs", "Caltech101", "OxfordFlowers"]
mini_ds = ["MiniDigits", "MiniLetters", "MiniSymbols", "MiniShapes"]

forget_classes_all = {
    "StanfordDogs": ["Pekinese", "toy poodle", "Scotch terrier"],
    "StanfordCars": [
        "2009 Spyker C8 Coupe",
        "2010 Dodge Ram Pickup 3500 Crew Cab",
        "2011 Ford Ranger SuperCab",
    ],
    "Caltech101": ["euphonium", "minaret", "platypus"],
    "OxfordFlowers": ["trumpet creeper", "gazania", "tree mallow"],
    "MiniDigits": ["digit two", "digit five", "digit eight"],
    "MiniLetters": ["latin capital letter a", "latin capital letter m", "latin capital letter s"],
    "MiniSymbols": ["anchor", "umbrella", "infinity"],
    "MiniShapes": ["green triangle", "blue star", "yellow heart"],
}

# for example {"StanfordDogs": {"Pekinese": ["{}", "a photo of a {}.", "pekingese dog"]}}
forget_prompts = {}

protect = []  # for example ["2012 Audi S4 Sedan"]
