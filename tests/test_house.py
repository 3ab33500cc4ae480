"""The house: which file may import which. A reader should never have to follow an arrow upwards."""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT

COPYABLE = {"backbone", "head", "loss", "matcher"}
PAPER = {
    *COPYABLE,
    *("config", "data", "evaluate", "model", "predict", "shapes", "train", "visualize"),
}
FOLDERS = ("support", "tools", "experiments")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {
    name_of(path): path
    for path in (*ROOT.glob("*.py"), *(p for f in FOLDERS for p in ROOT.glob(f"{f}/*.py")))
    if path.stem != "__init__"
}


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, inside functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(MODULES)


ARROWS = {name: imports(path) for name, path in MODULES.items()}


def floor_of(name: str) -> str:
    return name.split(".")[0] if "." in name else "paper"


def test_the_rooms_of_the_paper_are_at_the_root_and_nothing_else() -> None:
    assert {name for name in MODULES if "." not in name} == PAPER


@pytest.mark.parametrize("name", sorted(COPYABLE))
def test_a_file_that_is_there_to_be_copied_needs_none_of_ours(name: str) -> None:
    assert ARROWS[name] == set()
    text = MODULES[name].read_text(encoding="utf-8")
    assert re.findall(r"(?<![-\w])--[a-z][\w-]*", text) == []  # flags of a command line


def test_nothing_imports_commands_or_experiments() -> None:
    for name, targets in ARROWS.items():
        for target in targets:
            if floor_of(target) == "experiments":
                assert floor_of(name) == "experiments", (name, target)
            assert floor_of(target) != "tools", (name, target)


def test_the_machinery_knows_only_config_and_model_of_the_paper() -> None:
    for name, targets in ARROWS.items():
        if floor_of(name) == "support":
            allowed = {target for target in targets if floor_of(target) == "support"}
            assert targets - allowed <= {"config", "model"}, name


def test_arrows_run_down() -> None:
    """The order of DESIGN: commands, data, model, parts."""
    order = [
        {"train", "evaluate", "predict", "visualize"},
        {"data"},
        {"shapes", "model"},
        {"config", *COPYABLE},
    ]
    floor = {name: i for i, names in enumerate(order) for name in names}
    for name in PAPER:
        for target in ARROWS[name] & PAPER:
            assert floor[name] <= floor[target], (name, target)


def test_there_are_no_circles() -> None:
    left = dict(ARROWS)
    while left:
        free = [name for name, targets in left.items() if not targets & set(left)]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


def test_the_reader_of_imports_sees_all_kinds(tmp_path: Path) -> None:
    """A test of the tests above: each way to import is noticed."""
    path = tmp_path / "a.py"
    path.write_text(
        "import head\nimport support.cli as c\nfrom support import errors, faults\n"
        "from model import build_model\n\ndef f():\n    from tools.export import main\n"
    )
    assert imports(path) == {
        *("head", "model", "support.cli", "support.errors", "support.faults", "tools.export"),
    }
