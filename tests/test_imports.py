"""Who may import whom, and what stands nowhere in the code: read from the source, without running it."""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each room, and the rooms it may import from: `model` is the ground of all.
MAY_IMPORT = {
    "model": set(),
    "dataset_loading": {"model"},
    "trainers": {"model"},
    "callbacks": {"model"},
    "evaluation": {"model"},
    "inference": {"model"},
    # Its loader takes configuration classes alone, see below; beside it are the trainers of a run, built of all rooms.
    "configs": {"model", "dataset_loading", "trainers", "callbacks", "evaluation", "inference"},
}
# Commands that tie rooms together, as the scripts at the root do: they may import everything, and no room imports them.
COMMANDS = {
    f"evaluation/{name}.py"
    for name in ("__main__", "compare", "dynamics", "lm_eval", "report", "suite", "train_classifier")
}
# What the exported code may need where it is loaded: transformers and what comes with it.
LIBRARIES_OF_MODEL = {"torch", "transformers", "huggingface_hub", "safetensors", "numpy"}
ROOMS = sorted(room for room in MAY_IMPORT if (ROOT / room).is_dir())
# What ties the rooms together: it may import everything, and nothing imports it.
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
SOURCES = (
    sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")) + BENCHMARKS + sorted(ROOT.glob("*.py"))
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports_of(tree: ast.AST) -> Iterator[tuple[int, int, str, list[str]]]:
    """Line, level (number of leading dots), module and names of each import, those inside of functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, 0, alias.name, []
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.level, node.module or "", [alias.name for alias in node.names]


def guarded_lines(tree: ast.AST) -> set[int]:
    """Lines of what is only imported where it is installed: in `if is_..._available():`, or in a `try`."""
    guards = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Try)
        or (isinstance(node, ast.If) and re.fullmatch(r"is_\w+_available\(\)", ast.unparse(node.test)))
    ]
    return {inner.lineno for node in guards for inner in node.body}


def forbidden_imports(source: str, room: str, depth: int = 1) -> list[str]:
    """Imports of rooms that `room` may not look into; `depth`: 1 for files in its folder, 2 for those below."""
    allowed = MAY_IMPORT[room] | {room}
    others = (set(MAY_IMPORT) | {path.stem for path in ROOT.glob("*.py")} | {"benchmarks", "tests"}) - allowed
    return [
        f"line {line}: {module}"
        for line, level, module, _ in imports_of(ast.parse(source))
        if (level == 0 and module.split(".")[0] in others) or level > depth
    ]


def not_exportable(source: str) -> list[str]:
    """Imports that break a model whose files were copied beside its weights.

    transformers finds the files to copy by this very pattern in the text, docstrings included.
    """
    found = []
    tree = ast.parse(source)
    imports, guarded = list(imports_of(tree)), guarded_lines(tree)
    for line, level, module, _ in imports:
        is_free = line in guarded or module.split(".")[0] in LIBRARIES_OF_MODEL | set(sys.stdlib_module_names)
        if level == 0 and not is_free:
            found.append(f"line {line}: {module}")
        if level and (level > 1 or "." in module or not (ROOT / "model" / f"{module}.py").is_file()):
            found.append(f"line {line}: {'.' * level}{module}")
    in_text = re.findall(r"^\s*from\s+\.(\S+)\s+import", source, re.MULTILINE)
    in_code = [module for _, level, module, _ in imports if level]
    return found + ["in a docstring: ." + name for name in in_text if name not in in_code]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    """Layers without cycles."""
    files = [path for path in (ROOT / room).rglob("*.py") if name_of(path) not in COMMANDS]
    depths = {path: len(path.relative_to(ROOT).parts) - 1 for path in files}
    found = {name_of(path): forbidden_imports(path.read_text(), room, depth) for path, depth in depths.items()}
    assert {name: lines for name, lines in found.items() if lines} == {}


def modules_of(path: Path) -> set[str]:
    """What a file imports of ours, with its dots resolved: modules, and modules with a name of them."""
    found = set()
    for _, level, module, names in imports_of(ast.parse(path.read_text())):
        folders = path.relative_to(ROOT).parent.parts
        start = folders[: len(folders) + 1 - level] if level else ()
        place = ".".join([*start, *filter(None, [module])])
        found |= {place} | {f"{place}.{name}" for name in names}
    return found


def test_nothing_but_benchmarks_and_tests_imports_a_command() -> None:
    commands = {name.removesuffix(".py").replace("/", ".") for name in COMMANDS}
    commands |= {path.stem for path in ROOT.glob("*.py")}
    files = [path for path in SOURCES if path not in BENCHMARKS]
    found = {name_of(path): sorted(modules_of(path) & commands) for path in files}
    assert {name: modules for name, modules in found.items() if modules} == {}
    for name in COMMANDS:
        assert "if __name__ ==" in (ROOT / name).read_text()


def test_no_script_hides_a_library() -> None:
    """What stands at the root comes first where Python looks for modules."""
    names = {path.stem for path in ROOT.glob("*.py")} | set(ROOMS)
    assert names & ({"evaluate", "datasets"} | sys.stdlib_module_names) == set()


def test_the_rules_make_no_cycle() -> None:
    order: list[str] = []
    while len(order) < len(MAY_IMPORT):
        free = [room for room, needs in MAY_IMPORT.items() if room not in order and needs <= set(order)]
        assert free, f"a cycle among {set(MAY_IMPORT) - set(order)}"
        order += free


def test_configs_takes_only_configuration_classes_and_registries() -> None:
    trees = [ast.parse((ROOT / f"configs/{name}.py").read_text()) for name in ("__init__", "loader", "runs")]
    imported = [(module, names) for tree in trees for _, _, module, names in imports_of(tree)]
    names = [name for module, names in imported if module.split(".")[0] in MAY_IMPORT for name in names]
    allowed = re.compile(r"(Config|Arguments|Action)$|^one_line$")
    assert names and [name for name in names if not allowed.search(name) and not name.isupper()] == []


def test_the_model_is_flat_and_exportable() -> None:
    files = sorted((ROOT / "model").rglob("*.py"))
    assert files == sorted((ROOT / "model").glob("*.py"))
    assert {path.name: not_exportable(path.read_text()) for path in files if not_exportable(path.read_text())} == {}


def test_the_import_rules_see_what_breaks_them() -> None:
    for line in (
        "import callbacks",
        "from inference.loading import x",
        "from ..model import x",
        "def f():\n    import pretrain",
        "from benchmarks import timing",
    ):
        assert forbidden_imports(line, "trainers") != [], line
    assert forbidden_imports("import torch\nfrom .arguments import x\nimport modelling", "trainers") == []
    assert forbidden_imports("from model import x", "trainers") == []
    assert forbidden_imports("from ..arguments import x", "trainers", depth=2) == []
    assert forbidden_imports("from ...model import x", "trainers", depth=2) != []
    assert forbidden_imports("from inference import x", "model") != []
    for line in (
        "from . import cache",
        "from ..x import y",
        "from .a.b import c",
        "from .absent import x",
        "import scipy",
        "if x:\n    import scipy",
    ):
        assert not_exportable(line) != [], line
    assert not_exportable('"""\nfrom .cache import X\n"""') == ["in a docstring: .cache"]
    assert not_exportable("from .cache import X\nimport torch.nn\nimport math") == []
    assert (
        not_exportable(
            "if is_scipy_available():\n    import scipy\ntry:\n    import av\nexcept ImportError:\n    av = None"
        )
        == []
    )


# ------------------------------------------------------------ habits of the code


def broken_by(node: ast.AST) -> str:
    """What is wrong with a node of the syntax tree, or nothing."""
    if isinstance(node, ast.ExceptHandler):
        caught = {ast.unparse(part) for part in ast.walk(node.type)} if node.type else {"BaseException"}
        reraised = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
        return "except Exception" if caught & {"Exception", "BaseException"} and not reraised else ""
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
        return "" if isinstance(node.ctx, ast.Load) else "sets the environment"
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        if name in ("os.environ.setdefault", "os.environ.update", "os.environ.pop", "os.putenv", "os.unsetenv"):
            return "sets the environment"
        return name if name == "print" or name.endswith("parse_known_args") else ""
    return ""


def habits_broken(source: str) -> list[str]:
    """What may not stand in the code: print, swallowed exceptions, guessed arguments, the environment set, notes."""
    nodes = [(node, broken_by(node)) for node in ast.walk(ast.parse(source))]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    texts = [token for token in tokens if token.type in (tokenize.COMMENT, tokenize.STRING)]
    notes = [token for token in texts if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", token.string)]
    return [f"line {node.lineno}: {text}" for node, text in nodes if text] + [f"line {note.start[0]}" for note in notes]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_the_code_has_none_of_this(path: Path) -> None:
    assert habits_broken(path.read_text()) == []


def test_no_file_is_for_what_belongs_nowhere() -> None:
    names = {path.stem for path in SOURCES + TESTS} | {path.parent.name for path in SOURCES + TESTS}
    assert {name for name in names if re.search(r"(^|_)(utils?|helpers?|misc|common)(_|$)", name)} == set()


def test_the_habits_see_what_breaks_them() -> None:
    broken = (
        "print(1)",
        "try:\n    f()\nexcept Exception:\n    pass",
        "try:\n    f()\nexcept:\n    g()",
        "try:\n    f()\nexcept (OSError, Exception) as e:\n    g(e)",
        "p.parse_known_args()",
        "os.environ['NCCL_DEBUG'] = '1'",
        "os.environ.setdefault('A', 'b')",
        "x = 1  # TODO: more",
        '"""FIXME"""',
    )
    for source in broken:
        assert habits_broken(source) != [], source
    fine = (
        "pprint(1)\nx = os.environ['A']",
        "try:\n    f()\nexcept OSError:\n    pass",
        "try:\n    f()\nexcept Exception:\n    g()\n    raise",
    )
    for source in fine:
        assert habits_broken(source) == [], source
