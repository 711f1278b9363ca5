"""Conversations as they stand in files: messages with text and media, checked.

A conversation is a list of {"role", "content"}; a content is a list of parts, {"type": "text", "text"} or
{"type": modality, ...}, a reference to an item of media (`references.py`). `model.chat` makes tokens of them.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from model import MODALITIES
from model.chat import check_messages, items_at_marks, place_items, said_content
from model.message_keys import calls_of, is_left_out

from ..bad_rows import FIXES, reason_against, reason_against_part, system_of
from .references import Reference, UnusableRow, reference_to

_COLUMN = re.compile(r"\{(\w+)\}")
ROLES_OF_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""Whom `from` names, by role."""


def answer_to(given: Sequence[dict], prompt: str, answer: str, shown: Sequence[dict] = ()) -> list[dict]:
    """The conversation of one question, with media in front of it, and its answer, with media behind it; each text may
    be empty, or have marks for its media.

    Raises:
        UnusableRow: A text has marks, but more or fewer than media.
    """
    question = [*given, *([{"type": "text", "text": prompt}] if prompt else [])]
    reply = [*([{"type": "text", "text": answer}] if answer else []), *shown]
    try:
        question, reply = (items_at_marks(parts, MODALITIES) for parts in (question, reply))
    except ValueError as error:
        raise UnusableRow(str(error)) from error
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
    value = [_with_role(message) for message in value] if isinstance(value, list) else value
    try:
        check_messages(value, learns_all=loss_on == "all", fixes=FIXES)
        value, left = place_items(value, attached)
        waiting = {kind: list(references) for kind, references in left.items()}
        messages = [_parse_message(message, waiting, folder) for message in value]
        for message in messages:
            message["content"] = items_at_marks(message["content"], MODALITIES)
    except ValueError as error:
        raise UnusableRow(str(error)) from error
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


def _with_role(message: object) -> object:
    """A message with `from` and `value`, as ShareGPT and LLaVA write it, with role and content."""
    if not (isinstance(message, dict) and {"from", "value"} <= message.keys() and "role" not in message):
        return message
    role = ROLES_OF_SHAREGPT.get(message["from"]) if isinstance(message["from"], str) else None
    if role is None:
        raise UnusableRow(
            f"a message is from {message['from']!r:.80}, none of {', '.join(ROLES_OF_SHAREGPT)}; rename it, or write "
            "role and content"
        )
    others = {key: item for key, item in message.items() if key not in ("from", "value")}
    return {"role": role, "content": message["value"], **others}


def _parse_message(message: dict, waiting: dict[str, list[dict]], folder: Path | None) -> dict:
    content = message.get("content") or []
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    parsed = {"role": message["role"], "content": [_parse_part(part, waiting, folder) for part in content]}
    fields = {
        "weight": 0 if is_left_out(message) else None,
        "reasoning_content": message.get("reasoning_content") or None,
        "tool_calls": calls_of(message) or None,
    }
    return parsed | {name: value for name, value in fields.items() if value is not None}


def _parse_part(part: object, waiting: dict[str, list[dict]], folder: Path | None) -> dict:
    if isinstance(part, Reference):  # placed
        return part
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


def with_system(messages: list[dict], row: Mapping[str, object], used: Collection[str]) -> list[dict]:
    """Messages behind one of the system, where the row has a column for it.

    Args:
        used: Columns that are read as something else.

    Raises:
        UnusableRow: The messages begin with another one already, or the column holds no text.
    """
    try:
        said = system_of(row, used)
    except ValueError as error:
        raise UnusableRow(str(error)) from error
    if said is None or not said.strip():
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": [{"type": "text", "text": said}]}, *messages]
    if text_of(messages[0]).strip() != said.strip():
        raise UnusableRow("column 'system' says something else than the first message, which is of the system too")
    return messages


def text_of(message: dict) -> str:
    """The text of a message, with reasoning and calls of tools, without its media."""
    return "".join(part["text"] for part in said_content(message) if part["type"] == "text")


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
