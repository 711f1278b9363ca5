"""The end of a process that took part in a process group."""

import subprocess
import sys

PROGRAM = """
import atexit, sys, threading
from inference.shutdown import end_process

class Witness:
    def __del__(self):
        print("taken apart", flush=True)

witness = Witness()
atexit.register(print, "registered for the exit")
print("not flushed yet")
threading.Thread(target=lambda: print("the other thread")).start()
{end}
"""


def run(end):
    return subprocess.run([sys.executable, "-c", PROGRAM.format(end=end)], capture_output=True, text=True, timeout=60)


def test_all_is_said_and_done_but_nothing_taken_apart():
    """Compared with how Python ends: the same lines and the same code, without the finalizers of what modules hold."""
    ours, pythons = run("end_process(3)"), run("sys.exit(3)")
    assert ours.stderr == pythons.stderr == ""
    assert ours.returncode == pythons.returncode == 3
    assert pythons.stdout == ours.stdout + "taken apart\n"
    assert sorted(ours.stdout.splitlines()) == ["not flushed yet", "registered for the exit", "the other thread"]
