"""The one loader: YAML files and flags in, every option of a run as plain values out, with keys and types checked.

    python pretrain.py --config configs/recurrent_lm.yaml --config mine.yaml --training.max_steps 10

Later files and flags override earlier ones. Whatever is wrong is one line that names the key, before anything is built
or written. Paths in a YAML file are relative to that file, paths in flags to the current folder.
"""

import argparse
import dataclasses
import difflib
import functools
import json
import os
import re
import sys
import typing
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ArgumentParser, set_parsing_settings
from transformers import PreTrainedConfig

from model import MediaConfig, MegaTransformerConfig, MegaTransformerSeq2SeqConfig
from model.configuration_megatransformer_seq2seq import (
    SHARED,
    MegaTransformerSourceConfig,
    MegaTransformerTargetConfig,
)
from model.versions import VersionAction
from trainers import RecurrentTrainingArguments

from . import strict_yaml
from .modes import MODES
from .renamed import is_removed, new_name, with_new_names

SWITCHES = tuple(f"__{name}" for name in (*MODES, "allow_code"))  # flags that may stand without a value
OPTIONAL_SECTIONS = ("peft", "step_lora")  # of fine-tuning
# Not for YAML: what every Hugging Face config inherits, what tokenizer, backbone and launcher decide, what has a single
# value here, and secrets.
NOT_OPTIONS = {
    PreTrainedConfig: {item.name for item in dataclasses.fields(PreTrainedConfig)}
    | {"pad_token_id", "bos_token_id", "eos_token_id", "backbone_config", "codec_config", "vocoder_config"},
    MediaConfig: {"image_code_offset", "structure_token_ids"}
    | {name for name in MediaConfig.__dataclass_fields__ if name.endswith("_token_id")},
    MegaTransformerConfig: {"tie_word_embeddings"},
    MegaTransformerSeq2SeqConfig: {"decoder_start_token_id", "is_encoder_decoder"},
    MegaTransformerSourceConfig: set(SHARED),
    MegaTransformerTargetConfig: {*SHARED, "encoder_hidden_size"},
    RecurrentTrainingArguments: {"local_rank", "parallelism_config", "hub_token"}
    | {"logging_nan_inf_filter", "remove_unused_columns"},
}
CODE_OPTIONS = ("optimizer", "rewards")
"""Options of training that name functions, as module:function."""
OWN_CODE = ("evaluation", "trainers")
"""Packages of this project whose functions any file may name."""
PATH = "path"
"""Stands in a schema for an option that is a path, as `is_path` in the metadata of its field says."""


@dataclass(frozen=True)
class Layout:
    """What the YAML of a run may hold.

    Args:
        trainers: Names of the trainers.
        trainer: The one that is taken where none is named.
        sections: The keys of the sections, and the classes that hold their options.
        optional: Dotted keys of the groups that are not there unless they are given.
        model_type: Selects the class of the section `model`; None where there is nothing to select.
        has_modes: Whether something else than training can be done with such a run, as in `MODES`.
    """

    trainers: tuple[str, ...]
    trainer: str
    sections: tuple[tuple[str, type], ...]
    optional: tuple[str, ...]
    model_type: str | None = None
    has_modes: bool = False

    def schema(self) -> dict[str, Any]:
        """Each key with None or `PATH`, or with the schema of the group or list that it holds."""
        switches = ("trainer", "log_level", "local_rank", "allow_code", *(MODES if self.has_modes else ()))
        schema = dict.fromkeys(switches) | {name: schema_of(cls) for name, cls in self.sections}
        if self.model_type is not None:
            schema["model"] = {"model_type": None, **schema["model"]}
        return schema


@dataclass
class Given:
    """The content of one flag of a command line: what the parser sees of it, if it names no file; its values; and
    the configuration file that it names.
    """

    flags: list[str]
    tree: dict[str, Any] = field(default_factory=dict)
    file: str | None = None

    @property
    def origin(self) -> str:
        """How an error about a value begins."""
        return "" if self.file is None else f"{self.file}: "

    def parser_flags(self) -> list[str]:
        """What the parser gets to see, at last. It knows no group that is not there; and it merges a list of groups,
        item by item, into an earlier one of the same length, which is therefore emptied first.
        """
        lists = {key: value for key, value in flatten_keys(self.tree).items() if isinstance(value, list)}
        emptied = [f"--{key}=[]" for key, items in lists.items() if any(isinstance(item, dict) for item in items)]
        if self.file is not None:
            return [*emptied, "--config", json.dumps(without_absent_groups(self.tree), default=str)]
        return [*emptied, *self.flags]


def option_values(given: Sequence[Given], layout: Layout, is_to_run: bool = False) -> dict[str, Any]:
    """Every option as plain values, from defaults, files and flags; types are checked, nothing is built. That code is
    allowed is none of them: no file that a run leaves behind allows its own.

    Args:
        given: What `read_arguments` gives.
        is_to_run: Whether a run follows, in which the code that it names would run.

    Raises:
        ValueError: a key is unknown, a type or a choice is wrong, or a file names code that the command line does not
            allow.
    """
    schema = layout.schema()
    for item in given:
        check_keys(without_absent_groups(item.tree), schema, item.origin)
        if item.file is not None:
            if item.tree.get("allow_code"):
                raise ValueError(
                    f"{item.origin}allow_code: a file cannot allow its own code; give --allow-code instead"
                )
            make_paths_absolute(item.tree, schema, Path(item.file).absolute().parent)
    try:
        tree = json.loads(parsed(layout, *(flag for item in given for flag in item.parser_flags())))
    except ArgumentError as error:
        raise ValueError(describe_error(str(error), schema)) from error
    del tree["local_rank"]
    if not tree.pop("allow_code") and is_to_run:
        check_code(given)
    modes = [name for name in MODES if tree.get(name)]
    for name in MODES.keys() - modes:
        tree.pop(name, None)  # nothing of a mode is left in the file of a run
    if len(modes) > 1:
        given = [f"--{name.replace('_', '-')}" for name in modes]
        raise ValueError(f"{' and '.join(given)} are given, of which each ends the command; give one of them")
    make_paths_absolute(tree, schema, Path.cwd())
    for key in layout.optional:
        *outer, name = key.split(".")
        groups = [functools.reduce(lambda group, part: group.get(part) or {}, outer, item.tree) for item in given]
        named = [group[name] for group in groups if name in group]
        if not named or named[-1] is None:
            functools.reduce(dict.__getitem__, outer, tree)[name] = None
    return tree


# ----------------------------------------------------------------------------------------------- files and command line


def read_arguments(argv: Sequence[str]) -> Iterator[Given]:
    """The content of each flag of a command line, and of a file; raises ValueError for what is none of these."""
    rest = list(argv)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if flag in ("-h", "--help", "--version", "--print_config") or (flag.endswith(".help") and not equals):
            yield Given([flag + equals + value])
            continue
        if not flag.startswith("--"):
            raise ValueError(f"unexpected argument {flag!r}; options are written --section.name value")
        if flag.replace("-", "_") in SWITCHES and not equals and (not rest or rest[0] not in ("true", "false")):
            rest.insert(0, "true")
        if not equals and not rest:
            raise ValueError(f"{flag}: the value is missing")
        value = value if equals else rest.pop(0)
        if flag == "--print_completion":
            yield Given([f"{flag}={value}"])
        elif flag == "--config":
            yield Given([], read_yaml(value), file=value)
        else:
            yield read_flag(flag, value)


def read_flag(flag: str, value: str) -> Given:
    """The content of a flag of a section; under its new name, where it has an old one; nothing, if it is gone.

    Raises:
        ValueError: it is gone, and the value is not the one that is left; or the value cannot be read.
    """
    found = read_value(flag, value)
    old, keys = flag[2:].replace("-", "_").split("."), []
    if is_removed(old, found):
        return Given([])
    for name in old:
        keys.append(new_name([*keys, name]))
    if (new := with_new_names(found, keys=keys)) != found:
        value = json.dumps(new)
    if found and not new:
        return Given([])
    name = flag if keys == old else f"--{'.'.join(keys)}"
    return Given([f"{name}={value}"], functools.reduce(lambda inner, key: {key: inner}, reversed(keys), new))


def read_value(flag: str, value: str) -> Any:
    """The value of a flag, if that is a list or a mapping; else its text, since the parser knows what is expected."""
    try:
        value.encode("utf-8")  # what an argument has that is not UTF-8 came as surrogates
        found = strict_yaml.parse_yaml(value)
        return found if value.lstrip().startswith(("{", "[")) else value
    except strict_yaml.RefusedYaml as error:
        raise ValueError(f"{flag}: {error}") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"{flag}: the value is not UTF-8; convert it, e.g. with iconv") from error
    except yaml.YAMLError:
        return value


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The content of a configuration file, in which old names of options are replaced by the new ones.

    Raises:
        ValueError: the file is missing, is no YAML or no mapping, names a key twice, or is refused by `strict_yaml`.
    """
    try:
        tree = strict_yaml.parse_yaml(strict_yaml.read_text(Path(path)))
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not valid YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"--config {path} {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"--config {path}: expected sections such as 'model:', got {str(tree)[:40]!r}")
    return with_new_names(tree, f"{path}: ")


def to_yaml(tree: dict[str, Any]) -> str:
    """What `read_yaml` reads."""
    return yaml.dump(tree, Dumper=strict_yaml.StrictDumper, sort_keys=False, allow_unicode=True)


def without_absent_groups(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree without optional sections and parts of the model that are null."""
    tree = {name: section for name, section in tree.items() if section is not None or name not in OPTIONAL_SECTIONS}
    if isinstance(model := tree.get("model"), dict):
        parts = MegaTransformerConfig.sub_configs_defaults
        tree["model"] = {name: part for name, part in model.items() if part is not None or name not in parts}
    return tree


def make_paths_absolute(tree: dict[str, Any], schema: dict[str, Any], folder: Path) -> None:
    """Make the paths of a tree, whose types are not checked yet, relative to `folder`, in place.

    What may also be a name on the Hugging Face hub, or one of our DeepSpeed files, is a path only if that exists.
    """
    for name, value in tree.items():
        inner = schema.get(name)
        if isinstance(inner, dict) and isinstance(value, dict):
            make_paths_absolute(value, inner, folder)
        elif isinstance(inner, list) and isinstance(value, list):
            for item in (item for item in value if isinstance(item, dict)):
                make_paths_absolute(item, inner[0], folder)
        elif inner == PATH and isinstance(value, list):
            tree[name] = [os.path.normpath(folder / str(path)) for path in value]
        elif inner == PATH and isinstance(value, str) and value and (path := folder / value).exists():
            tree[name] = os.path.normpath(path)


def check_code(given: Sequence[Given]) -> None:
    """Raises ValueError where the last one to name a function is a file, and the function is not this project's: code
    of others runs only where the command line allows it.
    """
    for key in CODE_OPTIONS:
        sections = [(item.origin, item.tree["training"]) for item in given if "training" in item.tree]
        named = [(origin, section[key]) for origin, section in sections if key in section]
        origin, value = named[-1] if named else ("", None)
        for name in value if isinstance(value, list) else [value]:
            is_function = isinstance(name, str) and ":" in name
            if origin and is_function and name.partition(":")[0].partition(".")[0] not in OWN_CODE:
                raise ValueError(
                    f"{origin}training.{key}: {name!r} is code from outside this project, which a file may not run; "
                    "read that code and add --allow-code, or name it on the command line"
                )


# ------------------------------------------------------------------------------------------------- keys, types, choices


def nested_class(hint: Any) -> type | None:
    """The configuration class in a type such as `C`, `C | None` or `list[C]`."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    return next((found for part in typing.get_args(hint) if (found := nested_class(part))), None)


def option_types(cls: type) -> dict[str, Any]:
    """Names and types of the fields that are options."""
    skipped = set().union(*(names for base, names in NOT_OPTIONS.items() if issubclass(cls, base)))
    hints = typing.get_type_hints(cls, localns={"torch": torch})  # PreTrainedConfig imports it for type checkers only
    return {item.name: hints[item.name] for item in dataclasses.fields(cls) if item.init and item.name not in skipped}


def schema_of(cls: type) -> dict[str, Any]:
    """Each key of a class with None, or `PATH`, or the schema of the class it holds, in a list if it holds many."""
    schema = {}
    for name, hint in option_types(cls).items():
        inner = schema_of(nested) if (nested := nested_class(hint)) else None
        is_path = cls.__dataclass_fields__[name].metadata.get("is_path", False)
        schema[name] = PATH if is_path else [inner] if inner and typing.get_origin(hint) is list else inner
    return schema


def check_keys(tree: Any, schema: dict[str, Any] | list | str | None, origin: str, key: str = "") -> None:
    """Raises ValueError for the first key of the tree that is not in the schema, with the closest one that is."""
    if schema in (None, PATH):
        return
    if not isinstance(tree, list if isinstance(schema, list) else dict):
        kind = "a list" if isinstance(schema, list) else f"keys such as {next(iter(schema))}"
        raise ValueError(f"{origin}{key}: expected {kind}, got {tree!r}")
    if isinstance(schema, list):
        for index, item in enumerate(tree):
            check_keys(item, schema[0], origin, f"{key}[{index}]")
        return
    for name, value in tree.items():
        inner = f"{key}.{name}" if key else str(name)
        if name not in schema:
            known = [*schema, "config"] if not (key or origin) else list(schema)
            raise ValueError(f"{origin}unknown key {inner} ({value!r}); {closest(name, known)}")
        check_keys(value, schema[name], origin, inner)


@functools.lru_cache(maxsize=256)
def parsed(layout: Layout, *flags: str) -> str:
    """All options as JSON, of flags that name no file: to check a run against others takes the same ones repeatedly."""
    parser = build_parser(layout, any(re.match(r"-h|--help|--print_|.*\.help$", flag) for flag in flags))
    return parser.dump(parser.parse_args(flags), format="json", skip_unset=False, skip_validation=True)


@functools.cache
def build_parser(layout: Layout, is_described: bool = True) -> ArgumentParser:
    """The parser of all options; its `--help` shows the docstrings of the fields if they are read, which takes long."""
    set_parsing_settings(docstring_parse_attribute_docstrings=is_described, add_print_completion_argument=True)
    parser = ArgumentParser(prog=Path(sys.argv[0]).name, exit_on_error=False, allow_abbrev=False)
    add, names = parser.add_argument, Literal[layout.trainers]
    add("--version", action=VersionAction)
    add("--config", action="config", help="YAML file; may be given several times")
    add("--trainer", type=names, default=layout.trainer, help="Name of the trainer")
    add("--log_level", "--log-level", type=Literal["debug", "info", "warning", "error"], default="info")
    add("--allow_code", "--allow-code", type=bool, default=False, help="Run functions that a configuration file names")
    add("--local_rank", "--local-rank", type=int, help="Ignored: LOCAL_RANK of the environment rules")
    for name, what in MODES.items() if layout.has_modes else ():
        add(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), type=bool, default=False, help=what)
    if layout.model_type is not None:
        add("--model.model_type", default=layout.model_type, help="Selects the class of `model`")
    for name, cls in layout.sections:
        add_group(parser, cls, name)
    return parser


def add_group(parser: ArgumentParser, cls: type, key: str) -> None:
    """Add the options of a class, and of each class in it as a group; each has a help, such as `--training.help`."""
    options = option_types(cls)
    single = {name: hint for name, hint in options.items() if typing.get_origin(hint) is not list}
    groups = {name: nested for name, hint in single.items() if (nested := nested_class(hint))}
    skip = {item.name for item in dataclasses.fields(cls)} - set(options) | set(groups)
    parser.add_class_arguments(cls, key, skip=skip, fail_untyped=False)
    parser.add_argument(f"--{key}.help", action=SectionHelp, of=cls)
    for name, nested in groups.items():
        add_group(parser, nested, f"{key}.{name}")


def sections_in(schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The keys of the groups in a schema."""
    for name, inner in schema.items():
        if isinstance(inner, dict):
            yield f"{prefix}{name}"
            yield from sections_in(inner, f"{prefix}{name}.")


class SectionHelp(argparse.Action):
    """Shows the options of one section, that of the class `of`, with the sections in it, and ends the process."""

    def __init__(self, option_strings: Sequence[str], dest: str, of: type, **kwargs: Any) -> None:
        what = "Show the options of this section alone, and exit"
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=what)
        self.of = of

    def __call__(self, parser: ArgumentParser, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Do so."""
        key = self.option_strings[0].removeprefix("--").removesuffix(".help")
        set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the last parser may not be described
        section = ArgumentParser(prog=parser.prog, usage=argparse.SUPPRESS, add_help=False)
        add_group(section, self.of, key)
        section.print_help()
        parser.exit()


def describe_error(message: str, schema: dict[str, Any]) -> str:
    """A message of jsonargparse in one line: key, what was expected, what was given."""
    if unknown := re.match(r"unrecognized arguments: (\S+)\.help$", message):
        return f"{unknown[1]}.help: there is no such section; {closest(unknown[1][2:], list(sections_in(schema)))}"
    key = ".".join(dict.fromkeys(re.findall(r'arser key "([^"]+)":', message)))
    expected = re.search(r"Subtypes: \[(.*)\]|Expected an? (.*?)\. Got value", message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    if not (key and expected and value):
        return message
    kind = re.sub(r"<class '([\w.]+)'>", r"\1", expected[1] or expected[2]).replace("NoneType", "null")
    if "Literal" in kind:
        choices = re.findall(r"'([^']+)'", kind)
        return f"{key}: {value[1]!r} is unknown; {closest(value[1], choices)}"
    return f"{key}: expected {kind}, got {value[1]}"


def closest(name: Any, known: Sequence[str], else_where: str = "--help lists the known ones") -> str:
    """Advice about an unknown name: the known one most like it, and which are known, or, of many, `else_where`."""
    near = difflib.get_close_matches(str(name), known, n=1)
    listed = f"known: {', '.join(known)}" if len(known) <= 20 else else_where
    return f"did you mean {near[0]}? {listed}" if near else listed


def flatten_keys(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
