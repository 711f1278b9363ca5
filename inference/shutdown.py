"""The end of a process that took part in a process group."""

import atexit
import os
import sys
import threading
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """Do what Python does at its end, except taking the interpreter apart.

    DeepSpeed keeps its process groups after `destroy_process_group`, and with them gloo's threads. One that lets go of
    a tensor while the interpreter is being finalized cannot get its lock any more, and the process aborts after all
    its work is done ("terminate called without an active exception", https://github.com/pytorch/pytorch/pull/179291).
    """
    threading._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
