"""The committed notebooks ran in order, without errors; `make check-notebooks` executes them."""

import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
# A path from the root of somebody's machine; in URLs and in `../assets` something precedes the /.
MACHINE_PATH = re.compile(
    r"(?<![\w.~\-/])/(work|tmp|home|root|Users|usr|opt|var|mnt|content)\b|\b[A-Z]:\\\\"
)


@pytest.mark.parametrize("number", ["01", "02", "03", "04", "05"])
def test_a_notebook_is_committed_with_sound_outputs(number: str) -> None:
    [path] = FOLDER.glob(f"{number}_*.ipynb")
    assert path.stat().st_size <= 1.5e6
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))

    texts = [cell.source for cell in notebook.cells]
    for output in (output for cell in code for output in cell.outputs):
        assert output.output_type != "error" and output.get("name") != "stderr"
        texts += [output.get("text", ""), output.get("data", {}).get("text/plain", "")]
    assert not [text for text in texts if MACHINE_PATH.search(text)]

    # A picture comes early: it is on the first screen, with what is above it.
    shows = ["image/png" in str(cell.get("outputs")) for cell in notebook.cells]
    above = notebook.cells[: shows.index(True) + 1]
    assert sum(len(cell.source.splitlines()) for cell in above) <= 36
