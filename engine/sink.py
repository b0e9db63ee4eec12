"""Numbers of a run for TensorBoard or Weights & Biases: what logs.json gets, as it comes."""

from collections.abc import Mapping
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

from torch import Tensor

from forgetting.errors import ProblemError
from forgetting.io import need

TENSORBOARD = "torch.utils.tensorboard"
PROJECT = "class-forgetting"
POINTS = 200  # of a curve


def require(kind: str) -> None:
    """ProblemError unless the packages of a kind of sink are installed."""
    need(TENSORBOARD, "tensorboard")
    if kind == "wandb":
        need("wandb")


class Sink(ExitStack):
    """Takes the numbers of a run while it is open, in a new file of `folder`. ProblemError if
    Weights & Biases does not let the run in."""

    def __init__(self, kind: str, folder: Path) -> None:
        super().__init__()
        if kind == "wandb":  # it takes what TensorBoard is given
            folder.mkdir(parents=True, exist_ok=True)
            options = {"project": PROJECT, "dir": folder, "sync_tensorboard": True}
            try:
                run = import_module("wandb").init(**options)
            except Exception as error:  # no account, no network
                words = "`wandb login` first, or WANDB_MODE=offline"
                raise ProblemError(f"--log wandb: {str(error).splitlines()[0]}; {words}") from error
            self.callback(run.finish)
        self._writer = import_module(TENSORBOARD).SummaryWriter(str(folder))
        self.callback(self._writer.close)

    def row(self, name: str, numbers: Mapping[str, float | None], step: int) -> None:
        """What was found for `name`, number `step` of its kind; None is left out."""
        for tag, value in numbers.items():
            if value is not None:
                self._writer.add_scalar(tag, value, step)
        self._writer.add_text("name", name, step)

    def curve(self, tag: str, values: Tensor) -> None:
        """A number that changed from step to step; (n,): some of them evenly, and the last."""
        last = len(values) - 1
        for step in sorted({*range(0, last, max(1, last // POINTS)), last}):
            self._writer.add_scalar(tag, float(values[step]), step)
