"""How much memory a call takes, in a process of its own."""

import os
from collections.abc import Callable
from contextlib import suppress


def peak_of(call: Callable[[], object]) -> int:
    """Bytes by which the memory of a forked process grows at most while it makes the call, a ValueError of which is no
    failure. Pages of libraries, which a forked process has to find anew, are not counted: how many depends on what the
    tests before have imported.
    """
    reads, writes = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            with open("/proc/self/clear_refs", "w") as file:  # forget the peak of before
                file.write("5")
            before, files = _status("VmRSS"), _status("RssFile")
            with suppress(ValueError):
                call()
            os.write(writes, str(_status("VmHWM") - before - (_status("RssFile") - files)).encode())
        finally:
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as file:
        found = file.read()
    os.waitpid(process, 0)
    return int(found)


def _status(name: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
