"""RMSNorms that learn faster on a CPU."""

from typing import Any

import torch
from torch import nn


def speed_up_norms(model: nn.Module) -> None:
    """Makes every `torch.nn.RMSNorm` of a model one whose gradient takes less than half of the time on a CPU, where
    torch knows it by its parts alone, each of which passes over the memory. GPUs have a kernel of their own, and
    torch.compile makes one; what these get is unchanged, and so are weights, their names and what is saved.
    """
    for module in model.modules():
        if type(module) is nn.RMSNorm and module.eps is not None and module.elementwise_affine:
            module.__class__ = RMSNorm


class RMSNorm(nn.RMSNorm):
    """torch's, but for the gradient in float32 on a CPU."""

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
        """Keeps what the derivatives need."""
        x, weight, ctx.eps = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, output[1])
        ctx.save_for_forward(x, weight, output[1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
        """dx = c (g * weight) - c^3 / n (g . (weight * x)) x, and dweight = the sum of c g * x, with g = grad."""
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
