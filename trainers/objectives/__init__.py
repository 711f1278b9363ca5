"""Objectives of training by name."""

from dataclasses import fields

import torch
from transformers import PreTrainedModel

from model import TARGET_MODALITIES

from .base import Objective, ObjectiveOptions, TrainingPass
from .distillation import SelfDistillation
from .every_step import EveryStep
from .exit_distribution import ExitDistribution
from .fixed_point import FixedPoint
from .full import FullBackpropagation
from .implicit import ImplicitGradient
from .jacobian import JacobianPenalty

OBJECTIVES: dict[str, type[Objective]] = {
    "truncated": Objective,
    "full": FullBackpropagation,
    "every_step": EveryStep,
    "exit_distribution": ExitDistribution,
    "fixed_point": FixedPoint,
    "jacobian": JacobianPenalty,
    "implicit": ImplicitGradient,
    "distillation": SelfDistillation,
}
WITH_ANY = ("name", "step_schedule", "loop_dropout")
"""Options that do not belong to one objective."""

__all__ = ["OBJECTIVES", "Objective", "ObjectiveOptions", "TrainingPass", "build_objective", "check_model"]


def build_objective(options: ObjectiveOptions) -> Objective:
    """The objective of this name; ValueError if there is none, or it does not read an option that is given."""
    if options.name not in OBJECTIVES:
        raise ValueError(f"objective.name is {options.name!r}; give one of {', '.join(OBJECTIVES)}")
    objective = OBJECTIVES[options.name](options)
    for item in fields(options):
        value = getattr(options, item.name)
        if value != item.default and item.name not in (*WITH_ANY, *objective.options_read):
            readers = [name for name, cls in OBJECTIVES.items() if item.name in cls.options_read]
            raise ValueError(
                f"objective.{item.name} is {value}, but {options.name} has no such option; leave it out, or set "
                f"objective.name to {' or '.join(readers)}"
            )
    return objective


def check_model(objective: Objective, model: PreTrainedModel, has_autocast: bool) -> None:
    """Raises ValueError if a model, with its head, cannot be trained so, or has not what the options are about.

    Args:
        has_autocast: Whether its forward pass is to run in mixed precision.
    """
    options, config = objective.options, model.config
    if config.get_text_config().num_core_layers == 0:
        if options != ObjectiveOptions():
            raise ValueError(
                "training.objective is about the steps of a core, and this model has no core (num_core_layers is 0); "
                "leave it out"
            )
        return
    if objective.is_read_after_steps and config.is_encoder_decoder:
        raise ValueError(
            f"training.objective.name is {options.name!r}, which reads states without the source that a decoder sees; "
            "take truncated or full"
        )
    if options.loop_dropout and model.base_model.core.step_lora is None:
        raise ValueError(
            f"training.objective.loop_dropout is {options.loop_dropout}, but no step has a low-rank update; add "
            "step_lora, or leave it out"
        )
    written = [name for name in TARGET_MODALITIES if getattr(config, f"written_{name}_token_id", None) is not None]
    if objective.reads_tokens and written:
        raise ValueError(
            f"training.objective.name is {options.name!r}, which reads tokens alone after several steps, but this "
            f"model also writes {' and '.join(written)}; give another, such as full"
        )
    if objective.takes_gradients and has_autocast and model.dtype != torch.float32:
        kind = str(model.dtype).removeprefix("torch.")
        raise ValueError(
            f"training.objective.name is {options.name!r}, which takes gradients at states, but in mixed precision "
            f"accelerate gives copies of those that are {kind}; set bf16 to false, as the weights are {kind} anyway"
        )
    objective.check_model(model)
