"""Optimizers by name; another one is a builder, in a file of its own and in `OPTIMIZERS`, or by import name."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from .imports import load_function

OptimizerBuilder = Callable[[list[dict[str, Any]], TrainingArguments, nn.Module], torch.optim.Optimizer]
"""Takes the groups of parameters, with the weight decay of each, the training arguments and the model."""


def build_optimizer(
    name: str, groups: list[dict[str, Any]], args: TrainingArguments, model: nn.Module
) -> torch.optim.Optimizer:
    """The optimizer that is registered under a name, or that the function of an import name builds.

    Raises:
        ValueError: for a function that cannot be found, that raises, or that returns no optimizer.
    """
    build = OPTIMIZERS.get(name)
    if build is not None:
        return build(groups, args, model)
    build = load_function("optimizer", name, "trainers.optimizers:build_muon")
    try:
        optimizer = build(groups, args, model)
    except Exception as error:  # whatever the code of a user raises
        raise ValueError(f"optimizer {name!r} raised {type(error).__name__}: {error}") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer {name!r} returned {optimizer!r:.80}; it must return a torch.optim.Optimizer")
    return optimizer


def build_muon(groups: list[dict[str, Any]], args: TrainingArguments, model: nn.Module) -> torch.optim.Optimizer:
    """Muon at `args.muon_learning_rate` for the matrices inside the layers, and the optimizer of `args.optim` for the
    rest.

    Raises:
        ValueError: for an optimizer that is not torch's, whose state may not be loadable by torch's rules.
    """
    of_rest, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if not of_rest.__module__.startswith("torch.optim."):
        raise ValueError(
            f"training.optim makes a {of_rest.__name__}, but beside muon_learning_rate it has to be one of "
            "torch's: adamw_torch, adamw_torch_fused, sgd, adagrad or rmsprop"
        )
    return MuonBeside(of_rest(groups, **options), matrices_of(model), args.muon_learning_rate)


OPTIMIZERS: dict[str, OptimizerBuilder] = {"muon": build_muon}


def matrices_of(model: nn.Module) -> list[nn.Parameter]:
    """The weights of linear layers that learn, but for the output head, which like an embedding has a row per token."""
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    return list(dict.fromkeys(module.weight for module in linear if module.weight.requires_grad))


class MuonBeside(torch.optim.Optimizer):
    """`torch.optim.Muon` for some parameters of an optimizer, which it takes over; the rest stays with that one.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, with steps of the size that Liu et al. 2025,
    arXiv 2502.16982, give them, so that rates of AdamW and weight decays are of the right order.

    Both see one list of groups and one state, so that schedules, checkpoints and resuming are those of any optimizer.

    Args:
        rest: An optimizer that has not made a step yet.
        matrices: 2-D parameters of it.
        learning_rate: That of Muon.
    """

    def __init__(self, rest: torch.optim.Optimizer, matrices: list[nn.Parameter], learning_rate: float):
        chosen, groups, own = set(matrices), [], []
        for options in rest.param_groups:
            members = [parameter for parameter in options["params"] if parameter in chosen]
            others = [parameter for parameter in options["params"] if parameter not in chosen]
            groups += [{**options, "params": others, "is_muon": False}] if others else []
            own += [{"params": members, "weight_decay": options["weight_decay"]}] if members else []
        muon = torch.optim.Muon(own, lr=learning_rate, adjust_lr_fn="match_rms_adamw")
        groups += [{**options, "is_muon": True} for options in muon.param_groups]
        super().__init__(groups, {})
        self.parts = {False: rest, True: muon}

    def step(self, closure=None):
        """One step of both."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for is_muon, part in self.parts.items():
            # Loading a checkpoint and dividing groups replace these, so that each step looks anew.
            part.param_groups = [options for options in self.param_groups if options["is_muon"] == is_muon]
            part.state = self.state
            part.step()
        return loss
