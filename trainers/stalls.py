"""A run that has come to a stand is said: a worker that hangs, a file system, a rank that others wait for."""

import logging
import threading
import time
from typing import Any

from transformers import TrainerCallback, TrainingArguments

logger = logging.getLogger(__name__)

DATA = "the next batch, an evaluation or a checkpoint"


class StallCallback(TrainerCallback):
    """Warns where nothing has happened for a time, and again after twice, four times and so on as long.

    Args:
        seconds: That time.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.waiting_for, self.since, self.step = DATA, time.monotonic(), 0
        self.workers = 0
        self.is_over = threading.Event()

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to monitor."""
        self.end()
        self.is_over = threading.Event()
        self.workers = args.dataloader_num_workers
        self.happened(state, DATA)
        threading.Thread(target=self.watch, args=(self.is_over,), name="stall watch", daemon=True).start()

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """The batches of a step are there."""
        self.happened(state, "the end of the step, for which ranks wait for each other")

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """What comes next needs data."""
        self.happened(state, DATA)

    on_substep_end = on_evaluate = on_prediction_step = on_save = on_step_end

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch no more."""
        self.end()

    def end(self) -> None:
        """Watch no more, also where training is left by an error, of which callbacks hear nothing."""
        self.is_over.set()

    def happened(self, state: Any, waiting_for: str) -> None:
        """Take the time."""
        self.waiting_for, self.since, self.step = waiting_for, time.monotonic(), state.global_step

    def watch(self, is_over: threading.Event) -> None:
        """Look from time to time, until training is over."""
        said, factor = self.since, 1
        while not is_over.wait(self.seconds / 4):
            if self.since != said:
                said, factor = self.since, 1
            passed = time.monotonic() - said
            if passed >= factor * self.seconds:
                logger.warning("%s", self.describe(passed))
                factor *= 2

    def describe(self, passed: float) -> str:
        """What is known, in a line."""
        workers = ""
        if self.waiting_for == DATA and self.workers:
            workers = f" from {self.workers} workers (training.dataloader_num_workers), one of which may hang"
        return (
            f"nothing has happened for {passed:.0f} s: since step {self.step} the run waits for "
            f"{self.waiting_for}{workers}; Ctrl-C twice stops it"
        )
