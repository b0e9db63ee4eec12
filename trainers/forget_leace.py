"""Linear concept erasure (LEACE) with a class as the concept, on text hidden states."""

from __future__ import annotations

import importlib.util
import warnings

import torch
from torch import Tensor

import datasets
from engine import TRAINER_REGISTRY, UserError
from trainers.base import Solved
from trainers.retained import RetainingTrainer
from trainers.texts import BARE

ERASED = 0.5  # of the distance between the means; more than that left is no erasure


@TRAINER_REGISTRY.register()
class ForgetLEACE(RetainingTrainer):
    """LEACE (Belrose et al. 2023, arXiv 2306.03819): no linear classifier tells the class's texts
    from the retained ones any more, at the least change of the retained hidden states.

    The class's texts are those of the request and its evaluation prompt, which no other method
    sees. The eraser is fitted without its bias (`affine=False`): then it is a linear map of the
    hidden state and folds into the projection as a change of rank k, k the number of classes. What
    it equals are means, so the class's texts end on the mean of the retained ones.
    """

    name = "leace"
    default_target = None

    @classmethod
    def check_settings(cls, cfg) -> None:
        if importlib.util.find_spec("concept_erasure") is None:
            raise UserError(
                "ForgetLEACE needs the package concept-erasure: pip install -r requirements.txt"
            )

    def solve(self, classes: list[str], generator: torch.Generator) -> Solved:
        request = self.request(classes)
        staying, names = self.staying(request)
        texts = []
        for index, name in enumerate(classes):
            prompt = self.bundle.class_hidden[[self.bundle.classnames.index(name)]]
            mine = [row for row, owner in enumerate(request.owner) if owner == index]
            texts.append(torch.cat([request.hidden[mine], prompt]).double().to(self.device))
        left, right, apart = leace(texts, staying, self.model.projection.double())
        print(f"  {apart:.1%} of the distance between the class's texts and the retained is left")
        if apart > ERASED:
            print("  warning: little was erased: the class's texts hardly correlate with it")
        template = self.bundle.template
        prompts = [template.replace(BARE, datasets.plain(name)) for name in classes]
        report = {
            "apart": apart,
            "texts": list(dict.fromkeys([*request.texts, *prompts])),
            "retained": len(staying),
            "left_retain_set": names,
        }
        return Solved(left.float(), right.float(), report)


def leace(
    texts: list[Tensor], retained: Tensor, projection: Tensor
) -> tuple[Tensor, Tensor, float]:
    """Erase k classes of texts at once: factors of the change, and what is left of the concept.

    A class's indicator is standardised. LEACE does not depend on its scale, but the package drops
    singular values of the whitened cross-covariance below 0.01, and for 2 texts among n an
    indicator of 0 and 1 has one of at most sqrt(2 / n): from 20,000 names on nothing would be
    erased, without a word. Standardised, the tolerance is one of a correlation. The covariance is
    shrunk as the package does by default. Its `constrain_cov_trace` is off: it exists for erasing
    layer after layer, and where it acts the eraser has full rank and folds into no small adapter.

    Args:
        texts: for each class (n_i, w) hidden states; retained: (m, w); projection: (w, d); all
            float64.

    Returns:
        left (w, k), right (k, d), and the largest share, over the classes, of the distance between
        the class's mean and the mean of all other texts that is left after erasing.
    """
    with warnings.catch_warnings():
        # torch 2.14 says so of the package's own use of it, on import.
        warnings.filterwarnings("ignore", r".torch\.jit\.script. is deprecated", FutureWarning)
        from concept_erasure import LeaceFitter

    x = torch.cat([*texts, retained])  # (n, w)
    sizes = torch.tensor([*map(len, texts), len(retained)], device=x.device)
    owner = torch.arange(len(sizes), device=x.device).repeat_interleave(sizes)
    mine = torch.stack([owner == index for index in range(len(texts))], dim=1)  # (n, k)
    z = mine.double()
    eraser = LeaceFitter.fit(x, z / z.std(dim=0), affine=False, constrain_cov_trace=False).eraser
    left, right = -eraser.proj_right.T, eraser.proj_left.T  # (w, k), (k, w)
    means = torch.stack([x[m].mean(dim=0) - x[~m].mean(dim=0) for m in mine.T])  # (k, w)
    after = means + (means @ left) @ right
    apart = torch.linalg.vector_norm(after, dim=1) / torch.linalg.vector_norm(means, dim=1)
    return left, right @ projection, float(apart.max())
