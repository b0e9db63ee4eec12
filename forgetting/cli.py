"""The command `clip-forget`; in a clone `python -m forgetting` is the same.

What a command computes with is imported when it runs.
"""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from forgetting import __version__
from forgetting.errors import ProblemError, line, unknown

MODEL = "hf:DIR_OR_ID, open_clip:NAME/PRETRAINED, openai:FILE, or a folder"
OTHER_TEMPLATES = (  # by which an audit asks whether paraphrases move too
    "a {}",
    "the {}",
    "a picture of a {}.",
    "a photo of the {}.",
    "a good photo of a {}.",
    "a photo of one {}.",
    "an image of a {}",
    "a close-up photo of a {}.",
    "this is a {}.",
)
NUMBERS = {  # of ExactSettings, as options of `forget`; None: what the setting itself says
    "beta": "how far beyond zero the targets specific and opposite go",
    "ridge": None,
    "max_displacement": None,
    "specific_ridge": None,
    "similarity": "cosine with a forgotten text from which a name is not retained; 1: none",
    "min_margin": None,
    "min_displacement": None,
}
ORIGINAL = "the original checkpoint, file or folder; none for an adapter of embeddings"
LOCAL = {"type": lambda text: text.removeprefix("hf:")}  # a file or folder
SHOWN = 5  # paraphrases that an audit shows, those that move least

Option = Callable[..., Any]  # `add_argument` of a command's parser
Parse = Callable[[], argparse.Namespace]


class Parser(argparse.ArgumentParser):
    """Raises ProblemError, with the nearest option for an unknown one; has `--quiet`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        about = "show no progress and no notes: results, warnings and errors alone"
        self.add_argument("--quiet", action="store_true", help=about)

    def error(self, message: str) -> NoReturn:
        _, _, rest = message.partition("unrecognized arguments: ")
        strange = [word.split("=")[0] for word in rest.split() if word.startswith("-")]
        if strange:
            message = unknown("option", strange[0], self._option_string_actions)
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
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        try:
            sys.stdout.flush()
        except OSError:  # a full disk: Python would report it once more at its end
            _drop_output()
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    print(f"error: {line(message)}", file=sys.stderr)
    return 2


def _drop_output() -> None:
    """Send what is left for stdout nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def cli(argv: Sequence[str] | None = None) -> int:
    """`main` for the shell."""
    interrupted = "interrupted; no file was written; a database goes on by the same command"
    return run(main, argv, interrupted)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line; ProblemError for a mistake."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print("Forget names in a CLIP from text alone, and take the change where it is used.\n")
        for command, (function, _) in COMMANDS.items():
            print(f"  {command:<8} {function.__doc__}")
        print(f"\nexample:\n  clip-forget forget {COMMANDS['forget'][1]}")
        print("\nclip-forget COMMAND --help has the options and an example of each.")
    elif name == "--version":
        print(f"clip-forget {__version__}")
    elif name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    else:
        function, example = COMMANDS[name]
        parser = Parser(
            prog=f"clip-forget {name}",
            description=function.__doc__,
            epilog=f"example:\n  clip-forget {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

        def parse() -> argparse.Namespace:
            from forgetting.io import refuse_existing

            args = parser.parse_intermixed_args(rest)
            if getattr(args, "out", None):  # refused before anything is computed
                refuse_existing(args.out, args.overwrite)
            return args

        function(parser.add_argument, parse)


def _say(text: str) -> None:
    """Print one line, whatever it holds."""
    print(line(text))


def _out(option: Option, what: str) -> None:
    """The options of a command that writes."""
    option("--out", required=True, metavar="PATH", help=f"{what} to write")
    option("--overwrite", action="store_true", help="replace what is at PATH")


def _forget(option: Option, parse: Parse) -> None:
    """Forget names, and write an adapter."""
    from forgetting.api import TEMPLATES, forget
    from forgetting.context import ExactSettings
    from forgetting.models.loading import load_model
    from forgetting.models.text_embeddings import TextEmbeddings
    from forgetting.targets import TARGETS

    settings = {spec.name: spec for spec in fields(ExactSettings)}
    many = {"action": "append", "default": []}
    option("model", metavar="MODEL", help=MODEL)
    option("names", nargs="+", metavar="NAME", help="what to forget, all at once")
    option("--also", **many, metavar="NAME=WORD", help="another word for a name")
    retain = "one name to retain, or a file with one on each line; may be repeated"
    option("--retain", **many, metavar="NAME|@FILE", help=retain)
    protect = "one name that must not be harmed; may be repeated"
    option("--protect", "--keep", **many, metavar="NAME", help=protect)
    form = f"with {{}} for the name; may be repeated (default: {', '.join(TEMPLATES)})"
    option("--template", **many, metavar="TEXT", help=form)
    goal = f"one of {', '.join(TARGETS)} or text:TEXT (default: %(default)s)"
    option("--target", default="specific", help=goal)
    for name, about in NUMBERS.items():
        about = about or settings[name].metadata["help"]
        option(f"--{name.replace('_', '-')}", dest=name, type=float, metavar="NUMBER", help=about)
    about = "make an adapter for an index of images (clip-forget index), which changes no model"
    option("--embeddings", action="store_true", help=about)
    option("--no-generic", action="store_true", help="retain no generic vocabulary")
    option("--cache", help="folder of the vocabulary's hidden states (~/.cache/clip-forget)")
    _out(option, "adapter")
    args = parse()
    also = _words(args.also)
    changes = {name: getattr(args, name) for name in NUMBERS if getattr(args, name) is not None}
    changes |= {"target": args.target, "generic": not args.no_generic, "progress": not args.quiet}
    changes |= {"templates": tuple(args.template) or TEMPLATES, "protect": args.protect}
    changes |= {"cache": args.cache} if args.cache else {}
    model, tokenize = load_model(args.model)
    if args.embeddings:
        model, tokenize = TextEmbeddings.of(model, tokenize), None
    answer = forget(model, tokenize, args.names, also, _names(args.retain), **changes)
    answer.save(args.out, args.overwrite)
    _say(f"{args.out}: forgets {', '.join(answer.names)}; texts: {len(answer.texts)}")
    for note in answer.notes:
        if not args.quiet or note.startswith("warning"):
            _say(f"  {note}")


def _words(given: Sequence[str], names: Sequence[str] = ()) -> dict[str, list[str]]:
    """NAME=WORD, of which the NAME may be missing where there is but one."""
    words: dict[str, list[str]] = {}
    for text in given:
        name, equals, word = text.partition("=")
        if not equals and len(names) == 1:
            name, word = names[0], text
        if not word.strip():
            raise ProblemError(f"{line(text)!r}: write NAME=WORD")
        words.setdefault(name.strip(), []).append(word)
    return words


def _names(given: Sequence[str]) -> list[str]:
    """Names, and those of files (@FILE)."""
    from forgetting.io import foreign

    names: list[str] = []
    for text in given:
        if not text.startswith("@"):
            names.append(text)
            continue
        with foreign(f"names of {line(text[1:])} cannot be read"):
            content = Path(text[1:]).read_text(encoding="utf-8-sig")
        names += [name for name in content.splitlines() if name.strip()]
    return names


def _audit(option: Option, parse: Parse) -> None:
    """Say, by text alone, what else moves: paraphrases, and other names."""
    from forgetting.displacement import displacement_along
    from forgetting.forgotten import Forgotten
    from forgetting.models.encoder import read_encoder
    from forgetting.models.loading import load_model
    from forgetting.models.text_embeddings import TextEmbeddings
    from forgetting.problem import LowRankEdit

    option("adapter", metavar="ADAPTER")
    option("--model", required=True, help=f"the original: {MODEL}")
    option("--word", action="append", default=[], metavar="NAME=WORD", help="a word for a name")
    args = parse()
    model, tokenize = load_model(args.model)
    forgotten = Forgotten.load(args.adapter)
    if (adapter := forgotten.adapter).of_embeddings:
        encoder = TextEmbeddings.of(model, tokenize)
        if encoder.fingerprint != adapter.weights:
            raise ProblemError(f"{line(args.adapter)} was made for another model")
    else:
        Forgotten.load(args.adapter, model)  # refuses another model
        encoder = read_encoder(model, tokenize)
    edit = LowRankEdit(adapter.left.double(), adapter.right.double())
    words = _words(args.word, adapter.classes)
    if strange := words.keys() - set(adapter.classes):
        raise unknown("forgotten name", min(strange), adapter.classes)
    first = {part.name: part.texts[0] for part in adapter.recipe.parts} if adapter.recipe else {}
    for name in adapter.classes:
        own = words.get(name, [])
        texts = [*(form.replace("{}", name) for form in OTHER_TEMPLATES), *own]
        texts = [text for text in texts if text not in adapter.texts]
        hidden = encoder.hidden([first.get(name, name), *texts]).double()
        ratios = displacement_along(edit, hidden[0], hidden[1:])
        _say(
            f"{name}: {len(texts)} paraphrases move {ratios.mean():.2f} of the way on average, "
            f"{(ratios < 0.5).sum()} of them less than half of it"
        )
        for place, (ratio, text) in enumerate(sorted(zip(ratios.tolist(), texts, strict=True))):
            if place < SHOWN or text in own:
                _say(f"  {ratio:5.2f}  {text}")
    for note in forgotten.notes:
        _say(note)


def _compose(option: Option, parse: Parse) -> None:
    """Join adapters, or give names back, by solving again."""
    from forgetting.adapter import load_adapter
    from forgetting.compose import compose
    from forgetting.forgotten import Forgotten

    option("adapters", nargs="+", metavar="ADAPTER", help="adapters to join")
    given_back = "adapter whose classes are given back; may be repeated"
    option("--without", action="append", default=[], metavar="ADAPTER", help=given_back)
    _out(option, "adapter")
    args = parse()
    if len([*args.adapters, *args.without]) < 2:
        raise ProblemError("one adapter alone is nothing to compose: name another, or --without")
    sides = args.adapters, args.without
    made = compose(*({path: load_adapter(path) for path in side} for side in sides))
    Forgotten(made).save(args.out, args.overwrite)
    missed = f"the texts miss their targets by {made.solver['residual']:.1e} of the way"
    _say(f"{args.out}: forgets {', '.join(made.classes)}; {missed}")


def _verify(option: Option, parse: Parse) -> None:
    """Check that a model is the original with this change and nothing else."""
    from forgetting.forgotten import Forgotten
    from forgetting.models.loading import load_model

    option("adapter", metavar="ADAPTER")
    option("--model", required=True, help=f"the changed one: {MODEL}")
    option("--base", help=f"the original, for an adapter that was composed: {MODEL}")
    args = parse()
    original = None
    if args.base:
        original = Forgotten.load(args.adapter, load_model(args.base)[0]).original
    changed = Forgotten.load(args.adapter, load_model(args.model)[0], original=original)
    changed.verify()
    _say(f"verified: {', '.join(changed.names)}, and nothing else")


def _patch(option: Option, parse: Parse) -> None:
    """Change cached text embeddings; no model is run."""
    from forgetting.adapter import load_adapter
    from forgetting.deploy.embeddings import patch_file, projection_of

    option("adapter", metavar="ADAPTER")
    option("embeddings", metavar="FILE", help="cached texts: .npy or .safetensors")
    option("--base", **LOCAL, help=ORIGINAL)
    option("--key", help="tensor, where the file holds several")
    about = "the embeddings are as the projection gave them, not of length 1"
    option("--unnormalised", action="store_true", help=about)
    _out(option, "file")
    args = parse()
    adapter = load_adapter(args.adapter)
    projection, bias = projection_of(adapter, args.base)
    options = {"normalised": not args.unnormalised, "overwrite": args.overwrite}
    file = args.embeddings, args.out
    report = patch_file(*file, projection, adapter, args.key, bias, **options)
    _say(
        f"{args.out}: {report['rows']} embeddings patched; condition of the "
        f"projection {report['condition']:.3g}, each right to {report['error']:.1e}"
    )


def _export(option: Option, parse: Parse) -> None:
    """Write the changed model for another tool."""
    from forgetting.deploy.card import audited
    from forgetting.deploy.export import FORMATS, export

    option("adapter", metavar="ADAPTER")
    option("--base", **LOCAL, required=True, help="the original model, a local file or folder")
    option("--to", required=True, choices=FORMATS, help="the tool to export for")
    original = "the checkpoint that the adapter was made from, if the base is a rounded copy of it"
    option("--original", help=original)
    config = "open_clip's configuration and weights (NAME/TAG) or a JSON file, if the base has none"
    option("--config", help=config)
    base_id = "the base's name on the Hub, ID or ID@REVISION, for the model card and for PEFT"
    option("--base-id", help=base_id)
    _out(option, "file or folder")
    args = parse()
    adapter, files = audited(args.adapter), (args.base, args.to, args.out, args.original)
    export(adapter, *files, args.config, args.overwrite, args.base_id)
    _say(f"{args.out}: {args.to}, without {', '.join(adapter.classes)}")


def _index(option: Option, parse: Parse) -> None:
    """Hide what was forgotten in stored image vectors, or restore it."""
    from forgetting.adapter import load_adapter
    from forgetting.deploy.embeddings import projection_of
    from forgetting.deploy.stores import change_store

    places = {
        "column": "with the vectors: parquet, PostgreSQL",
        "collection": "of Qdrant",
        "vector": "its name, in a collection with several",
        "table": "of PostgreSQL",
        "key": "the table's primary key",
    }
    option("action", choices=("hide", "restore"))
    option("adapter", metavar="ADAPTER")
    about = "*.npy, *.parquet, *.faiss, *.index, qdrant:FOLDER_OR_URL or postgresql://..."
    option("store", metavar="STORE", help=about)
    for name, about in places.items():
        option(f"--{name}", help=about)
    option("--base", **LOCAL, help=ORIGINAL)
    option("--unnormalised", action="store_true", help="the vectors are not of length 1")
    option("--dry-run", action="store_true", help="read and compute, and change nothing")
    option("--batch", type=int, metavar="ROWS", help="how many rows to change at once")
    option("--out", metavar="PATH", help="the new file, where the store is one")
    option("--overwrite", action="store_true", help="replace what is at PATH")
    args = parse()
    adapter, hide = load_adapter(args.adapter), args.action == "hide"
    options = {name: getattr(args, name) for name in (*places, "out", "overwrite", "batch")}
    options |= {"normalised": not args.unnormalised, "progress": not args.quiet}
    projection, bias = projection_of(adapter, args.base)
    options |= {"bias": bias, "dry_run": args.dry_run}
    done = change_store(adapter, args.store, hide, projection, **options)
    _say(
        f"{done.where}: {done.rows} vectors, {done.changed} "
        f"{'would be ' if args.dry_run else ''}{'hidden' if hide else 'restored'}; checksum before "
        f"{done.before:08x}, after {done.after:08x}; condition {done.edit.condition:.3g}, "
        f"restoring is right to {done.error:.1e}"
    )


COMMANDS = {  # and an example of each
    "forget": (_forget, 'hf:my-clip "Acme Cola" --retain tea --out cola.safetensors'),
    "audit": (_audit, "cola.safetensors --model hf:my-clip --word cola"),
    "compose": (_compose, "cola.safetensors fanta.safetensors --out both.safetensors"),
    "verify": (_verify, "cola.safetensors --model hf:my-clip-without-cola"),
    "patch": (_patch, "cola.safetensors texts.npy --base my-clip --out patched.npy"),
    "index": (_index, "hide for-index.safetensors images.npy --out hidden.npy"),
    "export": (_export, "cola.safetensors --base my-clip --to hf --out my-clip-without-cola"),
}
