"""Forget names in a CLIP from text alone: a low-rank change of its text projection.

    forget           forget names in any CLIP; gives a Forgotten
    Forgotten        what was forgotten: apply, undo, verify, flag, save, load, share
    TextEmbeddings   a hosted encoder, or an index of images, in the place of the model
    hide_in_index    change stored image vectors, so that searches miss what was forgotten
    restore_index    take that back
    none_of_these    which images show none of what some texts name
    ForgetProblem    the paper's objective, on hidden states of your own
    solve_exact      its optimum, with a proof
    solve_lora       its descent by LoRA, as in the paper
    ProblemError     the only exception: one line that says what is wrong and what would be right

Everything else is imported from its module: `from forgetting.adapter import load_adapter`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors read
    from forgetting.api import forget as forget
    from forgetting.deploy.embeddings import hide_in_index as hide_in_index
    from forgetting.deploy.embeddings import restore_index as restore_index
    from forgetting.errors import ProblemError as ProblemError
    from forgetting.flag import none_of_these as none_of_these
    from forgetting.forgotten import Forgotten as Forgotten
    from forgetting.models.text_embeddings import TextEmbeddings as TextEmbeddings
    from forgetting.problem import ForgetProblem as ForgetProblem
    from forgetting.solvers.exact import solve_exact as solve_exact
    from forgetting.solvers.lora import solve_lora as solve_lora

__version__ = "0.2.0"
_MODULES = {
    "forget": "api",
    "Forgotten": "forgotten",
    "TextEmbeddings": "models.text_embeddings",
    "hide_in_index": "deploy.embeddings",
    "restore_index": "deploy.embeddings",
    "none_of_these": "flag",
    "ForgetProblem": "problem",
    "solve_exact": "solvers.exact",
    "solve_lora": "solvers.lora",
    "ProblemError": "errors",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first used: torch takes seconds."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
