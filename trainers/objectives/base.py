"""What an objective is: which steps of a pass in training carry gradient, and what its loss is."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from model.attention import AttentionInputs, prepare_attention
from model.cross_entropy import causal_loss

PRIORS = ("token", "batch")


@dataclass
class ObjectiveOptions:
    """What the steps of a model learn from, and how many there are."""

    name: str = "truncated"
    """Name of the objective. truncated: the loss after the last step, with gradient through the last steps alone; full:
    with gradient through all, computed again step by step; every_step, exit_distribution, fixed_point, jacobian,
    implicit, distillation."""
    weight: float | None = None
    """Factor of what the objective adds to the loss, at least 0; by default the objective's own."""
    exponent: float = 0.0
    """Exponent, at least 0, of the weights of every_step: that of the i-th step with gradient is i to this power; 0
    weighs all alike, 1 lets the weights grow linearly."""
    prior: str = "token"
    """What exit_distribution keeps near its prior: the exits of each token (token), or their mean over the tokens of a
    micro-batch (batch)."""
    prior_steps: float | None = None
    """Mean of the geometric prior of exit_distribution in steps, above 1; by default all steps are equally likely."""
    terms: int = 4
    """Terms of the series of implicit, at least 1; with 1 it is the gradient of one step."""
    passes: int = 1
    """Shallower passes of distillation in each micro-batch, at least 1."""
    step_schedule: float = 0.0
    """Share of the updates, at least 0 and at most 1, over which the mean of the drawn steps grows linearly from 1 to
    mean_steps; with any objective."""
    loop_dropout: float = 0.0
    """Probability, at least 0 and below 1, that a step of a micro-batch goes without its low-rank update (step_lora);
    with any objective."""

    def __post_init__(self) -> None:
        for name, least in (("weight", 0), ("exponent", 0), ("terms", 1), ("passes", 1)):
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise ValueError(f"objective.{name} is {value}; give a finite number of at least {least}")
        if self.prior not in PRIORS:
            raise ValueError(f"objective.prior is {self.prior!r}; give one of {', '.join(PRIORS)}")
        if self.prior_steps is not None and not 1 < self.prior_steps < math.inf:
            raise ValueError(f"objective.prior_steps is {self.prior_steps}; give a mean above 1")
        if not 0 <= self.step_schedule <= 1:
            raise ValueError(f"objective.step_schedule is {self.step_schedule}; give a share from 0 to 1")
        if not 0 <= self.loop_dropout < 1:
            raise ValueError(f"objective.loop_dropout is {self.loop_dropout}; give at least 0 and less than 1")


@dataclass
class TrainingPass:
    """A forward pass in training, and what an objective may do with it.

    Args:
        model: The model with its head, without what wraps it.
        inputs: Arguments of `forward`; `num_steps` is (without gradient, with gradient).
        outputs: What it returned, with `states`.
        num_items: What a sum over labels is divided by.
        key: (seed, global step, micro-batch), the same on all ranks.
        row_keys: (seed, global step, row in the global batch) of each row.
    """

    model: PreTrainedModel
    inputs: Mapping[str, Any]
    outputs: ModelOutput
    num_items: torch.Tensor
    key: tuple[int, ...]
    row_keys: Sequence[tuple[int, ...]]

    @property
    def states(self) -> tuple[torch.Tensor, ...]:
        """s_0 .. s_r, (batch, sequence, hidden) each."""
        return self.outputs.states

    @cached_property
    def attention(self) -> AttentionInputs:
        """Mask and positions, as the forward pass had them."""
        text, state = self.model.base_model, self.states[0]
        given = self.inputs.get("position_ids")
        mask, position_ids = text.place(state, 0, self.inputs.get("attention_mask"), given)
        return prepare_attention(text.text_config, state, mask, position_ids, None, given is not None)

    def read(self, state: torch.Tensor) -> torch.Tensor:
        """What the head reads of a state, (batch, sequence, hidden) both."""
        text = self.model.base_model
        return text.read(text.norm_state(state), self.attention, None)

    def token_loss(self, hidden: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """The loss of the labels, a scalar. hidden: as `read` returns it; weights: (batch, sequence), a further factor
        of the loss of what each position predicts.
        """
        of_labels = self.inputs.get("loss_weights")
        if weights is not None:
            shifted = nn.functional.pad(weights[:, :-1], (1, 0))  # the place of what is predicted
            of_labels = shifted if of_labels is None else shifted * of_labels
        vocab_size = self.model.config.get_text_config().vocab_size
        labels, head = self.inputs["labels"], self.model.compute_logits
        smoothing = self.inputs.get("label_smoothing", 0.0)
        return causal_loss(head, hidden, labels, vocab_size, self.num_items, of_labels, label_smoothing=smoothing)[0]

    @cached_property
    def label_weights(self) -> torch.Tensor:
        """Float32 (batch, sequence): the weight of what each position predicts, 0 where nothing is learned."""
        is_label = self.inputs["labels"] != -100
        weights = is_label * self.inputs.get("loss_weights", torch.ones_like(is_label)).float()
        return nn.functional.pad(weights[:, 1:], (0, 1))

    @cached_property
    def is_real(self) -> torch.Tensor:
        """(batch, sequence) of bool, False for padding."""
        mask = self.inputs.get("attention_mask")
        return torch.ones_like(self.inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of (batch, sequence) over the tokens of each row, padding left out, where rows weigh as their labels
        do in the loss; so that it does not matter how rows are spread over micro-batches and ranks.
        """
        of_rows = values.masked_fill(~self.is_real, 0).sum(1) / self.is_real.sum(1).clamp(min=1)
        return (of_rows * self.label_weights.sum(1)).sum() / self.num_items


class Objective:
    """Backpropagation that is truncated: the loss is read off the last state, and `backprop_steps` steps carry
    gradient. All others derive from it; each is a class, and an entry of `OBJECTIVES`.
    """

    options_read: tuple[str, ...] = ()
    """Options of `ObjectiveOptions` that it has of its own."""
    default_weight = 1.0
    is_read_after_steps = False
    """Whether it needs the states after each step, and parts of the model outside of its forward pass."""
    reads_tokens = False
    """Whether it reads distributions of tokens off these states, and so knows nothing of the losses of latents."""
    takes_gradients = False
    """Whether it takes gradients on the way to the loss."""
    trains_exit_probe = False
    """Whether the exit probe of a model that has one learns."""

    def __init__(self, options: ObjectiveOptions):
        self.options = options
        self.weight = self.default_weight if options.weight is None else options.weight

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises ValueError if a model, with its head, cannot be trained so."""

    def depth(self, without_gradient: int, with_gradient: int) -> tuple[int, int]:
        """The steps of a pass, from those that were drawn."""
        return without_gradient, with_gradient

    def around_forward(self) -> AbstractContextManager:
        """What the forward pass runs in."""
        return nullcontext()

    def loss(self, loss: torch.Tensor, of: TrainingPass) -> torch.Tensor:
        """The loss of a pass, from that after its last step; asked if `is_read_after_steps`."""
        return loss
