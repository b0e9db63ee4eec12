"""Class forgetting as mathematics: hidden states in, a low-rank change of the projection out.

`forget` forgets names in anybody's CLIP, in one call, and gives a `Forgotten`. Below it,
`ForgetProblem` states the paper's problem, and `solve_exact` its optimum with a proof.

Each name is imported from its module when it is first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "errors": ("ProblemError",),
    "problem": ("AUTO", "ForgetProblem"),
    "solvers.certificate": ("Certificate",),
    "solvers.exact": ("solve_each", "solve_exact", "thresholds"),
    "solvers.lora": ("LoraSettings", "LoraSolution", "solve_lora", "solve_lora_each"),
    "solvers.constrained": ("Ridge", "solve_constrained", "solve_constrained_each"),
    "retain": ("Group", "RetainSet"),
    "targets": ("TARGETS",),
    "adapter": ("Adapter", "load_adapter", "projection_sha256", "save_adapter"),
    "forgotten": ("Forgotten",),
    "api": ("forget",),
    "models.text_embeddings": ("TextEmbeddings",),
    "flag": ("none_of_these",),
    "deploy.embeddings": ("hide_in_index", "restore_index"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
