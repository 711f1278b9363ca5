"""AdamW without a schedule, whose weights are an average of all steps."""

from collections.abc import Callable
from typing import Any

import torch


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """Defazio et al. 2024, arXiv 2405.15682: AdamW moves z; x is the average of all z, weighted by the square of the
    greatest learning rate until then; gradients are taken at y = (1 - b1) z + b1 x.

    The weights are y while it trains, and x once `eval` has been called, which evaluation and saving do. Beside them it
    keeps z, x and the second moment in float32, so that y follows from the state alone, and a run that goes on from x
    computes what one does that was not interrupted.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate, at least 0, constant after the warmup.
        betas: b1, between 0 and 1, and the decay of the second moment.
        eps: What keeps the division from infinity.
        weight_decay: Decoupled weight decay at y, at least 0.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options)
        self.is_training = False

    def train(self) -> None:
        """Give the weights y, unless they are that already."""
        if self.is_training:
            return
        self.is_training = True
        self._give(lambda state, decay: state["x"].lerp(state["z"], 1 - decay))

    def eval(self) -> None:
        """Give the weights x, unless they are that already."""
        if not self.is_training:
            return
        self.is_training = False
        self._give(lambda state, decay: state["x"])

    @torch.no_grad()
    def _give(self, value: Callable[[dict[str, torch.Tensor], float], torch.Tensor]) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if self.state[parameter]:
                    parameter.copy_(value(self.state[parameter], group["betas"][0]))

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """One step, after `train`, of the groups that have gradients; the loss of the closure, where there is one."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            if all(parameter.grad is None for parameter in group["params"]):
                continue
            # Not there before the first step: what is there then are options, which a run may change.
            group["num_steps"] = group.get("num_steps", 0) + 1
            group["greatest_lr"] = max(group.get("greatest_lr", 0.0), group["lr"])
            group["sum_of_weights"] = group.get("sum_of_weights", 0.0) + group["greatest_lr"] ** 2
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state, (first, second) = self.state[parameter], group["betas"]
        if not state:
            state["z"] = parameter.clone()
            state["x"] = parameter.clone()
            state["second_moment"] = torch.zeros_like(parameter)
        z, x = state["z"], state["x"]
        moment = state["second_moment"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
        size = (moment / (1 - second ** group["num_steps"])).sqrt_().add_(group["eps"])
        y = x.lerp(z, 1 - first)
        z.sub_(y, alpha=group["lr"] * group["weight_decay"]).addcdiv_(parameter.grad, size, value=-group["lr"])
        if group["sum_of_weights"]:
            x.lerp_(z, group["greatest_lr"] ** 2 / group["sum_of_weights"])
        parameter.copy_(x.lerp(z, 1 - first))
