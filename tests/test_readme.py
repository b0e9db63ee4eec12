"""`make demo` prints what README.md quotes, and both notebooks run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import REPOSITORY
from tests.test_end_to_end import run_driver

README = (REPOSITORY / "README.md").read_text()


@pytest.mark.slow
def test_make_demo(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(REPOSITORY), str(clone)], check=True)
    (clone / ".venv").symlink_to(Path(sys.prefix))  # what an installation would make
    for file in clone.glob("requirements*"):
        os.utime(file, (0, 0))
    done = subprocess.run(["make", "demo"], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (clone / "results/report.html").is_file()
    table, *_ = re.findall(r"```\n(paper: .*?)```", README, re.DOTALL)
    printed = [" ".join(line.split()[:-2]) for line in done.stdout.splitlines()]  # but the seconds
    output = [" ".join(line.split()[:-2]) for line in table.splitlines() if line != "..."]
    assert len(output) >= 6 and set(output) <= set(printed)


NOTEBOOKS = [REPOSITORY / "results.ipynb", REPOSITORY / "forget.ipynb"]


def run_notebook(path, folder, monkeypatch):
    """Run a notebook in a folder: what it printed, and its other outputs by type."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=99, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    return "".join(output.get("text", "") for output in outputs), kinds


def test_the_notebook_of_results_runs_on_the_demos(tmp_path, monkeypatch):
    for attempt, trainer in (("1", "ForgetLoRA"), ("2", "ForgetExact")):  # one set of `make demo`
        arguments = [attempt, "0", "MiniDigits", "mini", "0", "--forget", "digit two"]
        done = run_driver(tmp_path / "results", *arguments, TRAINER=trainer)
        assert done.returncode == 0, done.stderr
    text, kinds = run_notebook(NOTEBOOKS[0], tmp_path, monkeypatch)
    assert "ForgetExact forgot ['digit two'] of mini" in text
    assert "own prompt: 100.0 % -> 0.0 %" in text
    assert kinds.count("image/png") == 1
    assert (tmp_path / "results/results2/seed_0/audit.json").is_file()


def test_the_notebook_that_forgets_runs_anywhere(tmp_path, monkeypatch):
    text, kinds = run_notebook(NOTEBOOKS[1], tmp_path, monkeypatch)
    (quoted,) = re.findall(r"```\n(forgets purple.*?)```", README, re.DOTALL)
    assert {x for x in quoted.splitlines() if "gap" not in x} < {*text.splitlines()}
    assert "only this change: True, changed: True\nbit for bit as before: True" in text
    assert kinds.count("image/png") == 1 and kinds.count("text/html") == 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_committed_notebook_was_run_and_is_small(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    text = path.read_text()
    assert '"output_type": "error"' not in text and str(REPOSITORY) not in text
    assert len(text) < 400_000
