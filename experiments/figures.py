"""The figures of docs/exact.md.

    python -m experiments figures [--features DIR] [--out docs/figures]

Without a folder of feature bundles only those that need none are made (`levels`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.colors import BoundaryNorm
from torch import Tensor

from clip.bundle import FeatureBundle
from engine.cli import Parser
from engine.determinism import one_thread
from engine.log import say
from evaluation.plots import COLOURS, check_picture, drawing
from experiments.alone import Alone
from experiments.frontier import UNKNOWN, frontier, load, plot
from experiments.solvers import problem_of
from experiments.world import World
from forgetting import ForgetProblem, LoraSettings, Spectrum, solve_exact, solve_lora, thresholds

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"
BACKBONE, SET = "ViT-B/32", "CaltechNature"
COUNTS = {1: COLOURS[1], 3: COLOURS[0], 7: COLOURS[2]}  # classes forgotten at once -> colour
LORA = (0.93, 1.07)  # lamb_forget of the descents for one text, in units of c*
WITHIN = (-0.3, 0.33, 0.67, 1.3)  # for several: 0 is c_lo, 1 is c*
LEVELS = [1, 1.001, 1.01, 1.03, 1.1, 1.2, 1.5, 2, 3]
ONE_TRIAL = LoraSettings(reduction=0.0, max_trials=1)


def levels(path: Path) -> None:
    """Level lines of the square root of F2 over (mu, r) for a random problem, with its optimum."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    problem = ForgetProblem(normal(8, 6), normal(3, 8), normal(20, 8), normal(3, 6), 1.0, 0.3)
    limits = thresholds(problem)
    norm = BoundaryNorm(LEVELS, 256, extend="max")
    cases = (
        ("between c_lo and c*", (limits.start + limits.reach) / 2),
        ("above c*: r = 0", 1.15 * limits.reach),
    )
    with drawing(path, 13, 5) as figure:
        for axis, (title, lamb_forget) in zip(figure.subplots(1, 2), cases, strict=True):
            here = replace(problem, lamb_forget=lamb_forget)
            solution = solve_exact(here)
            mu = torch.logspace(0, 4, 161, dtype=torch.float64)
            r = torch.logspace(-2, 3, 161, dtype=torch.float64)
            value = square_f2(here, mu, r).sqrt() / solution.certificate.primal
            lines = axis.contourf(
                mu, r, value.T, levels=LEVELS, norm=norm, extend="max", cmap="Blues"
            )
            axis.contour(mu, r, value.T, levels=LEVELS, colors="0.35", linewidths=0.6)
            best = max(solution.rho * solution.mu, float(r[0]))
            axis.plot(solution.mu, best, "*", markersize=13, color=COLOURS[1], clip_on=False)
            axis.set(xscale="log", yscale="log", xlabel="mu", ylabel="r")
            axis.set_title(f"sqrt(F2) / its minimum, {title}")
        figure.colorbar(lines, ax=figure.axes, ticks=LEVELS, format="%g")


def square_f2(problem: ForgetProblem, mu: Tensor, r: Tensor) -> Tensor:
    """F2 straight from its definition, (a, b) for mu (a,) and r (b,)."""
    h_f, h_r, d = problem.forget_hidden, problem.retain_hidden, problem.displacement
    eye_w, eye_k = torch.eye(h_f.shape[1]).to(h_f), torch.eye(len(h_f)).to(h_f)
    inner = eye_w + (h_r.T @ h_r) / mu[:, None, None]
    a = h_f @ torch.linalg.solve(inner, h_f.T.expand(len(mu), -1, -1))  # (a, k, k)
    q = (d * torch.linalg.solve(a[:, None] + r[:, None, None] * eye_k, d)).sum(dim=(-2, -1))
    first = problem.lamb_forget**2 * r + problem.lamb_preserve**2 * mu[:, None] + problem.lw**2
    return first * q


def phases(bundle: FeatureBundle, path: Path) -> None:
    """How far texts move against lamb_forget: the exact optimum, and descents beside it."""
    world = World(bundle, {})
    with drawing(path, 13, 5.4) as figure:
        fraction, length = figure.subplots(1, 2)
        for count, colour in COUNTS.items():
            problem = problem_of(world, bundle.classnames[:count])
            spectrum = Spectrum(problem.retain_hidden)
            limits = thresholds(problem, spectrum)
            low, high = limits.start, limits.reach
            width = max(high - low, 0.1 * high)
            grid = torch.linspace(low - 0.5 * width, high + 0.5 * width, 160).tolist()
            grid = sorted([*grid, low * (1 - 1e-6), high * (1 + 1e-6)])
            points = [solve_exact(replace(problem, lamb_forget=x), spectrum) for x in grid]
            label = f"{count} class" + ("es" if count > 1 else "")
            moved = [problem.reduction(p.delta.float()) for p in points]
            fraction.plot(grid, moved, color=colour, label=label)
            length.plot(grid, [float(p.delta.norm()) for p in points], color=colour)
            tries = [x * high for x in LORA] if count == 1 else [low + x * width for x in WITHIN]
            print(f"{label}: c_lo {low:.4f}, c* {high:.4f}")
            for x in tries:
                here = replace(problem, lamb_forget=x)
                descent, exact = solve_lora(here, ONE_TRIAL), solve_exact(here, spectrum)
                reached = float(here.objective(descent.delta.double()))
                best = exact.certificate.primal
                cut = exact.truncated(here.rank)[2]
                print(
                    f"  lamb_forget {x:.4f}: reduction {here.reduction(exact.delta.float()):.4f}, "
                    f"objective {best:.5f} (gap {exact.certificate.gap:.0e}; "
                    f"cut to rank {here.rank}: {cut:+.2%}); LoRA: reduction "
                    f"{descent.reduction:.4f}, objective {reached:.5f} ({reached / best - 1:+.3%})"
                )
                style = {"marker": "x", "color": colour, "s": 45, "zorder": 3}
                fraction.scatter(x, descent.reduction, **style)
                length.scatter(x, float(descent.delta.norm()), **style)
            for x, style in ((low, ":"), (high, "--")):
                for axis in (fraction, length):
                    axis.axvline(x, color=colour, linewidth=0.7, linestyle=style)
        fraction.scatter([], [], marker="x", color="0.3", label="LoRA, 2,000 steps")
        for label, style in (("c_lo", ":"), ("c*", "--")):
            fraction.plot([], [], color="0.3", linewidth=0.7, linestyle=style, label=label)
        fraction.set(xlabel="lamb_forget", title="how far the texts go (1: all the way)")
        length.set(xlabel="lamb_forget", title="length of the change, ||Delta||")
        figure.legend(loc="outside lower center", ncols=6)


def shares(bundles: Sequence[FeatureBundle], path: Path) -> None:
    """s(h) of every class forgotten in turn, for what is retained and what is not."""
    with drawing(path, 13, 5) as figure:
        for axis, own in zip(figure.subplots(1, len(bundles), sharey=True), bundles, strict=True):
            others = [bundle for bundle in bundles if bundle is not own]
            columns = {}
            for known, opts in (("known", ()), ("unknown", UNKNOWN)):
                alone = Alone(own, others, opts)
                left = alone.left().float()
                within = left @ own.class_hidden.T  # (C, C)
                if known == "unknown":
                    print_pulls(alone, others)
                else:
                    columns["its own\nprompt"] = within.diagonal()
                    columns["rest of\nits set"] = within[~torch.eye(len(within), dtype=torch.bool)]
                hidden = torch.cat([bundle.class_hidden for bundle in others])
                columns[f"others,\n{known}"] = (left @ hidden.T).flatten()
            axis.boxplot(
                [column.numpy() for column in columns.values()],
                tick_labels=list(columns),
                whis=(0, 100),
                medianprops={"color": COLOURS[1]},
            )
            axis.set_title(own.dataset)
            axis.tick_params(axis="x", labelsize="small")
        figure.axes[0].set_ylabel("share of the change, s(h)")


def print_pulls(alone: Alone, others: Sequence[FeatureBundle]) -> None:
    """x D of images, for the default target: of the forgotten class itself and of any other."""
    own = alone.bundle
    texts = zip(own.forget_hidden, alone.answers(), strict=True)
    d = torch.stack([(h @ answer.left) @ answer.right for h, answer in texts])  # (C, d)
    print(f"{own.dataset}, other names unknown: x D, mean and deviation over images of one D")
    mine = torch.arange(len(d)) == own.labels[:, None]  # (N, C)
    for bundle in (own, *others):
        pulls = bundle.image_features @ d.T  # (N, C)
        kept = ~mine if bundle is own else torch.ones_like(pulls, dtype=torch.bool)
        deviation = torch.stack([pulls[kept[:, i], i].std() for i in range(len(d))]).mean()
        print(f"  {bundle.dataset}: {pulls[kept].mean():.2f}, {deviation:.2f}")
    pulls = own.image_features @ d.T
    print(f"  the forgotten class itself: {pulls[mine].mean():.2f}")


def main(argv: Sequence[str] | None = None) -> None:
    """Make the figures."""
    parser = Parser(prog="python -m experiments figures", description=__doc__.splitlines()[0])
    parser.add_argument("--features", help="folder of feature bundles")
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder of the PNGs")
    args = parser.parse_args(argv)
    paths = {name: args.out / f"{name}.png" for name in ("levels", "phases", "shares", "frontier")}
    bundles = load(args.features, BACKBONE) if args.features else []
    for path in paths.values():
        check_picture(path)
    levels(paths["levels"])
    if bundles:
        named = {bundle.dataset: bundle for bundle in bundles}
        with one_thread():
            phases(named.get(SET, bundles[0]), paths["phases"])
            shares(bundles, paths["shares"])
            plot(frontier(bundles), paths["frontier"])
    say(f"written: {args.out}")
