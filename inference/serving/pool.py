"""The workers of a server: which one gets a job, and what happens when one dies."""

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any

from .messages import AnswerJob, AnswerMessage, Cancel, End, Failed, Load, ModelCard, Ready, Refusal
from .metrics import Metrics
from .replies import RequestError
from .worker import Settings, run_worker

logger = logging.getLogger(__name__)

GONE = "the worker that had this request has died; ask again"


class LoadingError(ValueError):
    """Workers that cannot load their models."""


@dataclass(eq=False)
class Handle:
    """A worker, as the server sees it."""

    process: Any
    connection: Any
    is_ready: bool = False
    answers: dict[int, asyncio.Queue] = field(default_factory=dict)
    outbox: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)


class Pool:
    """Workers, and the jobs that they have.

    Args:
        settings: What each worker is started with.
        num_workers: How many there are.
        metrics: What is counted.
        devices: The device of each worker; None: what the settings say.
    """

    def __init__(self, settings: Settings, num_workers: int, metrics: Metrics, devices: list[str] | None = None):
        self.settings, self.metrics = settings, metrics
        self.devices = devices or [settings.device] * num_workers
        self.handles: list[Handle] = []
        self.models: tuple[ModelCard, ...] = ()
        self.numbers = itertools.count()
        self.is_ending = False
        self.limits = settings.limits

    # ------------------------------------------------------------------------------------------------------- processes

    async def start(self) -> None:
        """Starts all workers, and waits until they have loaded their models. LoadingError: one cannot."""
        self.loop, self.is_loaded = asyncio.get_running_loop(), asyncio.Event()
        self.failure: str | None = None
        self.handles = [self._spawn(device) for device in self.devices]
        await self.is_loaded.wait()
        if self.failure is not None:
            self.stop()
            raise LoadingError(self.failure)

    def _spawn(self, device: str | None) -> Handle:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        settings = replace(self.settings, device=device)
        process = context.Process(target=run_worker, args=(theirs, settings), daemon=True)
        process.start()
        theirs.close()
        handle = Handle(process, ours)
        threading.Thread(target=self._listen, args=(handle, device), daemon=True).start()
        threading.Thread(target=self._send, args=(handle,), daemon=True).start()
        return handle

    @staticmethod
    def _send(handle: Handle) -> None:
        """Puts messages for a worker into its pipe, which may be full, from a thread of its own."""
        with contextlib.suppress(OSError, ValueError):  # it has died, which its listener says
            while (message := handle.outbox.get()) is not None:
                handle.connection.send(message)

    def _listen(self, handle: Handle, device: str | None) -> None:
        """Hands the messages of a worker, and its end, to the loop of the server."""
        while True:
            try:
                message = handle.connection.recv()
            except (EOFError, OSError):
                message = None
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                self.loop.call_soon_threadsafe(self._take, handle, device, message)
            if message is None:
                return

    def _take(self, handle: Handle, device: str | None, message: Any) -> None:
        if message is None:
            self._replace(handle, device)
        elif isinstance(message, Ready):
            handle.is_ready, self.models = True, message.models
            if all(it.is_ready for it in self.handles):
                self.is_loaded.set()
        elif isinstance(message, Failed):
            self.failure = message.message
            self.is_loaded.set()
        elif isinstance(message, Load):
            self.metrics.take_load(message)
        elif (answers := handle.answers.get(message.number)) is not None:
            answers.put_nowait(message)

    def _replace(self, handle: Handle, device: str | None) -> None:
        """The jobs of a worker that has died fail, and another worker takes its place."""
        handle.is_ready = False
        handle.outbox.put(None)
        self._fail(handle, GONE)
        if self.is_ending or handle not in self.handles:
            return
        handle.process.join(0)
        if not self.is_loaded.is_set():
            self.failure = self.failure or f"a worker ended with code {handle.process.exitcode} while it was loading"
            self.is_loaded.set()
            return
        if self.failure is not None:
            return
        logger.error("a worker has died with code %s; another takes its place", handle.process.exitcode)
        self.metrics.deaths.inc()
        self.handles[self.handles.index(handle)] = self._spawn(device)

    async def drain(self) -> None:
        """Takes no more jobs; those that run have `grace_seconds`, and fail then."""
        self.is_ending = True
        ends = self.loop.time() + self.limits.grace_seconds
        while self.num_jobs and self.loop.time() < ends:
            await asyncio.sleep(0.05)
        for handle in self.handles:
            self._fail(handle, "the server has ended; ask another one")

    @staticmethod
    def _fail(handle: Handle, why: str) -> None:
        for number, answers in handle.answers.items():
            answers.put_nowait(Refusal(number, 503, why))

    def stop(self) -> None:
        """Ends all workers."""
        self.is_ending = True
        for handle in self.handles:
            handle.outbox.put(None)
            handle.process.kill()
            handle.process.join(5)

    # ------------------------------------------------------------------------------------------------------------ jobs

    @property
    def num_ready(self) -> int:
        """Workers that take jobs."""
        return sum(handle.is_ready for handle in self.handles)

    @property
    def num_jobs(self) -> int:
        """Jobs that are not finished."""
        return sum(len(handle.answers) for handle in self.handles)

    def room(self) -> int:
        """Jobs that are taken now. RequestError: no worker is ready."""
        if self.is_ending:
            raise RequestError("the server is ending; ask another one", status=503)
        if not self.num_ready:
            raise RequestError("no worker is ready; ask again in a few seconds", status=503)
        most = self.limits.max_places + self.limits.max_queue
        return sum(most - len(handle.answers) for handle in self.handles if handle.is_ready)

    async def answer(self, job: AnswerJob) -> AsyncIterator[AnswerMessage]:
        """The messages of the worker with most room for a job. Whoever stops listening has it cancelled.

        Raises:
            RequestError: no worker takes it now, refuses it, or has died.
        """
        if self.room() < 1:
            raise RequestError("too many requests are waiting; ask again in a few seconds", status=429)
        handle = min((it for it in self.handles if it.is_ready), key=lambda it: len(it.answers))
        job, answers = replace(job, number=next(self.numbers)), asyncio.Queue()
        handle.answers[job.number] = answers
        is_over = False
        try:
            handle.outbox.put(job)
            while not is_over:
                message = await answers.get()
                is_over = isinstance(message, End | Refusal)
                if isinstance(message, Refusal):
                    raise RequestError(message.message, status=message.status)
                yield message
        finally:
            del handle.answers[job.number]
            if not is_over and handle.is_ready:
                handle.outbox.put(Cancel(job.number))
