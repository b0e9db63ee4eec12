"""Class forgetting as mathematics: hidden states in, a low-rank change of the projection out.

This room knows no CLIP, no data set and no trainer: it imports torch and safetensors only and works
on anybody's embeddings. `ForgetProblem` states what is wanted, `solve_lora` is the paper's descent,
`Adapter` is what is stored of the answer.
"""

from forgetting.adapter import Adapter, load_adapter, projection_sha256, save_adapter
from forgetting.lora import LoraSettings, LoraSolution, solve_lora
from forgetting.problem import ForgetProblem, ProblemError
from forgetting.target import empty_target

__all__ = [
    "Adapter",
    "ForgetProblem",
    "LoraSettings",
    "LoraSolution",
    "ProblemError",
    "empty_target",
    "load_adapter",
    "projection_sha256",
    "save_adapter",
    "solve_lora",
]
