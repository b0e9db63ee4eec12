"""The generic vocabulary: common names that are retained whatever somebody forgets. Their hidden
states are kept in a folder of files and in this process."""

import hashlib
import json
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

from torch import Tensor
from torch.nn.functional import normalize

from forgetting.errors import ProblemError
from forgetting.io import foreign, pack, unpack, write_bytes
from forgetting.models import words
from forgetting.models.encoder import Encoder
from forgetting.models.text_embeddings import TextEmbeddings

FORMAT = "clip-forget-hidden/1"
MAX_SIMILAR = 16  # generic names that are excluded for being similar to a forgotten text, at most
CACHE = Path("~/.cache/clip-forget")
SAMPLED = 8  # texts of a file that are encoded again, to see that it is of this model
TOLERANCE = 0.05  # relative distance of a hidden state in half precision between two batches


def generic_names() -> list[str]:
    """All names of all kinds, each once, in the order of the files."""
    kinds = [file for file in files(words).iterdir() if file.name.endswith(".txt")]
    kinds.sort(key=lambda file: file.name)
    lines = [line for kind in kinds for line in kind.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def generic_hidden(
    encoder: Encoder | TextEmbeddings,
    cache: str | Path | None = CACHE,
    progress: bool = True,
    template: str = "{}",
) -> tuple[list[str], Tensor]:
    """The names, and their hidden states (n, w), encoded once for a model and tokenizer, in the
    `template`, a text with {} for a name. `cache`: the folder of files; None: no file is read or
    written. A file that is damaged, or of another model, is replaced."""
    if isinstance(encoder, TextEmbeddings) and (clip := encoder.encoder) is not None:
        names, hidden = generic_hidden(clip, cache, progress, template)  # nothing is encoded twice
        embeddings = hidden @ clip.projection.detach().to(hidden)
        embeddings = embeddings if clip.bias is None else embeddings + clip.bias.to(embeddings)
        return names, normalize(embeddings, dim=1)
    names, title = generic_names(), "generic vocabulary" if progress else ""
    texts = [template.replace("{}", name) for name in names]
    folder = None if cache is None else expand(cache)

    def read_or_encode() -> Tensor:
        if folder is None:
            return encoder.hidden(texts, progress=title)
        parts = [encoder.fingerprint, encoder.tokens_sha256(texts), texts]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        path = folder / f"generic-{key[:32]}.safetensors"
        with suppress(ProblemError):  # damaged, or not there yet
            hidden = unpack(path, FORMAT)[1]["hidden"]
            step = max(1, len(texts) // SAMPLED)
            fresh = encoder.hidden(texts[::step])
            distances = (hidden[::step] - fresh).norm(dim=1)
            if (distances <= TOLERANCE * fresh.norm(dim=1)).all():
                return hidden
        hidden = encoder.hidden(texts, progress=title)
        with suppress(ProblemError):  # a disk that is full, or not ours
            write_bytes(pack(FORMAT, {"texts": len(texts)}, {"hidden": hidden}), path)
        return hidden

    return names, encoder.remembered(("generic", str(folder), template), read_or_encode)


def expand(path: str | Path) -> Path:
    """A path with `~` and `~user` replaced by the home folder; ProblemError for an unknown user."""
    with foreign(f"{path}: there is no such user"):
        return Path(path).expanduser()
