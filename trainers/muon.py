"""Muon, also on CPUs that have no products of bfloat16, and AdaMuon, whose orthogonal updates are scaled number by
number.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration of Muon, which brings all singular values near 1 in five steps."""


class Muon(torch.optim.Muon):
    """torch's Muon with updates of the size of AdamW's (`match_rms_adamw`). On CPUs, where torch's takes several times
    as long as all the rest of an update unless they multiply bfloat16, it orthogonalises in float32.
    """

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """One step; the loss of the closure, where there is one."""
        if any(it.device.type != "cpu" for group in self.param_groups for it in group["params"]):
            return super().step(closure)
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = orthogonalize(self._momentum(parameter, group["momentum"]))
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(update, alpha=group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))
        return loss

    def _momentum(self, parameter: torch.Tensor, decay: float) -> torch.Tensor:
        """Nesterov's: the mean of gradients as it will be if the next is like this one."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        mean = state["momentum_buffer"].lerp_(parameter.grad, 1 - decay)
        return parameter.grad.lerp(mean, decay)


class AdaMuon(torch.optim.Optimizer):
    """Si et al. 2025, arXiv 2507.11005, algorithm 1: with the momentum M = b M + G and O = orthogonal(sign(M)), the
    second moment V = b V + (1 - b) O^2 gives the direction D = O / (sqrt(V) + eps). Its root mean square is made 0.2,
    about that of AdamW, so that rates and decoupled weight decay are of the same order as there.

    Args:
        params: Matrices, or groups of them.
        lr: Learning rate, at least 0.
        weight_decay: Decoupled weight decay, at least 0.
        momentum: Decay b of both moments, at least 0 and below 1.
        eps: What keeps the division from infinity.
    """

    def __init__(
        self, params: Any, lr: float, weight_decay: float = 0.0, momentum: float = 0.95, eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """One step; the loss of the closure, where there is one."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(self._direction(parameter, group), alpha=group["lr"])
        return loss

    def _direction(self, parameter: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """What the learning rate is multiplied with."""
        state, decay = self.state[parameter], group["momentum"]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
            state["second_moment"] = torch.zeros_like(parameter)
        momentum = state["momentum"].mul_(decay).add_(parameter.grad)
        orthogonal = orthogonalize(momentum.sign())
        second = state["second_moment"].mul_(decay).addcmul_(orthogonal, orthogonal, value=1 - decay)
        direction = orthogonal / (second.sqrt() + group["eps"])
        return direction * (0.2 * direction.numel() ** 0.5 / (direction.norm() + group["eps"]))


def orthogonalize(matrix: torch.Tensor, num_steps: int = 5) -> torch.Tensor:
    """The nearest orthogonal matrix, roughly: singular values come to lie between 0.7 and 1.2. The iteration computes
    in bfloat16, as torch's Muon does, and on CPUs, of which many are slow at that, in float32; the result has the dtype
    of the matrix.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrix.shape[0] > matrix.shape[1]
    dtype = torch.float32 if matrix.device.type == "cpu" else torch.bfloat16
    current = (matrix.T if is_tall else matrix).to(dtype)
    current = current / current.norm().clamp(min=1e-7)
    for _ in range(num_steps):
        gram = current @ current.T
        current = torch.addmm(current, torch.addmm(gram, gram, gram, beta=b, alpha=c), current, beta=a)
    return (current.T if is_tall else current).to(matrix.dtype)
