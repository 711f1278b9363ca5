"""The end of a process that took part in a process group."""

import os
import subprocess
import sys

from inference import shutdown

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


def test_a_rank_removes_its_buffer_and_no_other(tmp_path, monkeypatch):
    """The names are those that two ranks on a machine without GPU have been seen to leave."""
    monkeypatch.setattr(shutdown, "SHARED_MEMORY", tmp_path)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "21001", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    start = f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1"
    for end in ("21001_0", "21001_1", "22001_1"):
        (tmp_path / f"{start}_{end}").touch()
    shutdown.remove_shared_memory()
    shutdown.remove_shared_memory()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{start}_21001_0", f"{start}_22001_1"]
