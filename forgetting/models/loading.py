"""Models by name, for the command: strictly, and offline where the files are local.

hf:DIR_OR_ID                  transformers; configuration and tokenizer of the checkpoint
open_clip:NAME[/PRETRAINED]   a configuration of open_clip with its weights, or a file of them
openai:FILE                   a file that OpenAI published, known by its SHA-256
DIR                           a folder that says itself what it holds
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from forgetting.errors import ProblemError, line, reason
from forgetting.io import need
from forgetting.models.reading import Tokenize

# Every file that OpenAI published (openai/CLIP, clip/clip.py): SHA-256 -> name. All are QuickGELU.
OPENAI = {
    "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762": "RN50",
    "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599": "RN101",
    "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd": "RN50x4",
    "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa": "RN50x16",
    "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c": "RN50x64",
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af": "ViT-B-32",
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f": "ViT-B-16",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836": "ViT-L-14",
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02": "ViT-L-14-336",
}
KINDS = "hf:DIR_OR_ID, open_clip:NAME/PRETRAINED, openai:FILE, or a folder"
BLOCK = 2**22


def load_model(text: str) -> tuple[nn.Module, Tokenize]:
    """A model in evaluation mode, and its tokenizer.

    Raises:
        ProblemError: one line: an unknown kind, a missing file or package, or a checkpoint that
            does not say how it is to be read.
    """
    kind, colon, rest = text.partition(":")
    loaders = {"hf": _hf, "open_clip": _open_clip, "openai": _openai}
    with _quiet():
        if colon and kind in loaders:
            if not rest:
                raise ProblemError(f"{kind}: names nothing; a model is {KINDS}")
            return loaders[kind](rest)
        if Path(text).is_dir():
            return _folder(Path(text))
    if Path(text).is_file():
        file = line(text)
        raise ProblemError(
            f"{file} is a file of weights, which does not say its activation (QuickGELU and GELU "
            f"have the same shapes): name what it is, open_clip:ViT-B-32-quickgelu/{file} or "
            f"open_clip:ViT-B-32/{file}, or openai:{file} if OpenAI published it"
        )
    raise ProblemError(f"no model {line(text)!r}; a model is {KINDS}")


def _folder(path: Path) -> tuple[nn.Module, Tokenize]:
    if (path / "open_clip_config.json").is_file():
        return _local_open_clip(path)
    if (path / "config.json").is_file():
        return _hf(str(path))
    raise ProblemError(
        f"{line(path)} holds neither config.json (transformers) nor open_clip_config.json, so how "
        "its weights are to be read is not known; name it, as open_clip:ViT-B-32-quickgelu/FILE"
    )


def _hf(text: str) -> tuple[nn.Module, Tokenize]:
    path = Path(text)
    local = path.is_dir()
    if local and not (path / "config.json").is_file():
        raise ProblemError(f"{line(text)} holds no config.json, which says what its weights are")
    if not local and (text.startswith((".", "/", "~")) or text.count("/") > 1):
        raise ProblemError(f"{line(text)}: no such folder")
    transformers = need("transformers", "clip-forgetting[transformers]")
    options: dict[str, Any] = {"local_files_only": True} if local else {}
    try:
        config = transformers.AutoConfig.from_pretrained(text, **options)
        named = (getattr(config, "architectures", None) or [None])[0]
        builder = getattr(transformers, named or "", transformers.AutoModel)
        model = builder.from_pretrained(text, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(text, **options)
    except Exception as error:  # whatever a foreign folder leads to
        raise ProblemError(f"hf:{line(text)} cannot be loaded ({reason(error)})") from error
    return model.eval(), tokenizer


def _open_clip(text: str) -> tuple[nn.Module, Tokenize]:
    open_clip = need("open_clip", "clip-forgetting[open-clip]")
    name, _, weights = text.partition("/")
    if name not in open_clip.list_models():
        raise ProblemError(f"open_clip has no configuration {line(name)!r}")
    known = open_clip.list_pretrained_tags_by_model(name)
    if not weights:
        shown = ", ".join(known[:6]) or "none published"
        raise ProblemError(
            f"open_clip:{line(name)} has no weights: name some, open_clip:{line(name)}/TAG ({shown}"
            ") or /FILE"
        )
    if weights not in known and not Path(weights).is_file():
        raise ProblemError(f"open_clip:{line(name)}: {line(weights)!r} is no tag and no file")
    if Path(weights).is_file() and _sha256(Path(weights)) in OPENAI and "quickgelu" not in name:
        raise ProblemError(
            f"{line(weights)} is OpenAI's, whose activation is QuickGELU: name it "
            f"openai:{line(weights)} or open_clip:{line(name)}-quickgelu/{line(weights)}"
        )
    try:
        model = open_clip.create_model(name, pretrained=weights, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:
        raise ProblemError(f"open_clip:{line(text)} cannot be loaded ({reason(error)})") from error
    return model.eval(), tokenizer


def _local_open_clip(path: Path) -> tuple[nn.Module, Tokenize]:
    open_clip = need("open_clip", "clip-forgetting[open-clip]")
    try:
        json.loads((path / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
        model = open_clip.create_model(f"local-dir:{path}", require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{path}")
    except Exception as error:
        raise ProblemError(f"{line(path)} cannot be loaded ({reason(error)})") from error
    return model.eval(), tokenizer


def _openai(text: str) -> tuple[nn.Module, Tokenize]:
    path = Path(text)
    if not path.is_file():
        raise ProblemError(f"{line(text)}: no such file")
    digest = _sha256(path)
    if digest not in OPENAI:
        raise ProblemError(
            f"{line(text)} is none of the files that OpenAI published (SHA-256 {digest[:16]}); "
            f"name what it is, with its activation: open_clip:ViT-B-32-quickgelu/{line(text)}, say"
        )
    open_clip = need("open_clip", "clip-forgetting[open-clip]")
    try:
        model = open_clip.load_openai_model(str(path), precision="fp32", device="cpu")
    except Exception as error:
        raise ProblemError(f"openai:{line(text)} cannot be loaded ({reason(error)})") from error
    return model.eval(), open_clip.get_tokenizer(OPENAI[digest])


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()


@contextlib.contextmanager
def _quiet():
    """Without the warnings and bars of the libraries that load."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
