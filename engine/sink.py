"""Numbers of a run for TensorBoard or Weights & Biases: what logs.json gets, as it comes."""

from collections.abc import Mapping
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

from torch import Tensor

from forgetting.io import foreign, need

TENSORBOARD = "torch.utils.tensorboard"
POINTS = 200  # of a curve


class Sink(ExitStack):
    """Takes the numbers of a run while it is open, in a new file of `folder`. ProblemError if
    Weights & Biases does not let the run in."""

    def __init__(self, kind: str, folder: Path) -> None:
        super().__init__()
        if kind == "wandb":  # it takes what TensorBoard is given
            folder.mkdir(parents=True, exist_ok=True)
            with foreign("no run of wandb begins (`wandb login` first, or WANDB_MODE=offline)"):
                options = {"project": "class-forgetting", "dir": folder, "sync_tensorboard": True}
                self.callback(need(kind).init(**options).finish)
        self.writer = self.enter_context(import_module(TENSORBOARD).SummaryWriter(str(folder)))

    def row(self, name: str, numbers: Mapping[str, float | None], step: int) -> None:
        """What was found for `name`, number `step` of its kind; None is left out."""
        for tag, value in numbers.items():
            if value is not None:
                self.writer.add_scalar(tag, value, step)
        self.writer.add_text("name", name, step)

    def curve(self, tag: str, values: Tensor) -> None:
        """A number that changed from step to step; (n,): some of them evenly, and the last."""
        last = len(values) - 1
        for step in sorted({*range(0, last, max(1, last // POINTS)), last}):
            self.writer.add_scalar(tag, float(values[step]), step)
