"""The routes of the server."""

import asyncio
import base64
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Collection
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from model.exit_criteria import EXIT_CRITERIA

from .guard import Guard, refused
from .jobs import chat_jobs, completion_jobs, fetch_images, media_jobs, model_of, text_jobs
from .limits import Limits
from .messages import AnswerJob, AnswerMessage, End, ModelCard, TextPiece
from .metrics import Metrics
from .pool import Pool
from .replies import Choice, Reply, RequestError, event, usage, whole, with_media
from .schema import ChatRequest, CompletionRequest, Generation, ImageRequest, SpeechRequest, Strict
from .static import add_page
from .streams import (
    HEADERS,
    TextParts,
    TimedStream,
    again,
    all_of,
    ended,
    image_events,
    media_parts,
    reply_events,
)

logger = logging.getLogger(__name__)

OF_TRANSCRIPTIONS = ("file", "model", "prompt", "response_format", "temperature", "language", "seed", "num_steps")


def build_app(
    pool: Pool, limits: Limits, metrics: Metrics, keys: Collection[str] = (), hosts: Collection[str] = ()
) -> Guard:
    """The application, behind its guard.

    Args:
        pool: Workers, which have been started.
        limits: What is taken at most.
        metrics: What is counted.
        keys: Keys of which a request needs one; none: none is asked for.
        hosts: Hosts of which images are fetched.
    """
    app = FastAPI(title="MegaTransformer", docs_url=None, redoc_url=None, openapi_url=None)
    service = Service(pool, limits, metrics, hosts)
    app.post("/v1/chat/completions")(service.chat)
    app.post("/v1/completions")(service.complete)
    app.post("/v1/images/generations")(service.draw)
    app.post("/v1/audio/speech")(service.speak)
    app.post("/v1/audio/transcriptions")(service.transcribe)
    app.get("/v1/models")(service.models)
    app.get("/v1/models/{name}")(service.model)
    app.post("/load_model")(service.load_model)
    app.get("/health")(service.health)
    app.get("/metrics")(service.metrics_text)
    add_page(app)
    app.add_exception_handler(RequestError, lambda _, error: refused(error.status, str(error), error.param))
    app.add_exception_handler(RequestValidationError, lambda _, error: refuse_fields(error))
    app.add_exception_handler(HTTPException, lambda _, error: refused(error.status_code, str(error.detail)))
    app.add_exception_handler(Exception, lambda *_: refused(500, "the server failed at this request; its log says why"))
    return Guard(app, limits, keys, metrics)


def refuse_fields(error: RequestValidationError) -> JSONResponse:
    """The first fault of a body, by the name of its field."""
    fault = max(error.errors(), key=lambda fault: len(fault["loc"]))  # of the alternatives, that which fits longest
    place = [str(part) for part in fault.get("loc", ()) if part != "body"]
    name, reason = ".".join(place)[:200], str(fault.get("msg", "")).removeprefix("Value error, ")
    if fault.get("type") == "extra_forbidden":
        reason = "is not known to this server; leave it out"
    if fault.get("type") == "json_invalid":
        name, reason = "", "the body is no JSON"
    return refused(400, f"{name}: {reason}"[:500] if name else reason[:500], name or None)


class Service:
    """The answers of the routes."""

    def __init__(self, pool: Pool, limits: Limits, metrics: Metrics, hosts: Collection[str]):
        self.pool, self.limits, self.metrics, self.hosts = pool, limits, metrics, hosts

    # ------------------------------------------------------------------------------------------------------------ texts

    async def chat(self, given: ChatRequest, request: Request) -> Response:
        """Conversations."""
        card = model_of(given.model, self.pool.models)
        await self._unless_gone(request, fetch_images(given, self.hosts, self.limits))
        jobs = chat_jobs(given, card, self.limits)
        has_tools = bool(given.tools) and given.tool_choice != "none"
        reply = Reply(card.name, True, has_tools, given.exit_steps)
        if given.writes is not None:
            if not given.stream:
                return JSONResponse(with_media(reply, given.writes, await self._all(jobs, request)))
            streams = await self._begun(jobs, request)
            parts = partial(media_parts, reply, given.writes)
            return TimedStream(reply_events(reply, streams, parts, given.has_usage), self.limits.max_seconds)
        return await self._text(given, reply, jobs, given.logprobs, request)

    async def complete(self, given: CompletionRequest, request: Request) -> Response:
        """Texts that go on."""
        card = model_of(given.model, self.pool.models)
        jobs = completion_jobs(given, card, self.limits)
        reply = Reply(card.name, False, shows_steps=given.exit_steps)
        return await self._text(given, reply, jobs, given.logprobs is not None, request)

    async def _text(
        self, given: Generation, reply: Reply, jobs: list[AnswerJob], has_likelihoods: bool, request: Request
    ) -> Response:
        if not given.stream:
            return JSONResponse(reply.whole(await self._all(jobs, request), has_likelihoods))
        streams = await self._begun(jobs, request)
        parts = TextParts(reply, len(streams), has_likelihoods)
        return TimedStream(reply_events(reply, streams, parts, given.has_usage), self.limits.max_seconds)

    # ------------------------------------------------------------------------------------------------------------ media

    async def draw(self, given: ImageRequest, request: Request) -> Response:
        """Images of a text."""
        card = self._writer(given.model, "image")
        size = f"{card.image_side}x{card.image_side}"
        if given.size not in ("auto", size):
            raise RequestError(f"size is {given.size}, and this model draws {size}; give that, or 'auto'", "size")
        jobs = media_jobs(given, card, self.limits, "image", one_message(given.prompt), given.n, given.partial_images)
        if given.stream:
            (stream,) = await self._begun(jobs, request)
            return TimedStream(image_events(stream), self.limits.max_seconds)
        answers = await self._all(jobs, request)
        images = [{"b64_json": base64.b64encode(answer.end.media).decode("ascii")} for answer in answers]
        tokens = sum(answer.end.prompt_tokens for answer in answers)
        return JSONResponse({"created": 0, "data": images, "usage": {"input_tokens": tokens}})

    async def speak(self, given: SpeechRequest, request: Request) -> Response:
        """Sound of a text."""
        card = self._writer(given.model, "audio")
        jobs = media_jobs(given, card, self.limits, "audio", one_message(given.input))
        (answer,) = await self._all(jobs, request)
        return Response(answer.end.media, media_type="audio/wav")

    def _writer(self, name: str | None, kind: str) -> ModelCard:
        cards = self.pool.models
        card = next((it for it in cards if kind in it.writes), cards[0]) if name is None else model_of(name, cards)
        if kind not in card.writes:
            raise RequestError(f"{card.name} writes {', '.join(card.writes)}, and no {kind}", "model")
        return card

    async def transcribe(self, request: Request) -> Response:
        """A text for a sound."""
        async with request.form(max_files=1, max_fields=len(OF_TRANSCRIPTIONS), max_part_size=2**16) as form:
            given, sound = await read_form(form)
        cards = self.pool.models
        readers = [it for it in cards if "audio" in it.modalities]
        card = model_of(given.model, cards) if given.model is not None or not readers else readers[0]
        if "audio" not in card.modalities:
            raise RequestError(f"{card.name} reads {', '.join(card.modalities)}, and no audio", "model")
        sound_part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(sound).decode(), "format": "wav"}}
        text = [{"type": "text", "text": given.prompt}] if given.prompt else []
        jobs = text_jobs(given, card, self.limits, [[{"role": "user", "content": [sound_part, *text]}]], None)
        (answer,) = await self._all(jobs, request)
        if given.response_format == "text":
            return PlainTextResponse(answer.text)
        return JSONResponse({"text": answer.text, "usage": {"type": "tokens", **usage([answer.end])}})

    # ------------------------------------------------------------------------------------------------------------- jobs

    async def _all(self, jobs: list[AnswerJob], request: Request) -> list[Choice]:
        """All answers, unless the client goes before."""
        streams = await self._begun(jobs, request)
        return await self._unless_gone(request, all_of([whole(stream) for stream in streams]))

    async def _begun(self, jobs: list[AnswerJob], request: Request) -> list[AsyncGenerator[AnswerMessage]]:
        """The answers of jobs, of which each has begun: what is wrong with one is known before the status is sent."""
        if self.pool.room() < len(jobs):
            raise RequestError("too many requests are waiting; ask again in a few seconds", status=429)
        streams = [self._counted(self.pool.answer(job)) for job in jobs]
        try:
            firsts = await self._unless_gone(request, all_of([anext(stream) for stream in streams]))
        except BaseException:
            for stream in streams:
                await stream.aclose()
            raise
        return [again(first, stream) for first, stream in zip(firsts, streams, strict=True)]

    async def _counted(self, stream: AsyncIterator[AnswerMessage]) -> AsyncGenerator[AnswerMessage]:
        async with aclosing(stream):
            async for message in stream:
                if isinstance(message, End):
                    self.metrics.prompt_tokens.inc(message.prompt_tokens)
                    self.metrics.new_tokens.inc(message.new_tokens)
                elif isinstance(message, TextPiece):
                    for token in message.tokens:
                        self.metrics.steps.observe(token.steps)
                yield message

    async def _unless_gone(self, request: Request, work: Awaitable[Any]) -> Any:
        """The result of work, which is cancelled when its client goes, or its time is over."""
        work, gone = asyncio.ensure_future(work), asyncio.ensure_future(until_gone(request))
        try:
            async with asyncio.timeout(self.limits.max_seconds):
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            raise RequestError("the client is gone", status=499)
        except TimeoutError:
            raise RequestError(
                504, f"there was no answer within {self.limits.max_seconds} seconds; ask for less"
            ) from None
        finally:
            await ended([work, gone])

    # ----------------------------------------------------------------------------------------------------------- others

    async def models(self) -> dict[str, Any]:
        """The models that are served."""
        return {"object": "list", "data": [model_entry(card, self.limits) for card in self.pool.models]}

    async def model(self, name: str) -> dict[str, Any]:
        """One of them."""
        return model_entry(model_of(name, self.pool.models), self.limits)

    async def load_model(self, given: "LoadRequest") -> Response:
        """`transformers chat` asks for it: models are loaded already."""
        name = model_of(given.model.partition("@")[0], self.pool.models).name

        async def events() -> AsyncIterator[str]:
            yield event({"status": "ready", "model": name, "cached": True})

        return StreamingResponse(events(), media_type="text/event-stream", headers=HEADERS)

    async def health(self) -> Response:
        """Whether requests are answered now."""
        ready, workers = self.pool.num_ready, len(self.pool.handles)
        content = {"status": "ok" if ready else "no worker is ready", "workers": workers, "ready": ready}
        return JSONResponse(content, 200 if ready and not self.pool.is_ending else 503)

    async def metrics_text(self) -> Response:
        """Counters."""
        self.metrics.running.set(self.pool.num_jobs)
        self.metrics.ready.set(self.pool.num_ready)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


class LoadRequest(Strict):
    """`/load_model`."""

    model: str


class TranscriptionRequest(Generation):
    """`/v1/audio/transcriptions`, without its file."""

    prompt: str = ""
    response_format: str = "json"


async def read_form(form: FormData) -> tuple[TranscriptionRequest, bytes]:
    """The fields and the sound of a request for a transcription. RequestError: there is none, or a field is wrong."""
    unknown = next((name for name in form if name not in OF_TRANSCRIPTIONS), None)
    if unknown is not None:
        raise RequestError(f"{unknown!r:.60} is not known to this server; leave it out", unknown[:60])
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise RequestError("file is missing; send a recording", "file")
    values: dict[str, Any] = {name: str(value) for name, value in form.items() if name not in ("file", "language")}
    try:
        for name, kind in (("temperature", float), ("seed", int), ("num_steps", int)):
            if name in values:
                values[name] = kind(values[name])
        given = TranscriptionRequest(**{"temperature": 0.0, **values})
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None
    except ValueError:
        raise RequestError("temperature, seed and num_steps are numbers") from None
    if form.get("language") not in (None, "", "en"):
        raise RequestError("language is not read by this server; leave it out", "language")
    if given.response_format not in ("json", "text"):
        raise RequestError("response_format is 'json' or 'text' here", "response_format")
    return given, await file.read()


def model_entry(card: ModelCard, limits: Limits) -> dict[str, Any]:
    """A model, as `/v1/models` tells of it, and what it may be asked for here."""
    return {
        "id": card.name,
        "object": "model",
        "created": 0,
        "owned_by": "megatransformer",
        "reads": card.modalities,
        "writes": card.writes,
        "has_chat": card.has_chat,
        "num_parameters": card.num_parameters,
        "num_steps": card.usual_steps,
        "max_model_len": card.context,
        "max_steps": None if card.usual_steps is None else limits.max_steps,
        "exit_criteria": {name: EXIT_CRITERIA[name].default_threshold for name in card.exit_criteria},
        "max_new_tokens": limits.max_new_tokens,
        "max_media": limits.max_media,
        "max_audio_seconds": limits.max_audio_seconds,
    }


def one_message(text: str) -> list[dict[str, Any]]:
    """A conversation of what one user says."""
    return [{"role": "user", "content": text}]


async def until_gone(request: Request) -> None:
    """Ends when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
