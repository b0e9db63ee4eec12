"""The methods, as Dassl trainers. Importing this package registers them by name."""

from trainers.forget_exact import ForgetExact
from trainers.forget_lora import ForgetLoRA

__all__ = ["ForgetExact", "ForgetLoRA"]
