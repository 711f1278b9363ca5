"""The trainer of recurrent-depth models: draws the depth of each micro-batch, and watches whether depth is used."""

import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from .arguments import RecurrentTrainingArguments
from .resuming import check_weights

logger = logging.getLogger(__name__)

# How libraries refuse an option or miss a package, other than by a ValueError.
REFUSALS = (ImportError, RuntimeError, TypeError)


class RecurrentTrainer(Trainer):
    """`transformers.Trainer` for models that take `num_steps` and `initial_state`.

    The depth of a micro-batch is drawn from (seed, global step, micro-batch) and the initial state of a row from (seed,
    global step, row in the global batch), so that all ranks run the same number of steps (ZeRO-3 gathers weights in
    each of them and would wait forever otherwise), a resumed run repeats the uninterrupted one, and the spread of a
    batch over ranks and micro-batches does not matter.

    Args:
        sample_depth: (recurrence config, *key) -> (steps without gradient, steps with).
        draw_states: (model config, sequence, list of keys, device) -> (rows, sequence, hidden).
        kwargs: As for `transformers.Trainer`.

    Raises:
        ValueError: For options that the libraries refuse; nothing is written then.
    """

    args: RecurrentTrainingArguments

    def __init__(self, *args: Any, sample_depth, draw_states, **kwargs: Any):
        try:
            super().__init__(*args, **kwargs)
        except REFUSALS as error:
            raise ValueError(f"training: {error}") from error
        self.sample_depth, self.draw_states = sample_depth, draw_states
        self.is_recurrent = self.model.config.num_core_layers > 0
        self.last_num_steps: tuple[int, int] | None = None
        self._position = (-1, -1)  # (global step, micro-batch within it) of the forward pass in progress
        self._metrics: dict[str, list[float]] = defaultdict(list)

    def _validate_args(self) -> None:
        """Also builds what options describe and `Trainer` builds when training begins, before it makes a folder."""
        super()._validate_args()
        if self.args.compile_units:
            with naming("torch_compile_backend or torch_compile_mode"):
                self.model.base_model.compile_units(**self.args.compile_options)
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # they take it over when they wrap the weights
            with naming("optim or optim_args"):
                self.create_optimizer()
        with naming("lr_scheduler_type or lr_scheduler_kwargs"):
            unused = torch.optim.SGD(self.model.parameters())
            self.create_scheduler(max(self.args.max_steps, 1), unused)
        self.lr_scheduler = None  # the real one knows how many steps there will be

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        """One micro-batch. `Trainer` does not say which of the step's micro-batches it is, so they are counted here; a
        checkpoint always stands between steps, where the count starts again.
        """
        step, micro_batch = self._position
        self._position = (self.state.global_step, micro_batch + 1 if step == self.state.global_step else 0)
        if self._is_time_to_probe():
            self._probe_recurrence(model, self._prepare_inputs(inputs))
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any):
        """Adds depth and initial state in training, where nobody looks at the logits; evaluation runs at the mean depth
        from the fixed state.
        """
        if model.training:
            inputs = {**inputs, "skip_logits": True}
        if model.training and self.is_recurrent:
            inputs |= self._draw_recurrence(*inputs["input_ids"].shape)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the means of what was gathered since the last log of training."""
        if "loss" in logs:
            logs = {**logs, **{name: sum(values) / len(values) for name, values in self._metrics.items()}}
            self._metrics.clear()
        super().log(logs, *args, **kwargs)

    # -------------------------------------------------------------------------------------------------- depth and state

    def _draw_recurrence(self, batch: int, sequence: int) -> dict[str, Any]:
        """`num_steps` and `initial_state` of the current micro-batch."""
        step, micro_batch = self._position
        config, seed = self.model.config, self.args.seed
        self.last_num_steps = self.sample_depth(config.recurrence, seed, step, micro_batch)
        self._metrics["steps_without_gradient"].append(self.last_num_steps[0])
        self._metrics["steps_with_gradient"].append(self.last_num_steps[1])
        # The order in which accelerate deals out batches: the ranks' batches side by side, micro-batch after
        # micro-batch.
        first = (micro_batch * self.args.world_size + self.args.process_index) * self.args.per_device_train_batch_size
        keys = [(seed, step, first + row) for row in range(batch)]
        states = self.draw_states(config, sequence, keys, self.args.device)
        return {"num_steps": self.last_num_steps, "initial_state": states}

    # ------------------------------------------------------------------------------------------------- is depth in use?

    def _is_time_to_probe(self) -> bool:
        every = self.args.recurrence_logging_steps
        step, micro_batch = self._position
        return self.is_recurrent and every > 0 and step % every == 0 and micro_batch == 0

    @torch.no_grad()
    def _probe_recurrence(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Runs the next batch, on which the model has not been trained yet, at one step and at the mean depth."""
        model.eval()
        with self.compute_loss_context_manager():
            shallow = model(**inputs, num_steps=1, skip_logits=True).loss
            mean_steps = self.model.config.recurrence.mean_steps
            deep = model(**inputs, num_steps=mean_steps, output_states=True, skip_logits=True)
        is_real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        values = {
            "loss_at_1_step": shallow,
            "loss_at_mean_steps": deep.loss,
            "depth_gap": shallow - deep.loss,
            "token_correlation": token_correlation(deep.state, is_real),
        }
        for step, change in enumerate(state_changes(deep.states, is_real), start=1):
            values[f"state_change_{step:02d}"] = change
        means = self.accelerator.reduce(torch.stack([value.float() for value in values.values()]), "mean").tolist()
        for name, value in zip(values, means, strict=True):
            self._metrics[name].append(value)
        self._raise_alarms(dict(zip(values, means, strict=True)))

    def _raise_alarms(self, values: dict[str, float]) -> None:
        step, half = self.state.global_step, self.state.max_steps / 2
        if step >= half and values["depth_gap"] < self.args.depth_gap_alarm:
            logger.warning(
                "step %d: the loss at one core step is only %.4f nats above that at the mean depth (alarm below %g): "
                "the recurrence is being ignored; a lower learning rate or sandwich norms usually help",
                *(step, values["depth_gap"], self.args.depth_gap_alarm),
            )
        if values["token_correlation"] > self.args.token_correlation_alarm:
            logger.warning(
                "step %d: the states of different tokens have a mean correlation of %.3f (alarm above %g): "
                "they are collapsing",
                *(step, values["token_correlation"], self.args.token_correlation_alarm),
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Missing or unexpected weights are errors; `Trainer` warns and trains on."""
        check_weights(resume_from_checkpoint, model or self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)


@contextmanager
def naming(keys: str) -> Iterator[None]:
    """Turn what a library says against training options into a ValueError that names them."""
    try:
        yield
    except (*REFUSALS, ValueError) as error:
        raise ValueError(f"training.{keys}: {error}") from error


def state_changes(states: tuple[torch.Tensor, ...], is_real: torch.Tensor) -> list[torch.Tensor]:
    """|s_i - s_{i-1}| / |s_i| for i = 1 .. r, mean over all tokens but padding.

    Args:
        states: (batch, sequence, hidden) each.
        is_real: (batch, sequence), False where there is padding.
    """
    tokens = [state[is_real] for state in states]  # (tokens, hidden)
    return [((after - before).norm(dim=-1) / after.norm(dim=-1)).mean() for before, after in pairwise(tokens)]


def token_correlation(state: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
    """Mean correlation (cosine after each token's mean over features is taken off) between the states of different
    tokens of a row, over all pairs of all rows; 1 if all tokens have collapsed to one state. Source: Geiping et al.
    2025, section 4.3. Ours leaves out padding, whose states are alike.

    Args:
        state: (batch, sequence, hidden).
        is_real: (batch, sequence), False where there is padding; True more than once in some row.
    """
    state = state.float()
    directions = nn.functional.normalize(state - state.mean(dim=-1, keepdim=True), dim=-1)
    directions = directions.masked_fill(~is_real.unsqueeze(-1), 0)
    tokens = is_real.sum(dim=1)  # (batch,)
    # The sum over all pairs is the squared norm of the sum; the pairs of a token with itself are 1 each.
    pairs = directions.sum(dim=1).square().sum() - directions.square().sum()
    return pairs / (tokens * (tokens - 1)).sum()
