"""Supervised fine-tuning: TRL's trainer with recurrent depth."""

from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import nn
from torch.utils.data import Dataset
from trl import SFTConfig, SFTTrainer

from .arguments import RecurrentTrainingArguments
from .objectives import Objective
from .recurrent import RecurrentTrainer


@dataclass
class SupervisedArguments(RecurrentTrainingArguments, SFTConfig):
    """Ours and those of `trl.SFTConfig` that say how to learn; what is learned, the section `data` says."""

    gradient_checkpointing: bool | None = None  # off, as everywhere; TRL turns it on

    def __post_init__(self) -> None:
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        super().__post_init__()


class LossOfTextOrModel(SFTTrainer):
    """TRL's trainer, whose loss knows tokens alone, and whose outputs are those of a further pass without gradient. In
    evaluation, for objectives that read states, and of models with media, whose losses have weights and other parts,
    the model's own are taken, as in pretraining.
    """

    has_media: bool
    objective: Objective

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any):
        """TRL's `loss_type` in the training of text."""
        if self.has_media or not model.training or self.objective.is_read_after_steps:
            return super(SFTTrainer, self).compute_loss(model, inputs, return_outputs, **kwargs)
        inputs = {name: value for name, value in inputs.items() if name != "skip_logits"}  # it never has any
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))  # by which it counts tokens
        return super().compute_loss(model, inputs, return_outputs, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, ...]:
        """The step of pretraining; TRL's would compute the logits in a forward pass of their own."""
        return super(SFTTrainer, self).prediction_step(*args, **kwargs)


class SupervisedTrainer(RecurrentTrainer, LossOfTextOrModel):
    """`trl.SFTTrainer` for models that take `num_steps` and `initial_state`, on the rows and with the arguments that
    `RecurrentTrainer` takes.

    Raises:
        ValueError: The libraries refuse an option, or models with media do not have the loss.
    """

    smooths_labels = False

    def __init__(self, *args: Any, train_dataset: Dataset, **kwargs: Any):
        # TRL takes no other datasets than these, which it would tokenise; ours take the place of the one below.
        stand_in = datasets.Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]})
        super().__init__(*args, train_dataset=stand_in, **kwargs)
        self.train_dataset = train_dataset
        if self.args.loss_type != "nll" and self.has_media:
            raise ValueError(f"training.loss_type: {self.args.loss_type!r} is for models of text alone; leave it out")
        if self.args.loss_type != "nll" and self.objective.is_read_after_steps:
            raise ValueError(
                f"training.loss_type: {self.args.loss_type!r} knows the last step alone, and objective.name is "
                f"{self.args.objective.name!r}; leave one of them out"
            )
