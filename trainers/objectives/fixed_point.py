"""A loss on how far the last step still moves the state."""

import torch

from .base import Objective, TrainingPass


class FixedPoint(Objective):
    """L + weight |s_r - s_{r-1}|^2 / |s_r|^2, the mean over tokens, where s_r = core(s_{r-1}): the iteration is to end
    where further steps change nothing.
    """

    options_read = ("weight",)
    default_weight = 0.1
    is_read_after_steps = True

    def loss(self, loss: torch.Tensor, of: TrainingPass) -> torch.Tensor:
        before, state = (each.float() for each in of.states[-2:])
        sizes = state.square().sum(-1).clamp(min=torch.finfo(state.dtype).tiny)  # of padding, states may be 0
        distances = (state - before).square().sum(-1) / sizes
        return loss + self.weight * of.mean(distances)
