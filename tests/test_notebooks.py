"""The committed notebooks ran in order, without errors; `make check-notebooks` executes them."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from conftest import CPU
from nbclient import NotebookClient

from config import PRESETS
from shapes import ShapesDataset
from train import start_training

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
# A path from the root of somebody's machine; in URLs and in `../assets` something precedes the /.
MACHINE_PATH = re.compile(
    r"(?<![\w.~\-/])/(work|tmp|home|root|Users|usr|opt|var|mnt|content)\b|\b[A-Z]:\\\\"
)


def problems(notebook: nbformat.NotebookNode) -> list[str]:
    """What is wrong with a notebook that is to be read with its outputs."""
    nbformat.validate(notebook)
    found = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("its cells were not executed in order, all of them, in a fresh kernel")
    outputs = [output for cell in code for output in cell.outputs]
    if not outputs:
        found.append("no outputs")
    for output in outputs:
        if output.output_type == "error" or output.get("name") == "stderr":
            found.append(f"an error or a warning: {output}")
    data = [
        value
        for output in outputs
        for kind, value in output.get("data", {}).items()
        if kind.startswith("text/")
    ]
    for text in (
        [cell.source for cell in notebook.cells]
        + [output.get("text", "") for output in outputs]
        + data
    ):
        if match := MACHINE_PATH.search(text):
            found.append(f"a path of one machine: {text[match.start() :][:60]}")
    return found


def test_there_are_five_notebooks() -> None:
    assert [path.name[:3] for path in NOTEBOOKS] == ["01_", "02_", "03_", "04_", "05_"]
    assert "05_your_own_data.ipynb" in [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_sound_outputs(path: Path) -> None:
    assert path.stat().st_size <= 1.5e6
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    assert notebook.nbformat == 4
    assert notebook.metadata.kernelspec.name == "python3"
    assert problems(notebook) == []


def test_unsound_notebooks_are_noticed() -> None:
    stream = {"output_type": "stream", "text": "1"}

    def notebook(source: str = "1", count: int = 1, **output) -> nbformat.NotebookNode:
        outputs = [
            nbformat.v4.new_output(**(output if "output_type" in output else stream | output))
        ]
        cell = nbformat.v4.new_code_cell(source, execution_count=count, outputs=outputs)
        return nbformat.v4.new_notebook(cells=[cell])

    assert problems(notebook()) == []
    assert problems(notebook(source='open("../assets/a"), "https://example.org/home/a"')) == []
    assert problems(notebook(count=2)) != []
    assert problems(notebook(output_type="error", ename="E", evalue="", traceback=[])) != []
    assert problems(notebook(name="stderr")) != []
    assert problems(notebook(source='open("/tmp/a")')) != []
    assert problems(notebook(text="written: /home/me/a")) != []
    assert (
        problems(
            notebook(
                output_type="display_data", data={"text/plain": "PosixPath('/root/a')"}, metadata={}
            )
        )
        != []
    )


# --- with other parameters ---


@pytest.fixture(scope="module")
def three_stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with three stages and six classes that has learned nothing."""
    config = replace(
        PRESETS["shapes"], data="shapes-crowded", num_classes=6, num_proposals=8, hidden_dim=32
    )
    training = start_training(config, CPU, ShapesDataset("crowded", "train", 4), 4)
    path = tmp_path_factory.mktemp("three") / "three.pt"
    training.save(path)
    return path


def execute(path: Path, **parameters: str) -> None:
    """Runs a notebook with other values of the parameters in its first cells.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    for name, value in parameters.items():
        line = re.compile(rf"^{name} = .*$", re.MULTILINE)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert sum(len(line.findall(cell.source)) for cell in cells) == 1, name
        for cell in cells:
            cell.source = line.sub(f"{name} = {value}", cell.source)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=300, resources=resources).execute()


def test_notebook_2_runs_with_another_image_and_another_checkpoint(three_stages: Path) -> None:
    execute(
        NOTEBOOKS[1],
        WEIGHTS=repr(str(three_stages)),
        IMAGE="77",
        IMAGES="6",
        HELD_OUT="3",
        **{"STEPS, BATCH": "4, 1"},
    )


def test_notebook_3_runs_with_another_image_and_another_checkpoint(three_stages: Path) -> None:
    weights = repr(str(three_stages))
    execute(NOTEBOOKS[2], WEIGHTS=weights, MANY=weights, IMAGE="77", MANY_IMAGE="3", COUNT="6")


def test_a_parameter_that_a_notebook_lacks_is_noticed() -> None:
    with pytest.raises(AssertionError, match="NO_SUCH_NAME"):
        execute(NOTEBOOKS[1], NO_SUCH_NAME="1")


# --- open anywhere ---


def sources(path: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(path, as_version=4).cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_its_badge_and_the_common_first_cell(path: Path) -> None:
    badge, first_cell = sources(path)[:2]
    address = re.search(r'^REPOSITORY = "https://github.com/(.+)"$', first_cell, re.MULTILINE)[1]
    assert f"colab.research.google.com/github/{address}/blob/main/notebooks/{path.name})" in badge
    assert first_cell == sources(NOTEBOOKS[0])[1]


def test_the_first_cell_finds_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(NOTEBOOKS[0].parent)
    exec(sources(NOTEBOOKS[0])[1], {})
    assert Path.cwd() == Path(sys.path[0]) == NOTEBOOKS[0].parents[1]


def test_the_first_cell_clones_the_repository_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def run(command: list, check: bool) -> None:
        commands.append([str(word) for word in command])
        if command[0] == "git":
            Path(command[-1]).mkdir()

    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    exec(sources(NOTEBOOKS[0])[1], {})
    assert Path.cwd() == Path(sys.path[0]) == tmp_path / "sparse-rcnn"
    clone, install = commands
    assert clone[:2] == ["git", "clone"] and clone[-2].startswith("https://github.com/")
    assert str(tmp_path / "sparse-rcnn" / "requirements.txt") in install
