"""The four files that people copy: each runs alone in an empty folder."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

COPYABLE = ["backbone", "head", "matcher", "loss"]

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


@pytest.mark.parametrize("name", COPYABLE)
def test_a_copied_file_runs_alone(name: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    command = [sys.executable, "-P", "-c", SCRIPT.format(name=name)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", COPYABLE)
def test_a_file_to_copy_mentions_no_flag_of_a_command_line(name: str) -> None:
    assert re.findall(r"(?<!-)--[a-z][a-z-]*", (ROOT / f"{name}.py").read_text()) == []
