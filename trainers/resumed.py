"""Optimizer and schedule of a run that goes on: what a checkpoint says of them, and what the run says."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainingArguments

Options = dict[str, Any]
COMPARED = ("lr", "betas", "eps", "weight_decay")
"""What most optimizers have, by the names of torch."""
UNDECAYED = "no_decay"
"""The name of a group for which weight decay is off, in DeepSpeed's own optimizer."""


def options_of(groups: Sequence[Options]) -> list[Options]:
    """What an optimizer does with each of its groups, of parameters or of others that stand for them."""
    return [{name: value for name, value in group.items() if name != "params"} for group in groups]


def options_by_arguments(args: TrainingArguments, group: Options) -> Options:
    """What a group of DeepSpeed's own optimizer has, which is built from its file, that the Trainer compares with the
    arguments. The group of what does not decay is known by its name, which Muon lengthens.
    """
    betas, decay = (args.adam_beta1, args.adam_beta2), args.weight_decay
    if group.get("name", "").startswith(UNDECAYED):
        decay = 0.0
    return {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon, "weight_decay": decay}


class ResumeError(ValueError):
    """A checkpoint that a run cannot go on from, as is found out when training begins."""


class OptionsOfRun(TrainerCallback):
    """Gives optimizer and schedule, whose states a checkpoint has brought, the rates of this run when training begins.

    The schedule is that of the run's own number of steps, of which the checkpoint knows nothing: the rate of the next
    update is computed anew. Other options are the checkpoint's, unless `allow_changes` is true.
    """

    def __init__(self) -> None:
        self.options: list[Options] = []
        self.options_in_use: list[Options] = []

    def remember(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the options of an optimizer that the run has built, before a checkpoint replaces them."""
        groups = optimizer.param_groups
        self.options, self.options_in_use = options_of(groups), options_of([one for one in groups if one["params"]])
        optimizer.register_load_state_dict_pre_hook(check_sizes)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, lr_scheduler: Any = None, **kwargs: Any
    ) -> None:
        """Do so.

        Raises:
            ResumeError: for options of the checkpoint that are others, where that is not allowed.
        """
        if state.global_step == 0:
            return
        groups = optimizer.param_groups
        wanted = self.options or [options_by_arguments(args, group) for group in groups]
        if len(groups) < len(wanted):  # ZeRO-1 and -2 leave out a group of no parameters, as beside adapters is
            wanted = self.options_in_use
        if args.allow_changes:
            change(groups, wanted)
        else:
            check(groups, wanted)
        set_rates(groups, lr_scheduler)


def change(groups: Sequence[Options], wanted: Sequence[Options]) -> None:
    """Give the groups of an optimizer other options; the rates become those that a schedule begins with."""
    for group, options in zip(groups, wanted, strict=True):
        group |= {name: value for name, value in options.items() if name in group}
        group["initial_lr"] = options["lr"]


def check(groups: Sequence[Options], wanted: Sequence[Options]) -> None:
    """Raises ResumeError for groups that were trained in another way: of checkpoints without a record of options, this
    alone shows it.
    """
    for group, options in zip(groups, wanted, strict=True):
        there = {**group, "lr": group.get("initial_lr", options["lr"])}
        for name in COMPARED:
            if name in options and name in there and not alike(there[name], options[name]):
                raise ResumeError(
                    f"training.resume_from_checkpoint: the optimizer there has {name} {there[name]}, and here "
                    f"{options[name]}; give the same, or add --training.allow_changes true"
                )


def check_sizes(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Raises ResumeError for a state whose groups are others than those of the optimizer that is to have it."""
    there, here = (
        [len(group["params"]) for group in groups] for groups in (state["param_groups"], optimizer.param_groups)
    )
    if there != here:
        raise ResumeError(
            f"training.resume_from_checkpoint: the optimizer there has groups of {there} parameters, here of {here}; "
            "others decay or have rates of their own: begin anew, or go on with the code of that run"
        )


def alike(there: Any, here: Any) -> bool:
    """Whether two options are equal; a pair may be a list in a file."""
    return list(there) == list(here) if isinstance(there, (list, tuple)) else there == here


def set_rates(groups: Sequence[Options], scheduler: Any) -> None:
    """Set the rates of the next update: those of the step where a schedule stands, by its own formula.

    Those that follow from measurements, and not from the number of the step, keep what they have.
    """
    schedule = getattr(scheduler, "scheduler", scheduler)  # what accelerate has wrapped
    if isinstance(schedule, LambdaLR):
        bases = [group["initial_lr"] for group in groups]
        rates = [base * factor(schedule.last_epoch) for base, factor in zip(bases, schedule.lr_lambdas, strict=True)]
        schedule.load_state_dict({**schedule.state_dict(), "base_lrs": bases, "_last_lr": rates})
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
    elif hasattr(schedule, "last_batch_iteration"):  # DeepSpeed's, which knows no other way
        schedule.step(schedule.last_batch_iteration)
