"""Image transforms by the names in `cfg.INPUT.TRANSFORMS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torchvision import transforms as T
from yacs.config import CfgNode

from engine.errors import unknown

INTERPOLATION_MODES = {
    mode: T.InterpolationMode(mode) for mode in ("bilinear", "bicubic", "nearest")
}
CROPS = ("random_crop", "random_resized_crop")  # these bring an image to its size themselves


def interpolation(cfg: CfgNode) -> T.InterpolationMode:
    """The mode that `cfg.INPUT.INTERPOLATION` names; UserError if there is none."""
    name = cfg.INPUT.INTERPOLATION
    if name not in INTERPOLATION_MODES:
        raise unknown("INPUT.INTERPOLATION", name, INTERPOLATION_MODES)
    return INTERPOLATION_MODES[name]


def _random_translation(cfg: CfgNode) -> Callable:
    """Half of the time as it is, else enlarged by an eighth and cropped anywhere."""
    size = cfg.INPUT.SIZE
    larger = [round(side * 1.125) for side in size]
    return T.RandomChoice([T.Resize(size), T.Compose([T.Resize(larger), T.RandomCrop(size)])])


# In the order in which they are applied, whatever the order in the config.
ON_IMAGES: dict[str, Callable[[CfgNode], Callable]] = {
    "random_translation": _random_translation,
    "random_crop": lambda cfg: T.RandomCrop(cfg.INPUT.SIZE, padding=cfg.INPUT.CROP_PADDING),
    "random_resized_crop": lambda cfg: T.RandomResizedCrop(
        cfg.INPUT.SIZE, scale=cfg.INPUT.RRCROP_SCALE, interpolation=interpolation(cfg)
    ),
    "random_flip": lambda cfg: T.RandomHorizontalFlip(),
}
# center_crop is always done in testing; the name is allowed because configs of the field have it.
NAMES = (*ON_IMAGES, "center_crop", "normalize")


def build_transform(
    cfg: CfgNode, is_train: bool = True, choices: Sequence[str] | None = None
) -> Callable | None:
    """From a PIL image to a (3, height, width) float32 tensor, for training or for testing.

    `choices` overrides `cfg.INPUT.TRANSFORMS`. Testing resizes the smaller edge and crops the
    centre; training resizes, unless a random crop does, and applies the random choices. None if
    `cfg.INPUT.NO_TRANSFORM`. UserError for a name that is not in `NAMES` (Dassl has more).
    """
    if cfg.INPUT.NO_TRANSFORM:
        print("Note: no transform is applied!")
        return None
    choices = cfg.INPUT.TRANSFORMS if choices is None else choices
    for name in choices:
        if name not in NAMES:
            raise unknown("INPUT.TRANSFORMS of the builtin engine", name, NAMES)

    size, mode = cfg.INPUT.SIZE, interpolation(cfg)
    steps: list[Callable]
    if is_train:
        steps = [] if set(CROPS) & set(choices) else [T.Resize(size, interpolation=mode)]
        steps += [make(cfg) for name, make in ON_IMAGES.items() if name in choices]
    else:
        steps = [T.Resize(max(size), interpolation=mode), T.CenterCrop(size)]
    steps.append(T.ToTensor())
    if "normalize" in choices:
        steps.append(T.Normalize(cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD))
    return T.Compose(steps)
