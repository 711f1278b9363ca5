"""The one loader: YAML files and flags in, typed and checked configuration classes out.

    python pretrain.py --config configs/recurrent_lm.yaml --config mine.yaml --training.max_steps 10

Later files and flags override earlier ones. Whatever is wrong is one line that names the key, before anything is built
or written. Paths in a YAML file are relative to that file, paths in flags to the current folder.
"""

import argparse
import dataclasses
import enum
import functools
import json
import logging
import math
import os
import re
import sys
import time
import typing
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import yaml
from jsonargparse import ArgumentParser, set_parsing_settings
from transformers import PreTrainedConfig

from callbacks import CallbacksConfig
from dataset_loading.configuration import DataConfig, TokenizerConfig
from model import CODEC_CONFIGS, MODELS, MegaTransformerConfig, MegaTransformerTextConfig
from model.terminal import one_line
from model.versions import VersionAction
from trainers import TRAINERS, PlannedTrainingArguments, RecurrentTrainingArguments

from . import strict_yaml
from .advice import closest
from .deepspeed_files import find_deepspeed
from .foreign_code import check_code

logger = logging.getLogger(__name__)

PATIENCE = 30  # seconds from an error of a rank that is not the first of its machine to its words
MODEL_CONFIGS: dict[str, type[PreTrainedConfig]] = {cls.model_type: cls for cls in MODELS}
SECTIONS = {
    "tokenizer": TokenizerConfig,
    "data": DataConfig,
    "callbacks": CallbacksConfig,
    "training": RecurrentTrainingArguments,  # last, as it looks for the devices
}
SWITCHES = ("__dry_run", "__allow_code")  # flags that may stand without a value
OPTIONAL_SECTIONS = ("peft", "step_lora")  # of fine-tuning
# Not for YAML: what every Hugging Face config inherits, what tokenizer, backbone and launcher decide, and secrets.
NOT_OPTIONS = {
    PreTrainedConfig: {item.name for item in dataclasses.fields(PreTrainedConfig)}
    | {"pad_token_id", "bos_token_id", "eos_token_id", "backbone_config", "codec_config", "vocoder_config"},
    MegaTransformerConfig: {"tie_word_embeddings", "image_code_offset", "structure_token_ids"}
    | {name for name in MegaTransformerConfig.__dataclass_fields__ if name.endswith("_token_id")},
    RecurrentTrainingArguments: {"local_rank", "parallelism_config", "hub_token"},
}


class ResolvedConfig:
    """All that defines a run, of any kind."""

    resolved: dict[str, Any]
    identity: ClassVar[tuple[str, ...]]
    """Beginnings of the keys that say which model it is."""

    @property
    def seed(self) -> int:
        """With which the run splits and generates its data."""
        return self.resolved["training"]["seed"]

    def defaults(self) -> dict[str, Any]:
        """What is resolved where nothing is given but what selects the classes."""
        raise NotImplementedError

    def reread(self, path: str | Path) -> dict[str, Any]:
        """Every option of a run of this kind as plain values, as a resolved YAML of earlier code says; options that are
        younger than that have their defaults.

        Raises:
            ValueError: for what is no such file.
        """
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Write the resolved YAML, which alone repeats the run; nobody ever reads half of it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            beside.write_text(to_yaml(self.resolved), encoding="utf-8")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


@dataclass
class RunConfig(ResolvedConfig):
    """All that defines a run of pretraining.

    Args:
        model: Configuration of the network; the ids of special tokens are not in it yet.
        tokenizer: Which tokenizer, or how to train one.
        data: What is read.
        callbacks: What is watched and written beside the trainer's own logs.
        training: Training arguments; None if `load_run_config` left them out.
        trainer: Name of the trainer.
        log_level: Least severe message that is shown.
        resolved: Every option as plain values: what was chosen, not what the classes derive from it.
        is_dry_run: Whether the run is only planned; `training` then knows nothing of this machine.
    """

    model: PreTrainedConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    callbacks: CallbacksConfig
    training: RecurrentTrainingArguments | None
    trainer: str
    log_level: str
    resolved: dict[str, Any] = field(repr=False)
    is_dry_run: bool = False
    identity: ClassVar[tuple[str, ...]] = ("model.", "tokenizer.")

    def defaults(self) -> dict[str, Any]:
        """What is resolved where nothing is given but the class of the model."""
        return resolve(["--model.model_type", self.model.model_type])

    def reread(self, path: str | Path) -> dict[str, Any]:
        """As said there."""
        return resolve(["--config", str(path)])


def load_config(argv: Sequence[str] | None = None) -> RunConfig:
    """The run that a command line (default: `sys.argv`) describes.

    Raises:
        SystemExit: with code 2, after one line on stderr, for whatever is wrong.
    """
    with one_line_errors():
        return build_run(resolve(sys.argv[1:] if argv is None else argv, is_to_run=True))


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> ResolvedConfig:
    """The run, of pretraining or of fine-tuning, that a YAML file and flags describe, without its training arguments
    (`training` is None).

    Those look for the devices of the machine, and a run may be evaluated on another one than it was trained on.

    Raises:
        ValueError: for whatever is wrong, in one line.
    """
    model = read_yaml(path).get("model")
    if isinstance(model, dict) and "path" in model:
        from .finetuning import load_finetuned_run  # it takes TRL, which nothing else needs

        return load_finetuned_run(path, overrides)
    return build_run(resolve(["--config", str(path), *overrides]), skip=("training",))


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of this command, and those that `configs` reads: --config and --data.KEY, with their values."""
    own, overrides, rest = [], [], list(argv)
    while rest:
        argument = rest.pop(0)
        if argument.partition("=")[0] != "--config" and not argument.startswith("--data."):
            own.append(argument)
            continue
        overrides.append(argument)
        if "=" not in argument and rest:
            overrides.append(rest.pop(0))
    return own, overrides


def read_run_config(checkpoint: Path, overrides: Sequence[str]) -> ResolvedConfig:
    """The configuration of the run that a checkpoint belongs to, with overrides.

    Raises:
        ValueError: there is none beside the checkpoint, or an override is wrong.
    """
    path = find_run_config(checkpoint)
    if path is not None:
        return load_run_config(path, overrides)
    if not any(override.partition("=")[0] == "--config" for override in overrides):
        raise ValueError(
            f"Neither {checkpoint} nor its parent folder has the config.yaml of a run: "
            "name the data with --config FILE."
        )
    return load_run_config(*first_config(overrides))


def find_run_config(checkpoint: Path) -> Path | None:
    """The config.yaml of the run that a checkpoint belongs to, if there is one: beside it, or a folder above."""
    paths = (folder / "config.yaml" for folder in (checkpoint, checkpoint.absolute().parent))
    return next(filter(Path.is_file, paths), None)


def first_config(overrides: Sequence[str]) -> tuple[str, list[str]]:
    """The path of the first --config, and the other overrides."""
    rest = list(overrides)
    index = next(i for i, override in enumerate(rest) if override.partition("=")[0] == "--config")
    _, has_value, path = rest.pop(index).partition("=")
    if not has_value:
        if index == len(rest):
            raise ValueError("--config: the value is missing")
        path = rest.pop(index)
    return path, rest


@contextmanager
def one_line_errors(kinds: tuple[type[Exception], ...] = (ValueError, OSError)) -> Iterator[None]:
    """Turn errors of these kinds into one line on stderr and exit code 2.

    Of the ranks of a machine, the first one speaks. The others wait for the launcher to end them: it ends all with the
    first one that leaves, and the one that speaks is to have spoken by then. One that is not ended in `PATIENCE`
    seconds has an error of its own, and says it.
    """
    try:
        yield
    except kinds as error:
        logger.debug("Where it failed:", exc_info=True)
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(PATIENCE)
        sys.stderr.write(f"error: {one_line(error)}\n")
        raise SystemExit(2) from None


def check_output_dir(run: ResolvedConfig) -> None:
    """Refuse to write where nothing can be written, or into the folder of another model.

    Raises:
        ValueError: if the output folder cannot be made, or holds a run of another model; names the first key that
            differs.
    """
    name = run.training.output_dir
    folder = Path(name).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not (name and there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"training.output_dir: {name!r} is no folder that can be written; choose another")
    if difference := first_difference(folder, run, run.identity):
        raise ValueError(f"training.output_dir: {name} holds another model: {difference}; choose another output_dir")


def first_difference(folder: Path, run: ResolvedConfig, prefixes: tuple[str, ...]) -> str | None:
    """How a run differs from the one whose config.yaml is in a folder, if there is one: the first key that begins with
    one of the prefixes. Options that are younger than that file have their defaults there.
    """
    if not (folder / "config.yaml").exists():
        return None
    content = read_yaml(folder / "config.yaml")
    make_paths_absolute(content, Path.cwd())  # as all are that today's code writes
    there, here = flatten(run.defaults()) | flatten(content), flatten(run.resolved)
    different = (key for key in here | there if key.startswith(prefixes) and there.get(key) != here.get(key))
    key = next(different, None)
    return key and f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"


# --------------------------------------------------------------------------------------------- from arguments to values


def resolve(argv: Sequence[str], is_to_run: bool = False) -> dict[str, Any]:
    """Every option as plain values, from defaults, files and flags; types are checked, nothing is built.

    Args:
        is_to_run: Whether a run follows, in which the code that it names would run.

    Raises:
        ValueError: for an unknown or repeated key, a wrong type or choice, a missing file; as `check_code`, unless the
            command line allows it.
    """
    given = list(read_arguments(argv))
    config_class = model_config_class([tree for _, tree, _ in given])
    absent = absent_parts([tree for _, tree, _ in given], config_class)
    schema = dict.fromkeys(("trainer", "log_level", "local_rank", "dry_run", "allow_code"))
    schema |= {"model": {"model_type": None, **schema_of(config_class)}}
    schema |= {name: schema_of(cls) for name, cls in SECTIONS.items()}
    tree = parse(given, schema, build_parser(config_class), is_to_run)
    tree["model"] |= dict.fromkeys(absent)
    if not tree["dry_run"]:
        del tree["dry_run"]  # a dry run leaves no file, so that no file needs to say that its run was none
    return tree


def parse(
    given: Sequence[tuple[str, dict[str, Any], list[str]]],
    schema: dict[str, Any],
    parser: ArgumentParser,
    is_to_run: bool,
) -> dict[str, Any]:
    """The values of what `read_arguments` gives, defaults included, with their types checked. That code is allowed is
    none of them: no file that a run leaves behind allows its own.
    """
    for origin, tree, _ in given:
        check_keys(without_absent_parts(tree), schema, origin)
        if origin and tree.get("allow_code"):
            raise ValueError(f"{origin}allow_code: a file cannot allow its own code; give --allow-code instead")
    try:
        values = parser.parse_args([flag for _, tree, flags in given for flag in (*emptied_lists(tree), *flags)])
    except ArgumentError as error:
        raise ValueError(describe(str(error), schema)) from error
    tree = json.loads(parser.dump(values, format="json", skip_unset=False))
    del tree["local_rank"]
    if not tree.pop("allow_code") and is_to_run:
        check_code(given)
    make_paths_absolute(tree, Path.cwd())
    return tree


def absent_parts(trees: Sequence[dict[str, Any]], config_class: type[PreTrainedConfig]) -> list[str]:
    """The optional parts of a model that are not there."""
    sections = [section for tree in trees if isinstance(section := tree.get("model"), dict)]
    return absent_of([name for name, spec in config_class.sub_configs_defaults.items() if spec.optional], sections)


def absent_of(optional: Sequence[str], trees: Sequence[dict[str, Any]]) -> list[str]:
    """The optional keys that no tree gives, or that the last one to name it makes null."""
    last = {name: tree[name] for tree in trees for name in optional if name in tree}
    return [name for name in optional if last.get(name) is None]


def without_absent_parts(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree without optional sections and parts of the model that are null: the parser knows no group that is not
    there.
    """
    tree = {name: section for name, section in tree.items() if section is not None or name not in OPTIONAL_SECTIONS}
    model = tree.get("model")
    if not isinstance(model, dict):
        return tree
    parts = MegaTransformerConfig.sub_configs_defaults
    return tree | {"model": {name: part for name, part in model.items() if part is not None or name not in parts}}


def emptied_lists(tree: dict[str, Any]) -> list[str]:
    """Flags that empty each list of groups in a tree. The parser merges such a list, item by item, into an earlier one
    of the same length, where it should replace that.
    """
    lists = {key: value for key, value in flatten(tree).items() if isinstance(value, list)}
    return [f"--{key}=[]" for key, items in lists.items() if any(isinstance(item, dict) for item in items)]


def read_arguments(argv: Sequence[str]) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """For each flag: the file it stands for, if any, the tree of its values, and what the parser gets to see.

    A configuration file becomes its content, with its paths made absolute.
    """
    rest = list(argv)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if flag in ("-h", "--help", "--version", "--print_config") or (flag.endswith(".help") and not equals):
            yield "", {}, [flag + equals + value]
            continue
        if not flag.startswith("--"):
            raise ValueError(f"unexpected argument {flag!r}; options are written --section.name value")
        if flag.replace("-", "_") in SWITCHES and not equals and (not rest or rest[0] not in ("true", "false")):
            rest.insert(0, "true")
        if not equals and not rest:
            raise ValueError(f"{flag}: the value is missing")
        value = value if equals else rest.pop(0)
        if flag == "--print_completion":
            yield "", {}, [f"{flag}={value}"]
        elif flag == "--config":
            tree = read_yaml(value)
            make_paths_absolute(tree, Path(value).absolute().parent)
            yield f"{value}: ", tree, ["--config", json.dumps(without_absent_parts(tree), default=str)]
        else:
            tree = read_value(flag, value)
            for key in reversed(flag[2:].replace("-", "_").split(".")):
                tree = {key: tree}
            yield "", tree, [f"{flag}={value}"]


def read_value(flag: str, value: str) -> Any:
    """What a flag is given, if that is a list or a mapping; else its text, since the parser knows what is expected.

    Raises:
        ValueError: for what `strict_yaml` refuses.
    """
    try:
        value.encode("utf-8")  # what an argument has that is not UTF-8 came as surrogates
        found = strict_yaml.load(value)
        return found if value.lstrip().startswith(("{", "[")) else value
    except strict_yaml.RefusedYaml as error:
        raise ValueError(f"{flag}: {error}") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"{flag}: the value is not UTF-8; convert it, e.g. with iconv") from error
    except yaml.YAMLError:
        return value


def to_yaml(tree: dict[str, Any]) -> str:
    """What `read_yaml` reads."""
    return yaml.dump(tree, Dumper=strict_yaml.StrictDumper, sort_keys=False, allow_unicode=True)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The content of a configuration file.

    Raises:
        ValueError: for a file that is missing, no YAML or no mapping, or names a key twice, or is refused otherwise
            (`strict_yaml`).
    """
    try:
        tree = strict_yaml.load(strict_yaml.read_text(Path(path)))
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not valid YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"--config {path} {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"--config {path}: expected sections such as 'model:', got {str(tree)[:40]!r}")
    return tree


def make_paths_absolute(tree: dict[str, Any], folder: Path) -> None:
    """Make the paths of a tree, whose types are not checked yet, relative to `folder`, in place.

    What may also be a name on the Hugging Face hub, or one of our DeepSpeed files, is a path only if that exists.
    """
    data, tokenizer, training = (
        section if isinstance(section := tree.get(name), dict) else {} for name in ("data", "tokenizer", "training")
    )
    groups = [group for name in ("train", "validation") if isinstance(group := data.get(name), list)]
    sources = [source for group in groups for source in group if isinstance(source, dict)]
    for source in sources:
        if isinstance(source.get("paths"), list):
            source["paths"] = [os.path.normpath(folder / str(path)) for path in source["paths"]]
    model = section if isinstance(section := tree.get("model"), dict) else {}
    parts = [(model.get("image_writer_config"), "codec_name_or_path")]
    parts += [(model.get("audio_writer_config"), "vocoder_name_or_path")]
    parts += [(model.get(f"{name}_config"), "backbone") for name in ("vision", "audio")]
    named = [*((source, "path") for source in sources), (tokenizer, "path"), (training, "deepspeed")]
    named += [(part, key) for part, key in parts if isinstance(part, dict)]
    named += [(model, "path")]  # of fine-tuning
    for mapping, key in named:
        if isinstance(name := mapping.get(key), str) and name and (path := folder / name).exists():
            mapping[key] = os.path.normpath(path)


# ------------------------------------------------------------------------------------------------- keys, types, choices


def model_config_class(trees: Sequence[dict[str, Any]]) -> type[PreTrainedConfig]:
    """The class named by the last `model.model_type` among the trees."""
    sections = [tree["model"] for tree in trees if isinstance(tree.get("model"), dict)]
    names = [section["model_type"] for section in sections if "model_type" in section]
    name = names[-1] if names else MegaTransformerTextConfig.model_type
    if str(name) not in MODEL_CONFIGS:
        raise ValueError(f"model.model_type: {name!r} is unknown; known: {', '.join(MODEL_CONFIGS)}")
    return MODEL_CONFIGS[name]


def nested_class(hint: Any) -> type | None:
    """The configuration class in a type such as `C`, `C | None` or `list[C]`."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    return next((found for part in typing.get_args(hint) if (found := nested_class(part))), None)


def options_of(cls: type) -> dict[str, Any]:
    """Names and types of the fields that are options."""
    skipped = set().union(*(names for base, names in NOT_OPTIONS.items() if issubclass(cls, base)))
    hints = typing.get_type_hints(cls, localns={"torch": torch})  # PreTrainedConfig imports it for type checkers only
    return {item.name: hints[item.name] for item in dataclasses.fields(cls) if item.init and item.name not in skipped}


def schema_of(cls: type) -> dict[str, Any]:
    """Each key of a class with None, or with the schema of the class it holds, in a list if it holds many."""
    schema = {}
    for name, hint in options_of(cls).items():
        inner = schema_of(nested) if (nested := nested_class(hint)) else None
        schema[name] = [inner] if inner and typing.get_origin(hint) is list else inner
    return schema


def check_keys(tree: Any, schema: dict[str, Any] | list | None, origin: str, key: str = "") -> None:
    """Raises ValueError for the first key of the tree that is not in the schema, with the closest one that is."""
    if schema is None:
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


@functools.cache
def build_parser(config_class: type[PreTrainedConfig]) -> ArgumentParser:
    """The parser of all sections; its `--help` shows the docstrings of the fields."""
    parser = empty_parser(TRAINERS, "pretrain")
    parser.add_argument(
        "--dry_run", "--dry-run", type=bool, default=False, help="Print what the run would need, and stop"
    )
    parser.add_argument("--model.model_type", default=config_class.model_type, help="Selects the class of `model`")
    for name, cls in {"model": config_class, **SECTIONS}.items():
        add_group(parser, cls, name)
    return parser


def empty_parser(trainers: Iterable[str], trainer: str) -> ArgumentParser:
    """A parser of what stands outside of the sections.

    Args:
        trainers: names of those there are.
        trainer: the one that is taken where none is named.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True, add_print_completion_argument=True)
    parser = ArgumentParser(prog=Path(sys.argv[0]).name, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--version", action=VersionAction)
    parser.add_argument("--config", action="config", help="YAML file; may be given several times")
    parser.add_argument("--trainer", type=Literal[tuple(trainers)], default=trainer, help="Name of the trainer")
    parser.add_argument("--log_level", "--log-level", type=Literal["debug", "info", "warning", "error"], default="info")
    parser.add_argument(
        "--allow_code", "--allow-code", type=bool, default=False, help="Run functions that a configuration file names"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help="Ignored: LOCAL_RANK of the environment rules")
    return parser


def add_group(parser: ArgumentParser, cls: type, key: str) -> None:
    """Add the options of a class, and those of each class in it as a group of its own; each has a `--help` of its own,
    such as `--training.help`.
    """
    options = options_of(cls)
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
    """Shows the options of one section, those of the sections in it included, and ends the process.

    Args:
        of: The class of the section.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, of: type, **kwargs: Any) -> None:
        what = "Show the options of this section alone, and exit"
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=what)
        self.of = of

    def __call__(self, parser: ArgumentParser, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Do so."""
        key = self.option_strings[0].removeprefix("--").removesuffix(".help")
        section = ArgumentParser(prog=parser.prog, usage=argparse.SUPPRESS, add_help=False)
        add_group(section, self.of, key)
        section.print_help()
        parser.exit()


def describe(message: str, schema: dict[str, Any]) -> str:
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


# ----------------------------------------------------------------------------------------------- from values to classes


def build_run(tree: dict[str, Any], skip: Sequence[str] = ()) -> RunConfig:
    """Build the classes of a resolved tree; `skip` names sections that stay None.

    Raises:
        ValueError: for a value out of range, with its section.
    """
    model = {name: value for name, value in tree["model"].items() if name != "model_type"}
    sections = {"model": build(MODEL_CONFIGS[tree["model"]["model_type"]], model, "model")}
    check_trainer(sections["model"], tree["trainer"])
    if not isinstance(sections["model"], CODEC_CONFIGS):
        check_positions(sections["model"], tree["data"]["block_size"])
    is_dry_run = tree.get("dry_run", False)
    for name, cls in SECTIONS.items():
        values = dict(tree[name])
        if name in skip:
            sections[name] = None
            continue
        if name == "training":
            values["deepspeed"] = find_deepspeed(values["deepspeed"])
            cls = PlannedTrainingArguments if is_dry_run else cls
        sections[name] = build(cls, values, name)
    names = {name: tree[name] for name in ("trainer", "log_level")}
    return RunConfig(**sections, **names, resolved=tree, is_dry_run=is_dry_run)


def build(cls: type, values: dict[str, Any], key: str) -> Any:
    """An instance of a configuration class, from the inside out, so that an error names the innermost key."""
    values = dict(values)
    for name, hint in options_of(cls).items():
        value, nested = values.get(name), nested_class(hint)
        if not (nested or all(map(math.isfinite, numbers_in(value)))):
            raise ValueError(f"{key}.{name}: {value} is not finite; give a number")
        choices = [item.value for part in typing.get_args(hint) if isinstance(part, enum.EnumMeta) for item in part]
        if choices and value is not None and value not in choices:
            raise ValueError(f"{key}.{name}: {value!r} is unknown; {closest(value, choices)}")
        if value is None and type(None) not in (hint, *typing.get_args(hint)):
            raise ValueError(f"{key}.{name}: null given where a value is needed; leave the line out for the default")
        if nested and isinstance(value, list):
            values[name] = [build(nested, item, f"{key}.{name}[{index}]") for index, item in enumerate(value)]
        elif nested and value is not None:
            values[name] = build(nested, value, f"{key}.{name}")
    try:
        return cls(**values)
    except torch.distributed.DistNetworkError as error:
        raise ValueError(network_problem(str(error))) from error
    except (ValueError, TypeError, ImportError, OSError) as error:
        reason = str(error).removeprefix(cls.__name__)
        raise ValueError(f"{key}{reason}" if reason.startswith((".", ":")) else f"{key}: {reason}") from error


def numbers_in(value: Any) -> Iterator[float]:
    """The floats in a value, in its lists and mappings too."""
    if isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(part)
    elif isinstance(value, float):
        yield value


def network_problem(message: str) -> str:
    """Why the processes of a run do not find each other."""
    port = os.environ.get("MASTER_PORT")
    if "EADDRINUSE" in message:
        return (
            f"MASTER_PORT: {port} is in use, perhaps by another run; give another one, as in "
            "`deepspeed --master_port 29501 pretrain.py`"
        )
    return f"MASTER_ADDR and MASTER_PORT: {os.environ.get('MASTER_ADDR')}:{port} does not answer: {message}"


def check_trainer(model: PreTrainedConfig, trainer: str) -> None:
    """Codecs have a trainer of their own."""
    fitting = "reconstruction" if isinstance(model, CODEC_CONFIGS) else "pretrain"
    if trainer != fitting:
        raise ValueError(f"trainer: {trainer!r} trains no {model.model_type}; set trainer: {fitting}")


def check_positions(model: PreTrainedConfig, block_size: int) -> None:
    """Tables of positions do not extrapolate."""
    model = model.get_text_config()
    if model.position_embedding in ("learned", "sinusoidal") and block_size > model.max_position_embeddings:
        raise ValueError(
            f"data.block_size: {block_size} is more than the {model.max_position_embeddings} positions of a "
            f"{model.position_embedding} table; raise model.max_position_embeddings or choose rope or alibi"
        )


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
