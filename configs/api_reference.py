"""Writes docs/api.md (`python -m configs.reference`): every public name of the code, read from the code."""

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, get_type_hints

import docstring_parser
from transformers import PreTrainedConfig

import callbacks
import dataset_loading
import model
from evaluation import rewards

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "api.md"
BAR = "\\|"
OR_FUNCTION = "or a function as `module:function`"
INTRODUCTION = """\
# Names

Written by `make docs` from the code; to change a text, change the docstring. What is not on this page may change
without notice. [Options](config.md) has the keys of a YAML, [Change it](change.md) says how to add an entry to a
registry.
"""
METHODS = {
    "forward": "Arguments of the models of text, and of those with images and audio.\n",
    "generate": (
        "Arguments besides those of transformers. What a call does not name is taken from the generation config, then\n"
        "from the config of the model.\n"
    ),
}
"""Methods of the model with a section of their own, and what stands above the table."""
OPTIONS = ("ExitOptions", "NoiseOptions", "MediaOptions")
"""Classes whose fields are explained below those."""
REGISTRIES = (
    ("Injections", "`recurrence.injection` of a configuration", "model.recurrence", "INJECTIONS"),
    ("Exit criteria", "`exit_criterion` of `generate`", "model.exit_criteria", "EXIT_CRITERIA"),
    ("Modalities", "What is read, and generated", "model.modality", "MODALITIES"),
    ("Trainers", "`trainer` of `pretrain.py`", "trainers", "TRAINERS"),
    ("Trainers of fine-tuning", "`trainer` of `finetune.py`", "trainers.finetuning", "FINETUNERS"),
    ("Optimizers", f"`training.optimizer`, {OR_FUNCTION}", "trainers.optimizers", "OPTIMIZERS"),
    ("Gradient filters", "`training.gradient_filter.name`", "trainers.gradient_filters", "GRADIENT_FILTERS"),
    ("Generated tasks", "`task` of a source of kind `generated`", "dataset_loading.tasks.registry", "TASKS"),
    ("Generated tasks with media", "The same, of images and audio", "dataset_loading.tasks.registry", "MEDIA_TASKS"),
    ("Checks", "What `python -m evaluation` reads from generated media", "evaluation.checks", "CHECKS"),
)
"""Heading, what a name is for, and the registry that holds it: its module and its name there."""


def render_names() -> str:
    """The page, in Markdown."""
    parts = [INTRODUCTION, "## `model`\n", "What `from model import ...` gives.\n"]
    parts += [entry(model, name) for name in model.__all__ if name not in OPTIONS]
    for name, introduction in METHODS.items():
        parts += [f"## `{name}`\n", introduction, table_of("argument", arguments_of(name))]
    parts += [entry(model, name) for name in OPTIONS]
    parts += ["## Registries\n"]
    for heading, what, module_name, name in REGISTRIES:
        module = importlib.import_module(module_name)
        parts += [f"### {heading}\n", f"{what}; `{name}` in `{file_of(module)}`.\n"]
        parts.append(table_of("name", meanings(getattr(module, name))))
    parts += ["### Rewards\n", f"`training.rewards`, {OR_FUNCTION}; functions of `{file_of(rewards)}`.\n"]
    functions = {f"{rewards.__name__}:{name}": it for name, it in inspect.getmembers(rewards, inspect.isfunction)}
    given = {name: it for name, it in functions.items() if {"completions", "columns"} <= set(names_of(it))}
    parts.append(table_of("name", meanings(given)))
    fields = docstring_parser.parse_from_object(dataset_loading.SourceConfig).params
    kinds = " ".join(next(field.description for field in fields if field.arg_name == "kind").split())
    parts += ["### Kinds of source\n", "`kind` of a source of data ([data](data.md#sources)).\n", f"{kinds}\n"]
    parts += ["### Callbacks\n", f"`callbacks` of a run; fields of `CallbacksConfig` in `{file_of(callbacks)}`.\n"]
    parts.append(table_of("group", meanings(get_type_hints(callbacks.CallbacksConfig))))
    return "\n".join(parts)


# --------------------------------------------------------------------------------------------------------- single names


def entry(package: Any, name: str) -> str:
    """Heading, signature and first paragraph of a name, and, of a class, its methods."""
    value, (path, text) = getattr(package, name), origin_of(package, name)
    lines = [f"### {name}\n"]
    if isinstance(value, type) and issubclass(value, PreTrainedConfig):
        lines += [f"`{path}`. {text} Its arguments are [options](config.md).\n"]
    elif callable(value) and not (isinstance(value, type) and issubclass(value, Exception)):
        lines += [f"`{path}`. {text}\n", f"```python\n{signature(name, value)}\n```\n"]
        if name in OPTIONS:
            lines.append(table_of("field", described(value)))
        elif isinstance(value, type) and (methods := methods_of(value)):
            lines.append(table_of("method", methods))
    else:
        lines.append(f"`{path}`. {text}\n")
    return "\n".join(lines)


def origin_of(package: Any, name: str) -> tuple[str, str]:
    """The file that defines a name of a package, from its root, and the first paragraph about it."""
    value, module, sources = getattr(package, name), package, [package.__name__]
    while sources:
        module = importlib.import_module(sources[0])
        tree = ast.parse(inspect.getsource(module))
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level == 1]
        named = [node.module for node in imports if name in {alias.name for alias in node.names}]
        sources = [f"{package.__name__}.{it}" for it in named]
    text = inspect.getdoc(value) if callable(value) else text_below(tree, name)
    return file_of(module), first_paragraph(text)


def text_below(tree: ast.Module, name: str) -> str:
    """The text in a file below the line that sets a constant."""
    for node, after in pairwise(tree.body):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if is_text and any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return str(after.value.value)
    return ""


def first_paragraph(text: str | None) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((text or "").split("\n\n")[0].split())


def signature(name: str, value: Callable[..., Any]) -> str:
    """How a function or class is called, an argument a line where one line is too short."""
    found = inspect.signature(value)
    parts, star = [], False
    for parameter in found.parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not star:
            parts.append("*")
        star |= parameter.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL)
        parts.append(argument(parameter))
    result = "" if found.return_annotation in (inspect.Signature.empty, None) else found.return_annotation
    end = f") -> {without_modules(result)}" if result else ")"
    line = f"{name}({', '.join(parts)}{end}"
    return line if len(line) <= 100 else "\n".join([f"{name}(", *(f"    {part}," for part in parts), end])


def argument(parameter: inspect.Parameter) -> str:
    """A parameter as it stands in a signature."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    is_typed = parameter.annotation is not inspect.Parameter.empty
    kind = f": {without_modules(parameter.annotation)}" if is_typed else ""
    default = "..." if "factory" in repr(parameter.default) else repr(parameter.default)
    value = "" if parameter.default is inspect.Parameter.empty else f" = {default}"
    return f"{stars}{parameter.name}{kind}{value}"


def without_modules(annotation: Any) -> str:
    """A type as it is written, without the modules that its names come from."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"(?:\b\w+\.)+(?=\w)", "", text).replace("'", "").replace('"', "")


def methods_of(cls: type) -> dict[str, str]:
    """What the public methods that a class itself defines do, but for those with a section of their own."""
    found = {}
    for name, value in vars(cls).items():
        function = getattr(value, "__func__", value)
        if isinstance(function, FunctionType) and function.__doc__ and not name.startswith("_") and name not in METHODS:
            found[f"{name}({', '.join(names_of(function))})"] = first_paragraph(function.__doc__)
    return found


def names_of(function: Callable[..., Any]) -> list[str]:
    """The names of a function's arguments."""
    return [argument for argument in inspect.signature(function).parameters if argument not in ("self", "cls")]


# ---------------------------------------------------------------------------------------------- arguments, registries


def arguments_of(method: str) -> dict[str, str]:
    """What a method of the model takes, from the docstrings of all classes that it comes from, the innermost first."""
    found: dict[str, str] = {}
    inner = (model.MegaTransformerTextModel, model.MegaTransformerModel)
    for cls in (*inner, *reversed(model.MegaTransformerForConditionalGeneration.__mro__)):
        if method in vars(cls) and cls.__module__.startswith("model."):
            for name, text in described(vars(cls)[method]).items():
                further = f" {text}" if text.startswith("Also") else ""
                found[name] = found[name] + further if name in found else text
    return found


def described(value: Any) -> dict[str, str]:
    """The arguments that a docstring explains."""
    items = docstring_parser.parse(inspect.getdoc(value) or "").params
    return {item.arg_name: item.description for item in items if item.arg_name != "kwargs"}


def file_of(module: ModuleType) -> str:
    """The file of a module, from the root."""
    return str(Path(inspect.getfile(module)).relative_to(ROOT))


def meanings(entries: Mapping[str, Any]) -> dict[str, str]:
    """What the entries of a registry are."""
    values = {name: value[0] if isinstance(value, tuple) else value for name, value in entries.items()}
    return {name: first_paragraph(inspect.getdoc(value)) for name, value in values.items()}


def table_of(heading: str, meanings: Mapping[str, str]) -> str:
    """A table of names and what they mean."""
    rows = (f"| `{name}` | {' '.join(text.split()).replace('|', BAR)} |" for name, text in meanings.items())
    return "\n".join([f"| {heading} | what it is |", "|---|---|", *rows, ""])
