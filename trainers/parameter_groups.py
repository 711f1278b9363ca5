"""Parts of a model that learn at a rate of their own, later than the rest, or not at all, named by patterns."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


@dataclass
class ParameterGroup:
    """Parameters that learn in a way of their own; of several groups, the first whose pattern matches one takes it."""

    pattern: str
    """Of the names of parameters, with the wildcards * ? [] of a shell: `model.readers.image.*`. It has to match."""
    learning_rate: float | None = None
    """In place of that of the training, at least 0; the schedule is the same."""
    lr_factor: float | None = None
    """Times the learning rate of the training, at least 0; instead of learning_rate."""
    weight_decay: float | None = None
    """In place of that of the training, at least 0, for those of them that decay there (biases and norms
    do not)."""
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
        ValueError: for a pattern that matches none, and if nothing is left to learn.
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
        ValueError: for a group without parameters.
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
    "Norm" in their type. `Trainer` goes by the names that layers have in a model, and misses those such as `norm_in`.
    """
    return {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for parameter, _ in module.named_parameters(recurse=False)
    }


def divide(
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
    for owner in (None, *groups):
        for options in whole:
            members = [parameter for parameter in options["params"] if owners.get(parameter) is owner]
            if not members:
                continue
            own = {} if owner is None else options_of(owner, options["lr"], decays[members[0]])
            optimizer.add_param_group({**options, **own, "params": members})


def options_of(group: ParameterGroup, learning_rate: float, decays: bool) -> dict[str, float]:
    """What the optimizer does otherwise with the parameters of a group.

    Args:
        learning_rate: That of the training.
        decays: Whether these are parameters that decay.
    """
    options = {"lr": learning_rate, "freeze_steps": group.freeze_steps}
    if group.learning_rate is not None:
        options["lr"] = group.learning_rate
    elif group.lr_factor is not None:
        options["lr"] = group.lr_factor * learning_rate
    if decays and group.weight_decay is not None:
        options["weight_decay"] = group.weight_decay
    return options


class FreezeStepsCallback(TrainerCallback):
    """Keeps the learning rates of groups at 0 until their `freeze_steps` are over.

    With gradients switched off instead, DDP and ZeRO, which prepare for all gradients when training begins, would wait
    for those. Between steps the rates are those of the schedule, which may compute the next from them; DeepSpeed makes
    its step in the backward pass, so that they have to be 0 from the beginning of a step.
    """

    def __init__(self) -> None:
        self.rates: list[tuple[dict, float]] = []

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs,
    ) -> None:
        """Set them to 0."""
        frozen = [group for group in optimizer.param_groups if group.get("freeze_steps", 0) > state.global_step]
        self.rates = [(group, group["lr"]) for group in frozen]
        for group in frozen:
            group["lr"] = 0.0

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        """Set them back."""
        for group, rate in self.rates:
            group["lr"] = rate
