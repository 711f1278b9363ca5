"""Modules as functions for one new token of each row, in as few operations as there are.

Narrow models are bound by the number of operations, not by arithmetic. Functions look up weights once for all steps of
a forward pass, in `generate` once for all tokens, and give the numbers of the modules, but for rounding. A module that
does something else when it is called, since it has hooks, adapters or quantized weights, is called as ever.
"""

import functools
from collections.abc import Callable

import torch
from torch import nn

Function = Callable[[torch.Tensor], torch.Tensor]

FEW_ROWS = 6
LARGE_WEIGHT = 2**18
"""Elements of a weight from which MKL reads it once for each of a few rows, unless they are columns."""


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module is of one of these very classes, and calling it does nothing beside its own `forward`."""
    changed = module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl
    return type(module) in kinds and not changed and "forward" not in vars(module)


def token_norm(norm: nn.Module) -> Function:
    """The norm, (rows, ..., features) -> the same. On CPUs torch makes six operations of an RMSNorm."""
    if is_plain(norm, nn.Identity):
        return lambda x: x
    weight = norm.weight
    if not is_plain(norm, nn.RMSNorm) or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return norm
    eps, share = constant(norm.eps), 1 / weight.numel()
    length_of, addcmul = torch.linalg.vector_norm, torch.addcmul

    def rms_norm(x: torch.Tensor) -> torch.Tensor:
        length = length_of(x, dim=-1, keepdim=True)
        return (x * addcmul(eps, length, length, value=share).rsqrt_()).mul_(weight)

    return rms_norm


@functools.cache
def constant(value: float) -> torch.Tensor:
    """A number on the CPU."""
    with torch.inference_mode(False):
        return torch.tensor(value)


def token_product(linear: nn.Module) -> Function:
    """The linear map, (rows, features) -> (rows, features)."""
    if not is_plain(linear, nn.Linear) or type(linear.weight) is not nn.Parameter:
        return linear
    weight, bias, linear_of = linear.weight, linear.bias, nn.functional.linear
    if weight.device.type != "cpu" or weight.numel() < LARGE_WEIGHT or bias is not None:
        return lambda x: linear_of(x, weight, bias)

    def product(x: torch.Tensor) -> torch.Tensor:
        if not 1 < (count := x.shape[0]) <= FEW_ROWS:
            return linear_of(x, weight)
        x = nn.functional.pad(x, (0, 0, 0, 1)) if count == 3 else x  # MKL is faster with four rows than with three
        return torch.mm(weight, x.t()).t()[:count].contiguous()

    return product


def token_sum(residual: nn.Module, linear: nn.Module, scale: float | None) -> Callable[..., torch.Tensor]:
    """(x, features) -> residual(x, linear(features)). `scale` is that of a residual that adds; None: it does not."""
    product = token_product(linear)
    if scale is None or not is_plain(residual, type(residual)) or product is linear or linear.bias is not None:
        return lambda x, features: residual(x, product(features))
    weight, addmm = linear.weight.t(), torch.addmm

    def product_and_sum(x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return addmm(x, features, weight, alpha=scale) if x.shape[0] == 1 else residual(x, product(features))

    return product_and_sum
