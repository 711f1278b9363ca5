"""Finds the private names of libraries that our code overrides, calls, reads and sets, and compares them with what is
installed.

A name is private if it begins with one underscore. It is a library's if a class of a library that one of our classes
inherits from defines it, if the object that it belongs to is a library's by its import or its annotation, or if nothing
of ours has such a name.
"""

import ast
import functools
import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent
PRIVATE = re.compile(r"_[A-Za-z]\w*(?<!__)")
BY_STRING = ("getattr", "setattr", "hasattr", "delattr", "attrgetter", "methodcaller")
OF_STRINGS = ("startswith", "endswith", "removeprefix", "removesuffix", "replace", "split", "partition", "rpartition")
NAMED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
KINDS = {ast.Load: "read", ast.Store: "set", ast.Del: "set"}


@dataclass(frozen=True, order=True)
class Use:
    """A private name of a library in our code; the owner is the class that defines it, where that is known."""

    kind: str
    name: str
    where: str
    owner: str = ""


def is_private(name: str) -> bool:
    return bool(PRIVATE.fullmatch(name))


def is_ours(module: str) -> bool:
    """Whether a module, by its full name, is one of this project."""
    top = module.partition(".")[0]
    return (ROOT / top).is_dir() or (ROOT / f"{top}.py").is_file()


def path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


# -------------------------------------------------------------------------------------------------- who defines a name


@functools.cache
def definitions_in(module: str) -> dict[str, ast.ClassDef]:
    """The classes of a module, by their qualified names; none where there is no source."""
    path = getattr(sys.modules.get(module), "__file__", None) or ""
    if not path.endswith(".py"):
        return {}
    found = {}

    def collect(node: ast.AST, prefix: str) -> None:
        for part in ast.iter_child_nodes(node):
            name = f"{prefix}{part.name}" if isinstance(part, NAMED) else prefix
            if isinstance(part, ast.ClassDef):
                found[name] = part
            inner = "." if isinstance(part, ast.ClassDef) else ".<locals>."
            collect(part, f"{name}{inner}" if isinstance(part, NAMED) else prefix)

    collect(ast.parse(Path(path).read_text(encoding="utf-8")), "")
    return found


@functools.cache
def defined_by(cls: type) -> frozenset[str]:
    """Private names of a class alone: methods and attributes, those that its methods assign too."""
    names = {*vars(cls), *vars(cls).get("__annotations__", ())}
    definition = definitions_in(cls.__module__).get(cls.__qualname__)
    for node in ast.walk(definition) if definition else ():
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return frozenset(filter(is_private, names))


def library_owner(cls: type, name: str, after: type | None = None) -> type | None:
    """The first class of a library, behind `after` in the order of inheritance, that defines the name."""
    classes = cls.__mro__ if after is None else cls.__mro__[cls.__mro__.index(after) + 1 :]
    return next((it for it in classes if not is_ours(it.__module__) and name in defined_by(it)), None)


def classes_of(modules: list[ModuleType]) -> list[type]:
    """Our classes, each once."""
    values = (value for module in modules for value in vars(module).values())
    return list(dict.fromkeys(it for it in values if isinstance(it, type) and is_ours(it.__module__)))


# ---------------------------------------------------------------------------------------------------------- overrides


def private_names_of(cls: type) -> list[str]:
    """Private methods and attributes that the body of a class defines, not those that it is given while code runs."""
    definition = definitions_in(cls.__module__)[cls.__qualname__]
    names = {node.id for part in definition.body for node in ast.walk(part) if isinstance(node, ast.Name)}
    names |= {part.name for part in definition.body if isinstance(part, ast.FunctionDef)}
    return [name for name in vars(cls) if is_private(name) and name in names]


def overrides(classes: list[type]) -> dict[Use, Any]:
    """Methods of ours in the place of a library's, and, as `set`, class attributes: those of mixins, too, in the
    classes that they are mixed into. The functions by use.
    """
    found = {}
    for ours in classes:
        mixed_into = [ours, *(cls for cls in classes if ours in cls.__mro__)]
        for name in private_names_of(ours):
            value = vars(ours)[name]
            owner = next((it for cls in mixed_into if (it := library_owner(cls, name, after=ours))), None)
            if owner is not None:
                kind = "override" if callable(value) or hasattr(value, "__get__") else "set"
                found[Use(kind, name, path_of(ours), path_of(owner))] = value
    return found


# ------------------------------------------------------------------------------------------------------ calls and reads


class Uses(ast.NodeVisitor):
    """Collects the private names of libraries in a file.

    Args:
        module: The file, imported.
        own_names: Private names that our code defines anywhere.
        family: Of our classes: each with all that share an instance with it.
    """

    def __init__(self, module: ModuleType, where: str, own_names: set[str], family: dict[type, set[type]]):
        self.module, self.where, self.own_names, self.family = module, where, own_names, family
        self.found: list[Use] = []
        self.classes: list[str] = []
        self.functions: list[ast.FunctionDef] = []
        self.called: set[ast.AST] = set()

    def add(self, kind: str, name: str, node: ast.AST, owner: type | None = None) -> None:
        self.found.append(Use(kind, name, f"{self.where}:{node.lineno}", path_of(owner) if owner else ""))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.classes.append(node.name)
        self.generic_visit(node)
        self.classes.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.functions.append(node)
        self.generic_visit(node)
        self.functions.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add_path(alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level == 0 and not is_ours(node.module):
            self.add_path(node.module, node)
            for alias in node.names:
                if is_private(alias.name):
                    self.add("read", alias.name, node)

    def add_path(self, path: str, node: ast.AST) -> None:
        for part in path.split("."):
            if is_private(part) and not is_ours(path):
                self.add("read", part, node)

    def visit_Call(self, node: ast.Call) -> None:
        self.called.add(node.func)
        for keyword in node.keywords:
            if keyword.arg and is_private(keyword.arg) and keyword.arg not in self.own_names:
                self.add("read", keyword.arg, keyword.value)
        if ast.unparse(node.func).rpartition(".")[2] in BY_STRING:
            self.add_strings(node)
        self.generic_visit(node)

    def add_strings(self, node: ast.Call) -> None:
        """Names that are given as strings; where a variable gives them, all in the function around it."""
        is_constant = all(isinstance(it, ast.Constant) for it in node.args[1:2])
        scope = node if is_constant or not self.functions else self.functions[-1]
        for part in strings_in(scope):
            if is_private(part.value) and part.value not in self.own_names:
                self.add("set" if "set" in ast.unparse(node.func) else "read", part.value, part)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if is_private(node.attr):
            kind = "call" if node in self.called else KINDS[type(node.ctx)]
            self.add_attribute(node, kind)
        self.generic_visit(node)

    def add_attribute(self, node: ast.Attribute, kind: str) -> None:
        receiver, name = ast.unparse(node.value), node.attr
        if receiver in ("self", "cls", "super()") and self.classes:
            cls = getattr(self.module, self.classes[0], None)
            if cls is not None:
                return self.add_of_own_class(cls, receiver, node, kind)
        known = self.object_of(node.value)
        if known is not None:
            module = known.__name__ if isinstance(known, ModuleType) else getattr(known, "__module__", "") or ""
            if not is_ours(module):
                owner = library_owner(known, name) if isinstance(known, type) else None
                return self.add(kind, name, node, owner)
        if name not in self.own_names:
            self.add(kind, name, node)
        return None

    def add_of_own_class(self, cls: type, receiver: str, node: ast.Attribute, kind: str) -> None:
        """Names of an object of ours are a library's if none of our classes, or one of the library's too, defines it.
        What stands in a method of the same name is a part of the override.
        """
        if receiver == "super()" and self.functions and self.functions[-1].name == node.attr:
            return
        family = self.family[cls]
        methods = any(callable(vars(it).get(node.attr)) for it in family if is_ours(it.__module__))
        if methods and receiver != "super()":
            return
        owner = next((it for member in family if (it := library_owner(member, node.attr))), None)
        is_own = any(node.attr in defined_by(it) for it in family if is_ours(it.__module__))
        if owner is not None or not is_own:
            self.add(kind, node.attr, node, owner)

    def object_of(self, node: ast.expr) -> Any:
        """What an expression is, where an import or an annotation tells it: a module, a class, or None."""
        if isinstance(node, ast.Name):
            for function in reversed(self.functions):
                arguments = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
                for argument in arguments:
                    if argument.arg == node.id:
                        return None if argument.annotation is None else self.object_of(argument.annotation)
            value = getattr(self.module, node.id, None)
            return value if isinstance(value, ModuleType | type) else type(value) if value is not None else None
        if isinstance(node, ast.Attribute):
            value = getattr(self.object_of(node.value), node.attr, None)
            return value if isinstance(value, ModuleType | type) else None
        return None


def strings_in(node: ast.AST) -> Iterator[ast.Constant]:
    """Strings of an expression, but for parts of a formatted one, and what methods of strings take."""
    is_of_string = isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in OF_STRINGS
    if isinstance(node, ast.JoinedStr) or is_of_string:
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node
    for part in ast.iter_child_nodes(node):
        yield from strings_in(part)


def own_names_in(trees: list[ast.AST]) -> set[str]:
    """Private names that our code defines: functions, classes, variables, and attributes that `self` is given."""
    names = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, NAMED):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return {name for name in names if is_private(name)}


def families(classes: list[type]) -> dict[type, set[type]]:
    """Each of our classes with the classes whose attributes an instance of it, or of a subclass, has."""
    return {cls: {it for sub in classes if cls in sub.__mro__ for it in sub.__mro__} for cls in classes}


def module_of(path: Path) -> ModuleType:
    """A file as a module; one that needs what is not installed, as an empty one, of which the text alone is read: a
    test, or what is made for lm-eval.
    """
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not (name.startswith("tests.") or error.name == "lm_eval"):
            raise
        return ModuleType(name)


def with_imports_of(tree: ast.Module) -> ModuleType:
    """A module that has done nothing but the public imports of a source."""
    module = ModuleType("extra")
    for node in tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if names and not any(is_private(part) for name in names for part in name.split(".")):
            exec(compile(ast.Module([node], []), "extra", "exec"), vars(module))
    return module


def scan(paths: list[Path], extra: str = "") -> Iterator[Use]:
    """All uses in files.

    Args:
        extra: Source that is looked at as if it were a further file.
    """
    modules = {str(path.relative_to(ROOT)): module_of(path) for path in paths}
    trees = {where: ast.parse((ROOT / where).read_text()) for where in modules}
    if extra:
        trees["extra"] = ast.parse(extra)
        modules["extra"] = with_imports_of(trees["extra"])
    classes = classes_of(list(modules.values()))
    yield from overrides(classes)
    own_names, family = own_names_in(list(trees.values())), families(classes)
    for where, tree in trees.items():
        uses = Uses(modules[where], where, own_names, family)
        uses.visit(tree)
        yield from uses.found
