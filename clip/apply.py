"""A full checkpoint from an adapter and the weights that it was made for.

    python -m clip.apply ADAPTER OUT [--weights PATH] [--cache cache]

OUT is a plain state dict in OpenAI's layout: for open_clip as `pretrained=OUT`, for OpenAI's code
as `clip.model.build_model(torch.load(OUT))`.
"""

import sys
from pathlib import Path

from clip.architectures import identity_sha256
from clip.source import ClipSource
from engine.cli import Parser, add_setting, run
from engine.config import FeatureSettings
from engine.files import write_json_atomic
from engine.log import logger
from forgetting.adapter import Adapter, load_adapter
from forgetting.deploy.export import openai_bytes
from forgetting.errors import ProblemError
from forgetting.io import naming, refuse_existing, write_bytes


def save_full_model(source: ClipSource, adapter: Adapter, path: str | Path) -> None:
    """Write the state dict of `source` with the adapter's change, and beside it a JSON file with
    the model's config in open_clip's form: weights alone do not say how they compute. Raises
    ProblemError: one of the two exists, or a model that is not in OpenAI's layout, or does not hold
    the adapter's projection."""
    path, architecture = Path(path), source.architecture
    beside = path.with_suffix(".json")
    for file in (path, beside):
        refuse_existing(file)
    with naming(source.weights_files[0]):
        tensors = {} if architecture.is_transformers else architecture.read()[0]
        data = openai_bytes(tensors, adapter)
    write_bytes(data, path, overwrite=False)
    config = {"model_cfg": architecture.model_config(), "preprocess_cfg": source.reading}
    if beside != path:
        write_json_atomic(config, beside, indent=1)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m clip.apply", description=__doc__.splitlines()[0])
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter file of a forgotten class")
    parser.add_argument("out", metavar="OUT", help="checkpoint to write; must not exist")
    parser.add_argument("--weights", help="the original checkpoint; default: the published one")
    add_setting(parser, "--cache", FeatureSettings, "cache")
    args = parser.parse_args(argv)

    out = Path(args.out)
    refuse_existing(out)
    if not out.absolute().parent.is_dir():  # a typing error must not become a folder
        raise ProblemError(f"no folder {out.parent} to write {out.name} into; make it first")
    adapter = load_adapter(args.adapter)
    source = ClipSource(adapter.backbone, args.weights, args.cache)
    own = identity_sha256(source.architecture)
    if adapter.settings.get("model", own) != own:
        what = "other activation, preprocessing or tokenizer"
        raise ProblemError(f"adapter {args.adapter} was made for another {source.arch}: {what}")
    save_full_model(source, adapter, out)
    logger.info(f"clip: {adapter.backbone} without {', '.join(adapter.classes)} written to {out}")


if __name__ == "__main__":
    sys.exit(run(main))
