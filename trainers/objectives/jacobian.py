"""A penalty on the Jacobian of the last step. Source: Bai et al. 2021, arXiv 2106.14342."""

from contextlib import AbstractContextManager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from model.depth import keyed_generator

from .base import Objective, TrainingPass

TWICE_DIFFERENTIABLE = ("eager", "sdpa")


class JacobianPenalty(Objective):
    """L + weight |J|_F^2 / n, where J = d core(s) / d s at s_{r-1}, of a row, and n the numbers in its state,
    without padding; estimated by one |v^T J|^2 with v ~ N(0, 1) of the row's key (Hutchinson). A core whose Jacobian is
    small converges fast.
    """

    options_read = ("weight",)
    default_weight = 0.1
    is_read_after_steps = takes_gradients = True

    def check_model(self, model: PreTrainedModel) -> None:
        found = model.config.get_text_config()._attn_implementation
        if found not in TWICE_DIFFERENTIABLE:
            raise ValueError(
                f"training.objective.name is 'jacobian', which {found} attention cannot be differentiated twice for; "
                "set attn_implementation to sdpa"
            )

    def around_forward(self) -> AbstractContextManager:
        return sdpa_kernel(SDPBackend.MATH)  # the others have no second derivative

    def loss(self, loss: torch.Tensor, of: TrainingPass) -> torch.Tensor:
        before, state = of.states[-2:]
        draws = [torch.randn(state.shape[1:], generator=keyed_generator("jacobian", *key)) for key in of.row_keys]
        vector = torch.stack(draws).to(state) * of.is_real[..., None]
        product = torch.autograd.grad(state, before, vector, create_graph=True)[0]
        return loss + self.weight * of.mean(product.float().square().mean(-1))
