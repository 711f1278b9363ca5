"""Muon for the matrices inside the layers, another optimizer for the rest."""

import torch
from torch import nn


def matrices_of(model: nn.Module) -> list[nn.Parameter]:
    """The weights of linear layers that learn, but for the output head, which like an embedding has a row per token."""
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    return list(dict.fromkeys(module.weight for module in linear if module.weight.requires_grad))


class MuonBeside(torch.optim.Optimizer):
    """`torch.optim.Muon` for some parameters of an optimizer, which it takes over; the rest stays with that one.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, with steps of the size that Liu et al. 2025,
    arXiv 2502.16982, give them, so that rates of AdamW and weight decays are of the right order.

    Both see one list of groups and one state, so that schedules, checkpoints and resuming are those of any optimizer.

    Args:
        rest: An optimizer that has not made a step yet.
        matrices: 2-D parameters of it.
        learning_rate: That of Muon.

    Raises:
        ValueError: for an optimizer that is not torch's, whose state may not be loadable by torch's rules.
    """

    def __init__(self, rest: torch.optim.Optimizer, matrices: list[nn.Parameter], learning_rate: float):
        if not type(rest).__module__.startswith("torch.optim."):
            raise ValueError(
                f"training.optim makes a {type(rest).__name__}, but beside muon_learning_rate it has to be one of "
                "torch's: adamw_torch, adamw_torch_fused, sgd, adagrad or rmsprop"
            )
        chosen, groups, own = set(matrices), [], []
        for options in rest.param_groups:
            members = [parameter for parameter in options["params"] if parameter in chosen]
            others = [parameter for parameter in options["params"] if parameter not in chosen]
            groups += [{**options, "params": others, "is_muon": False}] if others else []
            own += [{"params": members, "weight_decay": options["weight_decay"]}] if members else []
        muon = torch.optim.Muon(own, lr=learning_rate, adjust_lr_fn="match_rms_adamw")
        groups += [{**options, "is_muon": True} for options in muon.param_groups]
        super().__init__(groups, {})
        self.parts = {False: rest, True: muon}

    def step(self, closure=None):
        """One step of both."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for is_muon, part in self.parts.items():
            # Loading a checkpoint and dividing groups replace these, so that each step looks anew.
            part.param_groups = [options for options in self.param_groups if options["is_muon"] == is_muon]
            part.state = self.state
            part.step()
        return loss
