"""Parameters that learn in a way of their own, by patterns of their names: frozen, later, at other rates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState

from model.blocks import RezeroResidual


@dataclass
class ParameterGroup:
    """Parameters that learn in a way of their own; of several groups, the first whose pattern matches one takes it."""

    pattern: str
    """Pattern of names of parameters with the wildcards * ? [] of a shell, `model.readers.image.*`; it has to match."""
    learning_rate: float | None = None
    """Learning rate in place of that of the training, at least 0; the schedule is the same."""
    lr_factor: float | None = None
    """Factor of the learning rate of the training, at least 0; instead of learning_rate."""
    weight_decay: float | None = None
    """Weight decay in place of that of the training, at least 0, where they decay there (biases and norms do not)."""
    freeze_steps: int = 0
    """Optimizer steps, at least 0, before which these parameters stay as they are. Their gradients are computed and
    count in the norm: what stays frozen for good belongs into training.freeze, which costs nothing."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "lr_factor", "weight_decay", "freeze_steps"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} of {self.pattern!r} is {value}; give at least 0")
        if self.learning_rate is not None and self.lr_factor is not None:
            raise ValueError(
                f"{self.pattern!r} has learning_rate {self.learning_rate} and lr_factor {self.lr_factor}; leave one of "
                "them out"
            )


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Take the parameters whose names match from the training.

    Raises:
        ValueError: A pattern matches none, or nothing is left to learn.
    """
    for pattern in patterns:
        matching = [parameter for name, parameter in model.named_parameters() if fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(f"training.freeze: {pattern!r} {no_match(model)}")
        for parameter in matching:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"training.freeze: nothing is left to learn with {', '.join(map(repr, patterns))}")


def assign(model: nn.Module, groups: Sequence[ParameterGroup]) -> dict[nn.Parameter, ParameterGroup]:
    """The group of each parameter that learns and belongs to one.

    Raises:
        ValueError: A group has no parameters.
    """
    owners: dict[nn.Parameter, ParameterGroup] = {}
    for group in groups:
        matching = [parameter for name, parameter in model.named_parameters() if fnmatchcase(name, group.pattern)]
        free = [parameter for parameter in matching if parameter.requires_grad and parameter not in owners]
        if not free:
            reason = "matches what is frozen or in a group before it only" if matching else no_match(model)
            raise ValueError(f"training.parameter_groups: {group.pattern!r} {reason}")
        owners |= dict.fromkeys(free, group)
    return owners


def no_match(model: nn.Module) -> str:
    """The end of a sentence about a pattern."""
    names = [name for name, _ in model.named_parameters()]
    return f"matches no parameter; their names are such as {names[0]} and {names[-1]}"


def parameters_of_norms(model: nn.Module) -> set[str]:
    """The names of the parameters of all normalisation layers, torch's and those of libraries' encoders, which have
    "Norm" in their type, and the scales of ReZero. `Trainer` goes by the names that layers have in a model, and misses
    those such as `norm_in`.
    """
    return {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() or isinstance(module, RezeroResidual)
        for parameter, _ in module.named_parameters(recurse=False)
    }


def split_groups(
    optimizer: torch.optim.Optimizer, model: nn.Module, groups: Sequence[ParameterGroup], decaying: Sequence[str]
) -> None:
    """Divide the groups that an optimizer has among ours; what belongs to none stays in front.

    Args:
        optimizer: One that has not made a step yet.
        decaying: Names of the parameters that decay.
    """
    owners, decaying = assign(model, groups), set(decaying)
    decays = {parameter: name in decaying for name, parameter in model.named_parameters()}
    whole, optimizer.param_groups[:] = list(optimizer.param_groups), []
    for group in (None, *groups):
        for options in whole:
            members = [parameter for parameter in options["params"] if owners.get(parameter) is group]
            if not members:
                continue
            own: dict[str, float] = {}
            if group is not None:
                rate = options["lr"] * (1 if group.lr_factor is None else group.lr_factor)
                rate = rate if group.learning_rate is None else group.learning_rate
                own = {"lr": rate, "freeze_steps": group.freeze_steps}
                if decays[members[0]] and group.weight_decay is not None:
                    own["weight_decay"] = group.weight_decay
            optimizer.add_param_group({**options, **own, "params": members})


class FreezeStepsCallback(TrainerCallback):
    """Keeps the learning rates of groups at 0 until their `freeze_steps` are over.

    With gradients switched off instead, DDP and ZeRO, which prepare for all gradients when training begins, would wait
    for those. Between steps the rates are those of the schedule, which may compute the next from them; DeepSpeed makes
    its step in the backward pass, so that they have to be 0 from the beginning of a step.
    """

    def __init__(self) -> None:
        self.rates: list[tuple[dict, float]] = []

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Set them to 0."""
        frozen = [group for group in optimizer.param_groups if group.get("freeze_steps", 0) > state.global_step]
        self.rates = [(group, group["lr"]) for group in frozen]
        for group in frozen:
            group["lr"] = 0.0

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Set them back."""
        for group, rate in self.rates:
            group["lr"] = rate
