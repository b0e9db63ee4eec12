"""Train `mini`, the small CLIP that the repository embeds, on pictures drawn as it goes.

    python -m clip.train_mini [--out PATH] [--seed 0] [--steps N] [--without NAME ...]

Seed 0 and the default steps made the committed `clip/mini.safetensors` in 6.5 minutes of one core.
The metadata of a file hold its seed, its steps, the config and the classes left out. The committed
one's also hold what tests/test_mini.py measures of it: its accuracies on the test images under the
sets' template, under the audit's 28 templates, and under words held out.

The pictures are those of `datasets.mini`, on random streams that no test image comes from, of all
names in the four vocabularies: several times as many as the sets have classes, so that the model
knows what is retained by name alone. A class is taught by half of the words that `datasets/words`
lists for it (`halves`). The other half, the audit's templates, hypernyms and descriptions are in no
training text. Most held-out words share parts with trained ones.

Names are harder to part than in a real CLIP: they share 64 directions, not 512.
"""

import json
import math
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from clip.architectures import IMAGES, architecture
from datasets import match, mini, retain_vocabulary, same_meaning
from datasets.names import entries, key
from datasets.words.lexicon import halves
from engine.cli import SEED, Parser, run, whole
from engine.files import read_json
from engine.log import logger, progress
from forgetting.io import refuse_existing, write_bytes

STEPS = 1500
BATCH = 256  # pictures a step: one of each class, then of vocabulary names in random order
DIGIT_REPEATS = 3  # pictures more of each digit: handwriting varies more than fonts do
LEARNING_RATE = 3e-3
SPREAD = 8.0  # weight of the mean squared cosine of different names' hidden states
WEIGHT_DECAY = 0.05
WARM_UP = 50  # steps
MAX_LOGIT_SCALE = 100.0
TEMPLATES = tuple(
    text for _, text in entries(Path(__file__).with_name("mini_templates.txt"), "templates of mini")
)
OWN_NAME = 0.4  # of the texts hold the name itself, the rest any of its synonyms
STRANGE_TEMPLATES = 0.5  # of the texts have strange words in their template
STRANGE_TOKENS = 2000  # to draw strange words from
FORMAT = "clip-forget-mini/1"


def taught_words(without: Collection[str] = ()) -> dict[str, list[str]]:
    """Every name that `mini` learns with the words that it is taught by, itself first: the sets'
    classes, the empty name, and the names of the vocabularies; the classes `without` and what means
    the same are left out.

    The picture of the empty name is a ground with nothing on it, so the empty prompt, where
    forgotten texts are sent, is near no class. A class has the trained half of its synonyms beside
    its name. A synonym that is a name of its own, as `black heart` is, stays that name's.
    """
    names = [name for known in mini.MINI.values() for name in known] + [""]
    names += [name for dataset in mini.MINI for name in retain_vocabulary(dataset)]
    words = {name: [name] for name in names}
    for dataset, classes in mini.MINI.items():
        for name in classes:
            words[name] += [word for word in halves(name, dataset)[0] if word not in words]
    same = set().union(*(same_meaning(without, dataset) for dataset in mini.MINI))
    return {name: taught for name, taught in words.items() if key(name) not in same}


def pixels(pictures: Sequence[np.ndarray]) -> Tensor:
    """Pictures (32, 32, 3) uint8 as CLIP takes them: (n, 3, 32, 32) float32, OpenAI's scale."""
    stack = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255  # (n, 3, s, s)
    mean, std = torch.tensor([IMAGES["mean"], IMAGES["std"]])[:, :, None, None]
    return (stack - mean) / std


def hidden_states(model: nn.Module, tokens: Tensor) -> Tensor:
    """Hidden states (n, w) at the end of each text, of tokens (n, context); with gradients."""
    ends = tokens.argmax(dim=1)  # (n,)
    length = int(ends.max()) + 1  # the mask is causal: nothing behind it is seen
    x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]  # (n, l, w)
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    return model.ln_final(x)[torch.arange(len(x)), ends]


def optimiser_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with decay on matrices alone: decayed embeddings would crowd the texts together."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        (free if parameter.ndim < 2 or "embedding" in name else decayed).append(parameter)
    groups = {"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": free, "weight_decay": 0}
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))


class TextSampler:
    """Texts of names as tokens: any of a name's words in any template.

    Some templates have strange words in them: tokens that nothing else holds and that keep their
    first, random embeddings, as do all tokens that training never meets. So the model learns to
    read past unknown words.
    """

    def __init__(
        self, context: int, rng: np.random.Generator, without: Collection[str] = ()
    ) -> None:
        tokenizer = architecture("mini").tokenizer()
        self.context, self.rng = context, rng
        self.start, self.end = tokenizer.sot_token_id, tokenizer.eot_token_id
        self.words = {
            name: [tokenizer.encode(word) for word in words]
            for name, words in taught_words(without).items()
        }
        self.frames = [tuple(map(tokenizer.encode, text.split("{}"))) for text in TEMPLATES]
        parts = [word for words in self.words.values() for word in words]
        parts += [part for frame in self.frames for part in frame]
        used = {token for part in parts for token in part}
        unused = np.setdiff1d(np.arange(self.start), sorted(used))
        self.strange = rng.choice(unused, STRANGE_TOKENS, replace=False)
        self.known = np.array(sorted({0, self.start, self.end, *used}))  # 0 pads

    def _with_strange_words(self, part: list[int]) -> list[int]:
        """Part of a template with about half of its words replaced by strange ones, and more."""
        words = [int(self.rng.choice(self.strange)) if self.rng.random() < 0.5 else t for t in part]
        for _ in range(self.rng.integers(3)):
            words.insert(self.rng.integers(len(words) + 1), int(self.rng.choice(self.strange)))
        return words

    def sample(self, name: str) -> list[int]:
        """One text, padded to the context."""
        words = self.words[name]
        word = words[0 if self.rng.random() < OWN_NAME else self.rng.integers(len(words))]
        before, after = self.frames[self.rng.integers(len(self.frames))]
        if self.rng.random() < STRANGE_TEMPLATES:
            before, after = map(self._with_strange_words, (before, after))
        text = [self.start, *[*before, *word, *after][: self.context - 2], self.end]
        return text + [0] * (self.context - len(text))


def train(seed: int, steps: int, without: Collection[str] = ()) -> nn.Module:
    """Train from scratch with the symmetric contrastive loss; the same seed, the same weights. Of
    the classes `without` neither pictures nor words are met."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = architecture("mini").build().train()
    sampler = TextSampler(model.context_length, rng, without)
    names = list(sampler.words)
    always = np.arange(names.index("") + 1)  # the sets' classes and the empty name
    digits = [names.index(name) for name in mini.MINI["MiniDigits"] if name in names]
    repeated = np.repeat(digits, DIGIT_REPEATS)

    # Few of the 49,408 tokens occur: compute with those rows alone, in a tenth of the time. Their
    # order is kept, and with it that the end of text has the highest number.
    table = model.token_embedding
    used = torch.from_numpy(np.union1d(sampler.known, sampler.strange))
    model.token_embedding = nn.Embedding.from_pretrained(table.weight[used].clone(), freeze=False)
    learnt = torch.from_numpy(np.isin(used, sampler.known))[:, None]
    model.token_embedding.weight.register_hook(lambda gradient: gradient * learnt)

    optimiser = optimiser_of(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2,
    )
    bar = progress(range(steps), "mini", unit="steps")
    for _ in bar:
        others = len(always) + rng.permutation(len(names) - len(always))
        chosen = np.concatenate([always, repeated, others])[:BATCH]
        same = torch.from_numpy(chosen[:, None] == chosen[None, :])  # (b, b)
        images = pixels([mini.draw(names[i], rng) for i in chosen])
        sampled = torch.tensor([sampler.sample(names[i]) for i in chosen])  # (b, context)
        tokens = torch.searchsorted(used, sampled)
        image_features = model.encode_image(images, normalize=True)  # (b, d)
        hidden = hidden_states(model, tokens)  # (b, w)
        text_features = normalize(hidden @ model.text_projection, dim=1)  # (b, d)
        logits = model.logit_scale.exp() * image_features @ text_features.T  # (b, b)
        # Two pictures of one name are not each other's negatives.
        logits = logits.masked_fill(same & ~torch.eye(len(chosen), dtype=torch.bool), -torch.inf)
        pairs = torch.arange(len(chosen))
        contrast = (cross_entropy(logits, pairs) + cross_entropy(logits.T, pairs)) / 2
        # The contrastive loss alone is content with a dozen of the 64 directions, and a class that
        # is a mixture of its neighbours cannot be forgotten without them.
        directions = normalize(hidden, dim=1)
        crowding = (directions @ directions.T)[~same].square().mean()  # 1/w if spread evenly
        loss = contrast + SPREAD * crowding
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0.0, math.log(MAX_LOGIT_SCALE))
        bar.set_postfix_str(f"loss {loss.item():.3f}, scale {model.logit_scale.exp().item():.0f}")

    with torch.no_grad():
        table.weight[used] = model.token_embedding.weight
    model.token_embedding = table
    return model.eval()


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m clip.train_mini", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("mini.safetensors"), help="file to write")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--steps", type=whole(1, 10**9), default=STEPS)
    about = "a class that is never met (repeatable)"
    names = [name for known in mini.MINI.values() for name in known]
    parser.add_argument("--without", metavar="NAME", action="append", default=[], help=about)
    args = parser.parse_args(argv)
    without = [match(name, names) for name in args.without]
    refuse_existing(args.out)
    torch.set_num_threads(1)  # the same sums in the same order on any machine
    state = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in train(args.seed, args.steps, without).state_dict().items()
    }
    config = read_json(architecture("mini").config)
    about = {"seed": args.seed, "steps": args.steps, "without": without, "config": config}
    metadata = {"format": FORMAT} | {key: json.dumps(value) for key, value in about.items()}
    write_bytes(save(state, metadata), args.out)
    logger.info(f"wrote {args.out} ({args.out.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    sys.exit(run(main))
