"""Runs: from every option as plain values to the classes that hold them, and what is looked at before one begins."""

import enum
import logging
import math
import os
import sys
import time
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from transformers import PreTrainedConfig

from callbacks import CallbacksConfig
from dataset_loading.configuration import DataConfig, TokenizerConfig
from model import CODEC_CONFIGS, MODELS, MegaTransformerTextConfig
from model.terminal import one_line
from trainers import TRAINERS, PlannedTrainingArguments, RecurrentTrainingArguments

from .deepspeed_files import find_deepspeed
from .loader import (
    Layout,
    closest,
    flatten_keys,
    make_paths_absolute,
    nested_class,
    option_types,
    option_values,
    read_arguments,
    read_yaml,
    to_yaml,
)
from .modes import MODES, with_mode

logger = logging.getLogger(__name__)

PATIENCE = 30  # seconds from an error of a rank that is not the first of its machine to its words
MODEL_CONFIGS: dict[str, type[PreTrainedConfig]] = {cls.model_type: cls for cls in MODELS}
SECTIONS = {
    "tokenizer": TokenizerConfig,
    "data": DataConfig,
    "callbacks": CallbacksConfig,
    "training": RecurrentTrainingArguments,  # last, as it looks for the devices
}


class ResolvedConfig:
    """All that defines a run, of any kind."""

    resolved: dict[str, Any]
    identity: ClassVar[tuple[str, ...]]
    """Beginnings of the keys that say which model it is."""

    @classmethod
    def layout(cls, trees: Sequence[dict[str, Any]]) -> Layout:
        """The class of all that a YAML of this kind of run may hold, as the given trees say; the last one rules."""
        raise NotImplementedError

    @classmethod
    def from_options(cls, tree: dict[str, Any], skip: Sequence[str] = ()) -> Self:
        """Build the classes of what `resolve` gives; `skip` names sections that stay None.

        Raises:
            ValueError: a value is out of range; names its section.
        """
        built = {}
        for name, section in cls.layout([tree]).sections:
            values = None if name in skip or tree[name] is None else dict(tree[name])
            if name == "model":
                values.pop("model_type", None)
            if name == "training" and values is not None:
                values["deepspeed"] = find_deepspeed(values["deepspeed"])
                section = PlannedTrainingArguments if tree.get("dry_run") else section
            built[name] = None if values is None else build(section, values, name)
        names = {name: tree[name] for name in ("trainer", "log_level")}
        return cls(**built, **names, resolved=tree)

    @property
    def seed(self) -> int:
        """The seed with which the run splits and generates its data."""
        return self.resolved["training"]["seed"]

    @property
    def mode(self) -> str | None:
        """What is done instead of training to the end, one of `MODES`. In a dry run, `training` knows nothing of this
        machine.
        """
        return next((name for name in MODES if name in self.resolved), None)

    def save(self, path: str | Path) -> None:
        """Write the resolved YAML, which alone repeats the run; nobody ever reads half of it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(to_yaml(self.resolved), encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@dataclass
class RunConfig(ResolvedConfig):
    """All that defines a run of pretraining.

    Args:
        model: Configuration of the network; the ids of special tokens are not in it yet.
        tokenizer: Which tokenizer, or how to train one.
        data: What is read.
        callbacks: What is logged and generated besides the trainer's own logs.
        training: Training arguments; None if `load_run_config` left them out.
        trainer: Name of the trainer.
        log_level: Least severe message that is shown.
        resolved: Every option as plain values: what was chosen, not what the classes derive from it.
    """

    model: PreTrainedConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    callbacks: CallbacksConfig
    training: RecurrentTrainingArguments | None
    trainer: str
    log_level: str
    resolved: dict[str, Any] = field(repr=False)
    identity: ClassVar[tuple[str, ...]] = ("model.", "tokenizer.")

    def __post_init__(self) -> None:
        is_codec, model = isinstance(self.model, CODEC_CONFIGS), self.model.get_text_config()
        fitting = "reconstruction" if is_codec else "pretrain"
        if self.trainer != fitting:
            raise ValueError(f"trainer: {self.trainer!r} trains no {self.model.model_type}; set trainer: {fitting}")
        if self.model.is_encoder_decoder and self.data.packing:
            raise ValueError(
                "data.packing: true puts several rows into one, and a model of sequence to sequence reads a source and "
                "a target of one row; set packing: false"
            )
        for source in (*self.data.train, *self.data.validation) if self.model.is_encoder_decoder else ():
            if not source.has_answers or source.loss_on != "answer":
                raise ValueError(
                    f"data: source {source.label!r} has no targets: a model of sequence to sequence reads prompts and "
                    "learns answers; give loss_on: answer, and, unless it is generated, prompt_column and answer_column"
                )
        is_weighted = self.training is not None and any(it != 1 for it in vars(self.training.modality_weights).values())
        if self.model.is_encoder_decoder and is_weighted:
            raise ValueError(
                "training.modality_weights weigh documents of a causal model; of sequence to sequence leave them out, "
                "and weigh sources by their weight"
            )
        is_table = not is_codec and model.position_embedding in ("learned", "sinusoidal")  # which does not extrapolate
        if is_table and self.data.block_size > model.max_position_embeddings:
            raise ValueError(
                f"data.block_size: {self.data.block_size} is more than the {model.max_position_embeddings} positions "
                f"of a {model.position_embedding} table; raise model.max_position_embeddings or choose rope or alibi"
            )

    @classmethod
    def layout(cls, trees: Sequence[dict[str, Any]]) -> Layout:
        """The sections of pretraining, with the class that the type of the model selects."""
        sections = [tree["model"] for tree in trees if isinstance(tree.get("model"), dict)]
        names = [section["model_type"] for section in sections if "model_type" in section]
        name = names[-1] if names else MegaTransformerTextConfig.model_type
        if str(name) not in MODEL_CONFIGS:
            raise ValueError(f"model.model_type: {name!r} is unknown; known: {', '.join(MODEL_CONFIGS)}")
        config_class = MODEL_CONFIGS[name]
        optional = (f"model.{name}" for name, spec in config_class.sub_configs_defaults.items() if spec.optional)
        sections = (("model", config_class), *SECTIONS.items())
        return Layout(tuple(TRAINERS), "pretrain", sections, tuple(optional), config_class.model_type, has_modes=True)


def load_config(argv: Sequence[str] | None = None, kind: type[ResolvedConfig] = RunConfig) -> ResolvedConfig:
    """The run of a kind that a command line (default: `sys.argv`) describes.

    Raises:
        SystemExit: something is wrong; the code is 2, after one line on stderr.
    """
    with one_line_errors():
        return kind.from_options(with_mode(resolve(sys.argv[1:] if argv is None else argv, kind, is_to_run=True)))


def resolve(argv: Sequence[str], kind: type[ResolvedConfig] = RunConfig, is_to_run: bool = False) -> dict[str, Any]:
    """Every option of a kind of run as plain values, from defaults, files and flags; see `option_values`."""
    given = list(read_arguments(argv))
    return option_values(given, kind.layout([item.tree for item in given]), is_to_run)


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> ResolvedConfig:
    """The run, of pretraining or of fine-tuning, that a YAML file and flags describe, without its training arguments
    (`training` is None).

    Those look for the devices of the machine, and a run may be evaluated on another one than it was trained on.

    Raises:
        ValueError: something is wrong, which one line says.
    """
    kind, model = RunConfig, read_yaml(path).get("model")
    if isinstance(model, dict) and "path" in model:
        from .finetuning import FinetuningConfig as kind  # it takes TRL, which nothing else needs
    return kind.from_options(resolve(["--config", str(path), *overrides], kind), skip=("training",))


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
    files = [item.file for item in read_arguments(overrides) if item.file is not None]
    if not files:
        raise ValueError(
            f"Neither {checkpoint} nor its parent folder has the config.yaml of a run: "
            "name the data with --config FILE."
        )
    return load_run_config(files[0], overrides)


def find_run_config(checkpoint: Path) -> Path | None:
    """The config.yaml of the run that a checkpoint belongs to, if there is one: beside it, or a folder above."""
    paths = (folder / "config.yaml" for folder in (checkpoint, checkpoint.absolute().parent))
    return next(filter(Path.is_file, paths), None)


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
    """Raises ValueError for an output folder that cannot be written, or holds a run of another model."""
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
    content, layout = read_yaml(folder / "config.yaml"), run.layout([run.resolved])
    make_paths_absolute(content, layout.schema(), Path.cwd())  # as all are that today's code writes
    there, here = flatten_keys(option_values([], layout)) | flatten_keys(content), flatten_keys(run.resolved)
    different = (key for key in here | there if key.startswith(prefixes) and there.get(key) != here.get(key))
    key = next(different, None)
    return key and f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"


# ----------------------------------------------------------------------------------------------- from values to classes


def build(cls: type, values: dict[str, Any], key: str) -> Any:
    """An instance of a configuration class, from the inside out, so that an error names the innermost key."""
    values = dict(values)
    for name, hint in option_types(cls).items():
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
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        problem = f"MASTER_ADDR and MASTER_PORT: {address}:{port} does not answer: {error}"
        if "EADDRINUSE" in str(error):
            problem = (
                f"MASTER_PORT: {port} is in use, perhaps by another run; give another one, as in "
                "`deepspeed --master_port 29501 pretrain.py`"
            )
        raise ValueError(problem) from error
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
