"""Closed forms that erase a concept: LEACE and SPLINCE by whitening, the projections of POUR, CCUP
and DP, OCE's rotation, and SPEED's filtered null space. See `forgetting.baselines`.

None was published for CLIP's text projection. The docstrings say what was carried over."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from forgetting.baselines import FREE, Edit, EditInputs, free_directions, svd
from forgetting.settings import setting

ERASED = 0.5  # of the distance between the means; more than that left is no erasure
CORRELATED = 0.01  # least canonical correlation of a class that LEACE erases, the authors' svd_tol
TURNED = 1e-6  # singular values of a rotation's change that float32 does not see


def leace(inputs: EditInputs, settings: None = None, keep: Tensor | None = None) -> Edit:
    """LEACE (Belrose et al., "LEACE: Perfect linear concept erasure in closed form", NeurIPS 2023):
    no linear classifier tells the texts of C classes from the retained ones any more, at the least
    change of the retained hidden states.

    With S the covariance of all texts, `T = S^-1/2` and U an orthonormal basis of the whitened
    cross-covariance with the classes, hidden states become `P x`, `P = I - T^-1 U B^+ T`, which
    folds into W as a change of rank C. LEACE has `B = U`. With `keep`, rows (n,) of the retained
    texts, `B = (I - Q Q^T) U`, Q a basis of the whitened cross-covariance with those: P has the
    same kernel and leaves that one as it is. The authors' bias is left out: W has none.

    As in their package, S is shrunk linearly towards a multiple of I (Bodnar, Gupta and Parolya
    2014), and correlations below 0.01 do not count. So a class's indicator is standardised: one of
    0 and 1 falls below that from 20,000 names on."""
    x = torch.cat([inputs.hidden, inputs.retained])  # (n, w)
    z = one_hot(inputs.labels.unique(return_inverse=True)[1]).to(x)  # (k, C)
    z = torch.cat([z, z.new_zeros(len(inputs.retained), z.shape[1])])  # (n, C)
    n, centred, width = len(x), x - x.mean(dim=0), x.shape[1]
    s = centred.T @ centred / n
    trace = s.trace()
    shrink = trace.square() / n / (s.square().sum() - trace.square() / width)
    s = (1 - shrink) * s + shrink * trace / width * torch.eye(width).to(s)
    values, vectors = torch.linalg.eigh(s)
    used = values > values[-1] * width * torch.finfo(s.dtype).eps
    values, vectors = values[used], vectors[:, used]
    whiten = vectors * values.rsqrt() @ vectors.T  # T
    cross = whiten @ (centred.T @ (z / z.std(dim=0))) / (n - 1)  # (w, C)
    u, correlations, _ = torch.linalg.svd(cross, full_matrices=False)
    u = base = u[:, correlations > CORRELATED]  # (w, r)
    if keep is not None:
        *_, q = svd(centred[len(inputs.hidden) + keep] @ whiten)  # (., w)
        base = u - q.T @ (q @ u)
    left = -whiten @ torch.linalg.pinv(base).T  # (w, r)
    back = (vectors * values.sqrt() @ vectors.T @ u).T  # (r, w)
    means = torch.stack([x[row > 0].mean(dim=0) - x[row == 0].mean(dim=0) for row in z.T])  # (C, w)
    after = means + (means @ left) @ back
    apart = float((after.norm(dim=1) / means.norm(dim=1)).max())
    notes = [f"{apart:.1%} of the distance between the class's texts and the retained is left"]
    if apart > ERASED:
        notes.append("warning: little was erased: the class's texts hardly correlate with it")
    return Edit(left, back @ inputs.projection, {"apart": apart}, notes)


@dataclass(frozen=True)
class SplinceSettings:
    keep: int = setting(10, "nearest retained names whose covariance is kept", 1, 1000)


def splince(inputs: EditInputs, settings: SplinceSettings) -> Edit:
    """SPLINCE (Holstege, Ravfogel and Wouters, "Preserving Task-Relevant Information Under Linear
    Concept Removal", NeurIPS 2025, arXiv 2506.10703): erases as `leace` does, and keeps the
    covariance with a second label exactly. Here that label says which of the `keep` retained names
    nearest to the texts a text is."""
    near = normalize(inputs.retained, dim=1) @ normalize(inputs.hidden, dim=1).mean(dim=0)  # (m,)
    return leace(inputs, keep=near.topk(min(settings.keep, len(near))).indices)


@dataclass(frozen=True)
class ProjectionSettings:
    strength: float = setting(1.0, "part of the directions that is removed", above=0, high=1)


def ccup(inputs: EditInputs, settings: ProjectionSettings) -> Edit:
    """CCUP's null space (Mishra et al., "Erasing CLIP Memories", arXiv 2512.14137): embeddings lose
    the span of the forgotten texts' embeddings, `W' = W (I - strength U U^T)`, U orthonormal.

    Derived from the abstract, which speaks of a partial projection too. For one text at strength 1
    it is what vector-unforget does to every vector of a store, `x - (x n) n`, done to the queries
    instead: the scores with a given index are the same."""
    *_, basis = svd(inputs.embeddings)  # (r, d)
    return Edit(-settings.strength * inputs.projection @ basis.T, basis)


def pour(inputs: EditInputs, settings: ProjectionSettings) -> Edit:
    """POUR-P (Le, Peng, Liu and Noble, "POUR", CVPR 2026, arXiv 2511.19339): features lose the
    direction of the class in the simplex of class means, `P = I - w w^T`.

    The simplex is centred, so w is the unit text embedding less the mean of the retained ones. The
    paper has means of images there."""
    centre = normalize(inputs.retained @ inputs.projection, dim=1).mean(dim=0)  # (d,)
    *_, basis = svd(normalize(inputs.embeddings, dim=1) - centre)  # (r, d)
    return Edit(-settings.strength * inputs.projection @ basis.T, basis)


@dataclass(frozen=True)
class DoubleProjectionSettings:
    # Of CaltechNature's classes 52 % are left at 3, 94 at 0.5 and 63 from 20 on.
    threshold: float = setting(3.0, FREE, above=0, high=1e6)


def double_projection(inputs: EditInputs, settings: DoubleProjectionSettings) -> Edit:
    """DP (Zhang, Cheng, Wang and Liu, "Closed-Form Concept Erasure via Double Projections", CVPR
    2026, arXiv 2604.10032), derived from the abstract.

    First projection: a text's proxy is its projection on the span of what is retained, so that it
    keeps what retained texts explain. Second: the change stays in the null space N of that span and
    sends the text to its proxy. With `R = H_f N N^T`, what the proxies lack, the least such change
    is `Delta = -R^+ R W`. Retained texts in the span do not move at all. The span is that of the
    eigenvectors above the threshold: a few hundred names span everything."""
    free, report, notes = free_directions(inputs.retained, settings.threshold)  # (w, q)
    *_, basis = svd(inputs.hidden @ free @ free.T)  # (r, w)
    return Edit(-basis.T, basis @ inputs.projection, report, notes)


@dataclass(frozen=True)
class OceSettings:
    erase: float = setting(2000.0, "weight of the erased directions", above=0, high=1e9)
    retain: float = setting(10.0, "weight of the mean retained text", 0, 1e9)
    ridge: float = setting(10.0, "the authors' lambda", 0, 1e9)


def oce(inputs: EditInputs, settings: OceSettings) -> Edit:
    """OCE (Sun et al., "Orthogonal Concept Erasure for Diffusion Models", ICML 2026, arXiv
    2605.28902, code HansSunY/OCE), published for value matrices: `W' = W Q^T` with Q orthogonal.

    Q maximises `tr Q^T M` with
    `M = W^T (retain H_r^T H_r / m + ridge I) W - erase E E^T (I - G G^T)` (Procrustes): `Q = A B^T`
    of the singular vectors of M, the least one turned so that Q is a rotation. E spans the
    embeddings of the forgotten texts, G that of the text they are led to, here the empty prompt.
    The retained names stand for the authors' captions. They turn the last coordinate instead."""
    w, retained = inputs.projection, inputs.retained
    embedded = retained @ w  # (m, d)
    kept = settings.retain * embedded.T @ embedded / len(retained) + settings.ridge * w.T @ w
    *_, erased = svd(inputs.embeddings)  # (r, d)
    *_, guide = svd(inputs.neutral @ w)  # (1, d)
    led = erased - erased @ guide.T @ guide
    a, _, b = torch.linalg.svd(kept - settings.erase * erased.T @ led)
    a[:, -1] *= torch.linalg.det(a @ b).sign()
    u, values, basis = torch.linalg.svd((a @ b).T - torch.eye(len(a)).to(a))
    turned = values > TURNED
    return Edit(w @ (u * values)[:, turned], basis[turned])


@dataclass(frozen=True)
class SpeedSettings:
    threshold: float = setting(0.1, FREE, above=0, high=1e6)
    ridge: float = setting(1.0, "the authors' retain_scale", above=0, high=1e6)
    augment: int = setting(10, "noisy copies of a retained text", 0, 100)


def speed(inputs: EditInputs, settings: SpeedSettings) -> Edit:
    """SPEED (Li et al., "SPEED: Scalable, Precise, and Efficient Concept Erasure for Diffusion
    Models", ICLR 2026, arXiv 2503.07392, code Ouxiang-Li/SPEED), published for value matrices.

    Retained texts count that `F = D^T H_f (k I + H_f^T H_f)^-1`, an edit without constraints, moves
    more than their mean, and noisy copies of them, along the direction that W uses least, by the
    same rule. With N their null space, `C = H_f^T H_f / k`, `A = N N^T C + ridge I`, and the change
    held at zero for the empty prompt e, `Delta = A^-1 (X - p (e A^-1 p)^-1 e A^-1 X) D` where
    `X = N N^T H_f^T / k` and `p = N N^T e^T`. Names are encoded by one vector here, so e stands for
    the clusters of its tokens."""
    h, w, k = inputs.hidden, inputs.projection, len(inputs.hidden)
    second = h.T @ h / k  # C, (w, w)
    one = torch.eye(len(second)).to(second)
    edit = torch.linalg.solve(one + second, h.T @ inputs.displacement / k)  # F^T, (w, d)

    def influenced(rows: Tensor) -> Tensor:
        moved = (rows @ edit).norm(dim=1)
        return rows[moved > moved.mean()]

    rows = influenced(inputs.retained)
    least = torch.linalg.svd(w, full_matrices=False).U[:, -1]  # (w,)
    generator = torch.Generator().manual_seed(inputs.seed)
    along = torch.randn(settings.augment, len(rows), 1, generator=generator, dtype=w.dtype).to(w)
    copies = influenced((rows + along * least).flatten(0, 1))
    free, report, notes = free_directions(torch.cat([rows, copies]), settings.threshold)  # (w, q)
    target, invariant = (free @ (rows @ free).T for rows in (h / k, inputs.neutral))  # X, p
    inner = free @ (free.T @ second) + settings.ridge * one  # A
    left, fixed = (torch.linalg.solve(inner, columns) for columns in (target, invariant))
    left = left - fixed @ torch.linalg.pinv(inputs.neutral @ fixed) @ (inputs.neutral @ left)
    return Edit(left, inputs.displacement, report | {"influenced": len(rows)}, notes)
