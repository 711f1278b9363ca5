"""Answers in OpenAI's format, whole and in pieces."""

import base64
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ..calculator import called_expression
from .messages import AnswerMessage, End, ImagePiece, TextPiece, TokenShown

CALL = "calculator("


@dataclass
class Choice:
    """One choice, as far as it has come."""

    text: str = ""
    tokens: list[TokenShown] = field(default_factory=list)
    end: End | None = None


class RequestError(Exception):
    """A request that is refused.

    Args:
        message: What is wrong and what to do.
        param: The field that it is about.
        status: The status of HTTP.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.status = param, status


async def whole(stream: AsyncIterator[AnswerMessage]) -> Choice:
    """A choice from its beginning to its end."""
    answer = Choice()
    async with aclosing(stream):
        async for message in stream:
            if isinstance(message, TextPiece):
                answer.text += message.text
                answer.tokens += message.tokens
            elif isinstance(message, End):
                answer.end = message
    return answer


class Reply:
    """The head that all parts of a reply share.

    Args:
        model: The name of the model.
        is_chat: Whether messages are answered, else a text goes on.
        has_tools: Whether the calculator may be called.
        shows_steps: Whether the steps of each token are told.
    """

    def __init__(self, model: str, is_chat: bool, has_tools: bool = False, shows_steps: bool = False):
        self.is_chat, self.has_tools, self.shows_steps = is_chat, has_tools, shows_steps
        name = "chat.completion" if is_chat else "text_completion"
        self.head = {"id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}", "object": name}
        self.head |= {"created": int(time.time()), "model": model}

    # ----------------------------------------------------------------------------------------------------------- whole

    def whole(self, answers: Sequence[Choice], has_likelihoods: bool) -> dict[str, Any]:
        """The reply with all choices."""
        choices = []
        for index, answer in enumerate(answers):
            choice = {"index": index, **self._content(answer)}
            choice["logprobs"] = self.likelihoods(answer.tokens) if has_likelihoods else None
            choices.append(choice | self._steps(answer.tokens))
        return {**self.head, "choices": choices, "usage": usage([answer.end for answer in answers])}

    def _content(self, answer: Choice) -> dict[str, Any]:
        reason = answer.end.finish_reason
        if not self.is_chat:
            return {"text": answer.text, "finish_reason": reason}
        expression = called_expression(answer.text) if self.has_tools else None
        if expression is None:
            message = {"role": "assistant", "content": answer.text, "refusal": None}
            return {"message": message, "finish_reason": reason}
        message = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [tool_call(expression)]}
        return {"message": message, "finish_reason": "tool_calls"}

    def _steps(self, tokens: Sequence[TokenShown]) -> dict[str, Any]:
        if not self.shows_steps:
            return {}
        return {"exit_steps": [token.steps for token in tokens], "tokens": [token.text for token in tokens]}

    def steps_of(self, end: End) -> dict[str, Any]:
        """The steps of the positions of an image or a sound."""
        return {"exit_steps": list(end.exit_steps)} if self.shows_steps else {}

    def likelihoods(self, tokens: Sequence[TokenShown]) -> dict[str, Any]:
        """Probabilities of tokens."""
        if self.is_chat:
            content = []
            for token in tokens:
                likely = [with_bytes(text, value) for text, value in token.likely]
                content.append(with_bytes(token.text, token.likelihood.log_probability) | {"top_logprobs": likely})
            return {"content": content, "refusal": None}
        values = [token.likelihood.log_probability for token in tokens]
        tops = [dict(token.likely) for token in tokens]
        return {"tokens": [token.text for token in tokens], "token_logprobs": values, "top_logprobs": tops}

    # ---------------------------------------------------------------------------------------------------------- pieces

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """One event of a stream."""
        name = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {**self.head, "object": name, "choices": choices, **more}

    def first(self, index: int) -> dict[str, Any] | None:
        """The choice of the first event of a choice, if it has one without text."""
        return self._part(index, {"role": "assistant", "content": ""}) if self.is_chat else None

    def piece(self, index: int, text: str, tokens: Sequence[TokenShown], has_likelihoods: bool) -> dict[str, Any]:
        """The choice of an event with text."""
        part = self._part(index, {"content": text} if self.is_chat else text) | self._steps(tokens)
        return part | ({"logprobs": self.likelihoods(tokens)} if has_likelihoods else {})

    def drawn(self, index: int, kind: str, message: ImagePiece | End) -> dict[str, Any]:
        """The choice of an event with an image or a sound, which are complete with the last."""
        if isinstance(message, ImagePiece):
            return self._part(index, media_field(kind, message.media, partial=True))
        more = {} if kind == "audio" else {"partial": False}
        return self._part(index, media_field(kind, message.media, **more)) | self.steps_of(message)

    def last(self, index: int, reason: str, expression: str | None) -> dict[str, Any]:
        """The choice of the last event of a choice."""
        delta: Any = {} if self.is_chat else ""
        if expression is not None:
            delta, reason = {"tool_calls": [{"index": 0, **tool_call(expression)}]}, "tool_calls"
        return self._part(index, delta) | {"finish_reason": reason}

    def _part(self, index: int, content: Any) -> dict[str, Any]:
        name = "delta" if self.is_chat else "text"
        return {"index": index, name: content, "logprobs": None, "finish_reason": None}


class CallHolder:
    """Text that may be a call of a tool is held back until it is certain that it is none."""

    def __init__(self) -> None:
        self.text, self.tokens, self.is_open = "", [], True

    def push(self, piece: TextPiece) -> tuple[str, list[TokenShown]]:
        """The text that may be shown, and its tokens."""
        self.text += piece.text
        self.tokens += piece.tokens
        start = self.text.lstrip()
        if self.is_open and (CALL.startswith(start[: len(CALL)])):
            return "", []
        self.is_open = False
        return self.take()

    def take(self) -> tuple[str, list[TokenShown]]:
        """All that is held back."""
        text, tokens, self.text, self.tokens = self.text, self.tokens, "", []
        return text, tokens


def with_bytes(text: str, value: float) -> dict[str, Any]:
    """A token with its probability."""
    return {"token": text, "logprob": value, "bytes": list(text.encode())}


def tool_call(expression: str) -> dict[str, Any]:
    """A call of the calculator."""
    function = {"name": "calculator", "arguments": json.dumps({"expression": expression}, ensure_ascii=False)}
    return {"id": f"call_{secrets.token_hex(8)}", "type": "function", "function": function}


def usage(ends: Sequence[End]) -> dict[str, int]:
    """Tokens and steps of all choices."""
    prompt, new = sum(end.prompt_tokens for end in ends), sum(end.new_tokens for end in ends)
    steps = sum(end.core_steps for end in ends)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new, "core_steps": steps}


def with_media(reply: Reply, kind: str, answers: Sequence[Choice]) -> dict[str, Any]:
    """A reply whose messages have an image or a sound."""
    choices = []
    for index, answer in enumerate(answers):
        message = {"role": "assistant", "content": None, "refusal": None, **media_field(kind, answer.end.media)}
        choice = {"index": index, "message": message, "finish_reason": "stop", "logprobs": None}
        choices.append(choice | reply.steps_of(answer.end))
    return {**reply.head, "choices": choices, "usage": usage([answer.end for answer in answers])}


def media_field(kind: str, content: bytes, **more: Any) -> dict[str, Any]:
    """The field of a message that has an image or a sound.

    Args:
        kind: Which.
        content: The file.
        more: Fields of an image.
    """
    data = base64.b64encode(content).decode("ascii")
    if kind == "audio":
        return {"audio": {"id": f"audio_{secrets.token_hex(8)}", "data": data, "transcript": "", "expires_at": 0}}
    return {"images": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}, **more}]}


def event(content: Any, name: str | None = None) -> str:
    """An event of a stream."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return f"data: {text}\n\n" if name is None else f"event: {name}\ndata: {text}\n\n"


def error_content(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """An error."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}
