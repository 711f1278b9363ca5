"""How fast the training goes."""

import time
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerState


class ThroughputCallback(TrainerCallback):
    """Adds to each training log the speed since the log before; saving and forward passes outside training (evaluation,
    samples, the trainer's probes of depth) do not count, nor does the wait for data right after them.

    - tokens_per_second: training tokens of all ranks, padding included; ranks are taken to have equal shares;
    - core_steps_per_second: applications of the core to a micro-batch, on one rank, those without gradient included.

    Counts are made on the host, from shapes and arguments of the forward passes: nothing waits for the device. The
    callback goes before the reporting ones, so that they see its figures.
    """

    def __init__(self) -> None:
        self.hook: torch.utils.hooks.RemovableHandle | None = None
        self.mark = 0.0  # up to when time is counted, or left out
        self.interrupted = False
        self.reset()

    def reset(self) -> None:
        """Begin a new interval."""
        self.tokens, self.core_steps, self.seconds = 0, 0, 0.0

    def on_train_begin(
        self, args: Any, state: TrainerState, control: Any, model: PreTrainedModel, **kwargs: Any
    ) -> None:
        """Start counting the forward passes of the model."""
        self.hook = model.register_forward_pre_hook(self.count, with_kwargs=True)
        self.mark = time.perf_counter()

    def count(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        if not model.training:
            self.interrupt()
            return
        if self.interrupted:
            self.mark = time.perf_counter()
            self.interrupted = False
        self.tokens += kwargs["input_ids"].numel()
        config = model.config.get_text_config()
        if config.num_core_layers:
            self.core_steps += count_steps(kwargs.get("num_steps"), config)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Count the time of the step and of the wait for its data."""
        self.count_time()

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Leave the time out."""
        self.interrupt()

    def interrupt(self) -> None:
        """Leave out what comes until the next forward pass of the training."""
        if not self.interrupted:
            self.count_time()
        self.interrupted = True

    def count_time(self) -> None:
        """Count the time up to now."""
        now = time.perf_counter()
        self.seconds += now - self.mark
        self.mark = now

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Add the figures to the log of a training step and to the history."""
        if "loss" not in logs or self.seconds == 0:
            return
        figures = {"tokens_per_second": self.tokens * args.world_size / self.seconds}
        if self.core_steps:
            figures["core_steps_per_second"] = self.core_steps / self.seconds
        logs.update(figures)
        state.log_history[-1].update(figures)
        self.reset()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Stop counting."""
        self.hook.remove()


def count_steps(num_steps: int | tuple[int, int] | torch.Tensor | None, config: Any) -> int:
    """Core steps that a forward pass with this argument takes.

    A tensor counts as the mean depth, since reading it would wait for the device.
    """
    if isinstance(num_steps, int):
        return num_steps
    if isinstance(num_steps, (tuple, list)):
        return sum(num_steps)
    return config.num_steps or config.recurrence.mean_steps
