"""Tiny random models of every library that an export is for, and adapters of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from forgetting import Adapter, projection_sha256

W, D, WORDS, LENGTH = 64, 48, 99, 10
OPEN_CLIP = {
    "embed_dim": D,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "head_width": 64, "patch_size": 8},
    "text_cfg": {
        "context_length": LENGTH,
        "vocab_size": WORDS,
        "width": W,
        "heads": 1,
        "layers": 1,
    },
}


def make_adapter(projection: Tensor, seed: int = 5, rank: int = 2) -> Adapter:
    """A change of (w, d) about a third as large as the projection."""
    generator = torch.Generator().manual_seed(seed)
    w, d = projection.shape
    left, right = (torch.randn(*shape, generator=generator) for shape in ((w, rank), (rank, d)))
    scale = 0.3 * projection.float().norm() / (left @ right).norm()
    return Adapter(
        left=left * scale,
        right=right,
        projection_sha256=projection_sha256(projection),
        backbone="tiny",
        weights="random",
        dataset="Set",
        classes=["cat"],
        trainer="ForgetExact",
    )


def tokens(count: int = 6, seed: int = 0) -> Tensor:
    """(count, LENGTH) token ids: the largest marks the end of a text, zeros follow it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, WORDS - 1, (count, LENGTH), generator=generator)
    for i, row in enumerate(ids):
        end = LENGTH - 1 - i % 5
        row[end], row[end + 1 :] = WORDS - 1, 0
    return ids


def reference(module: nn.Module, run, adapter: Adapter) -> Tensor:
    """What the changed model must give: hidden states, caught where they enter the projection,
    times `W + Delta` in float64 (plus the bias)."""
    caught = []
    hook = module.register_forward_pre_hook(lambda _, args: caught.append(args[0].detach()))
    with torch.no_grad():
        run()
    hook.remove()
    weight = module.weight.detach().T.double() + adapter.left.double() @ adapter.right.double()
    hidden = caught[-1].double() @ weight
    return hidden if module.bias is None else hidden + module.bias.detach().double()


def open_clip_model(seed: int = 0, bias: bool = False, **changes) -> nn.Module:
    """A random open_clip model: a CLIP, or with a bias a CustomTextCLIP."""
    import open_clip

    config = {**OPEN_CLIP, **changes}
    config["text_cfg"] = OPEN_CLIP["text_cfg"] | ({"proj_bias": True} if bias else {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (open_clip.CustomTextCLIP if bias else open_clip.CLIP)(**config).eval()
        if bias:
            nn.init.normal_(model.text.text_projection.bias)
    return model


def open_clip_folder(folder: Path, model: nn.Module, bias: bool = False, **changes) -> Path:
    """What `push_to_hf_hub` writes, with a file of a tokenizer and weights of another tool."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config = {**OPEN_CLIP, **changes}
    if bias:
        config |= {"custom_text": True, "text_cfg": OPEN_CLIP["text_cfg"] | {"proj_bias": True}}
    whole = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "size": [16, 16]}}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "flax_model.msgpack").write_bytes(b"the unchanged model")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def open_clip_projection(model: nn.Module, bias: bool = False) -> Tensor:
    """W (w, d)."""
    kept = model.text.text_projection.weight.T if bias else model.text_projection
    return kept.detach().clone()


def hf_model(kind: str = "CLIPModel", seed: int = 0) -> nn.Module:
    """A random model of transformers."""
    import transformers

    text = {
        "vocab_size": WORDS,
        "hidden_size": W,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": LENGTH,
        "projection_dim": D,
        "bos_token_id": 1,
        "eos_token_id": WORDS - 1,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": W,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    family = kind.removesuffix("Model").removesuffix("TextModelWithProjection")
    if kind.endswith("TextModelWithProjection"):
        config = getattr(transformers, f"{family}TextConfig")(**text)
    else:
        made = getattr(transformers, f"{family}Config")
        config = made(text_config=text, vision_config=vision, projection_dim=D)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, kind)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # biases too
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def hf_linear(model: nn.Module) -> nn.Linear:
    """The last linear map of the text tower."""
    return model.text_projection if hasattr(model, "text_projection") else model.text_model.head


def hf_embed(model: nn.Module, ids: Tensor) -> Tensor:
    """Text embeddings (n, d), not normalised."""
    with torch.no_grad():
        if hasattr(model, "get_text_features"):
            out = model.get_text_features(input_ids=ids)
        else:
            out = model(input_ids=ids)
    if isinstance(out, Tensor):
        return out
    kept = getattr(out, "text_embeds", None)
    return out.pooler_output if kept is None else kept


def hf_folder(folder: Path, model: nn.Module, **options) -> Path:
    """What `save_pretrained` writes, with a file of a tokenizer and weights of another tool."""
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "merges.txt").write_text("a b\n")
    (folder / "tf_model.h5").write_bytes(b"the unchanged model")
    return folder
