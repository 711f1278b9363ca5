"""docs/architecture.md: what it names in the code is there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


def names_in(path: Path) -> set[str]:
    """Functions, classes and methods (`Class.method`) of a file."""
    tops = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    methods = [
        f"{top.name}.{node.name}"
        for top in tops
        for node in (top.body if isinstance(top, ast.ClassDef) else [])
        if isinstance(node, ast.FunctionDef)
    ]
    return {top.name for top in tops} | set(methods)


def test_functions_beside_the_equations_are_in_their_files():
    section = PAGE.split("### The paper, equation by equation")[1].split("\n###")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ") and ".py`" in line]
    found = [(name, row[2].strip("`")) for row in rows for name in re.findall(r"`([^`]+)`", row[1])]
    assert len(found) >= 12
    assert [(name, path) for name, path in found if name not in names_in(ROOT / path)] == []


def test_files_and_folders_are_there():
    paths = set(re.findall(r"`((?:\w+/)+(?:\w+\.\w+)?|\w+\.py)`", PAGE)) - {"runs/"}  # which a run makes
    assert len(paths) >= 25
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_folder_of_code_is_among_the_rooms():
    rooms = re.findall(r"`(\w+)/`", PAGE.split("## Rooms")[1])
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} <= set(rooms)
