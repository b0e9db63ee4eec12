"""docs/extend.md: a copy of the repository with its files runs its commands."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.results import read_logs
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "extend.md").read_text()
FILES = dict(re.findall(r"```(?:py|yaml)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """Run a line in the copy; returns what it prints."""
    clone = tmp_path_factory.mktemp("extend") / "clone"
    left_out = (".*", "data", "cache", "results", "output", "tests", "docs")
    shutil.copytree(REPOSITORY, clone, ignore=shutil.ignore_patterns(*left_out))
    for name, code in FILES.items():
        with (clone / name).open("a") as file:
            file.write(code)
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(line: str) -> str:
        how = {"cwd": clone, "env": os.environ | path, "capture_output": True, "text": True}
        done = subprocess.run(line, shell=True, **how)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.clone = clone
    return run


def test_a_data_set_a_method_and_a_target_run_as_the_page_says(shell):
    """All classes are of the new data set; both forget the class."""
    (commands, printed), *_ = re.findall(r"```sh\n(.*?)```\n```\n(.*?)```", PAGE, re.DOTALL)
    assert shell(commands) == printed and printed.count("100.0% -> 0.0%") == 2
    by_method, by_target = (
        read_logs(shell.clone / "results" / name)["MyShapes"]["blue_star"]["solver"]
        for name in ("mean", "common")
    )
    assert by_method["name"] == "mean" and by_method["settings"]["part"] == 1.2
    assert by_target["settings"]["target"] == "common" and by_target["residual"] < 1e-9
    text = shell("python train.py --help")
    assert re.search(r"ForgetMean +PART\n", text) and re.search("targets: .*, common", text)


def test_a_method_is_short():
    """Beyond its formula, two lines; and so is the page."""
    assert list(FILES) == ["datasets/sets.yaml", "trainers/mean.py", "trainers/common.py"]
    assert len(FILES["trainers/mean.py"].splitlines()) - 2 <= 25
    assert len(PAGE.splitlines()) <= 80
