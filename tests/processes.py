"""Processes of Python that begin with the libraries imported, since their import is most of what a short command takes.

A server imports them once and forks for each process. Our own code is imported by the process itself. What starts a
command as its user does, or has to begin with nothing, is not for here.
"""

import atexit
import functools
import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
LIBRARIES = ["torch", "transformers.trainer", "deepspeed", "torchmetrics.functional.audio", "trl", "jsonargparse"]
LIBRARIES += ["torch.utils.tensorboard", "pytest", "tests.processes"]


class Python:
    """A process that runs `python WORDS`.

    Args:
        words: A script, `-m` and a module, or `-c` and code; then its arguments.
        cwd: Its current folder.
        environment: All variables of its environment.
    """

    def __init__(self, words: Sequence[Any], cwd: Path | str, environment: Mapping[str, str]):
        self.words = list(map(str, words))
        self._folder = tempfile.TemporaryDirectory()
        files = [os.path.join(self._folder.name, name) for name in ("stdout", "stderr")]
        arguments = (self.words, str(cwd), dict(environment), files)
        self._process: BaseProcess = server().Process(target=run_here, args=arguments)
        self._process.start()
        self.sentinel = self._process.sentinel

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.exitcode

    def finish(self, seconds: float | None = None) -> CompletedProcess:
        """Wait for its end, and end it after so many seconds; the process, finished, with what it has written."""
        try:
            self._process.join(seconds)
        finally:
            self._process.kill()
        self._process.join()
        with self._folder as folder:
            written = [(Path(folder) / name).read_text(errors="replace") for name in ("stdout", "stderr")]
        return CompletedProcess(self.words, self.code, *written)


@functools.cache
def server() -> ForkServerContext:
    """The server. It sees no GPU, and nothing is yet in the folder to which the libraries copy the code of checkpoints,
    whatever the environment of a process says.
    """
    home = tempfile.TemporaryDirectory()
    atexit.register(home.cleanup)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with mock.patch.dict(os.environ, {"HF_MODULES_CACHE": home.name, "CUDA_VISIBLE_DEVICES": ""}):
        forkserver.ensure_running()
    return context


def run_here(words: list[str], cwd: str, environment: dict[str, str], files: list[str]) -> None:
    """Make this process the one that Python would have made."""
    gc.freeze()
    # What the process starts, such as workers that read data, starts in Python's usual way again. As children of the
    # server they would import all of our code first.
    multiprocessing.set_start_method(None, force=True)
    for number, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    first, *arguments = words
    places = [cwd if first in ("-m", "-c") else str(Path(first).parent)]
    places += [place for place in environment.get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.path[:] = [*places, *(place for place in sys.path if place and Path(place) != ROOT)]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    if first == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        main = sys.modules["__main__"] = ModuleType("__main__")
        sys.argv = ["-c", *arguments[1:]]
        exec(compile(arguments[0], "<string>", "exec"), vars(main))
    else:
        sys.argv = words
        runpy.run_path(first, run_name="__main__")


def run_python(*words: Any, cwd: Path | str = ROOT, environment: Mapping[str, str] | None = None) -> CompletedProcess:
    """`python WORDS`, finished. Code begins with nothing imported, and in an empty folder for the code of checkpoints:
    a process that is forked is so fast that Python takes files that were just copied there for missing.
    """
    environment = environment or os.environ
    if words[0] != "-c":
        return Python(words, cwd, environment).finish()
    with tempfile.TemporaryDirectory() as home:
        environment = {**environment, "HF_MODULES_CACHE": home}
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def run_ranks(*words: Any, count: int, cwd: Path | str = ROOT) -> list[CompletedProcess]:
    """The same as several ranks, on the CPU, with the environment that a launcher gives to each; as there, all end soon
    after one has failed, for which they would wait.
    """
    shared = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    ranks = [Python(words, cwd, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]
    while not any(rank.code for rank in ranks) and (going := [rank for rank in ranks if rank.code is None]):
        wait([rank.sentinel for rank in going])
    return [rank.finish(10) for rank in ranks]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
