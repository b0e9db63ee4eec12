"""A full checkpoint from an adapter and the weights that it was made for.

    python -m clip.apply ADAPTER OUT [--weights PATH] [--cache cache]

OUT is a plain state dict in OpenAI's layout: for open_clip as `pretrained=OUT`, for OpenAI's code
as `clip.model.build_model(torch.load(OUT))`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from clip.architectures import identity_sha256, preprocessing
from clip.source import ClipSource
from engine.cli import Parser, add_setting, run
from engine.config import FeatureSettings
from engine.files import write_json_atomic
from engine.log import logger
from forgetting.adapter import Adapter, load_adapter, projection_sha256
from forgetting.errors import ProblemError
from forgetting.io import atomic_path, refuse_existing


def save_full_model(source: ClipSource, adapter: Adapter, path: str | Path) -> None:
    """Write the state dict of `source` with the adapter's change, whole or not at all.

    The changed projection is float32, also where the file is in half precision: that is what was
    measured. Everything else is what the original file holds, to the bit. Beside it comes a JSON
    file with the model's config in open_clip's form, since weights alone do not say how they
    compute. Raises ProblemError if one of the two exists or the change has another shape.
    """
    path = Path(path)
    arch, beside = source.architecture, path.with_suffix(".json")
    places = [path] if beside == path else [path, beside]
    for place in places:
        refuse_existing(place)
    projection = source.projection  # loading the model also proves that the file fits it
    shape = (len(adapter.left), adapter.right.shape[1])
    if shape != projection.shape:
        raise ProblemError(
            f"the change is {shape}, but {source.arch} has a projection of "
            f"{tuple(projection.shape)}"
        )
    state = {} if arch.is_transformers else source.architecture.read()[0]
    if getattr(state.get("text_projection"), "shape", None) != projection.shape:
        raise ProblemError(f"{source.arch} has no text_projection in OpenAI's layout to be changed")
    state["text_projection"] = adapter.changed(projection)
    with atomic_path(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # what torch makes of a full disk
            raise ProblemError(f"cannot write {path}: {str(error).splitlines()[0]}") from error
    if len(places) > 1:
        config = {"model_cfg": arch.model_config(), "preprocess_cfg": preprocessing(arch)}
        write_json_atomic(config, beside, indent=1)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(prog="python -m clip.apply", description=__doc__.splitlines()[0])
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter file of a forgotten class")
    parser.add_argument("out", metavar="OUT", help="checkpoint to write; must not exist")
    parser.add_argument("--weights", help="the original checkpoint; default: the published one")
    add_setting(parser, "--cache", FeatureSettings, "cache")
    args = parser.parse_args(argv)

    out = Path(args.out)
    refuse_existing(out)
    folder = out.absolute().parent
    if not folder.is_dir():  # a typing error must not become a folder
        raise ProblemError(f"no folder {folder} to write {out.name} into; make it first")
    adapter = load_adapter(args.adapter)
    source = ClipSource(adapter.backbone, args.weights, args.cache)
    if projection_sha256(source.projection) != adapter.projection_sha256:
        raise ProblemError(
            f"adapter {args.adapter} was made for other weights (sha256 {adapter.weights[:16]}) "
            f"than {source.weights_files[0]}; give the original ones by --weights"
        )
    own = identity_sha256(source.architecture)
    if adapter.settings.get("model", own) != own:
        raise ProblemError(
            f"adapter {args.adapter} was made for a model of other activation, preprocessing or "
            f"tokenizer than {source.arch} has now"
        )
    save_full_model(source, adapter, out)
    logger.info(f"clip: {adapter.backbone} without {', '.join(adapter.classes)} written to {out}")


def cli(argv: list[str] | None = None) -> int:
    """`main` for the shell."""
    return run(main, argv)


if __name__ == "__main__":
    sys.exit(cli())
