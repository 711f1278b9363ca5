"""Recurrent depth for trainers that know nothing of it, such as `transformers.Trainer` and those of TRL."""

from typing import Any

from torch import nn
from transformers import TrainerCallback

from .depth import sample_depth
from .recurrence import draw_training_states


class RecurrentDepthCallback(TrainerCallback):
    """Draws the depth of each micro-batch from (seed, global step, micro-batch), and the initial state of each row from
    (seed, global step, row in the global batch), so that all ranks take the same steps and a resumed run repeats the
    uninterrupted one. The seed is that of the training arguments.

    The model gets them while it trains, in every call that names none itself; an evaluation has the mean depth and the
    fixed state.
    """

    def __init__(self) -> None:
        self.key = (0, 0, 0)  # (seed, global step, micro-batch)
        self.hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Adds depth and states to the arguments of the model, of PEFT's too; ValueError if it has no core."""
        config = model.config.get_text_config()
        if config.num_core_layers == 0:
            raise ValueError("RecurrentDepthCallback draws depths, but this model has no core; leave it out")

        def add(module: nn.Module, inputs: tuple, given: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            if not module.training or given.get("num_steps") is not None:
                return None
            drawn = {"num_steps": sample_depth(config.recurrence, *self.key)}
            tokens = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
            tokens = inputs[0] if tokens is None else tokens
            if given.get("initial_state") is None:
                drawn["initial_state"] = draw_training_states(
                    config, tokens.shape[1], self._row_keys(args, len(tokens)), tokens.device
                )
            return inputs, given | drawn

        self.hooks = [model.register_forward_pre_hook(add, with_kwargs=True)]

    def _row_keys(self, args: Any, rows: int) -> list[tuple[int, int, int]]:
        """(seed, global step, row in the global batch) of the rows of this micro-batch, as accelerate assigns them."""
        seed, step, micro_batch = self.key
        first = (micro_batch * args.world_size + args.process_index) * args.per_device_train_batch_size
        return [(seed, step, first + row) for row in range(rows)]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin with the first micro-batch of a step."""
        self.key = (args.seed, state.global_step, 0)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on with the next."""
        seed, step, micro_batch = self.key
        self.key = (seed, step, micro_batch + 1)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model as it was."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
