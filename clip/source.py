"""ClipSource: texts to hidden states, images to embeddings, with one set of CLIP weights."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clip.architectures import architecture
from clip.checkpoint import load_into, read_state_dict, require_file
from clip.digests import digests
from clip.download import download
from engine.errors import UserError

# To be changed with `preprocess` or `encode_hidden`: what was cached before is then not used.
ENCODING = "shorter side bicubic, centre crop, OpenAI mean and std; state at end of text; 1"


class ClipSource:
    """One CLIP, loaded when something must be encoded and not before.

    Args:
        arch: a name of `ARCHITECTURES`.
        weights: a checkpoint of that architecture; None for its published or embedded weights.
        cache: folder for downloads.
        device: None for the GPU if there is one, else the CPU. All arithmetic is float32.
    """

    def __init__(
        self,
        arch: str,
        weights: str | Path | None = None,
        cache: str | Path = "cache",
        device: str | torch.device | None = None,
    ) -> None:
        self.architecture = architecture(arch)
        self.arch = arch
        self.cache = Path(cache)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._weights = None if weights is None else Path(weights)
        if self._weights is not None:
            require_file(self._weights)

    @cached_property
    def weights_path(self) -> Path:
        """The checkpoint file; downloaded first if need be."""
        arch = self.architecture
        if self._weights is not None:
            return self._weights
        if isinstance(arch.weights, Path):
            require_file(arch.weights)
            return arch.weights
        path = download(arch.url, arch.sha256, self.cache / "weights" / arch.weights)
        if self._sha256(path) != arch.sha256:
            raise UserError(
                f"{path} is not the file that OpenAI published for {arch.name} (SHA-256 "
                f"{self._sha256(path)}); delete it, or pass it by --weights PATH"
            )
        return path

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of the checkpoint file, in hex."""
        return self._sha256(self.weights_path)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with all that an encoding depends on: weights, configuration, preprocessing."""
        parts = [ENCODING, self.architecture.configuration(), self.weights_sha256]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _sha256(self, path: Path) -> str:
        return digests([path], self.cache / "weights" / "sha256.json")[0]

    @cached_property
    def model(self) -> nn.Module:
        """The open_clip model: float32, `eval()`, on `device`."""
        path = self.weights_path
        state = read_state_dict(path)
        # Random initialisation must not move the caller's random numbers: a run that finds
        # everything cached would otherwise differ from one that does not.
        with torch.random.fork_rng(devices=[]):
            model = self.architecture.build()
        load_into(model, state, self.architecture, path)
        if self.device.type == "cuda":  # TensorFloat-32 keeps 10 bits of 23
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
        digest = self.weights_sha256[:16]
        print(f"clip: {self.arch} on {self.device}, float32, weights {digest} from {path}")
        return model.float().eval().requires_grad_(False).to(self.device)

    @cached_property
    def tokenizer(self) -> Any:
        """open_clip's byte-pair tokenizer at the context length of the model."""
        from open_clip import SimpleTokenizer

        return SimpleTokenizer(context_length=self.model.context_length)

    @cached_property
    def preprocess(self) -> Any:
        """PIL image -> (3, side, side) float32: OpenAI's resize, centre crop, normalisation."""
        from open_clip.transform import PreprocessCfg, image_transform_v2

        return image_transform_v2(PreprocessCfg(size=self.model.visual.image_size), is_train=False)

    @cached_property
    def projection(self) -> Tensor:
        """`text_projection` (w, d), float32 on the CPU."""
        return self.model.text_projection.detach().cpu().clone()

    @torch.no_grad()
    def encode_hidden(self, texts: list[str], batch_size: int = 256) -> Tensor:
        """Hidden states of `texts`, (n, w) float32 on the CPU (see `hidden_states`)."""
        tokenizer, limit = self.tokenizer, self.tokenizer.context_length
        for text in texts:
            length = len(tokenizer.encode(text)) + 2  # start and end of text
            if length > limit:
                shown = repr(shorten(text, 80))
                print(f"clip: warning: a text of {length} tokens is cut to {limit}: {shown}")
        rows = [torch.empty(0, self.model.ln_final.weight.shape[0])]
        for start in range(0, len(texts), batch_size):
            tokens = tokenizer(texts[start : start + batch_size]).to(self.device)
            rows.append(hidden_states(self.model, tokens).cpu())
        return torch.cat(rows)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Embeddings of preprocessed images (b, 3, side, side): (b, d), L2-normalised."""
        return normalize(self.model.encode_image(images.to(self.device)), dim=-1).cpu()


def hidden_states(model: nn.Module, tokens: Tensor) -> Tensor:
    """Hidden states (n, w) of tokens (n, context), after `ln_final` at the end of text and before
    projection, so that `hidden_states(model, tokens) @ projection` is the model's `encode_text`."""
    from open_clip.transformer import text_global_pool

    # The mask is causal: padding behind the last end of text reaches no state in front of it, and
    # leaving it out halves the cost.
    length = int(tokens.argmax(dim=1).max()) + 1
    tokens = tokens[:, :length]  # (n, l)
    x = model.token_embedding(tokens) + model.positional_embedding[:length]  # (n, l, w)
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    return text_global_pool(model.ln_final(x), tokens, model.text_pool_type, model.text_eos_id)
