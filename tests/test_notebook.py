"""results.ipynb runs on results of the demo's kind, from top to bottom, in a kernel of its own."""

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import REPOSITORY
from tests.test_end_to_end import run_driver

NOTEBOOK = REPOSITORY / "results.ipynb"


@pytest.fixture
def demo(tmp_path):
    """results/results1 and results/results2 of one set, as `make demo` makes them."""
    for attempt, trainer in (("1", "ForgetLoRA"), ("2", "ForgetExact")):
        arguments = [attempt, "0", "MiniDigits", "mini", "0", "--forget", "digit two"]
        done = run_driver(tmp_path / "results", *arguments, TRAINER=trainer)
        assert done.returncode == 0, done.stderr
    return tmp_path


def test_the_notebook_runs_on_the_demos_results(demo, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(demo)}})
    client.execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in shown)
    assert "ForgetExact forgot ['digit two'] of mini" in text
    assert "own prompt: 100.0 % -> 0.0 %" in text
    assert sum("image/png" in output.get("data", {}) for output in shown) == 1
    assert (demo / "results/results2/seed_0/audit.json").is_file()


def test_the_committed_notebook_was_run_and_is_small():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not any(
        "error" in output.output_type for c in notebook.cells for output in c.get("outputs", [])
    )
    assert NOTEBOOK.stat().st_size < 400_000
