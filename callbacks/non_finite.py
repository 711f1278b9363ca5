"""Losses and gradients that are not finite: noticed, kept, and acted upon."""

import logging
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, TrainerCallback, TrainerState

logger = logging.getLogger(__name__)

ACTIONS = ("stop", "skip", "warn")
KEPT_BATCHES = 64
"""Micro-batches that are kept for inspection until the next log."""


@dataclass
class NonFiniteConfig:
    """Watch over the loss and the gradient norm."""

    action: str = "stop"
    """What a loss or gradient norm that is not finite leads to: "stop" ends the run with an error, "skip" leaves out
    the update (and waits for the device at each step to see whether it has to), "warn" goes on."""

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"non_finite.action is {self.action!r}, must be one of {', '.join(ACTIONS)}.")


@dataclass
class MicroBatch:
    """What went into one forward pass, and its loss; references, nothing is copied."""

    inputs: dict[str, torch.Tensor]
    num_steps: Any
    loss: torch.Tensor | None


class NonFiniteCallback(TrainerCallback):
    """Checks the loss and the gradient norm of each log, where they are on the host already.

    The losses of single micro-batches stay on the device; they are looked at only when a log is not finite, to find the
    first offending micro-batch, which is saved as non_finite/step-N-rank-R.safetensors in the output folder. All ranks
    see the same logs, so all stop together.
    """

    def __init__(self, config: NonFiniteConfig) -> None:
        self.config = config
        self.batches: deque[MicroBatch] = deque(maxlen=KEPT_BATCHES)
        self.hook: torch.utils.hooks.RemovableHandle | None = None

    def on_train_begin(
        self, args: Any, state: TrainerState, control: Any, model: PreTrainedModel, **kwargs: Any
    ) -> None:
        """Start to keep the batches of the model.

        Raises:
            ValueError: the trainer hides losses that are not finite from its logs, or updates are to be skipped that
                DeepSpeed makes.
        """
        if self.config.action == "skip" and args.deepspeed:
            raise ValueError(
                "callbacks.non_finite.action is 'skip', but with training.deepspeed the gradients are not in reach: "
                "use 'stop' or 'warn'."
            )
        if args.logging_nan_inf_filter:
            raise ValueError(
                "logging_nan_inf_filter is true and would hide what callbacks.non_finite watches for: "
                "set training.logging_nan_inf_filter to false."
            )
        self.hook = model.register_forward_hook(self.keep, with_kwargs=True)

    def keep(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook."""
        if model.training:
            tensors = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
            inputs = {name: value for name, value in tensors.items() if not value.is_floating_point()}
            loss = output.loss.detach() if output.loss is not None else None
            self.batches.append(MicroBatch(inputs, kwargs.get("num_steps"), loss))

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, model: PreTrainedModel, **kwargs: Any
    ) -> None:
        """Take away gradients that are not finite, so that the optimizer has nothing to do."""
        if self.config.action != "skip":
            return
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            logger.warning("The gradient of step %d is not finite: its update is skipped.", state.global_step + 1)
            model.zero_grad(set_to_none=True)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Act if the log of a training step is not finite.

        Raises:
            FloatingPointError: it is not, and the action is "stop".
        """
        if "loss" not in logs:
            return
        watched = {name: float(logs[name]) for name in ("loss", "grad_norm") if logs.get(name) is not None}
        bad = {name: value for name, value in watched.items() if not math.isfinite(value)}
        if bad:
            figures = ", ".join(f"{name} is {value}" for name, value in bad.items())
            where = self.save_offending(Path(args.output_dir), state.global_step, args.process_index)
            message = (
                f"At step {state.global_step} the {figures}. {where} Lower the learning rate or the clipping norm, or "
                "look at the batch; callbacks.non_finite.action: skip or warn goes on."
            )
            if self.config.action == "stop":
                raise FloatingPointError(message)
            logger.warning("%s", message)
        self.batches.clear()

    def save_offending(self, folder: Path, step: int, rank: int) -> str:
        """Save the first micro-batch with a loss that is not finite, else the last one; a sentence that says which."""
        if not self.batches:
            return "No batch of this window was kept."
        offending = [batch for batch in self.batches if batch.loss is not None and not batch.loss.isfinite().all()]
        batch = offending[0] if offending else self.batches[-1]
        which = "first batch whose loss is not finite" if offending else "last batch (all kept losses are finite)"
        path = folder / "non_finite" / f"step-{step}-rank-{rank}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.cpu().contiguous() for name, value in batch.inputs.items()}
        save_file(tensors, path, metadata={"num_steps": str(batch.num_steps), "step": str(step)})
        return f"The {which} on rank {rank} is in {path}."

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Let the batches go."""
        self.hook.remove()
        self.batches.clear()
