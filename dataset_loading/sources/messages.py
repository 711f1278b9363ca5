"""Conversations as they stand in files: messages with text and media, checked.

A conversation is a list of {"role", "content"}; a content is a list of parts, {"type": "text", "text"} or
{"type": modality, ...}, a reference to an item of media (`references.py`). `model.chat` makes tokens of them.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from model.chat import check_messages

from ..bad_rows import FIXES, reason_against, reason_against_part
from .references import UnusableRow, reference_to

_COLUMN = re.compile(r"\{(\w+)\}")


def answer_to(given: Sequence[dict], prompt: str, answer: str, shown: Sequence[dict] = ()) -> list[dict]:
    """The conversation of one question, with media in front of it, and its answer, with media behind it; each text may
    be empty.
    """
    question = [*given, *([{"type": "text", "text": prompt}] if prompt else [])]
    reply = [*([{"type": "text", "text": answer}] if answer else []), *shown]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def parse_messages(
    value: object, attached: Mapping[str, list[dict]], folder: Path | None, loss_on: str = "answer"
) -> list[dict]:
    """Messages as they stand in a file, checked, each with a list of parts that say where their media are.

    Args:
        attached: References by modality, for the parts of that modality that name no file, in order; where there is no
            such part, they are put in front of what the user says first.
        folder: Folder that names of files are relative to.
        loss_on: What is learned: "answer", what the assistant says, or "all".

    Raises:
        UnusableRow: These are no messages, a part is of an unknown type, an item of media is missing or left over,
            there is nothing to learn, or another key changes what is to be learned.
    """
    for message in value if isinstance(value, list) else ():
        if isinstance(message, dict) and {"from", "value"} <= message.keys() and "role" not in message:
            raise UnusableRow(
                "a message has 'from' and 'value', as ShareGPT writes it; rename them to role and content, and in role "
                "human to user and gpt to assistant"
            )
    try:
        check_messages(value, learns_all=loss_on == "all", fixes=FIXES)
    except ValueError as error:
        raise UnusableRow(str(error)) from error
    waiting = {kind: list(references) for kind, references in attached.items()}
    contents = [[{"type": "text", "text": it}] if isinstance(it, str) else it for it in (m["content"] for m in value)]
    read = [{"role": message["role"], "content": it} for message, it in zip(value, contents, strict=True)]
    for kind, references in attached.items():
        read = _with_places(read, kind, len(references)) if references else read
    messages = [{**it, "content": [_parse_part(part, waiting, folder) for part in it["content"]]} for it in read]
    first = next((message for message in messages if message["role"] == "user"), None)
    for kind, references in waiting.items():
        if references and (first is None or len(references) < len(attached[kind])):
            raise UnusableRow(f"{len(attached[kind])} media of type {kind!r}, but fewer parts of the messages for them")
        if references:
            first["content"][:0] = references
    if all(message["role"] != "assistant" for message in messages):
        raise UnusableRow("no message of the assistant, so that there is nothing to learn")
    for message in messages:
        if not (text_of(message).strip() or media_of([message])):
            raise UnusableRow(f"a message ({message['role']}) is empty")
    return messages


def _with_places(messages: list[dict], kind: str, count: int) -> list[dict]:
    """Messages in which a mark such as "<image>" in a text, as LLaVA writes it, is a part."""
    mark, found, placed = f"<{kind}>", 0, []
    for message in messages:
        parts: list = []
        for part in message["content"]:
            text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            if not isinstance(text, str):
                parts.append(part)
                continue
            found += text.count(mark)
            for number, piece in enumerate(text.split(mark)):
                parts += [{"type": kind}] * (number > 0) + [{"type": "text", "text": piece}] * bool(piece)
        placed.append({**message, "content": parts})
    if found not in (0, count):
        raise UnusableRow(f"{count} media of type {kind!r}, but {found} marks {mark!r} in the texts for them")
    return placed if found else messages


def _parse_part(part: object, waiting: dict[str, list[dict]], folder: Path | None) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise UnusableRow(f"a part of a message is {part!r:.80}, without a type such as text or image")
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str):
            raise UnusableRow(f"a part of type 'text' has {type(text).__name__} as its text, not a string")
        if text.strip() and (reason := reason_against(part, ("text",))):
            raise UnusableRow(reason)
        if reason := reason_against_part(part, ("type", "text")):
            raise UnusableRow(reason)
        return {"type": "text", "text": text}
    names = (kind, "path", "file_name")
    if reason := reason_against_part(part, ("type", *names)):
        raise UnusableRow(reason)
    named = next((part[key] for key in names if part.get(key) is not None), None)
    if named is not None:
        return reference_to(kind, named, folder)
    if not waiting.get(kind):
        raise UnusableRow(f"a part of type {kind!r} names no file and no column has one for it")
    return waiting[kind].pop(0)


def text_of(message: dict) -> str:
    """The text of a message, without its media."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def media_of(messages: Sequence[dict]) -> list[dict]:
    """The references to the media of a conversation, in order."""
    return [part for message in messages for part in message["content"] if part["type"] != "text"]


def last_answer(messages: Sequence[dict]) -> int:
    """The number of the last message of the assistant."""
    return max(number for number, message in enumerate(messages) if message["role"] == "assistant")


def prompt_and_answer(messages: Sequence[dict]) -> tuple[str, str]:
    """The last message of the assistant, and the text of the messages of users before it, a line each."""
    last = last_answer(messages)
    asked = [text_of(message) for message in messages[:last] if message["role"] == "user"]
    return "\n".join(filter(None, asked)), text_of(messages[last])


def template_columns(template: str | None) -> list[str]:
    """The names in the braces of a template."""
    return _COLUMN.findall(template or "")


def fill_template(template: str, row: Mapping[str, object]) -> str:
    """A template with the row's values, texts or numbers, in place of {column}; raises UnusableRow for others."""
    for column in template_columns(template):
        if not isinstance(row.get(column), (str, int, float)):
            raise UnusableRow(f"column {column!r} of the prompt is {type(row.get(column)).__name__}, not text")
    return _COLUMN.sub(lambda match: str(row[match[1]]), template)
