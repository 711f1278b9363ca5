"""The trainer of the head by which a model exits without reading its output. The model itself stays as it is."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import EvalPrediction, PreTrainedModel

from model.exit_criteria import relative_change

from .arguments import RecurrentTrainingArguments
from .base import ScoringTrainer
from .recurrent import inputs_of_model

DIVERGENCE = 1e-4
"""KL(full depth || exit) in nats, below which an exit counts as equal to full depth."""
DISTANCE = 0.05
"""Distance |s_full - s_i| / |s_full|, below which an exit counts as equal to full depth, since later tokens read the
keys and values of its state."""


class ExitProbeArguments(RecurrentTrainingArguments):
    """Training arguments of an exit probe."""


class ExitProbeTrainer(ScoringTrainer):
    """`transformers.Trainer` for the exit probe of a model whose other weights are frozen: binary cross-entropy of its
    decision after each step, up to the mean depth.

    Raises:
        ValueError: The libraries refuse an option, or there are several processes; nothing is written then.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, compute_metrics=share_of_right_decisions, **kwargs)
        if self.args.world_size > 1:
            raise ValueError(
                f"trainer: an exit probe is trained by one process, not by {self.args.world_size}; start it with "
                "`python finetune.py`"
            )
        self.model_accepts_loss_kwargs = False  # the loss is a mean, which `Trainer` divides by the micro-batches
        self.accelerator.dataloader_config.dispatch_batches = False  # of media, whose batches are not cut by rows
        config = self.model.config.get_text_config()
        self.full_depth = config.num_steps or config.recurrence.mean_steps

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any):
        """The loss, and with `return_outputs` the share of right decisions of each row, (batch,)."""
        model.eval()  # what is observed is what there will be in generation
        states, is_final, counts = observe(model, inputs, self.full_depth)
        probe = self.model.model.exit_probe
        logits = torch.stack([probe(now, before) for before, now in pairwise(states)])
        losses = nn.functional.binary_cross_entropy_with_logits(logits, is_final.float(), reduction="none")
        loss = losses[:, counts].mean()
        if not return_outputs:
            return loss
        is_right = ((logits > 0) == is_final).float().mean(0)  # (batch, sequence)
        return loss, is_right.where(counts, torch.nan).nanmean(-1)


@torch.no_grad()
def observe(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor], full: int
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
    """What the probe learns from.

    A token is final after a step if from there on KL(P_full || P_i) is below `DIVERGENCE`, and |s_full - s_i| /
    |s_full| below `DISTANCE`: a distribution that passes by the last one leaves keys and values unlike those of full
    depth.

    Returns:
        s_0 .. s_full, each (batch, sequence, hidden); (full, batch, sequence) of bool: whether the token is final after
        step 1 .. full; (batch, sequence) of bool: tokens whose successor counts in the loss.
    """
    given = {name: value for name, value in inputs_of_model(batch).items() if name != "labels"}
    states = model(**given, num_steps=full, output_states=True, use_cache=False).states
    if not model.base_model.core.depends_on_step:  # one more step from each state, in place of all steps again
        depths = [{"num_steps": 1, "initial_state": state} for state in states[:-1]]
    else:  # whose steps are not all the same
        depths = [{"num_steps": step} for step in range(1, full + 1)]
    log_p = [model(**given, **depth, use_cache=False).logits.float().log_softmax(-1) for depth in depths]
    divergences = torch.stack([(log_p[-1].exp() * (log_p[-1] - each)).sum(-1) for each in log_p])
    counts = nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    is_close = torch.stack([relative_change(states[-1], state) < DISTANCE for state in states[1:]])
    is_final = (divergences < DIVERGENCE) & is_close
    return states, is_final.flip(0).cumprod(0).flip(0).bool(), counts


def share_of_right_decisions(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` for the trainer: the mean over the rows that have any."""
    return {"accuracy": float(torch.as_tensor(prediction.predictions).nanmean())}
