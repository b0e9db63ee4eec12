"""The command `clip-forget`: forget, audit, compose, undo, verify, patch, export.

clip-forget forget hf:DIR "Acme Cola" --also "Acme Cola=acme soda" --out acme.safetensors
clip-forget verify acme.safetensors --model hf:CHANGED
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from forgetting.compose import _Parser, _say
from forgetting.compose import cli as compose_cli
from forgetting.errors import ProblemError, line
from forgetting.io import refuse_existing

OTHER_TEMPLATES = (  # by which an audit asks whether other wordings follow
    *("a {}", "the {}", "a picture of a {}.", "a photo of the {}.", "a good photo of a {}."),
    *("a photo of one {}.", "an image of a {}", "a close-up photo of a {}.", "this is a {}."),
)
MODEL = "hf:DIR_OR_ID, open_clip:NAME/PRETRAINED, openai:FILE, or a folder"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; raises ProblemError with one line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--quiet"]:  # an option of each command
        arguments = [*arguments[1:], "--quiet"]
    if arguments[:1] == ["compose"]:  # has a command line of its own, and speaks for itself
        return compose_cli(arguments[1:])
    parser, lazily = _parser()
    if arguments[:1] and arguments[0] in lazily:
        module, add, run = lazily[arguments[0]]
        own = _Parser(prog=f"clip-forget {arguments[0]}")
        found = _part(module)
        getattr(found, add)(own)
        said = getattr(found, run)(own.parse_args(arguments[1:]))
        _say(said, sys.stdout)
        return 0
    args = parser.parse_args(arguments)
    args.run(args)
    return 0


def _part(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        missing = error.name or name
        raise ProblemError(f"this command needs {missing}, which is not installed") from error


def _parser() -> tuple[argparse.ArgumentParser, dict[str, tuple[str, str, str]]]:
    parser = _Parser(
        prog="clip-forget",
        description="Forget names in a CLIP from text alone; no image, one small change.",
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    def command(name: str, about: str, run: Callable[[argparse.Namespace], None]) -> Any:
        found = commands.add_parser(name, help=about, description=about)
        found.set_defaults(run=run)
        return found

    one = command("forget", "forget names, and write an adapter", _forget)
    one.add_argument("model", metavar="MODEL", help=MODEL)
    one.add_argument("names", nargs="+", metavar="NAME", help="what to forget, all at once")
    add = one.add_argument
    add("--also", action="append", default=[], metavar="NAME=WORD", help="another word for a name")
    add("--retain", action="append", default=[], metavar="NAME|@FILE", help="a name that stays, or"
        " a file with a name a line; may be repeated")  # fmt: skip
    add("--keep", action="append", default=[], metavar="NAME", help="a name not to harm")
    add("--template", action="append", default=[], metavar="TEXT", help="with {} for the name")
    add("--target", default="specific", help="specific (default), opposite, orthogonal, empty, "
        "text:TEXT")  # fmt: skip
    add("--beta", type=float, default=0.0, help="how far beyond nothing the target goes")
    add("--push", type=float, help="how far the ridge lets retained names be pushed")
    add("--no-generic", action="store_true", help="retain no generic vocabulary")
    add("--cache", help="folder of the vocabulary's hidden states (~/.cache/clip-forget)")
    add("--out", required=True, help="adapter to write; must not exist")

    one = command("audit", "what text alone says of an adapter: who follows, who feels it", _audit)
    one.add_argument("adapter", metavar="ADAPTER")
    one.add_argument("--model", required=True, help=f"the original: {MODEL}")
    one.add_argument("--word", action="append", default=[], help="another word to ask by")

    command("compose", "join adapters, or give classes back (see compose --help)", _never)
    one = command("undo", "write the weights of a changed model as they were", _undo)
    one.add_argument("adapter", metavar="ADAPTER")
    one.add_argument("--model", required=True, help=f"the changed one: {MODEL}")
    one.add_argument("--base", required=True, help=f"the original: {MODEL}")
    one.add_argument("--out", required=True, help="state dict (safetensors); must not exist")

    one = command("verify", "exactly this change of the original, and nothing else", _verify)
    one.add_argument("adapter", metavar="ADAPTER")
    one.add_argument("--model", required=True, help=f"the changed one: {MODEL}")
    one.add_argument("--base", help="the original, for an adapter that was composed")

    command("patch", "cached text embeddings, without a model (see patch --help)", _never)
    command("export", "the changed model for another tool (see export --help)", _never)
    lazily = {
        "patch": ("forgetting.deploy.stores", "add_patch", "run_patch"),
        "export": ("forgetting.deploy.export", "add_export", "run_export"),
    }
    return parser, lazily


def _never(args: argparse.Namespace) -> NoReturn:
    raise ProblemError(f"{args.command} is called with its own arguments")


def _names(given: Sequence[str]) -> list[str]:
    """Names, and those of files (@FILE)."""
    found: list[str] = []
    for text in given:
        if not text.startswith("@"):
            found.append(text)
            continue
        try:
            content = Path(text[1:]).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ProblemError(f"names of {line(text[1:])} cannot be read ({error})") from error
        found += [name for name in content.splitlines() if name.strip()]
    return found


def _forget(args: argparse.Namespace) -> None:
    from forgetting.api import TEMPLATES, forget
    from forgetting.models.loading import load_model

    out, also = Path(args.out), {}
    refuse_existing(out)
    for text in args.also:
        name, equals, word = text.partition("=")
        if not equals or not word.strip():
            raise ProblemError(f"--also {line(text)!r}: write NAME=WORD")
        also.setdefault(name.strip(), []).append(word)
    retain, options = _names(args.retain), {}
    options |= {"max_displacement": args.push} if args.push is not None else {}
    options |= {"cache": args.cache} if args.cache else {}
    model, tokenize = load_model(args.model)
    answer = forget(
        model,
        tokenize,
        args.names,
        also,
        retain,
        tuple(args.template) or TEMPLATES,
        args.keep,
        target=args.target,
        beta=args.beta,
        generic=not args.no_generic,
        progress=not args.quiet,
        **options,
    )
    answer.save(out, overwrite=False)
    count = len(answer.texts)
    _say(f"{out}: forgets {', '.join(answer.names)} by {count} text{'s' * (count > 1)}", sys.stdout)
    for note in answer.notes:
        if not args.quiet or note.startswith("warning"):
            _say(f"  {note}", sys.stdout)


def _audit(args: argparse.Namespace) -> None:
    from forgetting.adapter import load_adapter, read_parts
    from forgetting.api import Forgotten
    from forgetting.displacement import displacement_along
    from forgetting.models.encoder import read_encoder
    from forgetting.models.loading import load_model
    from forgetting.problem import LowRankEdit

    adapter = load_adapter(args.adapter)
    model, tokenize = load_model(args.model)
    found = Forgotten.load(args.adapter, model)
    tower = read_encoder(model, tokenize)
    known = {tower.tokens_sha256([text]) for text in found.texts}
    parts = read_parts(adapter, args.adapter) if adapter.recipe else []
    own = {part.name: part.tensors["forget_hidden"][0] for part in reversed(parts)}
    for name in adapter.classes:
        texts = [form.replace("{}", name) for form in OTHER_TEMPLATES]
        texts += [*args.word, name.upper(), name.lower()]
        # Of those that the model cannot tell apart one, and none that is forgotten itself.
        read = {tower.tokens_sha256([text]): text for text in reversed(texts)}
        texts = [text for tokens, text in read.items() if tokens not in known]
        if not texts:
            _say(f"{name}: no other wording that the model reads as another text", sys.stdout)
            continue
        hidden = tower.hidden([name, *texts]).double()
        edit = LowRankEdit(adapter.left.double(), adapter.right.double())
        shares = displacement_along(edit, own.get(name, hidden[0]).double(), hidden[1:]).tolist()
        mean = sum(shares) / len(shares)
        _say(f"{name}: {len(texts)} other wordings go {mean:.2f} of the way on average", sys.stdout)
        for text, share in sorted(zip(texts, shares, strict=True), key=lambda pair: pair[1])[:5]:
            _say(f"  {share:5.2f}  {text}", sys.stdout)
    forecast = found.forecast
    if forecast is None:
        _say("no forecast: a union of adapters", sys.stdout)
        return
    if forecast.margin is not None:
        words = f"margin {forecast.margin:.3f} of cosine, {forecast.gap:.3f} before"
        _say(words, sys.stdout)
    for group, (rms, most) in forecast.unlisted.items():
        _say(f"names like {group} that nobody listed feel {rms:.3f} (most {most:.3f})", sys.stdout)
    for one in forecast.affected:
        falls = ", likely to be misclassified" if one.likely_misclassified else ""
        _say(f"  {one.name}: -{one.cosine_loss:.3f} of cosine{falls}", sys.stdout)


def _undo(args: argparse.Namespace) -> None:
    from forgetting.api import Forgotten
    from forgetting.io import container, write_bytes
    from forgetting.models.loading import load_model

    out = Path(args.out)
    refuse_existing(out)
    base = Forgotten.load(args.adapter, load_model(args.base)[0])
    if base.original is None:
        raise ProblemError("--base is the changed model: name the original one")
    model = load_model(args.model)[0]
    changed = Forgotten.load(args.adapter, model, original=base.original)
    changed.undo()
    held = {k: x.detach().cpu().contiguous() for k, x in model.state_dict().items()}
    write_bytes(container(held, {"format": "pt"}), out, overwrite=False)
    _say(f"{out}: as it was, with {', '.join(changed.names)}", sys.stdout)


def _verify(args: argparse.Namespace) -> None:
    from forgetting.api import Forgotten
    from forgetting.models.loading import load_model

    original = None
    if args.base:
        original = Forgotten.load(args.adapter, load_model(args.base)[0]).original
    found = Forgotten.load(args.adapter, load_model(args.model)[0], original=original)
    found.verify()
    _say(f"verified: {', '.join(found.names)}, and nothing else", sys.stdout)


def cli(argv: Sequence[str] | None = None) -> int:
    """Exit status; a mistake is one line on stderr."""
    try:
        return main(argv)
    except (ProblemError, OSError) as error:
        _say(f"error: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(cli())
