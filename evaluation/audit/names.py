"""The names of measures, attackers and ways of relearning, and what they are called in words."""

MEASURES = (  # each a module of this package with a function `measure`, in the order they run in
    "examples",
    "paraphrase",
    "neighbours",
    "destinations",
    "confusion",
    "residue",
    "retrieval",
    "undo",
    "relearning",
)
ATTACKERS = {  # what each attacker holds
    "original_known": "the changed weights and the original",
    "two_adapters": "two changed models",
    "alone": "the changed weights alone",
}
RELEARNING = {  # how each method uses the images
    "cache": "kept beside the model",
    "probe": "a classifier on top",
    "refit": "its name learnt anew",
}
