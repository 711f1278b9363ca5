"""Requests that are valid to jobs for workers."""

import asyncio
import base64
import json
import secrets
from collections.abc import Collection
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from model import MediaError
from model.media_sources import fetch_bytes

from .limits import Limits
from .messages import AnswerJob, ModelCard
from .replies import RequestError
from .schema import MOST_PARTS, ChatRequest, CompletionRequest, Drawing, Generation, ImagePart, Message


def model_of(name: str | None, cards: tuple[ModelCard, ...]) -> ModelCard:
    """The model that a request names; if it names none, the first."""
    if name is None:
        return cards[0]
    found = next((card for card in cards if card.name == name), None)
    if found is None:
        known = ", ".join(card.name for card in cards)
        raise RequestError(f"the model {name!r:.100} is not served here; choose one of {known}", "model", 404)
    return found


def text_jobs(
    request: Generation, card: ModelCard, limits: Limits, prompts: list[Any], likely: int | None
) -> list[AnswerJob]:
    """A job for each choice of each prompt; choices have seeds that follow each other."""
    asked = getattr(request, "max_completion_tokens", None) or request.max_tokens
    if asked is not None and asked > limits.max_new_tokens:
        raise RequestError(f"max_tokens is {asked}, and at most {limits.max_new_tokens} are written", "max_tokens")
    check_steps(request.num_steps, limits)
    seed = secrets.randbits(62) if request.seed is None else request.seed
    return [
        AnswerJob(
            -1,
            card.name,
            "text",
            prompt,
            asked or limits.max_new_tokens,
            request.num_steps,
            request.exit_criterion,
            request.exit_threshold,
            request.decoding != "plain",
            None if request.temperature == 0 else (seed + choice) % 2**63,
            request.temperature or 1.0,
            request.top_p,
            request.top_k,
            request.repetition_penalty,
            tuple(request.stop_strings),
            likely,
        )
        for prompt in prompts
        for choice in range(request.n)
    ]


def media_jobs(
    request: Drawing, card: ModelCard, limits: Limits, kind: str, prompt: Any, count: int = 1, num_parts: int = 0
) -> list[AnswerJob]:
    """A job for each image or sound."""
    check_steps(request.num_steps, limits)
    names = ("guidance_scale", "num_flow_steps")
    flow = {name: value for name in names if (value := getattr(request, name, None)) is not None}
    seed = secrets.randbits(31) if request.seed is None else request.seed
    return [
        AnswerJob(
            -1,
            card.name,
            kind,
            prompt,
            1,
            request.num_steps,
            request.exit_criterion,
            request.exit_threshold,
            seed=(seed + choice) % 2**63,
            flow=flow,
            num_parts=num_parts,
        )
        for choice in range(count)
    ]


def check_steps(num_steps: int | None, limits: Limits) -> None:
    """Raises RequestError for more steps than are taken here."""
    if num_steps is not None and num_steps > limits.max_steps:
        raise RequestError(f"num_steps is {num_steps}, and at most {limits.max_steps} are taken here", "num_steps")


def chat_jobs(request: ChatRequest, card: ModelCard, limits: Limits) -> list[AnswerJob]:
    """The jobs of a conversation."""
    if not card.has_chat:
        raise RequestError(f"{card.name} has seen no conversations; use /v1/completions", "model")
    messages = [own_message(number, message) for number, message in enumerate(request.messages)]
    kind = request.writes
    if kind is not None:
        names = ("num_steps", "seed", "exit_criterion", "exit_threshold")
        drawing = Drawing(**{name: getattr(request, name) for name in names})
        return media_jobs(drawing, card, limits, kind, messages, request.n, MOST_PARTS - 1 if request.stream else 0)
    return text_jobs(request, card, limits, [messages], (request.top_logprobs or 0) if request.logprobs else None)


def completion_jobs(request: CompletionRequest, card: ModelCard, limits: Limits) -> list[AnswerJob]:
    """The jobs of texts that go on."""
    prompts = request.prompts
    if len(prompts) * request.n > 16:
        raise RequestError("prompt and n ask for more than 16 texts; ask for fewer", "n")
    return text_jobs(request, card, limits, prompts, request.logprobs)


def own_message(number: int, message: Message) -> dict[str, Any]:
    """A message as chat templates have it: calls of tools are what the assistant says."""
    where = f"messages[{number}]"
    role = "system" if message.role == "developer" else message.role
    if message.tool_calls:
        if role != "assistant" or message.content or len(message.tool_calls) > 1:
            raise RequestError("tool_calls are one call, of the assistant, which says nothing else", where)
        return {"role": role, "content": f"calculator({expression_of(message, where)})"}
    if message.content is None:
        raise RequestError("a message has no content; give a text", where)
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    for part in message.content:
        if isinstance(part, ImagePart):
            check_address(part.image_url.url, where)
    parts = [part.model_dump() for part in message.content]
    if all(part["type"] == "text" for part in parts):
        return {"role": role, "content": "".join(part["text"] for part in parts)}
    return {"role": role, "content": parts}


def expression_of(message: Message, where: str) -> str:
    """The expression of a call of the calculator."""
    call = message.tool_calls[0].function
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        arguments = None
    if call.name != "calculator" or not isinstance(arguments, dict) or not isinstance(arguments.get("expression"), str):
        raise RequestError('a call is of calculator, with arguments such as {"expression": "2*21"}', where)
    return arguments["expression"]


def check_address(url: str, where: str) -> None:
    """Raises RequestError for an image that is not in the request: no file is read."""
    if url[:5].lower() != "data:":
        raise RequestError("image_url is no data: URI, and nothing is fetched from where it is; send its data", where)


async def fetch_images(request: ChatRequest, hosts: Collection[str], limits: Limits) -> None:
    """Puts the data of images that are at addresses in their places.

    Args:
        request: A conversation, which is changed.
        hosts: Hosts, "example.org" or "example.org:8080", of which images are fetched.
        limits: Those of the server; an image is no larger than a body may be, and comes within the same time.

    Raises:
        RequestError: there are too many, or one cannot be fetched, or is elsewhere.
    """
    parts = [part for it in request.messages if isinstance(it.content, list) for part in it.content]
    images = [part.image_url for part in parts if isinstance(part, ImagePart)]
    remote = [image for image in images if image.url[:8].lower().startswith(("http://", "https://"))]
    if not hosts or not remote:
        return
    if len(remote) > limits.max_media:
        raise RequestError(f"{len(remote)} images are more than {limits.max_media}; send fewer", "messages")
    allowed = partial(is_at, hosts)
    for image in remote:
        try:
            data = await asyncio.to_thread(
                fetch_bytes, image.url, allowed, limits.max_body_mib * 2**20, float(limits.read_seconds)
            )
        except MediaError as error:
            raise RequestError(str(error), "messages") from error
        image.url = f"data:image/*;base64,{base64.b64encode(data).decode('ascii')}"


def is_at(hosts: Collection[str], address: str) -> bool:
    """Whether an address is at one of these hosts, without a name of a user. A host without a port has the usual."""
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        return False
    usual = {"http": 80, "https": 443}.get(parts.scheme)
    if usual is None or parts.username is not None or parts.hostname is None:
        return False
    return f"{parts.hostname}:{port}" in hosts if port not in (None, usual) else parts.hostname in hosts
