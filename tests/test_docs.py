"""README and docs: links lead somewhere, commands and code are right, and pages stay short."""

import argparse
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

import train
from engine.log import quiet
from forgetting.cli import cli
from forgetting.errors import ProblemError
from tests.conftest import REPOSITORY
from tests.encoder_fixtures import my_clip, needs_transformers

PAGES = {
    str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8")
    for path in (*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"))
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
OTHERS = {"git", "pip", "uv", "time", "cp", "tensorboard", "ray", "docker", "psql", ".", "cat"}


def commands(code: str) -> list[list[str]]:
    """The words of each command of a block, without the variables that are set before it."""
    lines = code.replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [list(_without_variables(words)) for words in found if words]


def _without_variables(words: list[str]) -> list[str]:
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return words


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading.lower())
    return re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {slug(heading) for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", PAGES[page])
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (REPOSITORY / page).parent / path if path else REPOSITORY / page
        assert file.exists(), f"{page}: no {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page}: no {target}"


def test_pages_stay_short():
    lengths = {page: text.count("\n") for page, text in PAGES.items()}
    assert lengths["README.md"] <= 220
    assert lengths["docs/method.md"] <= 300
    assert sum(length for page, length in lengths.items() if page.startswith("docs/")) <= 1400


def test_the_index_names_every_page():
    index = PAGES["docs/README.md"]
    for page in PAGES:
        if page.startswith("docs/") and page != "docs/README.md":
            assert f"]({Path(page).name})" in index, f"docs/README.md does not name {page}"


class Parsed(Exception):
    """A command line has been understood."""


def parse(words: list[str]) -> None:
    """Raise Parsed if the parser of a command takes its words."""
    program, *rest = words
    if program == "clip-forget":
        import_module("forgetting.cli").main(rest)
    elif words[:2] == ["sh", "forget_clip.sh"]:
        _, seed, sets, arch, multiclass, *options = words[2:]
        assert multiclass in "01" and seed.replace(",", "").isdigit()
        train.parse(["--dataset", sets.split(",")[0], "--backbone", arch, *options])
    elif words[:2] == ["python", "-m"]:
        name, *rest = rest[1:]
        if name in ("experiments", "benchmarks", "forgetting"):
            name = {"forgetting": "forgetting.cli"}.get(name, f"{name}.{rest.pop(0)}")
        elif name in ("evaluation.audit", "evaluation.report"):
            name += ".__main__"
        import_module(name).main(rest)
    else:
        assert program == "python" and rest[0].endswith(".py"), words
        import_module(rest[0].removesuffix(".py")).main(rest[1:])


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page, monkeypatch):
    take = argparse.ArgumentParser.parse_intermixed_args

    def parsed(self, *arguments):
        take(self, *arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_intermixed_args", parsed)
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    for language, code in FENCE.findall(PAGES[page]):
        for words in commands(code) if language == "sh" else ():
            if words and words[0] == "make":
                assert words[1] in targets, f"{page}: {words}"
            elif words and words[0] not in OTHERS and words[1] != "-c":
                try:
                    parse(words)
                except (Parsed, SystemExit):
                    continue
                except ProblemError as error:
                    pytest.fail(f"{page}: {' '.join(words)}: {error}")
                pytest.fail(f"{page}: {' '.join(words)}: nothing was parsed")


LIBRARY = [page for page, text in PAGES.items() if "```python" in text]


@needs_transformers
@pytest.mark.parametrize("page", LIBRARY)
def test_code_runs_as_printed(page, tmp_path, monkeypatch, capsys):
    """In order: the Python of a page, and `clip-forget` on files."""
    my_clip(tmp_path, monkeypatch)
    names: dict = {}
    for language, code in FENCE.findall(PAGES[page]):
        if language == "python":
            with quiet(False):  # a page may call main([..., "--quiet"])
                exec(compile(code, page, "exec"), names)
        for words in commands(code) if language == "sh" else ():
            local = not re.search(
                r"open_clip:|://|parquet|\b[A-Z]{3,}\b|onnx|\.pt", " ".join(words)
            )
            if words and words[0] == "clip-forget" and local:
                assert cli(words[1:]) == 0, f"{page}: {words}\n{capsys.readouterr().err}"
