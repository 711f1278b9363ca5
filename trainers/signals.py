"""What SIGTERM and Ctrl-C do to a run: it ends behind the step in progress, with a checkpoint, or at once."""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate.data_loader import DataLoaderAdapter
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Launchers and terminals send the same wish two or three times: to a group, then to each process of it.
SAME_WISH = 1.0
"""Seconds after the first signal within which others mean the same."""
POLL_INTERVAL = 1.0
"""Seconds from one look at the launcher to the next."""


class StopRequest:
    """While it is entered, SIGTERM and SIGINT end this process with 143 and 130.

    They do so at once, except within `deferred`, which the first signal lets come to an end; another one, a second
    later or more, does not wait. Child processes that were forked meanwhile end at once.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.is_deferred = False
        self.pid = os.getpid()
        self.received: float | None = None  # here: a signal of another rank may be known before
        self.old: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # no other can
            self.old = {number: signal.signal(number, self.receive) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
        end_children()

    @property
    def code(self) -> int:
        """What the process ends with: 128 and the number of the signal, as shells say it."""
        return 128 + (self.number or 0)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let what is in it come to an end, or to where it looks at `number`.

        Raises:
            SystemExit: There was a signal.
        """
        self.is_deferred = True
        try:
            yield
        finally:
            self.is_deferred = False
        if self.number is not None:
            say(
                "the run is stopped behind its last step; the same command with --training.resume_from_checkpoint true "
                "does what is left"
            )
            raise SystemExit(self.code)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        if os.getpid() != self.pid:
            os._exit(128 + number)
        name = signal.Signals(number).name
        if self.received is None:
            self.number, self.received = self.number or number, time.monotonic()
            if self.is_deferred:
                say(f"{name}: the run ends behind the step in progress, with a checkpoint; once more ends it at once")
            else:
                say(f"{name}: the run is stopped; the same command goes on from its newest checkpoint, if it has one")
                raise SystemExit(self.code)
        elif time.monotonic() - self.received > SAME_WISH:
            say(f"{name} again: the run is stopped at once")
            end_children()
            os._exit(self.code)


class StopCallback(TrainerCallback):
    """Ends training behind the step in which a signal came, on all ranks behind the same one, with a checkpoint.

    An evaluation in progress comes to its end first. It has to come after the callbacks that finish a checkpoint.
    """

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self.group: Any = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Prepare the way by which ranks agree: on the host, so that no device is waited for."""
        if args.world_size > 1:
            self.group = torch.distributed.new_group(backend="gloo")

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint, and for no evaluation, if there was a signal on any rank."""
        if self.is_agreed():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Do so for the step before, too; where the evaluation decides about saving, the next step does."""
        if self.is_agreed() and args.save_strategy != SaveStrategy.BEST:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave, if that was what the checkpoint is for, or there was a signal meanwhile.

        Raises:
            SystemExit: so that nothing of what comes at the end of a run is done.
        """
        if not self.is_agreed():
            return
        if state.is_world_process_zero:
            logger.warning(
                "stopped by %s behind step %d: saved in %s; the same command with "
                "--training.resume_from_checkpoint true goes on",
                signal.Signals(self.request.number).name,
                state.global_step,
                Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}",
            )
        raise SystemExit(self.request.code)

    def is_agreed(self) -> bool:
        """Whether any rank has a signal, which all have then."""
        if self.group is not None:
            number = torch.tensor(self.request.number or 0)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=self.group)
            self.request.number = int(number) or None
        return self.request.number is not None


def say(line: str) -> None:
    """Write a line on standard error from within a handler, on one rank of each machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, f"{line}\n".encode())


def end_children() -> None:
    """Kill the workers that read the data: they do not listen to SIGTERM, by which Python ends them."""
    children = multiprocessing.active_children()
    if children:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise an error for each
    for child in children:
        child.kill()


# ------------------------------------------------------------------------------------------------ workers and launchers


def sheltered(loader: DataLoader) -> DataLoader:
    """A loader whose workers leave SIGTERM and Ctrl-C, which reach whole groups of processes, to the process that they
    work for: without them it could not come to the end of its step.
    """
    base = loader.base_dataloader if isinstance(loader, DataLoaderAdapter) else loader
    base.worker_init_fn = partial(block_signals, base.worker_init_fn)
    return loader


def block_signals(then: Any, worker: int) -> None:
    """Let the signals of a worker wait for ever, then initialise it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    if then is not None:
        then(worker)


def watch_launcher() -> None:
    """Let this process get a SIGTERM when its launcher ends before it: DeepSpeed's forwards none, and ranks that were
    left alone would go on and keep their devices.
    """
    if "LOCAL_RANK" in os.environ:
        threading.Thread(target=wait_for_the_end_of, args=(launchers(),), name="launcher watch", daemon=True).start()


def launchers() -> dict[int | str, int]:
    """Parents by process ("self" for this one), as long as they belong to the launcher."""
    parents: dict[int | str, int] = {"self": parent_of("self")}
    if "deepspeed.launcher.launch" in command_of(os.getppid()):  # which `deepspeed` has started
        parent = parent_of(os.getppid())
        if "deepspeed" in command_of(parent):
            parents[os.getppid()] = parent
    return parents


def wait_for_the_end_of(parents: dict[int | str, int]) -> None:
    """Returns, and sends the signal, when a process has another parent than before."""
    while all(parent_of(child) == parent for child, parent in parents.items()):
        time.sleep(POLL_INTERVAL)
    os.kill(os.getpid(), signal.SIGTERM)


def parent_of(process: int | str) -> int:
    """The process that has started another, or that has taken it over; 0 if it has ended, or nobody can know."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[1])


def command_of(process: int) -> str:
    """The command line of a process; empty if it has ended, or nobody can know."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
