"""How callbacks report, to whatever `report_to` names, and what those that let the model write every few steps share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Reporter:
    """Hands texts and numbers to the reporting callbacks of a trainer, without the console and without the log history.

    Only rank 0 writes: the reporting callbacks see to that.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.handler = trainer.callback_handler

    def write(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, texts: Mapping[str, str | float]
    ) -> None:
        """Write each text or number under its name at the current step; TensorBoard shows `name` as train/name."""
        kinds = tuple(get_reporting_integration_callbacks(args.report_to))
        for callback in self.handler.callbacks:
            if isinstance(callback, kinds):
                callback.on_log(args, state, control, logs=dict(texts), model=self.handler.model)

    def summary_writer(self) -> SummaryWriter | None:
        """TensorBoard's, for what is no text; None on ranks other than 0, and where the run does not report there."""
        found = [callback for callback in self.handler.callbacks if isinstance(callback, TensorBoardCallback)]
        return found[0].tb_writer if found else None


class ReportingCallback(TrainerCallback):
    """A callback with a reporter of its own."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter


class PeriodicCallback(ReportingCallback):
    """Lets the model write every few steps and at the end.

    All ranks generate (under ZeRO-3 none has the whole model), with the same tokens; rank 0 writes. The random state of
    the training is left as it was, and so is the mode (train or eval) of the model.

    Args:
        every_steps: optimizer steps from one time to the next.
    """

    def __init__(self, every_steps: int, reporter: Reporter) -> None:
        super().__init__(reporter)
        self.every_steps = every_steps
        self.last_step: int | None = None

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs,
    ) -> None:
        """Write if this step is due."""
        if state.global_step % self.every_steps == 0:
            self.last_step = state.global_step
            self.write_all(args, state, control, model)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs,
    ) -> None:
        """Write unless the last step did."""
        if state.global_step != self.last_step:
            self.write_all(args, state, control, model)

    @abstractmethod
    def write_all(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: PreTrainedModel
    ) -> None:
        """All that the model writes at this step, to where the run reports to."""


class WritingCallback(PeriodicCallback):
    """Lets the model write texts."""

    def write_all(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: PreTrainedModel
    ) -> None:
        """All texts of this step, where the run reports to."""
        self.reporter.write(args, state, control, self.texts(model, state))

    @abstractmethod
    def texts(self, model: PreTrainedModel, state: TrainerState) -> dict[str, str]:
        """Markdown by name."""


def depths_of(model: PreTrainedModel, num_steps: list[int]) -> list[int | None]:
    """The depths to write at: None, for no argument, where the model has no core."""
    return num_steps if model.config.get_text_config().num_core_layers else [None]


@contextmanager
def aside(model: PreTrainedModel, seed: int = 0) -> Iterator[None]:
    """Let a model that is being trained generate, with draws from `seed`, and leave everything as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seed)
            yield
    finally:
        model.train(was_training)


def verbatim(text: str) -> str:
    """A code block of Markdown."""
    return "\n".join(f"    {line}" for line in text.splitlines())
