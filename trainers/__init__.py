"""The methods, as Dassl trainers. Importing this package registers them by name."""

from forgetting.context import ExactSettings
from forgetting.solvers.lora import LoraSettings
from trainers import baselines, exact, paper  # noqa: F401

# Every method and the dataclass of its own constants; None: it has none. They are set by
# TRAINER.METHOD.FIELD in capitals.
SETTINGS = {
    "ForgetLoRA": LoraSettings,
    "ForgetOptimum": None,
    "ForgetExact": ExactSettings,
    "ForgetNothing": None,
    "ForgetName": None,
    "ForgetZero": None,
    "ForgetNoise": None,
    "ForgetNullSpace": baselines.NullSpaceSettings,
    "ForgetUCE": baselines.UceSettings,
    "ForgetLEACE": None,
    "ForgetAscent": baselines.AscentSettings,
}
