"""Tiny, randomly initialised CLIPs of every family, and tokenizers for them; nothing is fetched."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

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
        found = nn.functional.linear(hidden, self.last.T, self.shift)
        return nn.functional.normalize(found, dim=1) if self.normalised else found


def _open_clip(kind: str, **text: Any) -> nn.Module:
    import open_clip
    from open_clip.coca_model import CoCa

    vision = dict(IMAGE, layers=[1, 1, 1, 1], patch_size=None) if kind == "RN" else IMAGE
    words = TEXT | text
    if kind == "CoCa":
        both = {"context_length": LENGTH, "vocab_size": VOCAB, "width": WIDTH, "heads": 2}
        both |= {"layers": 1}
        words |= {"embed_cls": True, "output_tokens": True, "pad_id": 0}
        vision = vision | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
        return CoCa(OUT, both, words, vision)
    builder = open_clip.model.CustomTextCLIP if kind == "Custom" else open_clip.model.CLIP
    return builder(OUT, vision, words)


def _scaled(model: nn.Module) -> nn.Module:
    """The same with weights that are not nearly zero, so that texts differ."""
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.ndim == 2 and "visual" not in name and "vision" not in name:
                x.mul_(0.25 / x.std().clamp_min(0.01)) if x.std() < 0.2 else None
    return model


def _transformers(kind: str) -> nn.Module:
    import transformers as t

    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": SIZE, "patch_size": 16}
    text = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": LENGTH}
    ends = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": 0}
    if kind == "CLIPModel":
        config = t.CLIPConfig(text_config=text | ends, vision_config=vision, projection_dim=OUT)
        return t.CLIPModel(config)
    if kind == "CLIPTextModelWithProjection":
        return t.CLIPTextModelWithProjection(t.CLIPTextConfig(**text, **ends, projection_dim=OUT))
    if kind == "SiglipModel":
        text |= ends | {"projection_size": OUT}
        return t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=vision))
    if kind == "Siglip2Model":
        text |= ends | {"projection_size": OUT}
        vision.pop("image_size")
        config = t.Siglip2Config(text_config=text, vision_config=vision | {"num_patches": 4})
        return t.Siglip2Model(config)
    if kind == "ChineseCLIPModel":
        text |= {"pad_token_id": 0}
        config = t.ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=OUT)
        return t.ChineseCLIPModel(config)
    text |= {"pad_token_id": 0, "project_dim": WIDTH, "max_position_embeddings": LENGTH + 8}
    config = t.AltCLIPConfig(text_config=text, vision_config=vision, projection_dim=OUT)
    return t.AltCLIPModel(config)


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
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="[S]",
        eos_token="[E]",
        pad_token="[PAD]",
        model_max_length=LENGTH,
    )


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
HUGGING_FACE = (
    *("CLIPModel", "CLIPTextModelWithProjection", "SiglipModel", "Siglip2Model"),
    *("ChineseCLIPModel", "AltCLIPModel"),
)
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
