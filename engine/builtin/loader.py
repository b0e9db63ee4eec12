"""From a list of Datum to batches, and `DataManager`, which does it for a set's splits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler
from torchvision import transforms as T
from yacs.config import CfgNode

from engine.builtin.registry import build_dataset
from engine.builtin.tools import read_image
from engine.builtin.transforms import build_transform, interpolation
from engine.errors import unknown
from engine.splits import Datum

SAMPLERS = {"RandomSampler": RandomSampler, "SequentialSampler": SequentialSampler}


class DatasetWrapper(Dataset):
    """Items are dicts with keys label, domain, impath, index, img (and img2, ... for a list of
    transforms; img0, resized only, with DATALOADER.RETURN_IMG0).

    In training an image is transformed DATALOADER.K_TRANSFORMS times; above 1, img is a list.
    """

    def __init__(
        self,
        cfg: CfgNode,
        data_source: Sequence[Datum],
        transform: Callable | Sequence[Callable] | None = None,
        is_train: bool = False,
    ) -> None:
        self.cfg = cfg
        self.data_source = data_source
        self.transform = transform
        self.is_train = is_train
        self.k_tfm = cfg.DATALOADER.K_TRANSFORMS if is_train else 1
        self.return_img0 = cfg.DATALOADER.RETURN_IMG0
        if self.k_tfm > 1 and transform is None:
            raise ValueError(f"K_TRANSFORMS is {self.k_tfm}, but there is no transform")
        plain = [T.Resize(cfg.INPUT.SIZE, interpolation=interpolation(cfg)), T.ToTensor()]
        if "normalize" in cfg.INPUT.TRANSFORMS:
            plain.append(T.Normalize(cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD))
        self.to_tensor = T.Compose(plain)

    def __len__(self) -> int:
        return len(self.data_source)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        datum = self.data_source[idx]
        image = read_image(datum.impath)
        item = {
            "label": datum.label,
            "domain": datum.domain,
            "impath": datum.impath,
            "index": idx,
        }
        several = isinstance(self.transform, list | tuple)
        for number, transform in enumerate(self.transform if several else [self.transform], 1):
            key = "img" if number == 1 else f"img{number}"
            item[key] = image if transform is None else self._transform_image(transform, image)
        if self.return_img0:
            item["img0"] = self.to_tensor(image)
        return item

    def _transform_image(self, transform: Callable, image: Any) -> Any:
        images = [transform(image) for _ in range(self.k_tfm)]
        return images[0] if len(images) == 1 else images


def build_data_loader(
    cfg: CfgNode,
    sampler_type: str = "SequentialSampler",
    data_source: Sequence[Datum] | None = None,
    batch_size: int = 64,
    n_domain: int = 0,
    n_ins: int = 2,
    tfm: Callable | Sequence[Callable] | None = None,
    is_train: bool = True,
    dataset_wrapper: type[Dataset] | None = None,
) -> DataLoader:
    """Batches of `data_source`; in training the last incomplete batch is dropped.

    `n_domain` and `n_ins` belong to samplers that only Dassl has. `dataset_wrapper` takes the
    place of `DatasetWrapper`. UserError for an unknown sampler; an empty source is refused.
    """
    if sampler_type not in SAMPLERS:
        raise unknown("sampler of the builtin engine", sampler_type, SAMPLERS)
    loader = DataLoader(
        (dataset_wrapper or DatasetWrapper)(cfg, data_source, transform=tfm, is_train=is_train),
        batch_size=batch_size,
        sampler=SAMPLERS[sampler_type](data_source),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        drop_last=is_train and len(data_source) >= batch_size,
        pin_memory=torch.cuda.is_available() and cfg.USE_CUDA,
    )
    assert len(loader) > 0, "the data source is empty"
    return loader


class DataManager:
    """The set that `cfg` names, with a loader for each of its splits.

    Attributes: dataset, train_loader_x, train_loader_u and val_loader (None without such a
    split), test_loader, num_classes, num_source_domains, lab2cname. As Dassl's it needs a
    non-empty train_x and test; a trainer that only evaluates builds its test loader itself.
    """

    def __init__(
        self,
        cfg: CfgNode,
        custom_tfm_train: Callable | Sequence[Callable] | None = None,
        custom_tfm_test: Callable | Sequence[Callable] | None = None,
        dataset_wrapper: type[Dataset] | None = None,
    ) -> None:
        self.dataset = dataset = build_dataset(cfg)
        tfm_train = custom_tfm_train or build_transform(cfg, is_train=True)
        tfm_test = custom_tfm_test or build_transform(cfg, is_train=False)

        def loader(source: list[Datum] | None, settings: CfgNode, is_train: bool) -> DataLoader:
            return build_data_loader(
                cfg,
                sampler_type=settings.SAMPLER,
                data_source=source,
                batch_size=settings.BATCH_SIZE,
                tfm=tfm_train if is_train else tfm_test,
                is_train=is_train,
                dataset_wrapper=dataset_wrapper,
            )

        loaders = cfg.DATALOADER
        unlabelled = loaders.TRAIN_X if loaders.TRAIN_U.SAME_AS_X else loaders.TRAIN_U
        self.train_loader_x = loader(dataset.train_x, loaders.TRAIN_X, True)
        self.train_loader_u = loader(dataset.train_u, unlabelled, True) if dataset.train_u else None
        self.val_loader = loader(dataset.val, loaders.TEST, False) if dataset.val else None
        self.test_loader = loader(dataset.test, loaders.TEST, False)
        self.num_classes = dataset.num_classes
        self.num_source_domains = len(cfg.DATASET.SOURCE_DOMAINS)
        self.lab2cname = dataset.lab2cname
        if cfg.VERBOSE:
            self.show_dataset_summary(cfg)

    def show_dataset_summary(self, cfg: CfgNode) -> None:
        """Print the name of the set, and the number of classes and of images in each split."""
        rows = {"Dataset": cfg.DATASET.NAME, "# classes": f"{self.num_classes:,}"}
        for split in ("train_x", "train_u", "val", "test"):
            if items := getattr(self.dataset, split):
                rows[f"# {split}"] = f"{len(items):,}"
        for label, value in rows.items():
            print(f"{label:<9}  {value}")
