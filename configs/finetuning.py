"""Configurations of `finetune.py`: a checkpoint, adapters, and the rest as in pretraining."""

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from jsonargparse import ArgumentParser

from callbacks import CallbacksConfig
from dataset_loading.configuration import DataConfig
from model.quantization import QuantizationConfig
from trainers import RecurrentTrainingArguments
from trainers.dpo import PreferenceArguments
from trainers.exit_probe import ExitProbeArguments
from trainers.finetuners import FINETUNERS
from trainers.finetuning import ModelOptions, PeftOptions, StepLoraOptions
from trainers.grpo import RolloutArguments
from trainers.sft import SupervisedArguments

from . import (
    NOT_OPTIONS,
    OPTIONAL_SECTIONS,
    ResolvedConfig,
    absent_of,
    add_group,
    build,
    empty_parser,
    one_line_errors,
    parse,
    read_arguments,
    schema_of,
)
from .advice import closest
from .deepspeed_files import find_deepspeed

DEFAULT_TRAINER = "sft"
# What the sections `model` and `data` say instead.
NOT_OPTIONS[SupervisedArguments] = {
    *("model_init_kwargs", "trust_remote_code", "chat_template_path", "eos_token", "pad_token"),
    *("dataset_text_field", "dataset_kwargs", "dataset_num_proc", "shuffle_dataset"),
    *("max_length", "truncation_mode", "pad_to_multiple_of"),
    *("packing", "packing_strategy", "padding_free", "eval_packing"),
    *("completion_only_loss", "assistant_only_loss", "router_aux_loss_coef"),
}
NOT_OPTIONS[PreferenceArguments] = {
    *("model_init_kwargs", "trust_remote_code", "dataset_num_proc", "pad_token", "pad_to_multiple_of"),
    *("truncation_mode", "padding_free", "precompute_ref_log_probs", "precompute_ref_batch_size", "use_weighting"),
    *("modality_weights", "router_aux_loss_coef"),
}
NOT_OPTIONS[RolloutArguments] = {
    *("model_init_kwargs", "trust_remote_code", "remove_unused_columns", "pad_to_multiple_of", "chat_template_kwargs"),
    *("generation_kwargs", "cache_implementation", "use_transformers_continuous_batching", "use_transformers_paged"),
    *("transformers_continuous_batching_config", "max_tool_calling_iterations", "num_generations_eval"),
    *("log_multimodal", "log_completions_hub_repo", "modality_weights", "router_aux_loss_coef"),
    *("recurrence_logging_steps", "depth_gap_alarm", "token_correlation_alarm", "cast_lm_head_to_fp32"),
    *(name for name in RolloutArguments.__dataclass_fields__ if "vllm" in name),
}
NOT_OPTIONS[ExitProbeArguments] = {
    *("recurrence_logging_steps", "depth_gap_alarm", "token_correlation_alarm", "modality_weights"),
}
SECTIONS = {
    "model": ModelOptions,
    "peft": PeftOptions,
    "step_lora": StepLoraOptions,
    "quantization": QuantizationConfig,
    "data": DataConfig,
    "callbacks": CallbacksConfig,
}


@dataclass
class FinetuningConfig(ResolvedConfig):
    """All that defines a run of fine-tuning.

    Args:
        model: The checkpoint that is tuned.
        peft: Low-rank adapters; without them, and those of steps, all weights learn.
        step_lora: Low-rank adapters of single steps of the core.
        quantization: Bits of the weights that do not learn.
        data: What is read.
        callbacks: What is watched and written beside the trainer's own logs.
        training: Training arguments, of the class that belongs to the trainer; None if `load_finetuned_run` left them
            out.
        trainer: Name of the trainer: what is learned from the data.
        log_level: Least severe message that is shown.
        resolved: Every option as plain values.
    """

    model: ModelOptions
    peft: PeftOptions | None
    step_lora: StepLoraOptions | None
    quantization: QuantizationConfig
    data: DataConfig
    callbacks: CallbacksConfig
    training: RecurrentTrainingArguments | None
    trainer: str
    log_level: str
    resolved: dict[str, Any] = field(repr=False)
    identity: ClassVar[tuple[str, ...]] = ("model.", "peft", "step_lora", "quantization.")

    @property
    def has_adapters(self) -> bool:
        """Whether adapters learn, and not the weights of the model."""
        return not (self.peft is None and self.step_lora is None)

    def defaults(self) -> dict[str, Any]:
        """What is resolved where nothing is given but the trainer and the checkpoint."""
        return resolve(["--trainer", self.trainer, "--model.path", self.model.path])

    def reread(self, path: str | Path) -> dict[str, Any]:
        """As said there."""
        return resolve(["--config", str(path)])


def load_finetuning_config(argv: Sequence[str] | None = None) -> FinetuningConfig:
    """The run that a command line (default: `sys.argv`) describes.

    Raises:
        SystemExit: with code 2, after one line on stderr, for whatever is wrong.
    """
    with one_line_errors():
        tree = resolve(sys.argv[1:] if argv is None else argv)
        training = dict(tree["training"], deepspeed=find_deepspeed(tree["training"]["deepspeed"]))
        _, arguments = FINETUNERS[tree["trainer"]]
        return build_run(tree, build(arguments, training, "training"))


def load_finetuned_run(path: str | Path, overrides: Sequence[str] = ()) -> FinetuningConfig:
    """As `load_run_config`, of a run of fine-tuning."""
    return build_run(resolve(["--config", str(path), *overrides]), training=None)


def resolve(argv: Sequence[str]) -> dict[str, Any]:
    """Every option as plain values; types are checked, nothing is built.

    Raises:
        ValueError: for an unknown or repeated key, a wrong type or choice, a missing file.
    """
    given = list(read_arguments(argv))
    trees = [tree for _, tree, _ in given]
    trainer = next((tree["trainer"] for tree in reversed(trees) if "trainer" in tree), DEFAULT_TRAINER)
    if trainer not in FINETUNERS:
        raise ValueError(f"trainer: {trainer!r} is unknown; {closest(trainer, list(FINETUNERS))}")
    sections = sections_of(trainer)
    schema = dict.fromkeys(("trainer", "log_level", "local_rank")) | {
        name: schema_of(cls) for name, cls in sections.items()
    }
    tree = parse(given, schema, build_parser(trainer))
    return tree | dict.fromkeys(absent_of(OPTIONAL_SECTIONS, trees))


def sections_of(trainer: str) -> dict[str, type]:
    """The sections and their classes."""
    return {**SECTIONS, "training": FINETUNERS[trainer][1]}


@functools.cache
def build_parser(trainer: str) -> ArgumentParser:
    """The parser of all sections; its `--help` shows the docstrings of the fields."""
    parser = empty_parser(FINETUNERS, DEFAULT_TRAINER)
    for name, cls in sections_of(trainer).items():
        add_group(parser, cls, name)
    return parser


def build_run(tree: dict[str, Any], training: RecurrentTrainingArguments | None) -> FinetuningConfig:
    """Build the classes of a resolved tree.

    Raises:
        ValueError: for a value out of range, with its section.
    """
    if tree["trainer"] == "exit_probe" and (parts := [name for name in OPTIONAL_SECTIONS if tree[name] is not None]):
        raise ValueError(f"{parts[0]}: an exit probe learns alone, beside a model that stays as it is; leave it out")
    built = {name: None if tree[name] is None else build(cls, tree[name], name) for name, cls in SECTIONS.items()}
    names = {name: tree[name] for name in ("trainer", "log_level")}
    return FinetuningConfig(**built, **names, training=training, resolved=tree)
