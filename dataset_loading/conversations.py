"""Conversations: messages with text and media, checked, and as token ids.

A conversation is a list of {"role", "content"}; a content is a list of parts, {"type": "text", "text"} or
{"type": kind, ...}, where the rest says where the medium is (`references.py`). The tokens are begin, and for each
message the token of its role and its parts in order; after a message of the assistant comes end. A role that the
vocabulary has no token for is spelled in ordinary tokens. A medium is one placeholder here: how many it becomes is
known when it is read.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from .documents import encode_texts
from .message_keys import reason_against_message, reason_against_part
from .references import UnusableRow, reference_to
from .validation import reason_against

ROLES = ("system", "user", "assistant", "tool")


def answer_to(given: Sequence[dict], prompt: str, answer: str, shown: Sequence[dict] = ()) -> list[dict]:
    """The conversation of one question and its answer.

    Args:
        given: references to media in front of the prompt, which may be empty.
        shown: references to media behind the answer, which may be empty.
    """
    question = [*given, *([{"type": "text", "text": prompt}] if prompt else [])]
    reply = [*([{"type": "text", "text": answer}] if answer else []), *shown]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def parse_messages(
    value: object, attached: Mapping[str, list[dict]], folder: Path | None, loss_on: str = "answer"
) -> list[dict]:
    """Messages as they stand in a file, checked, each with a list of parts that say where their media are.

    Args:
        attached: references by kind, for the parts of that kind that name no file, in order; where no part does, they
            are put in front of what the user says first.
        folder: that which names of files are relative to.
        loss_on: as in `tokenize_conversations`.

    Raises:
        UnusableRow: these are no messages, a part is of an unknown type, a medium is missing or left over, there is
            nothing to learn, or something is said besides that changes what is to be learned.
    """
    if not isinstance(value, list) or not value:
        raise UnusableRow(f"messages are {_name(value)}, not a list of {{role, content}}")
    for message in value:
        is_answer = isinstance(message, dict) and message.get("role") == "assistant"
        if isinstance(message, dict) and (reason := reason_against_message(message, loss_on == "all" or is_answer)):
            raise UnusableRow(_sharegpt_reason(message) or reason)
    waiting = {kind: list(references) for kind, references in attached.items()}
    for kind, references in attached.items():
        value = _with_places(value, kind, len(references)) if references else value
    messages = [_parse_message(message, waiting, folder) for message in value]
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


def _name(value: object) -> str:
    return "an empty list" if value == [] else type(value).__name__


def _with_places(messages: list, kind: str, count: int) -> list:
    """Messages in which a mark such as "<image>" in a text, as LLaVA writes it, is a part.

    Raises:
        UnusableRow: there are more or fewer marks than media.
    """
    mark = f"<{kind}>"
    placed = [_with_parts(message, mark, kind) if isinstance(message, dict) else message for message in messages]
    found = sum(_count_parts(message, kind) for message in placed) - sum(
        _count_parts(message, kind) for message in messages
    )
    if found not in (0, count):
        raise UnusableRow(f"{count} media of type {kind!r}, but {found} marks {mark!r} in the texts for them")
    return placed if found else messages


def _count_parts(message: object, kind: str) -> int:
    content = message.get("content") if isinstance(message, dict) else None
    parts = content if isinstance(content, list) else ()
    return sum(isinstance(part, dict) and part.get("type") == kind for part in parts)


def _with_parts(message: dict, mark: str, kind: str) -> dict:
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}] if mark in content else content
    if not isinstance(content, list):
        return message
    parts: list = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            parts.append(part)
            continue
        for number, piece in enumerate(text.split(mark)):
            parts += [{"type": kind}] * (number > 0) + [{"type": "text", "text": piece}] * bool(piece)
    return {**message, "content": parts}


def _sharegpt_reason(message: dict) -> str | None:
    if {"from", "value"} <= message.keys() and "role" not in message:
        return (
            "a message has 'from' and 'value', as ShareGPT writes it; rename them to role and content, and in role "
            "human to user and gpt to assistant"
        )
    return None


def _parse_message(message: object, waiting: dict[str, list[dict]], folder: Path | None) -> dict:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise UnusableRow(f"role of a message is {role!r}; it must be one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise UnusableRow(f"content of a message is {type(content).__name__}, neither text nor a list of parts")
    return {"role": message["role"], "content": [_parse_part(part, waiting, folder) for part in content]}


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


@dataclass(frozen=True)
class TokenizedConversation:
    """One conversation; each medium is one placeholder."""

    tokens: np.ndarray
    """int32 (tokens,)"""
    is_label: np.ndarray
    """bool (tokens,): what is learned; never begin, and of placeholders those of kinds that are learned."""


def tokenize_conversations(
    conversations: Sequence[Sequence[dict]],
    tokenizer: PreTrainedTokenizerFast,
    placeholders: Mapping[str, int],
    loss_on: str,
    written: Collection[str] = (),
) -> list[TokenizedConversation]:
    """Conversations as tokens.

    Args:
        placeholders: token ids by kind of medium.
        loss_on: "answer": what the assistant says and its end tokens; "all": everything but begin and media.
        written: kinds of media of which something is learned, either way.
    """
    special = {role: role_ids(tokenizer, role) for role in ROLES}
    special |= {kind: [placeholder] for kind, placeholder in placeholders.items()}
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    texts: list[str] = []
    plans = [_plan(messages, texts) for messages in conversations]
    ids = encode_texts(tokenizer, texts)
    return [_assemble(plan, ids, special, begin, end, loss_on, written) for plan in plans]


def special_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of a special token.

    Raises:
        ValueError: the tokenizer does not have it.
    """
    index = tokenizer.backend_tokenizer.token_to_id(token)  # get_vocab() would copy the whole of it
    if index is None:
        raise ValueError(f"the tokenizer has no token {token!r}, which media need; train or load it with media")
    return index


def role_ids(tokenizer: PreTrainedTokenizerFast, role: str) -> list[int]:
    """The token that begins messages of a role, or the tokens that spell it."""
    token = f"<|{role}|>"
    index = tokenizer.backend_tokenizer.token_to_id(token)
    return encode_texts(tokenizer, [token])[0].tolist() if index is None else [index]


def spelled_roles(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What begins messages of those roles that have no token: a text that contains it would begin a message."""
    return [token for role in ROLES if tokenizer.backend_tokenizer.token_to_id(token := f"<|{role}|>") is None]


def normalized(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """A text as its tokens are made of it, in which what is spelled may be found that it does not have itself."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return text if normalizer is None else normalizer.normalize_str(text)


def _plan(messages: Sequence[dict], texts: list[str]) -> list[tuple[str, list[int | str]]]:
    """For each message its role, and for each part the number of its text among `texts`, or the kind of the medium.

    Texts side by side become one: that they came in parts is not to be seen in their tokens.
    """
    plan = []
    for message in messages:
        parts: list[int | str] = []
        for part in message["content"]:
            if part["type"] != "text":
                parts.append(part["type"])
            elif parts and isinstance(parts[-1], int):
                texts[-1] += part["text"]
            else:
                texts.append(part["text"])
                parts.append(len(texts) - 1)
        plan.append((message["role"], parts))
    return plan


def _assemble(
    plan: list[tuple[str, list[int | str]]],
    ids: list[np.ndarray],
    special: Mapping[str, list[int]],
    begin: int,
    end: int,
    loss_on: str,
    written: Collection[str],
) -> TokenizedConversation:
    tokens, is_label = [begin], [False]  # lists, since most parts are a token or a few

    def add(part: list[int], learned: bool) -> None:
        tokens.extend(part)
        is_label.extend([learned] * len(part))

    for role, parts in plan:
        learned = loss_on == "all" or role == "assistant"
        add(special[role], loss_on == "all")
        for part in parts:
            if isinstance(part, str):
                add(special[part], part in written)
            else:
                add(ids[part].tolist(), learned)
        if role == "assistant":
            add([end], learned)
    return TokenizedConversation(np.array(tokens, dtype=np.int32), np.array(is_label, dtype=bool))
