"""From a data set and a CLIP to a FeatureBundle: the stage that is run once.

python -m clip.features DATASET ARCH [--root data] [--images PATH] [--weights PATH]
                        [--cache cache] [--precision fp32] [--out DIR] [--audit] [--launcher ray]
"""

import os
import sys
from pathlib import Path

import torch

import datasets
from clip.architectures import architecture, identity
from clip.audit_texts import with_audit
from clip.bundle import AUDIT_HIDDEN, FeatureBundle, bundle_path
from clip.cache import FeatureCache
from clip.source import ClipSource
from engine.cli import Parser, add_setting, run
from engine.config import DatasetSettings, FeatureSettings, ModelSettings
from engine.log import logger
from engine.ray import LauncherSettings, add_launcher, launcher
from forgetting.errors import ProblemError
from forgetting.io import refuse_existing

SPLIT = "test"
BARE = "{}"  # the template of the texts to forget and to retain


def build_bundle(
    dataset: str,  # of `datasets.SETS`; any other name for images of one's own
    source: ClipSource,
    root: str | Path,  # holds the images of the sets of the table
    template: str | None = None,  # the evaluation prompt with one `{}`; None: the set's own
    batch_size: int | None = None,  # images encoded at once; None: 32 on a CPU, 256 on a GPU
    workers: int | None = None,  # processes that load images; None: see `loaders`
    own: str = "",  # images of one's own, a folder or a CSV file (see `datasets.spec`)
    how: LauncherSettings | None = None,  # where images are encoded; None: here
) -> FeatureBundle:
    """Encode a data set's test images and texts, or read what the source's cache has of them.

    Class names keep the data set's spelling in `classnames`; in texts underscores are spaces.
    Raises ProblemError for an unknown name, missing or broken images, or weights that do not fit.
    """
    row = datasets.spec(dataset, own)
    template = row.template if template is None else template
    if template.count(BARE) != 1:
        raise ProblemError(f"template {template!r} must hold the class name's place {BARE} once")
    images = datasets.load(dataset, root, own)
    items = images.test
    classnames = list(images.classnames)
    names = [datasets.clean_name(name) for name in classnames]
    retain_names = [datasets.clean_name(name) for name in datasets.retain_vocabulary(dataset)]

    stored = FeatureCache(source, how)
    workers = loaders(source.device) if workers is None else workers
    files = [item.impath for item in items]
    projection, bias, known = stored.projection()
    model = identity(source.architecture)
    extra = {"forget_template": BARE, "model": model, "identity": known}
    if source.precision != "fp32":
        extra["precision"] = source.precision
    bundle = FeatureBundle(
        image_features=stored.images(f"{dataset}-{SPLIT}", files, batch_size, workers),
        labels=torch.tensor([item.label for item in items]),
        class_hidden=stored.texts([template.replace(BARE, name) for name in names]),
        forget_hidden=stored.texts(names),
        retain_hidden=stored.texts(retain_names),
        neutral_hidden=stored.texts([""]),
        text_projection=projection,
        text_bias=bias,
        backbone=source.arch,
        weights=source.weights_sha256,
        dataset=dataset,
        split=SPLIT,
        template=template,
        classnames=classnames,
        retain_names=retain_names,
        extra=extra,
    )
    bundle.check(f"of {dataset} under {source.arch}, weights {source.weights_files[0]}")
    return bundle


def loaders(device: torch.device) -> int:
    """How many processes load images: none where a model needs both of two cores, else up to 8."""
    cores = os.cpu_count() or 1
    return 0 if device.type == "cpu" and cores <= 2 else min(8, max(1, cores - 1))


def main(argv: list[str] | None = None) -> None:
    """The command line of this stage alone."""
    parser = Parser(prog="python -m clip.features", description=__doc__.splitlines()[0])
    parser.add_argument("dataset", metavar="DATASET", help="data set, for example StanfordDogs")
    parser.add_argument("arch", metavar="ARCH", help="architecture, for example ViT-B/16")
    add_setting(parser, "--root", DatasetSettings, "root")
    add_setting(parser, "--images", DatasetSettings, "images", metavar="PATH")
    parser.add_argument("--weights", help="a checkpoint of ARCH; default: the published one")
    add_setting(parser, "--cache", FeatureSettings, "cache")
    add_setting(parser, "--precision", ModelSettings, "precision")
    parser.add_argument("--out", help="also write the bundle into this folder")
    about = "also encode every class in other words, for an audit that has the bundle alone"
    parser.add_argument("--audit", action="store_true", help=about)
    add_launcher(parser)
    args = parser.parse_args(argv)
    how = launcher(args)

    dataset = datasets.spec(args.dataset, args.images).name
    out = args.out and bundle_path(args.out, architecture(args.arch).name, dataset)
    if out:
        refuse_existing(out)
    source = ClipSource(args.arch, args.weights, args.cache, precision=args.precision)
    bundle = build_bundle(dataset, source, args.root, own=args.images, how=how)
    count, folder = f"{len(bundle.labels)} images", FeatureCache(source).folder
    if args.audit:
        bundle = with_audit(bundle, source)
        count += f", {len(bundle.extra_tensors[AUDIT_HIDDEN])} other words"
    classes = len(bundle.classnames)
    logger.info(f"clip: {dataset} under {args.arch}: {classes} classes, {count}, kept in {folder}")
    if out:
        bundle.save(out)
        logger.info(f"clip: bundle written to {out}")


if __name__ == "__main__":
    sys.exit(run(main))
