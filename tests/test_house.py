"""The house: which file may import which. A reader should never have to follow an arrow upwards."""

import ast
import io
import re
import tokenize
from pathlib import Path

from conftest import ROOT

COPYABLE = {"backbone", "head", "loss", "matcher"}
# From the ground up. A file may import those of its own floor and of those below.
FLOORS = (
    {"support"},
    COPYABLE,
    {"config"},
    {"model"},
    {"data", "shapes"},
    {"evaluate", "visualize"},
    {"explore", "predict", "train"},
    {"experiments", "notebooks", "tools"},
)
FOLDERS = ("support", "experiments", "notebooks", "tools")
PATHS = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.py"))]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PATHS}


def imports(path: Path) -> set[str]:
    """All names that a file imports, inside functions too: modules, and what is taken from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: an import that is relative"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


ARROWS = {name: imports(path) & set(MODULES) for name, path in MODULES.items()}


def floor_of(name: str) -> int:
    room = name.split(".")[0]
    (floor,) = (number for number, rooms in enumerate(FLOORS) if room in rooms)
    return floor


def test_arrows_run_down() -> None:
    for name, targets in ARROWS.items():
        for target in targets:
            assert floor_of(target) <= floor_of(name), f"{name} imports {target}"
            # Nothing but an experiment imports an experiment, and so on; nothing imports a command.
            is_own_room = target.split(".")[0] == name.split(".")[0] != "tools"
            assert floor_of(target) < len(FLOORS) - 1 or is_own_room, f"{name} imports {target}"


def test_there_are_no_circles() -> None:
    left = dict(ARROWS)
    while left:
        free = [name for name, targets in left.items() if not targets & set(left)]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


def test_the_ground_floor_and_the_copyable_files_stand_alone() -> None:
    for name, targets in ARROWS.items():
        is_support = name.split(".")[0] == "support"
        if is_support or name in COPYABLE:
            assert not [t for t in targets if not (is_support and t.startswith("support"))], name


def test_a_copyable_file_does_not_speak_of_our_flags() -> None:
    for name in COPYABLE:
        text = MODULES[name].read_text(encoding="utf-8")
        assert re.findall(r"(?<![-\w])--[a-z][\w-]*", text) == [], name


def test_train_needs_few_names_of_the_machinery() -> None:
    names = [name for name in imports(MODULES["train"]) if re.match(r"support\.\w+\.", name)]
    assert 3 < len(names) <= 12


def code_lines(path: Path) -> int:
    """Lines without comments, docstrings and blank ones."""
    text = path.read_text(encoding="utf-8")
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL) and token.string.strip():
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        is_string = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_string and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def test_the_machinery_stays_small() -> None:
    assert sum(code_lines(path) for path in ROOT.glob("support/*.py")) <= 1250


def test_the_readers_of_imports_and_lines_see_all_kinds(tmp_path: Path) -> None:
    """A test of the tests above."""
    path = tmp_path / "a.py"
    path.write_text(
        '"""Three\n\nlines."""\n\nimport head\nimport support.cli\nfrom support import errors\n'
        '# A comment.\nfrom model import build_model\n\ndef f():\n    """One."""\n'
        '    from tools.export import main\n    return """a\n\n    string"""\n'
    )
    expected = {"head", "model", "support.cli", "support.errors", "tools.export"}
    assert imports(path) & set(MODULES) == expected
    assert code_lines(path) == 9
