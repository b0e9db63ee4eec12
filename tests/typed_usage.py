"""The public names as a program with types uses them. `mypy --strict` accepts this file."""

import numpy as np
from torch import Tensor, nn

import forgetting as f


def change(model: nn.Module, problem: f.ForgetProblem, original: Tensor) -> f.Forgotten:
    assert f.solve_exact(problem).certificate.gap < 1e-9 and f.solve_lora(problem).reached
    answer = f.forget(model, None, ["cola"], {"cola": ["soda"]}, ["tea"], ridge=1e-3)
    certificate, forecast = answer.certificate, answer.forecast  # None for a union
    if certificate is None or forecast is None or certificate.gap > 1e-9:
        raise f.ProblemError(f"{answer.texts[0].title()} is not forgotten")
    answer.apply()
    answer.save("cola.safetensors", overwrite=answer.verify(model))
    f.Forgotten.load("cola.safetensors", model, original=original).undo()
    private = any(name.likely_misclassified for name in forecast.affected)
    return f.Forgotten.from_pretrained(answer.push_to_hub("me/no-cola", private=private), model)


def search(texts: f.TextEmbeddings, images: np.ndarray, answer: f.Forgotten) -> Tensor:
    restored: Tensor = f.restore_index(texts.hidden(["milk"]), answer.adapter)
    scores, flags = answer.flag(f.hide_in_index(images, answer.adapter), false_alarms=0.005)
    shares, none = f.none_of_these(restored, texts.hidden(["tea"]), texts.hidden(["dog"]), 0.05)
    return scores[flags] + shares[none]
