"""Train `mini`, the small CLIP that the repository embeds, on pictures drawn as it goes.

    python -m clip.train_mini [--out PATH] [--seed 0] [--steps N]

Seed 0 and the default steps made the committed `clip/mini.safetensors` in 6 minutes on 2 cores (of
which it uses one). Its zero-shot accuracy with the sets' template, read back from float16:
MiniDigits 0.975, MiniLetters 0.996, MiniSymbols 1.000, MiniShapes 0.990.

The pictures are those of `datasets.mini`, on random streams that no test image comes from, of all
names in the four vocabularies: several times as many as the sets have classes, so that what is
retained by name alone is really known to the model.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm

from clip.architectures import architecture
from clip.source import hidden_states
from datasets import mini, retain_vocabulary, spec
from engine.cli import SEED, Parser, run, whole
from engine.files import atomic_path, read_json, refuse_existing

STEPS = 1500
BATCH = 256  # pictures a step: one of each class, then of vocabulary names in random order
DIGIT_REPEATS = 3  # pictures more of each digit: handwriting varies more than fonts do
THREADS = 1  # the same sums in the same order on any machine, however busy
LEARNING_RATE = 3e-3
SPREAD = 8.0  # weight of `crowding`
WEIGHT_DECAY = 0.05
WARM_UP = 50  # steps
MAX_LOGIT_SCALE = 100.0
TEMPLATES = (
    "{}",
    "a picture of a {}.",
    "a photo of a {}.",
    "an image of the {}.",
    "this is a {}.",
    "{}, drawn small.",
)
FORMAT = "clip-forget-mini/1"


def training_names() -> list[str]:
    """Every name that `mini` learns, without repeats, the sets' classes first.

    The sets' classes and vocabularies, and the empty name, whose picture is a ground with nothing
    on it: so the empty prompt, where forgotten texts are sent, is near no class.
    """
    classes = [name for known in mini.MINI.values() for name in known]
    others = [name for dataset in mini.MINI for name in retain_vocabulary(dataset)]
    return list(dict.fromkeys([*classes, "", *others]))


def pixels(pictures: Sequence[np.ndarray]) -> Tensor:
    """Pictures (32, 32, 3) uint8 as CLIP takes them: (n, 3, 32, 32) float32, OpenAI's scale."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    stack = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255  # (n, 3, s, s)
    mean, std = torch.tensor([OPENAI_DATASET_MEAN, OPENAI_DATASET_STD])[:, :, None, None]
    return (stack - mean) / std


def crowding(hidden: Tensor, same: Tensor) -> Tensor:
    """Mean squared cosine between different names' hidden states (n, w); 1/w if spread evenly.

    `same` (n, n) marks pairs of one name. The contrastive loss alone is content with a dozen of
    the 64 directions. Real CLIP is not so narrow, and a class that is a mixture of its neighbours
    cannot be forgotten without them.
    """
    directions = normalize(hidden, dim=1)
    return (directions @ directions.T)[~same].square().mean()


def _optimiser(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with decay on matrices alone: decayed embeddings would crowd the texts together."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        (free if parameter.ndim < 2 or "embedding" in name else decayed).append(parameter)
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": free, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
    )


def train(seed: int, steps: int) -> nn.Module:
    """Train from scratch with the symmetric contrastive loss; the same seed, the same weights."""
    from open_clip import SimpleTokenizer

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = architecture("mini").build().train()
    names = training_names()
    always = np.arange(names.index("") + 1)  # the sets' classes and the empty name
    repeated = np.repeat(always[: len(mini.MINI["MiniDigits"])], DIGIT_REPEATS)
    tokenizer = SimpleTokenizer(context_length=model.context_length)
    texts = torch.stack(
        [tokenizer([template.format(name) for name in names]) for template in TEMPLATES]
    )  # (templates, names, context)

    # Fewer than 500 of the 49,408 tokens occur: train those rows alone, a tenth of the time. Their
    # order is kept, and with it that the end of text has the highest number.
    table = model.token_embedding
    used, texts = torch.unique(texts, return_inverse=True)
    model.token_embedding = nn.Embedding.from_pretrained(table.weight[used].clone(), freeze=False)

    optimiser = _optimiser(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2,
    )
    bar = tqdm(range(steps), desc="mini", unit="step")
    for _ in bar:
        others = len(always) + rng.permutation(len(names) - len(always))
        chosen = np.concatenate([always, repeated, others])[:BATCH]
        same = torch.from_numpy(chosen[:, None] == chosen[None, :])  # (b, b)
        images = pixels([mini.draw(names[i], rng) for i in chosen])
        tokens = texts[rng.integers(len(TEMPLATES), size=len(chosen)), chosen]  # (b, context)
        image_features = model.encode_image(images, normalize=True)  # (b, d)
        hidden = hidden_states(model, tokens)  # (b, w)
        text_features = normalize(hidden @ model.text_projection, dim=1)  # (b, d)
        logits = model.logit_scale.exp() * image_features @ text_features.T  # (b, b)
        # Two pictures of one name are not each other's negatives.
        logits = logits.masked_fill(same & ~torch.eye(len(chosen), dtype=torch.bool), -torch.inf)
        pairs = torch.arange(len(chosen))
        contrast = (cross_entropy(logits, pairs) + cross_entropy(logits.T, pairs)) / 2
        loss = contrast + SPREAD * crowding(hidden, same)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0.0, math.log(MAX_LOGIT_SCALE))
        bar.set_postfix(loss=f"{loss.item():.3f}", scale=f"{model.logit_scale.exp().item():.0f}")

    with torch.no_grad():
        table.weight[used] = model.token_embedding.weight
    model.token_embedding = table
    return model.eval()


@torch.no_grad()
def zero_shot(model: nn.Module, dataset: str) -> float:
    """Accuracy on a Mini set's test images with the set's template, for a model in `eval()`."""
    from open_clip import SimpleTokenizer

    prompts = [spec(dataset).template.format(name) for name in mini.MINI[dataset]]
    tokens = SimpleTokenizer(context_length=model.context_length)(prompts)
    texts = normalize(hidden_states(model, tokens) @ model.text_projection, dim=1)  # (C, d)
    _, labels, pictures = zip(*mini.pictures(dataset, "test"), strict=True)
    predicted = (model.encode_image(pixels(pictures)) @ texts.T).argmax(dim=1)  # (N,)
    return (predicted == torch.tensor(labels)).float().mean().item()


def main(argv: Sequence[str] | None = None) -> None:
    """The command line above."""
    parser = Parser(prog="python -m clip.train_mini", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("mini.safetensors"), help="file to write")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--steps", type=whole(1, 10**9), default=STEPS)
    args = parser.parse_args(argv)
    refuse_existing(args.out, "choose another --out")
    torch.set_num_threads(THREADS)
    model = train(args.seed, args.steps)
    state = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state)  # what is reported is what float16 kept
    accuracies = {dataset: round(zero_shot(model, dataset), 4) for dataset in mini.MINI}
    config = read_json(architecture("mini").config)
    about = {"seed": args.seed, "steps": args.steps, "accuracies": accuracies, "config": config}
    metadata = {"format": FORMAT} | {key: json.dumps(value) for key, value in about.items()}
    with atomic_path(args.out) as scratch:  # save_file would make it readable by its owner alone
        scratch.write_bytes(save(state, metadata))
    for dataset, accuracy in accuracies.items():
        print(f"{dataset}: zero-shot accuracy {accuracy:.3f}")
    print(f"wrote {args.out} ({args.out.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    sys.exit(run(main))
