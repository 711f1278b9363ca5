"""How a callback reports: to whatever `report_to` names, TensorBoard or another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
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
