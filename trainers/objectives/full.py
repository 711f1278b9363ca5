"""Backpropagation through all steps."""

from .base import Objective


class FullBackpropagation(Objective):
    """The loss after the last step, with gradient through all of them. Activations are kept at the ends of the steps
    alone and computed again (gradient checkpointing, which is on), so that memory grows by a state with each step.
    """

    def depth(self, without_gradient: int, with_gradient: int) -> tuple[int, int]:
        return 0, without_gradient + with_gradient
