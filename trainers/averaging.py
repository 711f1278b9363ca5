"""An exponential moving average of the weights, which is what a run leaves behind."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback

from .resuming import ResumeError

FILE_NAME = "average.safetensors"


class WeightAverage(TrainerCallback):
    """After each update a = d a + (1 - d) w, with d = min(decay, (1 + n) / (10 + n)) after n updates, so that the first
    weights are soon forgotten. The model trains as it is, is evaluated with the average, and has it when training ends:
    that of the best checkpoint, where this is loaded, so that what is left behind is what was found to be the best.
    Checkpoints have the average in a file of its own, which the trainer has written.

    Args:
        decay: Decay of the average, at least 0 and below 1.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.average: dict[str, torch.Tensor] | None = None

    def load(self, checkpoint: str) -> None:
        """Go on with the average of a checkpoint.

        Raises:
            ResumeError: it has none.
        """
        path = os.path.join(checkpoint, FILE_NAME)
        if not os.path.isfile(path):
            raise ResumeError(
                f"training.ema_decay is {self.decay}, but {checkpoint} has no {FILE_NAME}; set it to null, or begin "
                "anew"
            )
        self.average = load_file(path)

    @contextmanager
    @torch.no_grad()
    def applied(self, model: nn.Module) -> Iterator[None]:
        """A context in which the model has the average, and after which it has its own weights again."""
        weights = learned_weights(model)
        own = {name: weight.detach().clone() for name, weight in weights.items()}
        try:
            self._give(weights)
            yield
        finally:
            for name, weight in weights.items():
                weight.copy_(own[name])

    def _give(self, weights: dict[str, nn.Parameter]) -> None:
        for name, weight in weights.items():
            weight.copy_(self.average[name])

    def save(self, checkpoint: str) -> None:
        """Write the average into the folder of a checkpoint, made if missing."""
        os.makedirs(checkpoint, exist_ok=True)
        averages = {name: average.cpu().contiguous() for name, average in self.average.items()}
        save_file(averages, os.path.join(checkpoint, FILE_NAME))

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Begin with the weights as they are, unless a checkpoint has an average."""
        weights = learned_weights(model)
        if self.average is None:
            self.average = {name: weight.detach().float().clone() for name, weight in weights.items()}
        else:
            self.average = {name: self.average[name].to(weight.device) for name, weight in weights.items()}

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Take the new weights in."""
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        weights = learned_weights(model)
        averages = list(self.average.values())
        get_ema_multi_avg_fn(decay)(averages, [weights[name].float() for name in self.average], state.global_step)

    @torch.no_grad()
    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Give the model the average."""
        self._give(learned_weights(model))


def learned_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that learn, by name; tied ones once."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
