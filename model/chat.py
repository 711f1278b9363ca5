"""Conversations: their template, their checks, and their outline, into which texts and media are put."""

import re
from collections.abc import Collection, Iterable
from functools import lru_cache, partial
from itertools import count, pairwise
from typing import Any

from .chat_guard import (
    control_tokens,
    encode_text,
    guard_template,
    guard_tokenizer,
    normalized,
    split_at_marks,
    without_guard,
)
from .chat_rendering import Rendered, UnboundedTemplateError, render, template_of
from .media_sources import own_part
from .message_keys import reason_against_message

ROLE_TOKENS = {role: f"<|{role}|>" for role in ("user", "assistant", "system", "tool")}
"""What begins a message, by role: a token where the vocabulary has it, else these characters in ordinary tokens."""

# One line, since every line break and blank would become tokens.
CHAT_TEMPLATE = (
    "{%- macro write(content) -%}"
    "{%- if content is string -%}{{- content -}}{%- else -%}{%- for part in content -%}"
    "{{- part.text if part.type == 'text' else '<|' ~ part.type ~ '|>' -}}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '<|' ~ message.role ~ '|>' -}}"
    "{%- if message.role == 'assistant' -%}"
    "{% generation %}{{- write(message.content) -}}{{- eos_token -}}{% endgeneration %}"
    "{%- else -%}{{- write(message.content) -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
"""begin, then of each message its role and its content, and end after what the assistant says; nothing in between.

The assistant calls a tool by what it says; a message of the tool answers, after which the assistant speaks again.
"""

_SPELLING_TEMPLATE = CHAT_TEMPLATE.replace("'<|' ~ message.role ~ '|>'", "spell(message.role)").replace(
    "'<|assistant|>'", "spell('assistant')"
)
"""The beginning of a message whose role has no token."""

_MADE_HERE: set[str] = {CHAT_TEMPLATE}
"""Templates of which nothing comes from a file; others are rendered within bounds."""

Outline = tuple[tuple[str, tuple[str, ...] | None], ...]
"""Of each message its role and the types of its parts, None if its content is a string."""

WRITTEN_PREFIX = "written_"
"""How the names of kinds begin that are written rather than read."""

# Private characters; no text of a user is ever in a rendered template.
_PLACE = "\ue000{}\ue001"
_PLACES = re.compile("\ue000([0-9]+)\ue001")


def kinds_of_role(role: str, kinds: Collection[str]) -> dict[str, str]:
    """Types of parts that messages of a role may have besides text, and the kinds that these are: what the assistant
    shows is written, where the model writes such media, and everything else is read.
    """
    read = {name: name for name in kinds if not name.startswith(WRITTEN_PREFIX)}
    written = {name.removeprefix(WRITTEN_PREFIX): name for name in kinds if name.startswith(WRITTEN_PREFIX)}
    return read | written if role == "assistant" else read


def outline_of(
    messages: Any, kinds: Collection[str], continue_final_message: bool = False
) -> tuple[Outline, list[str], list[dict[str, Any]]]:
    """The outline of a conversation, its texts and the parts that are media, in order.

    Texts side by side in a message become one, as they will be read.

    Args:
        kinds: Kinds of media that the model reads or writes; the parts get them as their types.
        continue_final_message: The last message may be empty.

    Raises:
        ValueError: for what is no conversation; the message says which part of which message, and why.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"a conversation is {_short(messages)}; give a list of messages, at least one")
    outline: list[tuple[str, tuple[str, ...] | None]] = []
    texts: list[str] = []
    media: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"message {number} is {_short(message)}; give a dict with role and content")
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or role not in ROLE_TOKENS:
            raise ValueError(f"message {number} has role {_short(role)}; choose one of {', '.join(ROLE_TOKENS)}")
        if reason := reason_against_message(message, role == "assistant"):
            raise ValueError(f"message {number} ({role}) {reason}")
        num_texts, num_media = len(texts), len(media)
        if isinstance(content, str):
            outline.append((role, None))
            texts.append(content)
        elif isinstance(content, (list, tuple)):
            known = kinds_of_role(role, kinds)
            outline.append((role, _outline_of_parts(content, number, known, texts, media)))
        else:
            raise ValueError(f"message {number} has content {_short(content)}; give a string or a list of parts")
        is_open = continue_final_message and number == len(messages) - 1
        if not is_open and len(media) == num_media and not "".join(texts[num_texts:]).strip():
            raise ValueError(f"message {number} ({role}) says nothing; give it a text or a medium, or leave it out")
    return tuple(outline), texts, media


def _outline_of_parts(
    parts: Any, number: int, kinds: dict[str, str], texts: list[str], media: list[dict[str, Any]]
) -> tuple[str, ...]:
    types: list[str] = []
    for part in map(own_part, parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise ValueError(f"message {number} has a part of type 'text' with text {_short(part.get('text'))}")
            if types[-1:] == ["text"]:
                texts[-1] += part["text"]
                continue
            texts.append(part["text"])
            types.append("text")
        elif isinstance(kind, str) and kind in kinds:
            types.append(kinds[kind])
            media.append({**part, "type": kinds[kind], kinds[kind]: part.get(kind)})
        else:
            raise ValueError(
                f"message {number} has a part of type {_short(kind)}; choose one of {', '.join(['text', *kinds])}"
            )
    return tuple(types)


@lru_cache(maxsize=1024)
def render_outline(
    template: str,
    outline: Outline,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> list[tuple[str | int, bool]]:
    """What the template writes around the texts of a conversation.

    Returns:
        Pieces in order: what the template writes, media as single placeholders, or the number of a text; and whether
        the template counts them to what the assistant says.

    Raises:
        ValueError: the template cannot be rendered (`chat_rendering.render`), leaves out what a message says, or writes
            what no message says.
    """
    numbers = count()
    messages = messages_of(outline, map(_PLACE.format, numbers))
    text, spans = render_messages(
        template,
        messages,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        bos_token=bos_token,
        eos_token=eos_token,
    )
    _check_places(text, next(numbers))
    edges = sorted({0, len(text), *(min(edge, len(text)) for span in spans for edge in span)})
    pieces = []
    for start, end in pairwise(edges):
        is_answer = any(first <= start and end <= last for first, last in spans)
        for number, piece in enumerate(_PLACES.split(text[start:end])):
            if piece:
                pieces.append((int(piece) if number % 2 else piece, is_answer))
    return pieces


def render_messages(template: str, messages: list[dict[str, Any]], **variables: Any) -> Rendered:
    """`chat_rendering.render`, which trusts what was made here."""
    return render(template, messages, is_trusted=template in _MADE_HERE, **variables)


def _check_places(text: str, num_texts: int) -> None:
    """Raises ValueError for a rendered conversation that lacks a text, or has a place without one."""
    found, known = set(_PLACES.findall(text)), set(map(str, range(num_texts)))
    if found != known:
        what = "leaves out what a message says" if known - found else "writes what no message says"
        raise ValueError(f"the chat template {what}; correct it, or use another checkpoint")


def messages_of(outline: Outline, texts: Iterable[str]) -> list[dict[str, Any]]:
    """Messages of an outline, with texts in their places, and media as parts that say nothing but their kind."""
    messages, rest = [], iter(texts)
    for role, types in outline:
        kinds = ("text",) if types is None else types
        content = [{"type": kind, "text": next(rest)} if kind == "text" else {"type": kind} for kind in kinds]
        messages.append({"role": role, "content": content[0]["text"] if types is None else content})
    return messages


def prepare_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Make a tokenizer that may never have seen conversations ready for them.

    It gets `CHAT_TEMPLATE`, and `ROLE_TOKENS` at the end of its vocabulary as far as the model has rows of embeddings
    that no token uses. Roles without a token are spelled. A tokenizer with a template of its own keeps that and its
    vocabulary. Either way the template and the normalizer keep texts from becoming special tokens (`chat_guard.py`),
    also where what is saved is used without this code.

    Args:
        vocab_size: rows of the model's embedding table.

    Raises:
        ValueError: as `guard_tokenizer`; or the tokenizer's own template takes more time or memory than it may.
    """
    if _is_ours(tokenizer.chat_template):
        known = tokenizer.get_vocab()
        missing = [token for token in ROLE_TOKENS.values() if token not in known]
        free = max(vocab_size - max(known.values()) - 1, 0)
        special = [token for token in ROLE_TOKENS.values() if token in known or token in missing[:free]]
        if not set(special) <= set(control_tokens(tokenizer)):
            tokenizer.add_special_tokens({"extra_special_tokens": special}, replace_extra_special_tokens=False)
    tokenizer.chat_template = guard(tokenizer, tokenizer.chat_template)
    check_template(tokenizer)


def check_template(tokenizer: Any) -> None:
    """See to it that the template of a tokenizer or processor, if it has one, ends. It may refuse messages.

    Raises:
        UnboundedTemplateError: it takes more time or memory than it may.
        ValueError: it is no text.
    """
    if tokenizer.chat_template is None:
        return
    template, special = template_of(tokenizer.chat_template), getattr(tokenizer, "tokenizer", tokenizer)
    messages = [{"role": role, "content": f"{role} says"} for role in ("system", "user", "assistant", "tool")]
    try:
        render_messages(template, messages, **special.special_tokens_map)
    except ValueError as error:
        if isinstance(error, UnboundedTemplateError):
            raise


def guard(tokenizer: Any, template: str | dict[str, str] | None) -> str | dict[str, str]:
    """Keep texts from passing for special tokens or roles: changes a tokenizer, as far as it has to be.

    Args:
        template: A chat template, or several by their names. None: `CHAT_TEMPLATE`.

    Returns:
        The same with a guard.

    Raises:
        ValueError: as `guard_tokenizer`; or a template is no text.
    """
    if isinstance(template, dict):
        return {name: guard(tokenizer, one) for name, one in template.items()}
    guard_tokenizer(tokenizer)
    if not _is_ours(template):
        return guard_template(template_of(template), tokenizer)
    special = set(control_tokens(tokenizer))
    names = [token[2:-2] for token in sorted(special) if token.startswith("<|") and token.endswith("|>")]
    types = [name for name in names if f"<|{name.removeprefix(WRITTEN_PREFIX)}_start|>" in special]
    spelled = [role for role, token in ROLE_TOKENS.items() if token in spelled_roles(tokenizer)]
    if spelled:
        split_at_marks(tokenizer)
    plain = _SPELLING_TEMPLATE if spelled else CHAT_TEMPLATE
    made = guard_template(plain, tokenizer, tuple(ROLE_TOKENS), types, spelled)
    _MADE_HERE.add(made)
    return made


def _is_ours(template: str | dict[str, str] | None) -> bool:
    if not isinstance(template, str):
        return template is None
    return without_guard(template) in (CHAT_TEMPLATE, _SPELLING_TEMPLATE)


def spelled_roles(tokenizer: Any) -> list[str]:
    """The beginnings of messages whose roles have no token."""
    return [token for token in ROLE_TOKENS.values() if tokenizer.backend_tokenizer.token_to_id(token) is None]


def encode_conversation(
    tokenizer: Any, messages: list[dict[str, Any]], add_generation_prompt: bool = False
) -> list[int]:
    """Token ids of a conversation without media, in which no text can pass for anything but text.

    Args:
        tokenizer: A fast one with a chat template.
        add_generation_prompt: Ends with what lets the assistant speak.

    Raises:
        ValueError: as `outline_of` and `check_texts`.
    """
    outline, texts, _ = outline_of(messages, ())
    template = template_of(tokenizer.chat_template)
    check_texts(tokenizer, texts, template)
    begin, end = tokenizer.bos_token or "", tokenizer.eos_token or ""
    pieces = render_outline(template, outline, begin, end, add_generation_prompt)
    ids: list[int] = []
    for piece, _ in pieces:
        is_text = isinstance(piece, int)
        ids += encode_text(tokenizer, texts[piece]) if is_text else tokenizer.encode(piece, add_special_tokens=False)
    return ids


def check_texts(tokenizer: Any, texts: Iterable[str], template: str) -> None:
    """Refuse texts that would be read as the beginning of a message.

    Args:
        template: That of the conversation; one of its own begins messages otherwise than ours.

    Raises:
        ValueError: one contains a role that the vocabulary has no token for, and which is spelled for this reason.
    """
    spelled = spelled_roles(tokenizer) if _is_ours(template) else []
    for text in map(partial(normalized, tokenizer), texts) if spelled else ():
        found = next((token for token in spelled if token in text), None)
        if found is not None:
            raise ValueError(
                f"a message contains {found!r}, for which the vocabulary has no token, so that it would begin another "
                "message; leave it out"
            )


def _short(value: Any) -> str:
    """A value in an error."""
    shown = repr(value) if isinstance(value, (str, int, float, dict, list, tuple, type(None))) else type(value).__name__
    return shown if len(shown) <= 80 else shown[:77] + "..."
