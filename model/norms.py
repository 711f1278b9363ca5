"""Norms over the last dimension."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig


def build_norm(config: PreTrainedConfig) -> nn.Module:
    """The norm that `config.norm` names."""
    norm = {"rmsnorm": RMSNorm, "layernorm": nn.LayerNorm}[config.norm]
    return norm(config.hidden_size, eps=config.norm_eps)


class RMSNorm(nn.RMSNorm):
    """torch's, which learns on a CPU in less than half of the time: there torch knows its gradient by its parts alone,
    each of which passes over the memory. GPUs have a kernel of their own, and torch.compile makes one.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        learns = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        is_plain = x.dtype == self.weight.dtype == torch.float32 and x.device.type == "cpu"
        if learns and is_plain and not torch.compiler.is_compiling():
            return RMSNormFunction.apply(x, self.weight, self.eps)[0]
        return super().forward(x)


def inverse_root_mean_square(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / rms(x) over the last dimension, of shape (..., 1)."""
    return torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps)


class RMSNormFunction(torch.autograd.Function):
    """y = c x * weight, with c = 1 / rms(x). The values are torch's to the last bit."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        """y, and c of shape (..., 1)."""
        scale = inverse_root_mean_square(x, eps)
        return x * scale * weight, scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Keep what the derivatives need."""
        x, weight, ctx.eps = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, output[1])
        ctx.save_for_forward(x, weight, output[1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
        """With g = grad: dx = c (g * weight) - c^3 / n (g . (weight * x)) x, and dweight = the sum of c g * x."""
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient of this gradient will be asked for, and depends on x by c as well
            scale = inverse_root_mean_square(x, ctx.eps)
        width = x.shape[-1]
        products = (grad * x).reshape(-1, width)
        along = (products @ weight).view_as(scale) * scale.pow(3) / -width
        grad_weight = scale.reshape(-1) @ products
        return (grad * scale).mul_(weight).addcmul_(x, along), grad_weight, None

    @staticmethod
    def jvp(ctx: Any, x_tangent: torch.Tensor, weight_tangent: torch.Tensor, _: None) -> tuple[torch.Tensor, None]:
        """The derivative in a direction."""
        x, weight, scale = ctx.saved_tensors
        scale_tangent = -scale.pow(3) * (x * x_tangent).mean(dim=-1, keepdim=True)
        return (x_tangent * scale + x * scale_tangent) * weight + x * scale * weight_tangent, None
