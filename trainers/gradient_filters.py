"""Filters that amplify the slow part of gradients, between clipping and the optimizer (Grokfast, arXiv 2405.20233)."""

import math
import os
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .resuming import ResumeError

FILE_NAME = "gradient_filter.safetensors"


@dataclass
class GradientFilterOptions:
    """Adds to each gradient a multiple of its average over past updates (Lee et al. 2024, arXiv 2405.20233)."""

    name: str | None = None
    """ema, an exponential moving average, or ma, the mean of the last gradients; by default nothing is filtered."""
    factor: float = 2.0
    """What the average is multiplied with before it is added, at least 0; the authors take 2 for ema and 5 for ma."""
    decay: float = 0.98
    """Decay of ema, at least 0 and below 1."""
    window: int = 100
    """Number of gradients of ma, at least 1. A checkpoint grows by as many gradients of all weights."""

    def __post_init__(self) -> None:
        if self.name is not None and self.name not in GRADIENT_FILTERS:
            raise ValueError(f"gradient_filter.name is {self.name!r}; give one of {', '.join(GRADIENT_FILTERS)}")
        if not 0 <= self.factor < math.inf:
            raise ValueError(f"gradient_filter.factor is {self.factor}; give a finite number, at least 0")
        if not 0 <= self.decay < 1:
            raise ValueError(f"gradient_filter.decay is {self.decay}; give a number from 0 to below 1")
        if self.window < 1:
            raise ValueError(f"gradient_filter.window is {self.window}; give at least 1")


class SlowPart(Protocol):
    """A running average of gradients of one weight."""

    state: dict[str, torch.Tensor]
    """Tensors that a checkpoint holds, from which it goes on."""

    def update(self, gradient: torch.Tensor) -> torch.Tensor | None:
        """Take in a float32 gradient; the average in float32, None where there is none yet."""


class ExponentialAverage:
    """a = d a + (1 - d) g, beginning with the first gradient. Memory: one float32 number per weight."""

    def __init__(self, options: GradientFilterOptions) -> None:
        self.decay = options.decay
        self.state: dict[str, torch.Tensor] = {}

    def update(self, gradient: torch.Tensor) -> torch.Tensor:
        """The average, with the gradient in it."""
        if not self.state:
            self.state["average"] = gradient.clone()
        return self.state["average"].lerp_(gradient, 1 - self.decay)


class WindowAverage:
    """Mean of the last gradients, once there are as many as the window is long. Memory: `window` + 1 float32 numbers
    per weight, of which one is their sum, which is computed anew once in a window, so that no error grows.
    """

    def __init__(self, options: GradientFilterOptions) -> None:
        self.window = options.window
        self.state: dict[str, torch.Tensor] = {}

    def update(self, gradient: torch.Tensor) -> torch.Tensor | None:
        """The mean, with the gradient in it; None before the window is full."""
        if not self.state:
            self.state["gradients"] = gradient.new_zeros(self.window, *gradient.shape)
            self.state["sum"] = torch.zeros_like(gradient)
            self.state["count"] = torch.zeros((), dtype=torch.int64)
        gradients, total, count = self.state["gradients"], self.state["sum"], int(self.state["count"])
        oldest = gradients[count % self.window]
        total.add_(gradient).sub_(oldest)
        oldest.copy_(gradient)
        if (count + 1) % self.window == 0:
            torch.sum(gradients, 0, out=total)
        self.state["count"] += 1
        return total / self.window if count + 1 >= self.window else None


GRADIENT_FILTERS: dict[str, type[SlowPart]] = {"ema": ExponentialAverage, "ma": WindowAverage}


class GradientFilter:
    """g + factor * (average of g) in place of each gradient g, whenever an optimizer makes a step: after all ranks have
    added theirs up, after clipping, and not where a step is left out.

    Args:
        options: Which average, and its factor.
        model: Whose learned weights are filtered.
    """

    def __init__(self, options: GradientFilterOptions, model: nn.Module) -> None:
        self.options = options
        self.parameters = {name: it for name, it in model.named_parameters() if it.requires_grad}
        self.averages = {name: GRADIENT_FILTERS[options.name](options) for name in self.parameters}

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Filter before each step of an optimizer from now on."""
        optimizer.register_step_pre_hook(self.apply)

    @torch.no_grad()
    def apply(self, *arguments: Any) -> None:
        """Filter all gradients that are there, in place."""
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            average = self.averages[name].update(parameter.grad.float())
            if average is not None:
                parameter.grad.add_(average.to(parameter.grad.dtype), alpha=self.options.factor)

    def states(self) -> dict[str, torch.Tensor]:
        """Tensors that a checkpoint holds, by key and name of the weight."""
        return {f"{key}/{name}": it for name, part in self.averages.items() for key, it in part.state.items()}

    def _shapes(self) -> dict[str, torch.Size]:
        """Those of `states`, once all weights have had a gradient."""
        fresh = {name: GRADIENT_FILTERS[self.options.name](self.options) for name in self.parameters}
        for name, parameter in self.parameters.items():
            fresh[name].update(torch.empty_like(parameter, device="meta"))
        return {f"{key}/{name}": it.shape for name, part in fresh.items() for key, it in part.state.items()}

    def save(self, checkpoint: str) -> None:
        """Write all averages into the folder of a checkpoint, made if missing."""
        os.makedirs(checkpoint, exist_ok=True)
        tensors = {key: tensor.cpu().contiguous() for key, tensor in self.states().items()}
        save_file(tensors, os.path.join(checkpoint, FILE_NAME))

    def load(self, checkpoint: str) -> None:
        """Go on with the averages of a checkpoint.

        Raises:
            ResumeError: it has none, or those of another filter or of other weights.
        """
        path = os.path.join(checkpoint, FILE_NAME)
        if not os.path.isfile(path):
            raise ResumeError(
                f"training.gradient_filter.name is {self.options.name!r}, but {checkpoint} has no {FILE_NAME}; set "
                "it to null, or begin anew"
            )
        loaded, shapes = load_file(path), self._shapes()
        for item, tensor in loaded.items():
            if tensor.shape != shapes.get(item):
                raise ResumeError(
                    f"training.gradient_filter: {checkpoint} has {item} of the shape {list(tensor.shape)}, which is of "
                    "another filter, window or weight; give the options of that run, or begin anew"
                )
        for item, tensor in loaded.items():
            key, name = item.split("/", 1)
            device = torch.device("cpu") if key == "count" else self.parameters[name].device
            self.averages[name].state[key] = tensor.to(device)
