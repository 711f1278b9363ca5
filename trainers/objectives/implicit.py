"""The gradient at a fixed point. Sources: Bai et al. 2019, arXiv 1909.01377; Geng et al. 2021, arXiv 2111.05177."""

import torch

from .base import Objective, TrainingPass


class ImplicitGradient(Objective):
    """The loss after the last step, with the gradient that it would have if the last state were a fixed point s* =
    core(s*): dL/ds* (I - J)^-1 dcore, where the inverse is the sum of the first `terms` powers of the Jacobian J of the
    last step. Only that step is kept in memory; each term more costs one backward pass of it.
    """

    options_read = ("terms",)
    is_read_after_steps = takes_gradients = True

    def depth(self, without_gradient: int, with_gradient: int) -> tuple[int, int]:
        return without_gradient + with_gradient - 1, 1

    def loss(self, loss: torch.Tensor, of: TrainingPass) -> torch.Tensor:
        before, state = of.states[-2:]
        term = torch.autograd.grad(loss, state, retain_graph=True)[0]
        further = torch.zeros_like(term)
        for _ in range(self.options.terms - 1):
            term = torch.autograd.grad(state, before, term, retain_graph=True)[0]
            further += term
        surrogate = (state * further).sum()  # whose gradient is what is missing, and whose value does not count
        return loss + surrogate - surrogate.detach()
