"""Parts to copy: each file alone in an empty folder, in a fresh interpreter, runs the example of its docstring."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["backbone", "head", "matcher", "loss"])
def test_a_copied_file_runs_alone(name: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    script = (
        f"import sys, doctest, {name}; failed, run = doctest.testmod({name}, raise_on_error=False);"
        "ours = {'config', 'data', 'model', 'shapes', 'backbone', 'head', 'matcher', 'loss'} & set(sys.modules);"
        f"assert ours == {{'{name}'}}, ours; assert run > 0 and failed == 0, (run, failed)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", f"sys = __import__('sys'); sys.path.insert(0, '.'); {script}"],
                          cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
