"""The settings that all methods share, as dataclass fields: each class is a section of the config.

A key of the config is a field's name in capitals behind the name of its section: `FORGET.RANK`. A
method's own constants stand beside its code, and are listed in `trainers.SETTINGS`
(`TRAINER.FORGETLORA.LR`).
"""

from __future__ import annotations

from dataclasses import dataclass

from forgetting.settings import setting

AUTO = ("auto",)


@dataclass(frozen=True)
class RunSettings:
    """The top level."""

    output_dir: str = setting("output", "folder of the results", low=1)
    seed: int = setting(
        0,
        "seed of all random numbers; there is no run without one (Dassl's -1)",
        low=0,
        high=2**32 - 1,
    )
    log: str = setting(
        "",
        "also send the numbers of logs.json, and a descent's objective, to tensorboard or wandb",
        choices=("", "tensorboard", "wandb"),
    )
    use_cuda: bool = setting(True, "use a GPU where there is one")


@dataclass(frozen=True)
class DatasetSettings:
    name: str = setting("", "name of the data set")
    root: str = setting("data", "folder that holds the image sets", low=1)
    images: str = setting(
        "", "images of your own: a folder with a folder per class, or a CSV of path and class"
    )
    template: str = setting("", "evaluation prompt, {} for the class; empty: the data set's own")


@dataclass(frozen=True)
class LoaderSettings:
    num_workers: int | None = setting(
        None, "processes that load images; none: by the cores", low=0, high=128, optional=True
    )


@dataclass(frozen=True)
class TestLoaderSettings:
    batch_size: int | None = setting(
        None,
        "images that are encoded at once; none: 32 on a CPU, 256 on a GPU",
        low=1,
        high=65536,
        optional=True,
    )


@dataclass(frozen=True)
class ModelSettings:
    precision: str = setting(
        "fp32",
        "arithmetic of the image encoder; bf16 and fp16 are faster where the hardware has them, "
        "and change embeddings a little",
        choices=("fp32", "bf16", "fp16"),
    )
    init_weights: str = setting("", "checkpoint of the backbone; empty: download")


@dataclass(frozen=True)
class BackboneSettings:
    name: str = setting(
        "RN50",
        "RN50, ViT-B/16, ViT-L/14, ..., mini, open_clip:NAME[/PRETRAINED] or hf:DIR",
        low=1,
    )


@dataclass(frozen=True)
class TrainerSettings:
    name: str = setting("ForgetLoRA", "name of the method")


@dataclass(frozen=True)
class FeatureSettings:
    dir: str = setting("", "folder of feature bundles: no model, no images")
    cache: str = setting("cache", "folder for weights and encoded features", low=1)


@dataclass(frozen=True)
class ForgetSettings:
    """What is forgotten, from which inputs, and the constants that methods share."""

    classes: tuple[str, ...] = setting(
        (), "class to forget (repeatable), or all; without one: the list of forget_cls.py"
    )
    multiclass: bool = setting(False, "forget all classes at once")
    part: str = setting("", "i/n: of the requests every n-th from the i-th on; empty: all")
    overwrite: bool = setting(False, "do classes again that are done")
    save_model: bool = setting(False, "write the full state dict beside each adapter")
    protect: tuple[str, ...] = setting(
        (), "name that must not be harmed (repeatable); beside those of protect in forget_cls.py"
    )
    prompts: str = setting(
        "", "JSON file, class name -> texts; empty: forget_prompts of forget_cls.py"
    )
    retain_names: str = setting(
        "", "file of names to retain, one per line; empty: the data set's vocabulary"
    )
    target: str = setting(
        "",
        "where texts are sent: specific, opposite, orthogonal, empty, text:TEXT or vector:FILE",
    )
    beta: float = setting(
        0.1,
        "how far beyond zero opposite and specific go: margin for the class against harm",
        above=-1,
        high=1e6,
    )
    similarity: float = setting(
        0.95,
        "cosine with a forgotten text from which on a name is not retained; 1: all are",
        above=0,
        high=1,
    )
    terms: tuple[str, ...] = setting(
        ("forget", "preserve", "weight"),
        "terms of the paper's loss; leave one out to switch it off",
        low=1,
        choices=("forget", "preserve", "weight"),
    )
    lamb_preserve: float | None = setting(
        None, "weight of the retained texts; none: that of WEIGHTS", 0, 1e6, optional=True
    )
    lamb_forget: float | str | None = setting(
        None,
        "weight of the forgotten texts, auto: just above the one from which texts reach their "
        "target; none: that of WEIGHTS",
        low=0,
        high=1e6,
        choices=AUTO,
        optional=True,
    )
    lamb_weight: float = setting(1.0, "weight of the size of the change", 0, 1e6)
    rank: int = setting(5, "rank of the adapter", 1, 1024)
    alpha: float = setting(1.0, "scale of the adapter: times alpha / rank", 1e-6, 1e6)
    noise_std: float = setting(
        0.5, "noise on the empty prompt while it lies nearest to a class to forget", 0, 1e6
    )


@dataclass(frozen=True)
class UnlistedSettings:
    """The paper's weights for a backbone that `FORGET.WEIGHTS` does not name."""

    lamb_preserve: float = setting(0.3, "weight of the retained texts there", 0, 1e6)
    lamb_forget: float | str = setting(
        "auto", "weight of the forgotten texts there", 0, 1e6, choices=AUTO
    )


SECTIONS = {
    "": RunSettings,
    "DATASET": DatasetSettings,
    "DATALOADER": LoaderSettings,
    "DATALOADER.TEST": TestLoaderSettings,
    "MODEL": ModelSettings,
    "MODEL.BACKBONE": BackboneSettings,
    "TRAINER": TrainerSettings,
    "FEATURES": FeatureSettings,
    "FORGET": ForgetSettings,
    "FORGET.UNLISTED": UnlistedSettings,
}
