"""The end of a command: of a process that took part in a process group, and by Ctrl-C."""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NoReturn

SHARED_MEMORY = Path("/dev/shm")


def run_to_the_end(main: Callable[[], int]) -> NoReturn:
    """Run a command and leave with its code, also where it leaves by SystemExit."""
    try:
        code = main()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    end_process(code)


def say_errors(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Says errors, as `sys.excepthook`: Ctrl-C ends a command with one line and code 130, as shells know it."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    sys.stdout.flush()
    sys.stderr.write("stopped by Ctrl-C\n")
    sys.stderr.flush()
    os._exit(128 + signal.SIGINT)


def end_process(code: int) -> NoReturn:
    """Do what Python does at its end, except taking the interpreter apart.

    DeepSpeed keeps its process groups after `destroy_process_group`, and with them gloo's threads. One that lets go of
    a tensor while the interpreter is being finalized cannot get its lock any more, and the process aborts after all
    its work is done ("terminate called without an active exception", https://github.com/pytorch/pytorch/pull/179291).
    """
    threading._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    remove_shared_memory()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def remove_shared_memory() -> None:
    """Removes the buffer by which DeepSpeed's ranks on one machine exchange tensors without a GPU. DeepSpeed leaves it:
    66 MiB of memory for each rank of each run, until the machine is started again.
    """
    group = (os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    name = "_".join(("deepspeed_allreduce_buffer", str(os.getuid()), *map(str, group)))  # as in its shm_initialize
    (SHARED_MEMORY / name).unlink(missing_ok=True)
