"""The image of the server, as far as it can be tested without a registry: all that the server needs is copied."""

import ast
import json
import re
from pathlib import Path

import pytest

from inference.serve import build_parser

ROOT = Path(__file__).parents[1]
FILE = (ROOT / "Dockerfile").read_text()
COPIED = [line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]


def instruction(name: str) -> list[str]:
    return re.findall(rf"^\s*{name} (.*)$", FILE, flags=re.MULTILINE)


def test_what_is_copied_exists():
    sources = [word for line in instruction("COPY") if "--from" not in line for word in line.split()[:-1]]
    assert set(sources) - {"."} <= set(COPIED)
    assert all((ROOT / name).exists() for name in COPIED)


def test_what_the_server_imports_is_copied():
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    imported = set()
    for room in COPIED:
        for path in (ROOT / room).rglob("*.py") if (ROOT / room).is_dir() else ():
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
                imported |= {name.partition(".")[0] for name in names}
    assert imported & rooms <= set(COPIED)


def test_the_command_is_one_of_the_server():
    (command,) = instruction("ENTRYPOINT")
    python, flag, module, *options = json.loads(command)
    assert (python, flag, module) == (".venv/bin/python", "-m", "inference.serve")
    args = build_parser().parse_args([*options, "/runs/a"])
    assert args.host == "0.0.0.0" and [str(args.port)] == instruction("EXPOSE")


def test_the_user_is_not_root():
    assert instruction("USER") == ["server"] and FILE.index("useradd") < FILE.index("USER server") < FILE.index("ENTRY")


@pytest.mark.parametrize("status", [200, 503])
def test_the_health_is_that_of_the_server(status, monkeypatch):
    """The check asks /health, whose status other than 200 is an error of urlopen's."""
    (command,) = instruction("CMD")
    *_, flag, code = json.loads(command)
    asked = []

    def urlopen(address: str, timeout: float) -> None:
        asked.append(address)
        if status != 200:
            raise OSError(status)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    if status == 200:
        exec(code, {})
    else:
        with pytest.raises(OSError, match="503"):
            exec(code, {})
    assert flag == "-c" and asked == [f"http://127.0.0.1:{build_parser().get_default('port')}/health"]
