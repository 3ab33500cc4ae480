"""The committed notebooks ran in order, without errors; `make check-notebooks` executes them."""

import re
from pathlib import Path

import nbformat
import pytest

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
    assert "05_train_on_your_own_data.ipynb" in [path.name for path in NOTEBOOKS]


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
