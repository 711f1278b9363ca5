"""A run from its configuration to its end: what the scripts that train have in common."""

import copy
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from datasets import disable_progress_bars
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainingArguments

from callbacks import ModelCardWriter, StabilityError, sources_of
from inference.devices import choose_threads, device_report
from inference.logs import set_up_logging
from trainers.checkpoints import NoSpaceError
from trainers.locks import RunLock
from trainers.resuming import TRAINER_STATE_NAME, ResumeError, save_state_of
from trainers.sharding import NotShardedError
from trainers.signals import StopCallback, StopRequest, watch_launcher

from .resuming import Start, config_text, find_start
from .runs import ResolvedConfig, one_line_errors

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class NoRowsError(ValueError):
    """Data of which not one row came, as only their end shows."""


ENDINGS = (
    *(ResumeError, NoRowsError, NoSpaceError, NotShardedError, OSError, SafetensorError),
    *(StabilityError, FloatingPointError),
)
"""Errors that end training with a line for people; the last two are alarms."""


def set_up_output(log_level: str) -> None:
    """Logs of this rank, and progress bars where somebody sees them."""
    rank = int(os.environ.get("RANK", "0"))
    set_up_logging(log_level, rank)
    if rank != 0 or not sys.stderr.isatty():
        disable_progress_bars()


def run_training(run: ResolvedConfig, build: Callable[[ResolvedConfig, str | None], Trainer]) -> int:
    """Build the trainer of a run, train, and leave.

    Args:
        build: run and checkpoint to go on from -> trainer.

    Raises:
        SystemExit: the input is bad, or an alarm ends the run, with code 2; after SIGTERM or Ctrl-C, with 143 or 130.
    """
    logger.info("%s", device_report())
    args, lock = run.training, RunLock(run.training.output_dir)
    with StopRequest() as request, leaving(lock):
        watch_launcher()
        with one_line_errors():
            args.check_launcher()
            start = decide(lambda: begin_run(run, lock), args)
            if start.is_finished:
                logger.info("%s holds the finished run: nothing is left to do", args.output_dir)
                return 0
            trainer = build(run, start.checkpoint)
            decide(lock.take, args)
        choose_threads(trainer.model)
        card = ModelCardWriter(run.resolved, sources_of(run.data))
        trainer.config_text = config_text(run)
        trainer.add_callback(ConfigWriter(run))
        trainer.add_callback(card)
        trainer.stop = StopCallback(request)
        with one_line_errors(ENDINGS):
            with request.deferred():
                trainer.train(resume_from_checkpoint=start.checkpoint)
                if trainer.state.global_step == 0:
                    raise NoRowsError(
                        "data.train: not one row came of it, and nothing was trained; look at its sources"
                    )
                trainer.save_model()
            finish(trainer, card)
    return 0


@contextmanager
def leaving(lock: RunLock) -> Iterator[None]:
    """A context behind which the ranks have parted and the output folder is free, however it ends."""
    try:
        yield
    finally:
        # Left open, the group makes the launcher wait, or report a failure that was none.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        lock.release()


def begin_run(run: ResolvedConfig, lock: RunLock) -> Start:
    """Where a run begins, in a folder that no other run writes to; a folder that is not there yet is not made."""
    start = find_start(run)
    if not start.is_finished:
        lock.take(may_make_folder=False)
    if start.checkpoint is None and start.may_be_complete:
        logger.warning("%s holds no whole checkpoint to go on from: the run begins anew", run.training.output_dir)
    return start


def decide(choose: Callable[[], Answer], args: TrainingArguments) -> Answer:
    """The result of the first rank, or the ValueError or OSError that it raises, on all ranks: each might find another
    thing in a folder that is being written.
    """
    if args.world_size == 1:
        return choose()
    answer: list = [None, None]
    if args.process_index == 0:
        try:
            answer[0] = choose()
        except (ValueError, OSError) as error:
            answer[1] = str(error)
    torch.distributed.broadcast_object_list(answer, src=0, device=args.device)
    if answer[1] is not None:
        raise ValueError(answer[1])
    return answer[0]


class ConfigWriter(TrainerCallback):
    """Writes config.yaml when training begins: all is built and loaded then, and no refused start has replaced the file
    of an earlier run. The state of a finished run that is replaced is removed: it would say that this one is finished.
    """

    def __init__(self, run: ResolvedConfig) -> None:
        self.run = run

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Write it, on the first rank."""
        if state.is_world_process_zero:
            self.run.save(os.path.join(args.output_dir, "config.yaml"))
            if state.global_step == 0:
                Path(args.output_dir, TRAINER_STATE_NAME).unlink(missing_ok=True)


def finish(trainer: Trainer, card: ModelCardWriter) -> None:
    """Evaluate what is trained and saved; last write the state, which says that all of the run is there."""
    state = copy.deepcopy(trainer.state)  # the evaluation below has a file of its own, and is none that counts
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    logger.info("%s", ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if "runtime" not in name))
    if trainer.is_world_process_zero():
        card.write(trainer.args.output_dir, trainer.model, trainer.state)
        save_state_of(state, trainer.args.output_dir)
