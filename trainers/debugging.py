"""The search for what is wrong with a run: whether it can learn one batch, and where values stop being finite."""

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer

from .checkpoints import is_finite

NUM_STEPS = 50
"""Optimizer steps on the one batch."""
NUM_LAST = 5
"""Losses at the end whose mean has to be lower than the first one."""
LEAST_FALL = 0.1
"""Share of the first loss by which it has to fall."""


class NotLearningError(ValueError):
    """The loss of one batch does not fall when a run trains on it over and over."""


def overfit_one_batch(trainer: Trainer) -> str:
    """Train on the first rows of the data, as many as one update takes, over and over, in torch's anomaly mode.

    Returns:
        How far the loss fell.

    Raises:
        FloatingPointError: The output of a module is not finite; the first one is named.
        NotLearningError: The loss does not fall.
        RuntimeError: A gradient is NaN, as torch's anomaly mode says it.
    """
    args = trainer.args
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    trainer.train_dataset = list(itertools.islice(iter_rows(trainer.train_dataset), rows))
    if len(trainer.train_dataset) < rows:
        raise NotLearningError(f"data.train has {len(trainer.train_dataset)} rows, fewer than the {rows} of one update")
    with torch.autograd.set_detect_anomaly(True), finite_outputs(trainer.model):
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    first, last = losses[0], statistics.fmean(losses[-NUM_LAST:])
    found = f"the loss of {rows} rows went from {first:.4g} to {last:.4g} in {len(losses)} updates"
    if not last < (1 - LEAST_FALL) * first:
        raise NotLearningError(
            f"{found}, and should have fallen: look at the labels of the rows, at what is frozen, and at "
            f"training.learning_rate, which is {args.learning_rate:g}"
        )
    return f"{found}, and all outputs were finite"


def iter_rows(dataset: Any) -> Iterator[Any]:
    """The rows of a dataset, with random access or without."""
    is_stream = isinstance(dataset, IterableDataset)  # which has a method for random access, and not the access
    return iter(dataset) if is_stream else (dataset[index] for index in range(len(dataset)))


# ------------------------------------------------------------------------------------------------------- finite outputs


@contextmanager
def finite_outputs(model: nn.Module) -> Iterator[None]:
    """A context in which a FloatingPointError names the first module of the model whose output is not finite.

    transformers' `DebugUnderflowOverflow` also looks at inputs, in which a mask of -inf is no fault, and not into
    outputs with names, and prints the extremes of all weights.
    """
    hooks = [module.register_forward_hook(Check(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Check:
    """A forward hook of the module with a name.

    Raises:
        FloatingPointError: Its output is not finite.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Look at the output; inner modules come before those that they are in."""
        if all(map(is_finite, tensors_in(output))):
            return
        weights = [name for name, weight in module.named_parameters(recurse=False) if not is_finite(weight)]
        cause = f"its own {weights[0]} is not" if weights else "its own weights are"
        if not all(map(is_finite, tensors_in(inputs))):
            cause += ", and neither is its input"
        raise FloatingPointError(
            f"the output of {self.name or 'the model'} ({type(module).__name__}) is the first that is not "
            f"finite; {cause}"
        )


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of an output: a tensor, or sequences and mappings of outputs."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (Mapping, Sequence)) and not isinstance(value, str):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)
