"""A run that ends by itself when its evaluations get no better."""

from collections.abc import Mapping
from typing import Any

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping where each source of validation is evaluated apart: `Trainer` tells of each of them,
    and only one of these evaluations, or the mean of all, has the metric. The count of evaluations in vain is in each
    checkpoint, and a run that goes on begins with it.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Go on with the count of a checkpoint. That the best model is not loaded at the end needs no warning."""
        self.early_stopping_patience_counter = evaluations_in_vain(state.stateful_callbacks)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float],
        **kwargs: Any,
    ) -> None:
        """Count, if the evaluation has the metric, and stop the run if it is time."""
        if f"eval_{args.metric_for_best_model.removeprefix('eval_')}" in metrics:
            super().on_evaluate(args, state, control, metrics, **kwargs)
            state.stateful_callbacks[type(self).__name__] = self.state()  # `Trainer` does so in checkpoints alone


def evaluations_in_vain(states: Mapping[str, Any]) -> int:
    """Evaluations in vain, one after another, by the states of callbacks in the state of a trainer."""
    state = states.get(EarlyStopping.__name__, {})
    return state.get("attributes", {}).get("early_stopping_patience_counter", 0)


def has_stopped(state: Mapping[str, Any], patience: int | None) -> bool:
    """Whether a run ended by itself in the state of a trainer, as read from its file."""
    return patience is not None and evaluations_in_vain(state.get("stateful_callbacks") or {}) >= patience
