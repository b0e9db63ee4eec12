"""Tiny, randomly initialised CLIPs of every family, and tokenizers for them; nothing is fetched."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

SIZE, WIDTH, OUT, LENGTH, VOCAB = 32, 24, 16, 24, 300
START, END = 298, 299  # the largest number is the end of a text

IMAGE = {"image_size": SIZE, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
TEXT = {"context_length": LENGTH, "vocab_size": VOCAB, "width": WIDTH, "heads": 2, "layers": 2}

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


def tokenize(texts: list[str]) -> Tensor:
    """Bytes between a start and an end, filled up with 0: (n, LENGTH) int64."""
    rows = torch.zeros(len(texts), LENGTH, dtype=torch.int64)
    for row, text in zip(rows, texts, strict=True):
        ids = [START, *text.encode()[: LENGTH - 2], END]
        row[: len(ids)] = torch.tensor(ids)
    return rows


class OwnEncoder(nn.Module):
    """Somebody's own model: a bag of letters, a layer, and `hidden @ W (+ b)`."""

    def __init__(self, bias: bool = False, normalised: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Parameter(torch.randn(WIDTH, OUT) / 5)
        self.shift = nn.Parameter(torch.randn(OUT)) if bias else None
        self.normalised = normalised

    def forward(self, tokens: Tensor) -> Tensor:
        there = (tokens > 0)[..., None]
        hidden = torch.tanh(self.layer((self.table(tokens) * there).sum(dim=1))) * 3
        found = hidden @ self.last
        found = found if self.shift is None else found + self.shift
        return nn.functional.normalize(found, dim=1) if self.normalised else found


def _open_clip(kind: str, **text: Any) -> nn.Module:
    import open_clip
    from open_clip.model import CustomTextCLIP

    vision, words = IMAGE, TEXT | text
    if kind == "RN":
        vision = IMAGE | {"layers": [1, 1, 1, 1], "patch_size": None}
    if kind == "CoCa":
        words |= {"embed_cls": True, "output_tokens": True, "pad_id": 0}
        pooled = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
        return open_clip.CoCa(OUT, TEXT | {"layers": 1}, words, vision | pooled)
    return (CustomTextCLIP if kind == "Custom" else open_clip.CLIP)(OUT, vision, words)


def _scaled(model: nn.Module) -> nn.Module:
    """The same with weights that are not nearly zero, so that texts differ."""
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.ndim == 2 and "visual" not in name and "vision" not in name:
                x.mul_(0.25 / x.std().clamp_min(0.01)) if x.std() < 0.2 else None
    return model


ENDS = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": 0}
OUT_DIM = {"projection_dim": OUT}
SIGLIP = ENDS | {"projection_size": OUT}
ALT = {"pad_token_id": 0, "project_dim": WIDTH, "max_position_embeddings": LENGTH + 8}
HUGGING_FACE = {  # kind -> what its texts, its images and the whole have beside the rest
    "CLIPModel": (ENDS, {}, OUT_DIM),
    "CLIPTextModelWithProjection": (ENDS | OUT_DIM, {}, {}),
    "SiglipModel": (SIGLIP, {}, {}),
    "Siglip2Model": (SIGLIP, {"num_patches": 4}, {}),
    "ChineseCLIPModel": ({"pad_token_id": 0}, {}, OUT_DIM),
    "AltCLIPModel": (ALT, {}, OUT_DIM),
}


def _transformers(kind: str) -> nn.Module:
    import transformers

    of_text, of_vision, more = HUGGING_FACE[kind]
    layers = {"num_attention_heads": 2, "intermediate_size": 48}
    text = layers | {"hidden_size": WIDTH, "num_hidden_layers": 2, "vocab_size": VOCAB}
    text |= {"max_position_embeddings": LENGTH} | of_text
    vision = layers | {"hidden_size": 32, "num_hidden_layers": 1, "patch_size": 16} | of_vision
    vision |= {} if kind == "Siglip2Model" else {"image_size": SIZE}
    if kind == "CLIPTextModelWithProjection":
        return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**text))
    config = getattr(transformers, kind.replace("Model", "Config"))
    made = config(text_config=text, vision_config=vision, **more)
    return getattr(transformers, kind)(made)


def transformers_tokenizer() -> Any:
    """A byte tokenizer of transformers with the same start and end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = {chr(i): i for i in range(1, 256)} | {"[PAD]": 0, "[S]": START, "[E]": END}
    letters |= {f"[{i}]": i for i in range(256, START)}
    inner = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="[256]"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.post_processor = processors.TemplateProcessing(
        single="[S] $A [E]", special_tokens=[("[S]", START), ("[E]", END)]
    )
    ends = {"bos_token": "[S]", "eos_token": "[E]", "pad_token": "[PAD]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=LENGTH, **ends)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "open_clip ViT": lambda: _open_clip("ViT"),
    "open_clip RN": lambda: _open_clip("RN"),
    "open_clip CustomTextCLIP": lambda: _open_clip("Custom"),
    "open_clip CustomTextCLIP with bias": lambda: _open_clip("Custom", proj_bias=True),
    "open_clip CoCa": lambda: _open_clip("CoCa"),
    "own": OwnEncoder,
    "own with bias": lambda: OwnEncoder(bias=True),
    "own normalised": lambda: OwnEncoder(normalised=True),
}
ALL = [
    *FAMILIES,
    *(pytest.param(f"transformers {kind}", marks=needs_transformers) for kind in HUGGING_FACE),
]


def tiny(family: str, seed: int = 0) -> tuple[nn.Module, Any]:
    """A model of a family in evaluation mode, and a tokenizer for it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family in FAMILIES:
            return _scaled(FAMILIES[family]()).eval(), tokenize
        return _scaled(_transformers(family.split()[1])).eval(), transformers_tokenizer()


def my_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the working directory that the documentation supposes: a model whose projection can be
    inverted, as that of ViT-B can, and embeddings."""
    monkeypatch.setitem(OUT_DIM, "projection_dim", WIDTH)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # where the vocabulary's hidden states are kept
    for part in tiny("transformers CLIPModel"):
        part.save_pretrained("my-clip")
    for name in ("images.npy", "texts.npy"):
        np.save(name, nn.functional.normalize(torch.randn(50, WIDTH)).numpy())
