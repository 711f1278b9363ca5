"""Reinforcement learning by TRL's GRPO, for models whose depth varies."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import GRPOConfig, GRPOTrainer

from model import tokenizer_of
from model.chat import encode_conversation
from model.depth import sample_depth

from .arguments import RecurrentTrainingArguments, check_choices
from .base import BaseTrainer
from .dpo import NamedMetrics, prepare_models
from .user_functions import load_reward

# With these a token is written with the probability that the pass of the loss computes for it.
EXACT = {"exit_criterion": "none", "cache_policy": "full", "state_warm_start": False, "noise_level": 0.0}
# What TRL knows, which looks only while it trains.
CHOICES = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}
# What would write the completions without this model's depth.
FOREIGN = ("use_vllm", "use_transformers_continuous_batching", "use_transformers_paged")


@dataclass
class RolloutArguments(RecurrentTrainingArguments, GRPOConfig):
    """Arguments of GRPO; see `trl.GRPOConfig` for the inherited ones."""

    learning_rate: float = 1e-5
    gradient_checkpointing: bool | None = None  # off, as everywhere; TRL turns it on
    disable_dropout: bool = True
    """Whether there is none, so that a token is generated with the probability that the loss computes."""
    num_generations_eval: int | None = 1  # greedily, all would be the same
    rewards: list[str] = field(default_factory=list)
    """Reward functions by import name, module:function, such as evaluation.rewards:exact_answer; their sum is the
    reward, by `reward_weights` where those are given."""

    def __post_init__(self) -> None:
        if self.greater_is_better is None:
            self.greater_is_better = True  # the best model is that of the highest reward
        super().__post_init__()

    def _check_ranges(self) -> None:
        super()._check_ranges()
        if not self.rewards:
            raise ValueError("rewards is empty; name at least one function, as evaluation.rewards:exact_answer")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.rewards):
            raise ValueError(
                f"reward_weights has {len(self.reward_weights)} numbers for {len(self.rewards)} rewards; give one each"
            )
        for name, known in CHOICES.items():
            value = getattr(self, name)
            check_choices(name, {True: "group", False: "none"}.get(value, value), known)
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; give a number above 0: answers have to differ")
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length is {self.max_completion_length}; give at least 1")
        for name in FOREIGN:
            if getattr(self, name):
                raise ValueError(f"{name} is on, but it knows no recurrent depth; leave it out")


class RolloutTrainer(BaseTrainer, GRPOTrainer, NamedMetrics):
    """TRL's GRPO for models that take `num_steps`.

    Each completion has one depth, the same for all completions of a prompt, so that they are compared with each other
    and not with what another depth would have written. It is drawn from (seed, global step, micro-batch, prompt) and
    recorded with the completion, through TRL's shuffling and splitting, so that every pass that scores the completion
    (of the policy, of the policy before, of the reference) runs at it: from the fixed initial state, without exits.
    Under ZeRO-3, where ranks must take the same steps, a depth is that of a whole batch of completions.

    Evaluation writes greedily, at the mean depth. All steps carry gradient.

    Args:
        kwargs: The arguments of `trl.GRPOTrainer`, without `reward_funcs`, which the arguments name.

    Raises:
        ValueError: A reward cannot be imported, or the libraries refuse an option.
    """

    args: RolloutArguments

    def __init__(self, *args: Any, **kwargs: Any):
        rewards = [load_reward(name) for name in kwargs["args"].rewards]
        super().__init__(*args, reward_funcs=rewards, **kwargs)
        prepare_models(self)
        self.text_config = self.model.config.get_text_config()
        self.is_recurrent = self.text_config.num_core_layers > 0
        self._position = (-1, -1)  # (global step, micro-batch within it) of the training step in progress
        self._num_steps: dict[bool, list[float]] = {True: [], False: []}  # mean depths in training and in evaluation

    def get_train_dataloader(self) -> DataLoader:
        """TRL's, whose order of an epoch would depend on the epochs before, which a resumed run has not seen."""
        loader = super().get_train_dataloader()
        if self.shuffle_dataset:
            sampler = loader.get_sampler()
            sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(self.args.data_seed + epoch)
        return loader

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch, which is counted from 0 in each step."""
        step, micro_batch = self._position
        self._position = (self.state.global_step, micro_batch + 1 if step == self.state.global_step else 0)
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean depth."""
        depths = self._num_steps[self.model.training]
        if depths:
            logs["num_steps" if self.model.training else "eval_num_steps"] = sum(depths) / len(depths)
            depths.clear()
        super().log(logs, *args, **kwargs)

    # ------------------------------------------------------------------------------------------------------- rollouts

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], list | None, dict[str, Any]]:
        """Texts as documents begin in training: the begin token in front, and special tokens written in them are text.
        Messages go through the chat template, with texts that are nothing else either.
        """
        tokenizer = tokenizer_of(self.processing_class)
        if not isinstance(prompts[0], str):
            return [encode_conversation(tokenizer, prompt, add_generation_prompt=True) for prompt in prompts], None, {}
        ids = tokenizer(prompts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [[tokenizer.bos_token_id, *row] for row in ids], None, {}

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Writes each completion at its depth, which is recorded with it."""
        options = EXACT | {"top_k": self.top_k if self.model.training else 1}
        if self.text_config.recurrence.cache_policy == "first":  # in passes without a cache, too
            options["cache_policy"] = "first"
        depths = self._draw_depths(len(inputs)) if self.is_recurrent else None
        if depths is not None:
            self._num_steps[self.model.training].append(depths.float().mean().item())
            options["num_steps"] = int(depths[0]) if is_deepspeed_zero3_enabled() else depths
        for name, value in options.items():
            setattr(self.generation_config, name, value)
        with self.scoring_at(depths):
            outputs = super()._generate_and_score_completions(inputs)
        return outputs if depths is None else outputs | {"num_steps": depths}

    def _draw_depths(self, rows: int) -> torch.LongTensor:
        """(rows,) on the CPU: of the completions that this rank is about to write."""
        recurrence = self.text_config.recurrence
        if not self.model.training:
            return torch.full((rows,), self.text_config.num_steps or recurrence.mean_steps)
        first = self.accelerator.process_index * rows
        prompts = [(first + row) // self.num_generations for row in range(rows)]
        if is_deepspeed_zero3_enabled():
            prompts = [0] * rows
        return torch.tensor([sum(sample_depth(recurrence, self.args.seed, *self._position, it)) for it in prompts])

    # -------------------------------------------------------------------------------------------------------- scoring

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss at the depths at which the completions were generated."""
        with self.scoring_at(inputs.get("num_steps")):
            return super().compute_loss(model, inputs, *args, **kwargs)

    @contextmanager
    def scoring_at(self, depths: torch.LongTensor | None) -> Iterator[None]:
        """A context in which every pass with labels, of the policy and of the reference, runs each row at its depth.
        TRL passes over all rows part by part, in their order, and then over all of them again.

        Args:
            depths: (rows,), None for a model without depth.
        """
        next_row = 0

        def add_depths(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            nonlocal next_row
            if kwargs.get("labels") is None:  # it writes, at the depths of the generation config
                return None
            first, next_row = next_row, next_row + len(kwargs["labels"])
            part = depths[first:next_row]
            next_row %= len(depths)
            return args, {**kwargs, "num_steps": part}

        models = [] if depths is None else [it for it in (self.model, self.ref_model) if it is not None]
        hooks = [it.register_forward_pre_hook(add_depths, with_kwargs=True) for it in models]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
