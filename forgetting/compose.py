"""Forget A now and B next week, give A back later: unions solved again, from adapters alone.

    python -m forgetting.compose A.safetensors B.safetensors --out AB.safetensors
    python -m forgetting.compose AB.safetensors --without A.safetensors --out B.safetensors

Adding two changes is wrong: each moves the other's texts. In the constrained form `K_0 = G + mu I`
is the same for every request, so an adapter that keeps `K_0^-1 h` of its texts can be solved again
with any other, without G and without W (`forgetting.solvers.constrained.solve_constraints`). The paper's objective has
a mu that depends on the request; it is solved again from the retain statistics (`--statistics`).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from torch import Tensor

from forgetting.adapter import (
    SHARED,
    Adapter,
    Part,
    adapter_bytes,
    columns,
    joined,
    load_adapter,
    read_parts,
    recipe_fields,
    save_adapter,
)
from forgetting.errors import ProblemError, line, shown
from forgetting.io import refuse_existing
from forgetting.problem import NUMBERS, ForgetProblem, LowRankEdit
from forgetting.solvers.certificate import POOR, certify_constrained
from forgetting.solvers.constrained import solve_constraints
from forgetting.solvers.exact import resolve_auto_weight, solve_exact
from forgetting.statistics import RetainStatistics, square_root

ROWS = {name: dims[0] for name, (_, dims) in columns("constrained").items()}  # forget or leaving
# Relative distances. One text encoded in two batches differs by 1e-7, in half precision by 5e-4 or
# less; the nearest different names of six real sets are 0.1 apart.
SAME_TEXT, UNCLEAR = 1e-5, 1e-3
# Targets of one text that agree to this are one target: whoever made them may have used float32.
SAME_TARGET = 1e-4
CHUNK = 1024  # rows that are compared with all others at one time


@dataclass(frozen=True)
class Composed(LowRankEdit):
    """An answer, left (w, p) orthonormal, right (p, d), float64, and a report."""

    report: dict[str, Any]


def solve_recipes(
    shared: dict[str, Any], parts: Sequence[Part], statistics: RetainStatistics | None = None
) -> Composed:
    """Forget all parts at once.

    Args:
        shared: as in `recipe_fields`.
        parts: of any number of adapters. A text that several of them forget, or take out of the
            retain statistics, counts once, also if they had it from two encodings.
        statistics: needed for the paper's objective; lets the constrained form's answer be
            proved, which cannot be done without G.

    Returns:
        The answer. Its report says in `proved` whether no other change is better by more than the
        `gap`; without statistics it is only known to land on the targets, to `residual`.

    Raises:
        ProblemError: statistics that are missing or others; one text with two targets; an answer
            that misses its targets, or whose gap is more than `POOR`; columns that cannot be what
            they are said to be.
    """
    named = shared["statistics"][:12]
    if statistics is not None and statistics.sha256 != shared["statistics"]:
        raise ProblemError(
            f"the adapters belong to the retain statistics {named}, "
            f"not to the given ones ({statistics.sha256[:12]})"
        )
    if shared["objective"] == "constrained":
        solve = _solve_constrained
    elif statistics is not None:
        solve = _solve_paper
    else:
        raise ProblemError(
            "adapters of the paper's objective are solved again from the retain statistics: "
            f"pass --statistics FILE, the one of sha256 {named}"
        )
    left, right, report = solve(shared, _union(parts), statistics)
    for name, meaning in (("residual", "misses its targets by"), ("gap", "is proved only to")):
        if not report.get(name, 0.0) <= POOR:  # NaN neither
            raise ProblemError(
                f"the answer {meaning} {report[name]:.1e} ({name}; at most {POOR:.0e}): nearly "
                "equal texts have different targets, or a recipe is damaged"
            )
    # Orthonormal columns lose nothing that matters when the factors are rounded to float32.
    left, rotation = torch.linalg.qr(left)
    return Composed(left, rotation @ right, report | {"proved": "gap" in report})


def _solve_constrained(
    shared: dict[str, Any], rows: dict[str, Tensor], statistics: RetainStatistics | None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    h_f, d, base = (rows[x][None] for x in ("forget_hidden", "displacement", "forget_base"))
    gone, gone_base, shares = (rows[x][None] for x in ("leaving_hidden", "leaving_base", "shares"))
    h_f, gone, norm = h_f.double(), gone.double(), torch.linalg.matrix_norm
    inner = torch.cat([h_f, gone], dim=1) @ torch.cat([base, gone_base], dim=1).mT
    if norm(inner - inner.mT) > POOR * norm(inner):  # of K_0^-1, which is symmetric
        raise ProblemError("the adapters' columns are not of their texts and of one K_0")
    left, right = solve_constraints(h_f, base, gone, gone_base, shares, d)
    size, missed = float(norm(d)), float(norm((h_f @ left) @ right - d))
    # tr Delta^T K Delta at the optimum, where K Delta = H_f^T right
    report = {"objective": float((right * d).sum()), "residual": missed / size if size else missed}
    if statistics is not None:
        gram = statistics.weighted(shared["weights"])
        proof = certify_constrained(gram, shared["mu"], gone, shares, h_f, d, left, right)
        report["gap"] = proof[0].gap
    return left[0], right[0], report


def _solve_paper(
    shared: dict[str, Any], rows: dict[str, Tensor], statistics: RetainStatistics
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    h_f, leaving = rows["forget_hidden"].double(), rows["leaving_hidden"].double()
    retained = statistics.root(shared["weights"])
    if len(leaving):  # taken off the squares, which costs half of the digits
        gone = (leaving.T * rows["shares"]) @ leaving
        retained = square_root(statistics.weighted(shared["weights"]) - gone)
    d = rows["displacement"]
    problem = ForgetProblem(
        projection=h_f.new_zeros(h_f.shape[1], d.shape[1]),  # only D matters of W and P
        forget_hidden=h_f,
        retain_hidden=retained,
        target=d,
        **{key: shared[key] for key in NUMBERS},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a poor gap, which is refused
        problem = resolve_auto_weight(problem)
        solution = solve_exact(problem)
    report = {
        "lamb_forget": problem.lamb_forget,
        "branch": solution.branch,
        "objective": solution.certificate.primal,
        "gap": solution.certificate.gap,
    }
    return solution.left, solution.right, report


def _union(parts: Sequence[Part]) -> dict[str, Tensor]:
    """The rows of all parts, each text once."""
    rows = joined(parts)
    forget, owner = _first(parts, rows, "forget_hidden")
    for j, i in enumerate(forget):
        if not _near(rows["displacement"][[j]], rows["displacement"][[i]], SAME_TARGET):
            raise ProblemError(
                f"{parts[owner[i]].name!r} and {parts[owner[j]].name!r} send the same text to "
                "different targets"
            )
    chosen = {"forget": [j for j, i in enumerate(forget) if i == j], "leaving": []}
    leaving, owner = _first(parts, rows, "leaving_hidden")
    # Copies of one text in the statistics are told apart by their number within a part.
    own, taken = Counter(), Counter()
    for j, (part, *text) in enumerate(zip(owner, leaving, rows["shares"].tolist(), strict=True)):
        own[part, *text] += 1
        if own[part, *text] > taken[*text]:
            taken[*text] += 1
            chosen["leaving"].append(j)
    return {name: x[chosen[ROWS[name]]] for name, x in rows.items()}


def _first(
    parts: Sequence[Part], columns: dict[str, Tensor], name: str
) -> tuple[list[int], list[int]]:
    """For each text of a column the first one that is the same, and the part that it is of.

    Raises:
        ProblemError: two texts of two parts that are neither the same nor clearly different.
    """
    rows = columns[name].double()
    if not len(rows):
        return [], []
    owner = torch.tensor([i for i, part in enumerate(parts) for _ in part.tensors[name]])
    first, square = torch.arange(len(rows)), rows.square().sum(dim=1)
    for chunk in first.clone().split(CHUNK):
        size = torch.maximum(square[chunk, None], square)  # (b, n)
        apart = square[chunk, None] + square - 2 * rows[chunk] @ rows.T
        same = apart <= SAME_TEXT**2 * size
        unclear = (apart <= UNCLEAR**2 * size) & ~same & (owner[chunk, None] != owner)
        if unclear.any():
            i, j = unclear.nonzero()[0].tolist()
            a, b = (parts[owner[x]].name for x in (chunk[i], j))
            distance = float((apart[i, j] / size[i, j]).sqrt())
            raise ProblemError(
                f"{a!r} and {b!r} have a text that differs by {distance:.0e}: too much for one "
                "text, too little for two; forget both again from the same features"
            )
        first[chunk] = same.to(torch.uint8).argmax(dim=1)  # the first of the largest
    while not torch.equal(first, first[first]):
        first = first[first]
    return first.tolist(), owner.tolist()


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether rows are the same, one by one, to a relative distance."""
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    return bool(((a - b).norm(dim=1) <= tolerance * a.norm(dim=1)).all())


def compose(
    adapters: dict[str, Adapter],
    without: dict[str, Adapter] | None = None,
    statistics: RetainStatistics | None = None,
) -> Adapter:
    """One adapter that forgets what all `adapters` forget, less what those in `without` forget.

    Both are named by where they come from, for messages. A class that two adapters forget stays
    forgotten until it was given back twice.

    Raises:
        ProblemError: no recipe; adapters that do not belong together; a class to be given back
            that is not there; nothing is left.
    """
    everyone = adapters | (without or {})
    parts_of = {where: read_parts(adapter, where) for where, adapter in everyone.items()}
    (first_where, first), *others = everyone.items()
    for where, adapter in others:
        _check_fit(first, first_where, adapter, where)
    parts = [part for where in adapters for part in parts_of[where]]
    for where in without or {}:
        for part in parts_of[where]:
            _give_back(parts, part, where)
    if not parts:
        raise ProblemError("nothing is left to forget: use the original projection")
    try:
        composed = solve_recipes(first.recipe, parts, statistics)
    except torch.linalg.LinAlgError as error:
        raise ProblemError("the recipes or statistics hold numbers too large to solve") from error
    settings = [adapter.settings for adapter in adapters.values()]
    texts = Counter(text for adapter in adapters.values() for text in adapter.texts)
    texts.subtract(text for adapter in (without or {}).values() for text in adapter.texts)
    return replace(
        first,
        left=composed.left.float(),
        right=composed.right.float(),
        dataset=" + ".join(dict.fromkeys(part.dataset for part in parts)),
        classes=list(dict.fromkeys(part.name for part in parts)),
        settings={
            key: value
            for key, value in first.settings.items()
            if key != "changed_sha256"  # of another change
            and all(key in other and other[key] == value for other in settings)
        },
        solver={"name": "compose", "texts": [*+texts], **composed.report},
        **recipe_fields(first.recipe, parts),
    )


def _check_fit(a: Adapter, a_where: str, b: Adapter, b_where: str) -> None:
    """Refuse two adapters that were not solved over the same `K_0` or with the same constants."""
    compared = [
        *((name, getattr(a, name), getattr(b, name)) for name in ("backbone", "trainer")),
        # How the model computes, its activation for one; adapters of before do not say.
        ("model", *(x.settings.get("model", y.settings.get("model")) for x, y in ((a, b), (b, a)))),
        ("text projection", a.projection_sha256, b.projection_sha256),
        ("objective", a.recipe["objective"], b.recipe["objective"]),
        *((key, a.recipe.get(key), b.recipe.get(key)) for key in SHARED[a.recipe["objective"]]),
    ]
    for name, ours, theirs in compared:
        if ours != theirs:
            if isinstance(ours, dict) and isinstance(theirs, dict):
                key = next(k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k))
                name, ours, theirs = f"{name}.{key}", ours.get(key), theirs.get(key)
            ours, theirs = shown(ours), shown(theirs)
            raise ProblemError(
                f"{line(name)} differs: {ours} in {a_where}, {theirs} in {b_where}; only adapters "
                "of one model, made in the same way, compose"
            )


def _give_back(parts: list[Part], part: Part, where: str) -> None:
    """Take `part` out of the list `parts`."""
    named = [i for i, p in enumerate(parts) if (p.dataset, p.name) == (part.dataset, part.name)]
    for i in named:
        if _same(parts[i], part):
            del parts[i]
            return
    if named:
        raise ProblemError(
            f"{where}: {part.name!r} was forgotten in another way there (other texts or another "
            "target) than in the adapters that it is to be taken out of"
        )
    left = ", ".join(repr(p.name) for p in parts) or "nothing"
    raise ProblemError(f"{where}: forgets {part.name!r}, but what is composed forgets {left}")


def _same(a: Part, b: Part) -> bool:
    to = {"forget_hidden": SAME_TEXT, "leaving_hidden": SAME_TEXT, "displacement": SAME_TARGET}
    a, b = a.tensors, b.tensors
    return torch.equal(a["shares"], b["shares"]) and all(_near(a[x], b[x], to[x]) for x in to)


class _Parser(argparse.ArgumentParser):
    """Raises ProblemError, with the nearest option for an unknown one."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        about = "show no progress and no notes: results, warnings and errors alone"
        self.add_argument("--quiet", action="store_true", help=about)

    def error(self, message: str) -> NoReturn:
        _, _, rest = message.partition("unrecognized arguments: ")
        if rest.startswith("-"):
            name = rest.split()[0].split("=")[0]
            near = get_close_matches(name, self._option_string_actions)
            meant = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            message = f"unknown option {name!r}{meant}"
        raise ProblemError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; raises ProblemError with one line."""
    parser = _Parser(
        prog="python -m forgetting.compose",
        description="Join adapters, or give classes back, by solving again.",
    )
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="adapters to join")
    given_back = "adapter whose classes are given back; may be repeated"
    parser.add_argument(
        "--without", action="append", default=[], metavar="ADAPTER", help=given_back
    )
    parser.add_argument("--out", required=True, help="adapter to write; must not exist")
    needed = "file of retain statistics; needed for the paper's objective"
    parser.add_argument("--statistics", help=needed)
    args = parser.parse_intermixed_args(argv)
    out = Path(args.out)
    refuse_existing(out)
    if len(args.adapters) < 2 and not args.without:
        raise ProblemError("one adapter alone is nothing to compose: name another, or --without")
    adapters: dict[str, Adapter] = {}
    for paths in (args.adapters, args.without):
        seen: dict[bytes, str] = {}
        for path in paths:
            if path in adapters:
                raise ProblemError(f"{line(path)} is named twice")
            adapters[path] = load_adapter(path)
            other = seen.setdefault(adapter_bytes(adapters[path]), path)
            if other != path:
                raise ProblemError(f"{line(other)} and {line(path)} are the same adapter")
    result = compose(
        {path: adapters[path] for path in args.adapters},
        {path: adapters[path] for path in args.without},
        RetainStatistics.load(args.statistics) if args.statistics else None,
    )
    save_adapter(result, out, overwrite=False)
    report = [
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in result.solver.items()
        if name not in ("name", "texts", "proved")
    ]
    if not result.solver["proved"]:
        report.append("not proved to be the least disturbance: that takes --statistics")
    names = ", ".join(result.classes)
    _say(f"{out}: forgets {names} of {result.dataset} ({', '.join(report)})", sys.stdout)


def _say(text: str, stream: TextIO) -> None:
    """Print one line, what the stream cannot encode escaped."""
    encoding = stream.encoding or "utf-8"
    print(line(text).encode(encoding, "backslashreplace").decode(encoding), file=stream)


def cli(argv: Sequence[str] | None = None) -> int:
    """Exit status; a mistake is one line on stderr."""
    try:
        main(argv)
    except (ProblemError, OSError) as error:
        _say(f"error: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(cli())
