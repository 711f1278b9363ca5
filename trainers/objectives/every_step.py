"""A loss after every step that carries gradient."""

import torch

from .base import Objective, TrainingPass


class EveryStep(Objective):
    """sum_i w_i L_i over the k steps with gradient, w_i = i^exponent / sum_j j^exponent, where L_i is the loss that
    coda and head read off the state after the i-th of them. Each costs a coda and a head.
    """

    options_read = ("exponent",)
    is_read_after_steps = reads_tokens = True

    def loss(self, loss: torch.Tensor, of: TrainingPass) -> torch.Tensor:
        num_steps = of.inputs["num_steps"][1]
        weights = [step**self.options.exponent for step in range(1, num_steps + 1)]
        losses = [of.token_loss(of.read(state)) for state in of.states[-num_steps:-1]] + [loss]
        return sum(weight * each for weight, each in zip(weights, losses, strict=True)) / sum(weights)
