"""The four files that people copy: each runs alone in an empty folder."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# Runs in a fresh interpreter: the example in the docstring of module {name}.
SCRIPT = """
import doctest, sys
sys.path.insert(0, ".")
import {name}

failed, run = doctest.testmod({name})
assert run > 0 and failed == 0, (run, failed)
ours = {{"config", "data", "model", "shapes", "backbone", "head", "matcher", "loss"}}
assert ours & set(sys.modules) == {{"{name}"}}
"""


@pytest.mark.parametrize("name", ["backbone", "head", "matcher", "loss"])
def test_a_copied_file_runs_alone(name: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    command = [sys.executable, "-P", "-c", SCRIPT.format(name=name)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
