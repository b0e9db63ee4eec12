"""Class forgetting as mathematics: hidden states in, a low-rank change of the projection out.

This room knows no data set and no trainer: it imports torch, safetensors and tqdm only, and works
on anybody's embeddings. `forget` forgets names in anybody's CLIP, in one call, and gives a
`Forgotten`. Below it, `ForgetProblem` states the paper's problem: `solve_lora` is its descent,
`solve_exact` its optimum with a proof, `solve_each` and `solve_lora_each` the same for every class
of a set alone. `RetainSet` holds names to retain; `solve_constrained` is the form that removes a
class completely, `solve_constrained_each` that for thousands of requests. `Adapter` is what is
stored of an answer, and `forgetting.compose` joins adapters and gives them back.
"""

from forgetting.adapter import Adapter, load_adapter, projection_sha256, save_adapter
from forgetting.certificate import Certificate
from forgetting.checks import ProblemError
from forgetting.constrained import Ridge, solve_constrained, solve_constrained_each
from forgetting.each import solve_each, solve_requests
from forgetting.exact import settle, solve_exact, thresholds
from forgetting.forget import Forgotten, forget
from forgetting.lora import LoraSettings, LoraSolution, solve_lora, solve_lora_each
from forgetting.problem import AUTO, ForgetProblem
from forgetting.retain import Group, RetainSet
from forgetting.spectrum import Spectrum
from forgetting.statistics import RetainStatistics
from forgetting.targets import (
    TARGETS,
    empty_target,
    opposite_target,
    orthogonal_target,
    specific_target,
)

__all__ = [
    "AUTO",
    "TARGETS",
    "Adapter",
    "Certificate",
    "ForgetProblem",
    "Forgotten",
    "Group",
    "LoraSettings",
    "LoraSolution",
    "ProblemError",
    "RetainSet",
    "RetainStatistics",
    "Ridge",
    "Spectrum",
    "empty_target",
    "forget",
    "load_adapter",
    "opposite_target",
    "orthogonal_target",
    "projection_sha256",
    "save_adapter",
    "settle",
    "solve_constrained",
    "solve_constrained_each",
    "solve_each",
    "solve_exact",
    "solve_lora",
    "solve_lora_each",
    "solve_requests",
    "specific_target",
    "thresholds",
]
