"""Chat templates that others have written, rendered within bounds of time and memory.

A template is a program of whoever made the checkpoint. The sandbox of transformers keeps it from files and from Python,
but not from loops that never end and texts that fill the memory. So it runs in a child of this process, which ends.
"""

import gc
import json
import os
import re
import select
import signal
import sys
import time
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

try:
    import resource
except ImportError:  # not on Windows
    resource = None

MAX_SECONDS = 2
"""Seconds of computation for one conversation."""
MAX_WAIT = 30.0
"""Seconds until a child that is not computing either is ended: one that the machine has no time for."""
MAX_MEMORY = 256 * 2**20
"""Bytes that a template may take."""
MAX_CHARACTERS = 2**20
"""What it may write around the texts of a conversation."""

_END = b"\n"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Rendered = tuple[str, list[tuple[int, int]]]
"""The text of a conversation, and the beginnings and ends in it of what the assistant says."""


class UnboundedTemplateError(ValueError):
    """A template takes more time or memory than it may."""


def template_of(chat_template: Any, name: str | None = None) -> str:
    """The template that is meant, where a tokenizer or processor has one, or several by their names; `name` is that of
    one, or a template itself. Default: the one called "default". ValueError: there is none, or none of this name, or it
    is no text.
    """
    if name is not None:
        chat_template = chat_template.get(name, name) if isinstance(chat_template, dict) else name
    if isinstance(chat_template, dict):
        if "default" not in chat_template:
            listed = ", ".join(map(str, chat_template)) or "none"
            raise ValueError(f"of the chat templates ({listed}) none is called 'default'; name one of them so")
        chat_template = chat_template["default"]
    if chat_template is None:
        raise ValueError("there is no chat template; choose a model that has learned from conversations")
    if not isinstance(chat_template, str):
        raise ValueError(f"the chat template is of type {type(chat_template).__name__}; it has to be a text")
    return chat_template


def render_template(
    template: str, messages: list[dict[str, Any]], is_trusted: bool = False, **variables: Any
) -> Rendered:
    """A conversation as a template writes it, with what transformers gives to templates besides the messages. One that
    is trusted is ours, and is rendered at once; so is any where processes cannot be bounded: elsewhere than on Linux.
    ValueError: it fails, or writes nothing; UnboundedTemplateError: it takes more time or memory than it may, or writes
    more; OSError: the system starts no further process.
    """
    if is_trusted or resource is None or sys.platform != "linux":
        return _attempt(template, messages, variables)
    return _attempt_in_child(template, messages, variables)


def _attempt(template: str, messages: list[dict[str, Any]], variables: dict[str, Any]) -> Rendered:
    try:
        (text,), spans = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=_GENERATION.search(template) is not None,  # else transformers warns
            **variables,
        )
        text.encode("utf-8")
    except MemoryError as error:
        raise _unbounded(f"it takes more than {MAX_MEMORY // 2**20} MiB of memory") from error
    except Exception as error:  # whatever the operations of a template raise
        raise ValueError(_refusal(f"it fails with {type(error).__name__}: {str(error)[:300]}")) from error
    if len(text) > MAX_CHARACTERS:
        raise _unbounded(f"it writes {len(text)} characters around the texts, more than {MAX_CHARACTERS}")
    if not text.strip():
        raise ValueError(_refusal("it writes nothing"))
    return text, [tuple(span) for span in spans[0]] if spans else []


def _unbounded(problem: str) -> UnboundedTemplateError:
    return UnboundedTemplateError(_refusal(problem))


def _refusal(problem: str) -> str:
    return f"the chat template cannot be used: {problem}; correct it, or use another checkpoint"


def _attempt_in_child(template: str, messages: list[dict[str, Any]], variables: dict[str, Any]) -> Rendered:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            _answer(writing, template, messages, variables)
        finally:
            os._exit(0)  # no handlers of the parent run, and nothing that it has buffered is written twice
    os.close(writing)
    try:
        answer = _read_until(reading, time.monotonic() + MAX_WAIT)
    finally:
        os.close(reading)
        os.kill(pid, signal.SIGKILL)  # it has ended, or has to
        _, status = os.waitpid(pid, 0)
    if not answer.endswith(_END):
        is_late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
        late = f"it is not done after {MAX_SECONDS} seconds of computation"
        raise _unbounded(late if is_late else "rendering it breaks the process")
    found = json.loads(answer)
    if "problem" in found:
        raise (UnboundedTemplateError if found["is_unbounded"] else ValueError)(found["problem"])
    return found["text"], [tuple(span) for span in found["spans"]]


def _answer(writing: int, template: str, messages: list[dict[str, Any]], variables: dict[str, Any]) -> None:
    """What the child does: it writes the text and the spans, or the problem, into a pipe."""
    gc.disable()  # what belongs to the parent, such as memory of a GPU, is not the child's to give back
    _bound_this_process()
    try:
        text, spans = _attempt(template, messages, variables)
        found = {"text": text, "spans": spans}
    except ValueError as error:
        found = {"problem": str(error), "is_unbounded": isinstance(error, UnboundedTemplateError)}
    with open(writing, "wb") as pipe:
        pipe.write(json.dumps(found).encode() + _END)


def _bound_this_process() -> None:
    """Limits this process from here on: time, memory beyond what it has, no file, and no memory on disk."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    bounds = {
        resource.RLIMIT_AS: used + MAX_MEMORY,
        resource.RLIMIT_CPU: MAX_SECONDS,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, bound in bounds.items():
        highest = resource.getrlimit(kind)[1]
        if highest != resource.RLIM_INFINITY:
            bound = min(bound, highest)
        resource.setrlimit(kind, (bound, highest))


def _read_until(source: int, deadline: float) -> bytes:
    """All that comes through a pipe until its other end is closed; nothing if that takes longer."""
    parts = []
    while select.select([source], [], [], max(deadline - time.monotonic(), 0))[0]:
        part = os.read(source, 2**16)
        if not part:
            return b"".join(parts)
        parts.append(part)
    return b""
