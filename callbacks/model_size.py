"""How large the model is, part by part."""

import logging
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerState
from transformers.trainer_utils import unwrap_peft_model

from .reporting import ReportingCallback

logger = logging.getLogger(__name__)

PART_NAMES = {"embed_tokens": "embeddings", "embed_positions": "embeddings", "lm_head": "head"}


@dataclass
class PartSize:
    """One part of a model."""

    parameters: int = 0
    trainable: int = 0
    num_bytes: int = 0
    passes: int = 1
    """How often the part is run for a token, at the mean depth."""
    executed: int = 0
    """Parameters in each run, those of a shared layer as often as it is executed."""


def parameter_count(parameter: nn.Parameter) -> int:
    """Elements of a parameter; of the whole one where ZeRO-3 has left only a share of it here."""
    return parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()


def part_of(name: str, model: PreTrainedModel) -> str:
    """The part of the model that a parameter of this name belongs to."""
    top, *inner = name.removeprefix(f"{model.base_model_prefix}.").split(".")
    return f"{inner[1]} of {inner[0]}" if top == "readers" else PART_NAMES.get(top, top)


def executions(name: str, model: PreTrainedModel) -> int:
    """How often a run of its part executes the layer of a parameter of this name."""
    part, *inner = name.removeprefix(f"{model.base_model_prefix}.").split(".")
    inner = inner[2:] if inner[0] == "cores" else inner  # of an untied core
    is_in_stack = part in ("prelude", "core", "coda") and inner[0] == "layers"
    return getattr(model.base_model, part).order.count(int(inner[1])) if is_in_stack else 1


def part_sizes(model: PreTrainedModel) -> dict[str, PartSize]:
    """Sizes of embeddings, prelude, core, coda, norm and head, and of encoders and projectors of media, in the order of
    the model; shared ones count once.
    """
    parts: dict[str, PartSize] = {}
    for name, parameter in model.named_parameters():
        part = parts.setdefault(part_of(name, model), PartSize())
        count = parameter_count(parameter)
        part.parameters += count
        part.executed += count * executions(name, model)
        part.trainable += count if parameter.requires_grad else 0
        part.num_bytes += count * parameter.element_size()
    if "core" in parts:
        config = model.config.get_text_config()
        parts["core"].passes = config.recurrence.mean_steps // config.num_cores
        if "norm" in parts:
            parts["norm"].passes = 2  # after the core, and after the coda
    return parts


def size_table(model: PreTrainedModel) -> str:
    """The sizes as a Markdown table, with a line of sums; of language models also how deep they are. Adapters count to
    the parts that they are in.

    "run" is how often a part runs for a token at the mean depth (those that read a medium: for a token of the medium);
    "executed" is run x parameters, those of a shared layer as often as it is executed in a run.
    """
    model = unwrap_peft_model(model)
    parts = part_sizes(model)
    lines = ["| part | parameters | trainable | MB | run | executed |", "|---|---:|---:|---:|---:|---:|"]
    for name, part in parts.items():
        lines.append(
            f"| {name} | {part.parameters:,} | {part.trainable:,} | {part.num_bytes / 1e6:.2f} | {part.passes} "
            f"| {part.passes * part.executed:,} |"
        )
    is_language_model = model.get_output_embeddings() is not None
    if is_language_model and model.config.tie_word_embeddings:
        lines.append("| head | the embeddings | | | 1 | |")
    sizes = [(it.parameters, it.trainable, it.num_bytes, it.passes * it.executed) for it in parts.values()]
    parameters, trainable, num_bytes, executed = map(sum, zip(*sizes, strict=True))
    lines.append(f"| all | {parameters:,} | {trainable:,} | {num_bytes / 1e6:.2f} | | {executed:,} |")
    if is_language_model:
        config = model.config.get_text_config()
        lines += ["", f"{config.num_unique_layers} layers, {config.mean_executed_layers} executed at the mean depth"]
    return "\n".join(lines)


class ModelSizeCallback(ReportingCallback):
    """Logs `size_table` once, when the training starts, and writes it to the reports."""

    def on_train_begin(
        self, args: Any, state: TrainerState, control: Any, model: PreTrainedModel, **kwargs: Any
    ) -> None:
        """Write the table, on rank 0."""
        if state.is_world_process_zero:
            table = size_table(model)
            logger.info("Size of the model:\n%s", table)
            self.reporter.write(args, state, control, {"model_size": table})
