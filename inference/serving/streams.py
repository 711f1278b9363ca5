"""Streams: of workers' messages, and of the events that are made of them."""

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import aclosing
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..calculator import called_expression
from .messages import AnswerMessage, End, ImagePiece
from .replies import CallHolder, Reply, RequestError, error_content, event, usage

HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}

# --------------------------------------------------------------------------------------------------------------- events


class TimedStream(StreamingResponse):
    """A stream that ends after a time, and closes what it reads from, also when its client goes.

    Args:
        content: The events.
        seconds: The most time.
    """

    def __init__(self, content: AsyncIterator[str], seconds: float):
        super().__init__(with_error(content), media_type="text/event-stream", headers=HEADERS)
        self.content, self.seconds = content, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.content):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.seconds):
                    await super().__call__(scope, receive, send)


async def with_error(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Events, of which the last is an error if there is one."""
    try:
        async for text in events:
            yield text
    except RequestError as error:
        yield event(error_content(str(error), error.status))


async def reply_events(
    reply: Reply,
    streams: Sequence[AsyncGenerator[AnswerMessage]],
    parts: Callable[[int, AnswerMessage], list[dict[str, Any]]],
    wants_usage: bool,
) -> AsyncIterator[str]:
    """The events of a reply.

    Args:
        reply: Its head.
        streams: The messages of each choice.
        parts: Makes choices of events of the number of a choice and a message.
        wants_usage: Whether tokens and steps are told at the end.
    """
    ends = []
    for index in range(len(streams)):
        if (first := reply.first(index)) is not None:
            yield event(reply.chunk([first]))
    async with aclosing(merged(streams)) as messages:
        async for index, message in messages:
            for part in parts(index, message):
                yield event(reply.chunk([part]))
            if isinstance(message, End):
                ends.append(message)
    if wants_usage:
        yield event(reply.chunk([], usage=usage(ends)))
    yield event("[DONE]")


class TextParts:
    """The choices of events with text. What may be a call of a tool is held back.

    Args:
        reply: The head of the reply.
        count: The number of choices.
        has_likelihoods: Whether probabilities are told.
    """

    def __init__(self, reply: Reply, count: int, has_likelihoods: bool):
        self.reply, self.has_likelihoods = reply, has_likelihoods
        self.holders = [CallHolder() for _ in range(count)] if reply.has_tools else None

    def __call__(self, index: int, message: AnswerMessage) -> list[dict[str, Any]]:
        """Those of a message."""
        holder, is_end = self.holders[index] if self.holders else None, isinstance(message, End)
        text, tokens = ("", ()) if is_end else (message.text, message.tokens)
        if holder is not None:
            text, tokens = holder.take() if is_end else holder.push(message)
        expression = called_expression(text) if is_end and holder is not None and holder.is_open else None
        parts = []
        if tokens and expression is None:
            parts.append(self.reply.piece(index, text, tokens, self.has_likelihoods))
        if is_end:
            parts.append(self.reply.last(index, message.finish_reason, expression))
        return parts


def media_parts(reply: Reply, kind: str, index: int, message: ImagePiece | End) -> list[dict[str, Any]]:
    """The choices of events with an image, as it is drawn, or a sound."""
    drawn = reply.drawn(index, kind, message)
    return [drawn, reply.last(index, "stop", None)] if isinstance(message, End) else [drawn]


async def image_events(stream: AsyncGenerator[ImagePiece | End]) -> AsyncIterator[str]:
    """The events of an image that is drawn, as `/v1/images/generations` has them."""
    count = 0
    async with aclosing(stream):
        async for message in stream:
            name = f"image_generation.{'completed' if isinstance(message, End) else 'partial_image'}"
            content = {"type": name, "b64_json": base64.b64encode(message.media).decode("ascii")}
            content |= {"created_at": int(time.time()), "output_format": "png"}
            if isinstance(message, End):
                content["usage"] = {"input_tokens": message.prompt_tokens}
            else:
                content, count = {**content, "partial_image_index": count}, count + 1
            yield event(content, name)


# ------------------------------------------------------------------------------------------------------------- messages


async def again(first: AnswerMessage, stream: AsyncIterator[AnswerMessage]) -> AsyncGenerator[AnswerMessage]:
    """A stream with what was taken from it."""
    async with aclosing(stream):
        yield first
        async for message in stream:
            yield message


async def merged(streams: Sequence[AsyncGenerator[Any]]) -> AsyncIterator[tuple[int, Any]]:
    """The messages of several streams as they come, each with the number of its stream."""
    waiting = {asyncio.ensure_future(anext(stream, None)): index for index, stream in enumerate(streams)}
    try:
        while waiting:
            ready, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in ready:
                index, message = waiting.pop(task), task.result()
                if message is not None:
                    waiting[asyncio.ensure_future(anext(streams[index], None))] = index
                    yield index, message
    finally:
        await ended(waiting)
        for stream in streams:
            await stream.aclose()


async def all_of(works: Sequence[Awaitable[Any]]) -> list[Any]:
    """The results of all. The first that fails ends the others, and its error is raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await ended(tasks)


async def ended(tasks: Collection[asyncio.Future]) -> None:
    """Cancels what is not done, and waits until it has ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
