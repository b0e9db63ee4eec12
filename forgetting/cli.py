"""The command `clip-forget`: forget, audit, compose, undo, verify, patch, export.

    clip-forget forget hf:DIR "Acme Cola" --also "Acme Cola=acme soda" --out acme.safetensors
    clip-forget verify acme.safetensors --model hf:CHANGED

In a clone `python -m forgetting` is the same. What a command computes with is imported when it
runs.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from forgetting import __version__
from forgetting.errors import ProblemError, line, nearest, unknown

MODEL = "hf:DIR_OR_ID, open_clip:NAME/PRETRAINED, openai:FILE, or a folder"
OTHER_TEMPLATES = (  # by which an audit asks whether paraphrases move too
    *("a {}", "the {}", "a picture of a {}.", "a photo of the {}.", "a good photo of a {}."),
    *("a photo of one {}.", "an image of a {}", "a close-up photo of a {}.", "this is a {}."),
)
NUMBERS = (  # of ExactSettings, as options of `forget`
    *("beta", "ridge", "max_displacement", "specific_ridge", "similarity"),
    *("min_margin", "min_displacement"),
)
SHOWN = 5  # paraphrases that an audit shows, those that move least


class Parser(argparse.ArgumentParser):
    """Raises ProblemError, with the nearest option for an unknown one; has `--quiet`."""

    def __init__(self, **settings: Any) -> None:
        # A prefix that happens to be unique today is a mistyped option tomorrow.
        super().__init__(allow_abbrev=False, **settings)
        about = "show no progress and no notes: results, warnings and errors alone"
        self.add_argument("--quiet", action="store_true", help=about)

    def error(self, message: str) -> NoReturn:
        _, _, rest = message.partition("unrecognized arguments: ")
        strange = [word.split("=")[0] for word in rest.split() if word.startswith("-")]
        if strange:
            close = nearest(strange[0], self._option_string_actions)
            meant = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            message = f"unknown option {strange[0]!r}{meant}"
        raise ProblemError(f"{message} (see {self.prog} --help)")


def run(
    main: Callable[[Sequence[str] | None], object],
    argv: Sequence[str] | None = None,
    interrupted: str = "interrupted; nothing was written",
) -> int:
    """Exit status of `main(argv)`: what it returns if that is a number, else 0; 2 if it refuses.
    What the user must know of a failure is one line on stderr."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the shell closed it: `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  open until the process ends
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show is no reason to stop
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main(argv)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except BrokenPipeError:  # whoever reads the output has seen enough
        _drop_output()
        return 1
    except ProblemError as error:
        return _refuse(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        try:
            sys.stdout.flush()
        except OSError:  # a full disk: Python would report it once more at its end
            _drop_output()
        return _refuse(f"{where}{error.strerror or error}")
    except MemoryError:
        return _refuse("out of memory")
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


def _drop_output() -> None:
    """Send what is left for stdout nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(message: str) -> int:
    print(f"error: {line(message)}", file=sys.stderr)
    return 2


def cli(argv: Sequence[str] | None = None) -> int:
    """`main` for the shell."""
    return run(main, argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line; ProblemError for a mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--quiet"]:  # an option of each command
        arguments = [*arguments[1:], "--quiet"]
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__.split("\n\n")[1], end="\n\n")
        for command, (about, _, _) in COMMANDS.items():
            print(f"  {command:<8}  {about}")
        print("\nclip-forget COMMAND --help says more.")
    elif name == "--version":
        _say(f"clip-forget {__version__}")
    elif name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    else:
        about, add, run = COMMANDS[name]
        parser = Parser(prog=f"clip-forget {name}", description=f"{about[0].upper()}{about[1:]}.")
        add(parser.add_argument)
        run(parser.parse_intermixed_args(rest))


def _say(text: str) -> None:
    """Print one line, whatever it holds."""
    print(line(text))


def _out(add: Callable[..., Any], what: str) -> None:
    """The options of a command that writes."""
    add("--out", required=True, metavar="PATH", help=f"{what} to write")
    add("--overwrite", action="store_true", help="replace what is at PATH")


def _adapter(add: Callable[..., Any]) -> None:
    add("adapter", metavar="ADAPTER", help="file of what was forgotten")


def _part(module: str) -> Any:
    try:
        return import_module(f"forgetting.{module}")
    except ImportError as error:
        missing = error.name or module
        raise ProblemError(f"this command needs {missing}, which is not installed") from error


def _free(args: argparse.Namespace) -> Path:
    """The place to write to, refused before anything is computed."""
    _part("io").refuse_existing(args.out, args.overwrite)
    return Path(args.out)


def _add_forget(add: Callable[..., Any]) -> None:
    settings = {spec.name: spec for spec in fields(_part("context").ExactSettings)}
    add("model", metavar="MODEL", help=MODEL)
    add("names", nargs="+", metavar="NAME", help="what to forget, all at once")
    add("--also", action="append", default=[], metavar="NAME=WORD", help="another word for a name")
    add("--retain", action="append", default=[], metavar="NAME|@FILE", help="a name to retain, or"
        " a file with one name on each line; may be repeated")  # fmt: skip
    add("--protect", "--keep", action="append", default=[], metavar="NAME", help="a name that must"
        " not be harmed; may be repeated")  # fmt: skip
    add("--template", action="append", default=[], metavar="TEXT", help="with {} for the name")
    add("--target", default="specific", help="specific (default), opposite, orthogonal, empty, "
        "text:TEXT")  # fmt: skip
    for name in NUMBERS:
        about = settings[name].metadata.get("help", "see docs/exact.md").replace("%", "%%")
        add(f"--{name.replace('_', '-')}", dest=name, type=float, metavar="NUMBER", help=about)
    add("--no-generic", action="store_true", help="retain no generic vocabulary")
    add("--cache", help="folder of the vocabulary's hidden states (~/.cache/clip-forget)")
    _out(add, "adapter")


def _forget(args: argparse.Namespace) -> None:
    out, also = _free(args), {}
    for text in args.also:
        name, equals, word = text.partition("=")
        if not equals or not word.strip():
            raise ProblemError(f"--also {line(text)!r}: write NAME=WORD")
        also.setdefault(name.strip(), []).append(word)
    options = {name: getattr(args, name) for name in NUMBERS if getattr(args, name) is not None}
    options |= {"cache": args.cache} if args.cache else {}
    retain, api = _names(args.retain), _part("api")
    model, tokenize = _part("models.loading").load_model(args.model)
    answer = api.forget(
        model,
        tokenize,
        args.names,
        also,
        retain,
        tuple(args.template) or api.TEMPLATES,
        args.protect,
        target=args.target,
        generic=not args.no_generic,
        progress=not args.quiet,
        **options,
    )
    answer.save(out, args.overwrite)
    count = len(answer.texts)
    _say(f"{out}: forgets {', '.join(answer.names)} by {count} text{'s' * (count > 1)}")
    for note in answer.notes:
        if not args.quiet or note.startswith("warning"):
            _say(f"  {note}")


def _names(given: Sequence[str]) -> list[str]:
    """Names, and those of files (@FILE)."""
    found: list[str] = []
    for text in given:
        if not text.startswith("@"):
            found.append(text)
            continue
        try:
            content = Path(text[1:]).read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise ProblemError(f"names of {line(text[1:])} cannot be read ({error})") from error
        found += [name for name in content.splitlines() if name.strip()]
    return found


def _add_audit(add: Callable[..., Any]) -> None:
    _adapter(add)
    add("--model", required=True, help=f"the original: {MODEL}")
    add("--word", action="append", default=[], help="another word for what was forgotten")


def _audit(args: argparse.Namespace) -> None:
    model, tokenize = _part("models.loading").load_model(args.model)
    found = _part("forgotten").Forgotten.load(args.adapter, model)
    encoder, adapter = _part("models.encoder").read_encoder(model, tokenize), found.adapter
    edit = _part("problem").LowRankEdit(adapter.left.double(), adapter.right.double())
    known = {encoder.tokens_sha256([text]) for text in found.texts}
    for name in adapter.classes:
        texts = [form.replace("{}", name) for form in OTHER_TEMPLATES]
        texts += [*args.word, name.upper(), name.lower()]
        # Of those that the model cannot tell apart one, and none that is forgotten itself.
        read = {encoder.tokens_sha256([text]): text for text in reversed(texts)}
        texts = [text for tokens, text in read.items() if tokens not in known]
        if not texts:
            _say(f"{name}: no paraphrase that the model reads as another text")
            continue
        own = [part for part in adapter.recipe.parts if part.name == name] if adapter.recipe else []
        hidden = encoder.hidden([own[0].texts[0] if own else name, *texts]).double()
        along = _part("displacement").displacement_along
        ratios = along(edit, hidden[0], hidden[1:]).tolist()
        mean = sum(ratios) / len(ratios)
        lagging = sum(ratio < 0.5 for ratio in ratios)
        verdict = f"{lagging} of them less than half of it" if lagging else "all more than half"
        _say(f"{name}: {len(texts)} paraphrases move {mean:.2f} of the way on average, {verdict}")
        for text, ratio in sorted(zip(texts, ratios, strict=True), key=lambda pair: pair[1])[
            :SHOWN
        ]:
            _say(f"  {ratio:5.2f}  {text}")
    forecast = found.forecast
    if forecast is None:
        _say("no forecast for other names: the adapter is a union")
        return
    for group, (rms, most) in forecast.unlisted.items():
        _say(
            f"names like those of the group {group} that nobody listed move {rms:.3f} of the way "
            f"(root mean square), at most {most:.3f}"
        )
    for one in forecast.affected:
        wrong = ", likely misclassified" if one.likely_misclassified else ""
        _say(f"  {one.name}: loses {one.cosine_loss:.3f} of cosine{wrong}")
    wrong = [one.name for one in forecast.affected if one.likely_misclassified]
    _say(f"likely misclassified: {', '.join(wrong) or 'no other name'}")


def _add_compose(add: Callable[..., Any]) -> None:
    add("adapters", nargs="+", metavar="ADAPTER", help="adapters to join")
    given_back = "adapter whose classes are given back; may be repeated"
    add("--without", action="append", default=[], metavar="ADAPTER", help=given_back)
    _out(add, "adapter")


def _compose(args: argparse.Namespace) -> None:
    out, adapter = _free(args), _part("adapter")
    if len(args.adapters) < 2 and not args.without:
        raise ProblemError("one adapter alone is nothing to compose: name another, or --without")
    found: dict[str, Any] = {}
    for paths in (args.adapters, args.without):
        seen: dict[bytes, str] = {}
        for path in paths:
            if path in found:
                raise ProblemError(f"{line(path)} is named twice")
            found[path] = adapter.load_adapter(path)
            if (other := seen.setdefault(adapter.adapter_bytes(found[path]), path)) != path:
                raise ProblemError(f"{line(other)} and {line(path)} are the same adapter")
    sides = [{path: found[path] for path in paths} for paths in (args.adapters, args.without)]
    made = _part("compose").compose(*sides)
    adapter.save_adapter(made, out, args.overwrite)
    names = ", ".join(made.classes)
    _say(
        f"{out}: forgets {names}; the texts miss their targets by {made.solver['residual']:.1e} "
        "of the way"
    )


def _add_undo(add: Callable[..., Any]) -> None:
    _adapter(add)
    add("--model", required=True, help=f"the changed one: {MODEL}")
    add("--base", required=True, help=f"the original: {MODEL}")
    _out(add, "state dict (safetensors)")


def _undo(args: argparse.Namespace) -> None:
    out, files, load = _free(args), _part("io"), _part("models.loading").load_model
    forgotten = _part("forgotten").Forgotten
    base = forgotten.load(args.adapter, load(args.base)[0])
    if base.original is None:
        raise ProblemError("--base is the changed model: name the original one")
    model = load(args.model)[0]
    changed = forgotten.load(args.adapter, model, original=base.original)
    changed.undo()
    held = {name: x.detach().cpu().clone() for name, x in model.state_dict().items()}
    files.write_bytes(files.container(held, {"format": "pt"}), out, args.overwrite)
    _say(f"{out}: as it was, with {', '.join(changed.names)}")


def _add_verify(add: Callable[..., Any]) -> None:
    _adapter(add)
    add("--model", required=True, help=f"the changed one: {MODEL}")
    add("--base", help="the original, for an adapter that was composed")


def _verify(args: argparse.Namespace) -> None:
    load, forgotten = _part("models.loading").load_model, _part("forgotten").Forgotten
    original = None
    if args.base:
        original = forgotten.load(args.adapter, load(args.base)[0]).original
    found = forgotten.load(args.adapter, load(args.model)[0], original=original)
    found.verify()
    _say(f"verified: {', '.join(found.names)}, and nothing else")


def _add_patch(add: Callable[..., Any]) -> None:
    _adapter(add)
    add("embeddings", metavar="FILE", help="cached texts: .npy, .safetensors or .parquet")
    add("--base", required=True, help="the original checkpoint, file or folder")
    add("--key", help="tensor or column, where the file holds several")
    add("--unnormalised", action="store_true", help="the embeddings are as the projection gave "
        "them, not of length 1")  # fmt: skip
    _out(add, "file")


def _patch(args: argparse.Namespace) -> None:
    out, adapter = _free(args), _part("adapter").load_adapter(args.adapter)
    base = _local(args.base)
    projection, bias = _part("models.checkpoint").read_projection(base, adapter)
    report = _part("deploy.embeddings").patch_file(
        args.embeddings,
        out,
        projection,
        adapter,
        args.key,
        bias,
        normalised=not args.unnormalised,
        overwrite=args.overwrite,
    )
    _say(
        f"{out}: {report['rows']} {report['dtype']} embeddings patched; condition of the "
        f"projection {report['condition']:.3g}, each right to {report['error']:.1e}",
    )


def _add_export(add: Callable[..., Any]) -> None:
    _adapter(add)
    add("--base", required=True, help="the original model, a local file or folder")
    formats = ("openai", "open_clip", "hf", "peft", "onnx")
    add("--to", required=True, choices=formats, help="the tool to export for")
    add("--original", help="the checkpoint that the adapter was made from, if the base is a rounded"
        " copy of it")  # fmt: skip
    add("--config", help="open_clip's configuration and weights (NAME/TAG), or a JSON file, if the"
        " base has none")  # fmt: skip
    _out(add, "file or folder")


def _export(args: argparse.Namespace) -> None:
    out, adapter = _free(args), _part("adapter").load_adapter(args.adapter)
    original = None if args.original is None else _local(args.original)
    export = _part("deploy.export").export
    export(adapter, _local(args.base), args.to, out, original, args.config, args.overwrite)
    _say(f"{out}: {args.to}, without {', '.join(adapter.classes)}")


def _local(base: str) -> str:
    """A path, which may be named as other commands name a model."""
    kind, _, rest = base.partition(":")
    return rest if kind in ("hf", "openai") and rest and not os.path.lexists(base) else base


COMMANDS = {
    "forget": ("forget names, and write an adapter", _add_forget, _forget),
    "audit": (
        "what text alone says of an adapter: paraphrases, affected names",
        _add_audit,
        _audit,
    ),
    "compose": ("join adapters, or give classes back, by solving again", _add_compose, _compose),
    "undo": ("write the weights of a changed model as they were", _add_undo, _undo),
    "verify": ("exactly this change of the original, and nothing else", _add_verify, _verify),
    "patch": ("change cached text embeddings, without a model", _add_patch, _patch),
    "export": ("write the changed model for another tool", _add_export, _export),
}
