"""The methods, as Dassl trainers. Importing this package registers them by name."""

from trainers.forget_ascent import ForgetAscent
from trainers.forget_exact import ForgetExact
from trainers.forget_leace import ForgetLEACE
from trainers.forget_lora import ForgetLoRA
from trainers.forget_noise import ForgetNoise
from trainers.forget_nothing import ForgetName, ForgetNothing
from trainers.forget_nullspace import ForgetNullSpace
from trainers.forget_uce import ForgetUCE
from trainers.forget_zero import ForgetZero

METHODS = (
    ForgetLoRA,
    ForgetExact,
    ForgetNothing,
    ForgetName,
    ForgetZero,
    ForgetNoise,
    ForgetNullSpace,
    ForgetUCE,
    ForgetLEACE,
    ForgetAscent,
)

__all__ = ["METHODS", *(method.__name__ for method in METHODS)]
