"""Numbers of a run for TensorBoard or Weights & Biases: what logs.json gets, as it comes.

An extra: logs.json has everything, and nothing here is read again.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from forgetting.errors import ProblemError

if TYPE_CHECKING:
    from torch import Tensor

PACKAGES = {  # of a kind -> module to import, and name of the package
    "tensorboard": {"torch.utils.tensorboard": "tensorboard"},
    "wandb": {"torch.utils.tensorboard": "tensorboard", "wandb": "wandb"},
}
PROJECT = "class-forgetting"
POINTS = 200  # of a curve


def require(kind: str) -> None:
    """ProblemError unless the packages of a kind of sink are installed; "": none is wanted."""
    for module, package in PACKAGES.get(kind, {}).items():
        try:
            import_module(module)
        except ImportError as error:
            raise ProblemError(
                f"--log {kind} needs the package {package}: pip install {package}"
            ) from error


class Sink:
    """Takes the numbers of a run; one that is of no kind ("") takes them nowhere."""

    def __init__(self, kind: str, folder: Path) -> None:
        """`folder`: a new file is written there, and nothing that is there is touched.

        Raises ProblemError if Weights & Biases does not let the run in.
        """
        self._writer: Any = None
        self._open = ExitStack()
        if kind:
            if kind == "wandb":  # it takes what TensorBoard is given
                wandb = import_module("wandb")
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    run = wandb.init(project=PROJECT, dir=folder, sync_tensorboard=True)
                except Exception as error:  # no account, no network
                    raise ProblemError(
                        f"--log wandb: {str(error).splitlines()[0]}; `wandb login` first, or "
                        "WANDB_MODE=offline"
                    ) from error
                self._open.callback(run.finish)
            module = import_module("torch.utils.tensorboard")
            self._writer = module.SummaryWriter(str(folder))
            self._open.callback(self._writer.close)

    def row(self, name: str, numbers: Mapping[str, float | None], step: int) -> None:
        """What was found for `name`, number `step` of its kind; None is left out."""
        if self._writer:
            for tag, value in numbers.items():
                if value is not None:
                    self._writer.add_scalar(tag, value, step)
            self._writer.add_text("name", name, step)

    def curve(self, tag: str, values: Tensor) -> None:
        """A number that changed from step to step; (n,): some of them evenly, and the last."""
        if self._writer:
            last = len(values) - 1
            for step in sorted({*range(0, last, max(1, last // POINTS)), last}):
                self._writer.add_scalar(tag, float(values[step]), step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()
