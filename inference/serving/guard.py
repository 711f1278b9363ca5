"""Checks that stand before the routes: keys, the size of bodies, and the time they take to come."""

import asyncio
import hmac
from collections.abc import Collection
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .limits import Limits
from .metrics import Metrics
from .replies import RequestError, error_content
from .static import FILES

OPEN = (*FILES, "/health")
"""Paths that need no key: the page, which asks for one, and what watches the server."""


class Guard:
    """Counts requests, and refuses those without a key, and those whose bodies are too large or too slow.

    Args:
        app: What is behind it.
        limits: Those of the server.
        keys: Keys of which a request needs one; none: none is asked for.
        metrics: What is counted.
    """

    def __init__(self, app: ASGIApp, limits: Limits, keys: Collection[str], metrics: Metrics):
        self.app, self.limits, self.metrics = app, limits, metrics
        self.keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun: list[int] = []

        async def note(message: Message) -> None:
            if message["type"] == "http.response.start":
                begun.append(message["status"])
            await send(message)

        try:
            await self._answer(scope, receive, note)
        except RequestError as fault:
            await refused(fault.status, str(fault))(scope, receive, note)
        finally:
            route = scope.get("route")
            self.metrics.requests.labels(getattr(route, "path", "other"), begun[0] if begun else "none").inc()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if scope["path"] not in OPEN and not self._is_allowed(headers.get(b"authorization", b"")):
            raise RequestError("a key is needed: send it as Authorization: Bearer KEY", status=401)
        body = await self._read(headers, receive)
        parts = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> Message:
            return next(parts, None) or await receive()

        await self.app(scope, again, send)

    def _is_allowed(self, header: bytes) -> bool:
        kind, _, given = header.partition(b" ")
        fits = [hmac.compare_digest(given.strip(), key) for key in self.keys]  # all of them, in the same time
        return not self.keys or (kind.lower() == b"bearer" and any(fits))

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body. One that is too large is read to its end too, and thrown away, since clients that still send
        would not see the answer. RequestError: it is too large, or does not come in time.
        """
        most, body = self.limits.max_body_mib * 2**20, bytearray()
        declared = headers.get(b"content-length", b"0")
        is_too_large = declared.isdigit() and int(declared) > most
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                is_complete = False
                while not is_complete:
                    message = await receive()
                    is_complete = not message.get("more_body", False)
                    body += b"" if is_too_large else message.get("body", b"")
                    is_too_large = is_too_large or len(body) > most
        except TimeoutError:
            if not is_too_large:
                raise RequestError("the request did not come in time; send it at once", status=408) from None
        if is_too_large:
            raise RequestError(f"the body is larger than {self.limits.max_body_mib} MiB; send less", status=413)
        return bytes(body)


def refused(status: int, message: str, param: str | None = None, **headers: Any) -> JSONResponse:
    """An answer that says what is wrong. What is left of the request is not read."""
    headers |= {"retry-after": "2"} if status in (429, 503) else {}
    headers |= {"connection": "close"} if status in (408, 413) else {}
    return JSONResponse(error_content(message, status, param), status, headers or None)


def timed_protocol(seconds: float) -> type[H11Protocol]:
    """A protocol that closes connections which send no whole head of a request within so many seconds."""

    class TimedProtocol(H11Protocol):
        """HTTP/1.1 with little patience."""

        watch: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.look()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.look()

        def look(self) -> None:
            """Begins to wait for a head where none has come, and stops where one has."""
            is_waiting = self.cycle is None or self.cycle.response_complete
            if is_waiting and self.watch is None:
                self.watch = self.loop.call_later(seconds, self.transport.close)
            elif not is_waiting and self.watch is not None:
                self.watch.cancel()
                self.watch = None

        def connection_lost(self, exc: Exception | None) -> None:
            if self.watch is not None:
                self.watch.cancel()
            super().connection_lost(exc)

    return TimedProtocol
