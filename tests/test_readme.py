"""What README.md tells its two readers to type runs as printed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from forgetting.cli import cli
from tests.conftest import REPOSITORY
from tests.encoder_fixtures import needs_transformers, tiny

README = (REPOSITORY / "README.md").read_text()


def blocks(section: str, language: str) -> list[str]:
    """The code of a section, in order."""
    text = README.partition(f"## {section}\n")[2].partition("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@needs_transformers
def test_the_engineers_lines(tmp_path, monkeypatch, capsys):
    model, words = tiny("transformers CLIPModel")
    model.save_pretrained(tmp_path / "my-clip")
    words.save_pretrained(tmp_path / "my-clip")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # where the vocabulary's hidden states are kept
    (code,) = blocks("Your own CLIP, in ten lines", "python")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert "Acme Cola" in capsys.readouterr().out
    assert names["answer"].certificate.gap < 1e-9
    assert names["answer"].verify(), "the last line applies the change again"
    (shell,) = blocks("Your own CLIP, in ten lines", "sh")
    commands = shell.splitlines()
    assert len(commands) == 4
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "clip-forget"
        assert cli(arguments) == 0, f"{command}\n{capsys.readouterr().err}"


@pytest.mark.slow
def test_make_demo(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(REPOSITORY), str(clone)], check=True)
    (clone / ".venv").symlink_to(Path(sys.prefix))  # what an installation would make
    os.utime(clone / "requirements.txt", (0, 0))
    done = subprocess.run(["make", "demo"], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (clone / "results/report.html").is_file()
    (table,) = blocks("What the demo prints", "")
    printed = [" ".join(line.split()[:-2]) for line in done.stdout.splitlines()]  # but the seconds
    output = [" ".join(line.split()[:-2]) for line in table.splitlines()[3:]]
    assert len(output) == 12 and set(output) <= set(printed)
