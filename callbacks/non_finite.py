"""Losses and gradients that are not finite, and losses that leap: noticed, kept, and acted upon."""

import logging
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from .kept_batches import MOST_SAVED, KeptBatches, save_batch, save_whole

logger = logging.getLogger(__name__)

ACTIONS = ("stop", "skip", "warn", "roll_back")
WINDOW = 64
"""Losses of which the median is the loss that is expected."""
FEWEST = 16
"""Losses without which none is expected."""
SMALLEST_DEVIATION = 0.01
"""Share of the median that a deviation is at least, where losses hardly differ."""


@dataclass
class NonFiniteConfig:
    """Watch over the loss and the gradient norm."""

    action: str = "stop"
    """What a loss or gradient norm that is not finite, or a leap of the loss, leads to: "stop" ends the run with an
    error, "skip" leaves out the update, "roll_back" leaves it out and goes on with the weights and the optimizer of
    the newest whole checkpoint and the data behind that step, "warn" goes on. For "skip" and "roll_back" the host waits
    for the device at each step to see whether it has to."""
    spike_deviations: float | None = None
    """Where given, above 0: a loss is a leap if it is this many standard deviations (estimated by the median absolute
    deviation) above the median of the last 64; 10 spares what batches differ by. The host waits for the device at each
    step."""
    max_rollbacks: int = 3
    """Most times that a run goes back, at least 1, after which it stops."""

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"non_finite.action is {self.action!r}, must be one of {', '.join(ACTIONS)}.")
        if self.spike_deviations is not None and not 0 < self.spike_deviations < math.inf:
            raise ValueError(
                f"non_finite.spike_deviations is {self.spike_deviations}, must be a number above 0; try 10."
            )
        if self.max_rollbacks < 1:
            raise ValueError(f"non_finite.max_rollbacks is {self.max_rollbacks}, must be at least 1.")

    @property
    def is_at_each_step(self) -> bool:
        """Whether each step is looked at before its update, and not the logs alone."""
        return self.action in ("skip", "roll_back") or self.spike_deviations is not None


def check_non_finite(config: NonFiniteConfig, args: Any) -> None:
    """Compare what is asked for with what the arguments of training allow.

    Raises:
        ValueError: the trainer hides losses that are not finite from its logs; or updates, or weights, are DeepSpeed's
            or FSDP's; or there are no checkpoints to go back to.
    """
    if args.logging_nan_inf_filter:
        raise ValueError(
            "logging_nan_inf_filter is true and would hide what callbacks.non_finite watches for: "
            "set training.logging_nan_inf_filter to false."
        )
    asked = "spike_deviations" if config.action in ("stop", "warn") else "action"
    if config.is_at_each_step and args.deepspeed:
        raise ValueError(
            f"callbacks.non_finite.{asked} is {getattr(config, asked)!r}, but with training.deepspeed the gradients "
            "are not in reach: use 'stop' or 'warn', without spike_deviations."
        )
    if config.action == "roll_back" and args.fsdp:
        raise ValueError(
            "callbacks.non_finite.action is 'roll_back', but with training.fsdp the weights are divided among ranks: "
            "use 'skip', 'stop' or 'warn'."
        )
    if config.action == "roll_back" and args.save_strategy == "no":
        raise ValueError(
            "callbacks.non_finite.action is 'roll_back', but training.save_strategy is 'no', and there is nothing to "
            "go back to: save checkpoints, or use 'skip'."
        )


class NonFiniteCallback(TrainerCallback):
    """Checks the loss and the gradient norm of each log, where they are on the host already, or of each step, where an
    option asks for that.

    The losses of single micro-batches stay on the device; they are looked at only when something is wrong, to find the
    first offending micro-batch, which is saved as non_finite/step-N-rank-R.pt in the output folder; where each step is
    looked at, with the weights that it had, in step-N-weights.pt, so that `repeat_loss` gives the same loss. All ranks
    see the same figures, so all act together.

    Args:
        roll_back: Gives the model and the optimizer what the newest whole checkpoint holds, and returns its name; None
            where there is none yet.
        losses: What the trainer takes its losses in with: `begin_step`, `mean_of_step`, `leave_out`.
    """

    def __init__(
        self,
        config: NonFiniteConfig,
        roll_back: Callable[[], str | None],
        losses: Any,
    ) -> None:
        self.config = config
        self.roll_back, self.losses = roll_back, losses
        self.kept = KeptBatches(are_whole=config.is_at_each_step)
        # In the state of the trainer, and so in each checkpoint: a run that goes on acts as one that never ended.
        self.memory: dict[str, Any] = {}

    def on_train_begin(
        self, args: Any, state: TrainerState, control: Any, model: PreTrainedModel, **kwargs: Any
    ) -> None:
        """Start to keep the batches of the model."""
        self.memory = state.stateful_callbacks.setdefault(
            "non_finite", {"losses": [], "num_rollbacks": 0, "num_saved": 0}
        )
        self.kept.begin(model)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Where each step is looked at, let the batches of the last one go."""
        if self.config.is_at_each_step:
            self.kept.batches.clear()
            self.losses.begin_step()

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, model: PreTrainedModel, **kwargs: Any
    ) -> None:
        """Look at the step before its update, if an option asks for that.

        Raises:
            FloatingPointError: it is not finite, or leaps, and the action is "stop", or the run went back too often.
        """
        if not self.config.is_at_each_step:
            return
        step = state.global_step + 1
        reason = self.reason_against(step, model)
        if reason is not None:
            where = self.save_offending(args, step, model)
            logger.warning("%s: %s. %s", reason, self.act(reason, where, model, args), where)

    def reason_against(self, step: int, model: nn.Module) -> str | None:
        """What is wrong with a step, as the beginning of a sentence; None if nothing is."""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            return f"The gradient of step {step} is not finite"
        loss = self.losses.mean_of_step()
        if not math.isfinite(loss):
            return f"The loss of step {step} is not finite"
        if self.config.spike_deviations is None:
            return None
        before = self.memory["losses"]
        expected = spread = 0.0
        if len(before) >= FEWEST:
            expected, spread = median_and_deviation(before)
        is_leap = len(before) >= FEWEST and loss > expected + self.config.spike_deviations * spread
        before[:] = [*before, loss][-WINDOW:]  # a leap, too: what lasts becomes what is expected
        if not is_leap:
            return None
        return (
            f"The loss of step {step} is {loss:.4g}, {(loss - expected) / spread:.1f} standard deviations above the "
            f"median {expected:.4g}"
        )

    def act(self, reason: str, where: str, model: nn.Module, args: Any) -> str:
        """Do what the action says; a sentence's end that says what was done.

        Raises:
            FloatingPointError: the run is to stop.
        """
        action, most = self.config.action, self.config.max_rollbacks
        if action == "warn":
            return "the run goes on"
        if action == "stop":
            raise FloatingPointError(f"{reason}. {where} callbacks.non_finite.action: skip or roll_back goes on.")
        if action == "roll_back" and self.memory["num_rollbacks"] >= most:
            raise FloatingPointError(
                f"{reason}, and the run has gone back {most} times (callbacks.non_finite.max_rollbacks). {where} Lower "
                "the learning rate, or look at the data."
            )
        model.zero_grad(set_to_none=True)  # so that the optimizer has nothing to do
        self.losses.leave_out()
        checkpoint = self.roll_back() if action == "roll_back" else None
        if checkpoint is None:
            return "its update is skipped" + ", as there is no checkpoint yet" * (action == "roll_back")
        self.memory["num_rollbacks"] += 1
        # What is expected of the weights of then, not of those that the run had by now.
        then = TrainerState.load_from_json(str(Path(args.output_dir, checkpoint, TRAINER_STATE_NAME)))
        self.memory["losses"][:] = then.stateful_callbacks.get("non_finite", {"losses": []})["losses"]
        return f"the run goes on with {checkpoint} and the data behind this step"

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Act if the log of a training step is not finite; where each step is looked at, that is done.

        Raises:
            FloatingPointError: it is not, and the action is "stop".
        """
        if "loss" not in logs or self.config.is_at_each_step:
            return
        watched = {name: float(logs[name]) for name in ("loss", "grad_norm") if logs.get(name) is not None}
        bad = {name: value for name, value in watched.items() if not math.isfinite(value)}
        if bad:
            figures = ", ".join(f"{name} is {value}" for name, value in bad.items())
            message = (
                f"At step {state.global_step} the {figures}. {self.save_offending(args, state.global_step)} Lower the "
                "learning rate or the clipping norm, or look at the batch; callbacks.non_finite.action: skip, warn or "
                "roll_back goes on."
            )
            if self.config.action == "stop":
                raise FloatingPointError(message)
            logger.warning("%s", message)
        self.kept.batches.clear()

    def save_offending(self, args: Any, step: int, model: nn.Module | None = None) -> str:
        """Save the first micro-batch with a loss that is not finite, else the last one, and the weights of the model,
        if it is given; a sentence that says which.
        """
        batches, memory = self.kept.batches, self.memory
        if not batches:
            return "No batch of this window was kept."
        memory["num_saved"] += 1
        if memory["num_saved"] > MOST_SAVED:
            return f"It is not saved, as {MOST_SAVED} steps are already."
        offending = self.kept.first_not_finite()
        which = (
            "last batch (all kept losses are finite)" if offending is None else "first batch whose loss is not finite"
        )
        path = Path(args.output_dir, "non_finite", f"step-{step}-rank-{args.process_index}.pt")
        save_batch(path, offending or batches[-1], step, args)
        if model is not None and args.process_index == 0 and not args.fsdp:
            save_whole(path.with_name(f"step-{step}-weights.pt"), model.state_dict())
        return f"The {which} on rank {args.process_index} is in {path}."

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Let the batches go."""
        self.kept.end()


def median_and_deviation(values: list[float]) -> tuple[float, float]:
    """The median, and an estimate of the standard deviation that single values do not move: 1.4826 times the median
    absolute deviation, which of normal values is their standard deviation.
    """
    median = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(value - median) for value in values)
    return median, max(deviation, SMALLEST_DEVIATION * abs(median), sys.float_info.min)
