"""Learning from preferences by TRL's DPO, for models whose depth varies."""

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import Trainer
from trl import DPOConfig, DPOTrainer

from .arguments import RecurrentTrainingArguments, check_choices, check_fixed
from .recurrent import RecurrentTrainer

logger = logging.getLogger(__name__)

# What TRL knows, which looks only while it trains.
LOSSES = (
    *("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft"),
)
# What TRL offers and variable depth forbids: the value there has to be, and what another would cause.
FIXED = {
    "precompute_ref_log_probs": (False, "the reference has to run at the depth of each micro-batch"),
    "padding_free": (False, "rows have initial states of their own"),
    "use_weighting": (False, "its weights are those of one depth"),
}


@dataclass
class PreferenceArguments(RecurrentTrainingArguments, DPOConfig):
    """Arguments of DPO; see `trl.DPOConfig` for the inherited ones."""

    learning_rate: float = 1e-5
    gradient_checkpointing: bool | None = None  # off, as everywhere; TRL turns it on

    def _check_ranges(self) -> None:
        super()._check_ranges()
        if self.beta <= 0:
            raise ValueError(f"beta is {self.beta}; give a number above 0, e.g. 0.1")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}; give at least 2, for a prompt and an answer, or null")
        for name in [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type:
            check_choices("loss_type", name, LOSSES)
        check_fixed(self, FIXED)


class NamedMetrics(Trainer):
    """Goes behind a trainer of TRL, whose metrics of an evaluation do not say which of several it was."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log them as eval_SOURCE_NAME, like the loss, without those that were never a number."""
        loss = next((name for name in logs if name.startswith("eval_") and name.endswith("_loss")), None)
        if loss is not None:
            source = loss.removesuffix("loss")
            for name in [name for name in logs if name.startswith("eval_") and not name.startswith(source)]:
                value = logs.pop(name)
                if value is not None and not math.isnan(value):
                    logs[source + name.removeprefix("eval_")] = value
        super().log(logs, *args, **kwargs)


class PreferenceTrainer(RecurrentTrainer, DPOTrainer, NamedMetrics):
    """TRL's DPO for models that take `num_steps` and `initial_state`.

    Depth and initial states are drawn as in `RecurrentTrainer`. The four passes over a pair, those of policy and
    reference over the chosen and the rejected answer, have the same, so that nothing but what was learned is in their
    log-ratios. Evaluation runs at the mean depth from the fixed state.

    The datasets hold token ids: prompt_ids, chosen_ids and rejected_ids. The reference of a model with fresh adapters
    is the model without them.
    """

    args: PreferenceArguments
    smooths_labels = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        prepare_models(self)

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: PreferenceArguments, name: str
    ) -> Dataset:
        """TRL would tokenise texts, and tokenise them otherwise than pretraining does. Pairs of which `max_length`
        would leave nothing but the prompt teach nothing, and are left out; ValueError if none is left.
        """
        if args.max_length is None:
            return dataset
        kept = [number for number, ids in enumerate(dataset["prompt_ids"]) if len(ids) < args.max_length]
        if len(kept) == len(dataset):
            return dataset
        longest = f"prompts of {args.max_length} tokens and more (training.max_length)"
        if not kept:
            raise ValueError(f"data: all {len(dataset)} pairs of {name} have {longest}; raise it")
        logger.warning("%d of %d pairs of %s are left out: %s", len(dataset) - len(kept), len(dataset), name, longest)
        return dataset.select(kept)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any):
        """Adds depth and initial states of the pairs in training."""
        if model.training and self.is_recurrent:
            rows, sequence = inputs["input_ids"].shape  # the chosen answers of all pairs, then the rejected ones
            drawn = self._draw_recurrence(rows // 2, sequence)
            inputs = inputs | drawn | {"initial_state": drawn["initial_state"].repeat(2, 1, 1)}
        return DPOTrainer.compute_loss(self, model, inputs, return_outputs, **kwargs)

    @torch.no_grad()
    def _probe_recurrence(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Probe on the chosen answers."""
        pairs = len(inputs["input_ids"]) // 2
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        chosen = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}
        super()._probe_recurrence(model, {name: rows[:pairs] for name, rows in chosen.items()})


def prepare_models(trainer: Trainer) -> None:
    """Complete what TRL does to the models of a trainer. The copy of fresh adapters that it makes as the reference
    goes: the model without any is the same. Its `disable_dropout` gets the dropout of attention, too.
    """
    model = trainer.model
    if isinstance(model, PeftModel) and "ref" in model.peft_config:
        model.delete_adapter("ref")
    models = [model, trainer.ref_model] if trainer.args.disable_dropout else []
    for module in (part for it in models if it is not None for part in it.modules()):
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
