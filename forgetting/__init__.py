"""Class forgetting as mathematics: hidden states in, a low-rank change of the projection out.

This room knows no CLIP, no data set and no trainer: it imports torch and safetensors only and works
on anybody's embeddings. `ForgetProblem` states what is wanted; `solve_lora` is the paper's descent,
`solve_exact` the optimum of the same objective with its proof, `solve_each` that for every class of
a set alone, `solve_constrained` the form that removes a class completely; `Adapter` is what is
stored of an answer. `forgetting.compose` joins adapters and gives them back.
"""

from forgetting.adapter import Adapter, load_adapter, projection_sha256, save_adapter
from forgetting.certificate import Certificate
from forgetting.constrained import Ridge, solve_constrained
from forgetting.each import solve_each
from forgetting.exact import auto_lamb_forget, solve_exact, thresholds
from forgetting.lora import LoraSettings, LoraSolution, solve_lora
from forgetting.problem import ForgetProblem, ProblemError
from forgetting.reduction import Spectrum
from forgetting.statistics import RetainStatistics
from forgetting.target import empty_target, opposite_target, orthogonal_target, specific_target

__all__ = [
    "Adapter",
    "Certificate",
    "ForgetProblem",
    "LoraSettings",
    "LoraSolution",
    "ProblemError",
    "RetainStatistics",
    "Ridge",
    "Spectrum",
    "auto_lamb_forget",
    "empty_target",
    "load_adapter",
    "opposite_target",
    "orthogonal_target",
    "projection_sha256",
    "save_adapter",
    "solve_constrained",
    "solve_each",
    "solve_exact",
    "solve_lora",
    "specific_target",
    "thresholds",
]
