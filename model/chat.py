"""Conversations to token ids: their template, their checks, and their outline, into which texts and media are put.

Whatever encodes conversations goes through `ConversationEncoder`: rows of training, chats, and processors.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np

from .chat_guard import control_tokens, guard_template, guard_tokenizer, split_at_marks, without_guard
from .chat_rendering import Rendered, UnboundedTemplateError, render_template, template_of
from .media_sources import own_part
from .message_keys import WHAT_TO_DO, calls_of, is_left_out, reason_against_message
from .text_encoding import encode_texts, normalized

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

Outline = tuple[tuple[Any, ...], ...]
"""The role of each message, the types of its parts, which are None if its content is a string, and of a message that
has calls of tools or reasoning these as JSON, with a leaf in the place of each text."""

SpecialTokens = tuple[tuple[str, Any], ...]
"""What templates find of a tokenizer, such as ("bos_token", "<|begin|>")."""

NULL_TOKEN = "<|null|>"
"""Stands in the place of each token of a prompt that is left out for guidance without a classifier."""

TARGET_PREFIX = "written_"
"""How the names of modalities begin that are generated rather than read."""

NO_ANSWERS = (
    "the chat template does not tell what the assistant says, as a message changes how those before it are written; "
    "put {% generation %} and {% endgeneration %} around it in the template"
)

# Private characters; no text of a user is ever in a rendered template. Where a template makes JSON of what it is given,
# the quote shows it.
_PLACE, _PLACE_OF_LEAF = "\ue000{}\ue001", '\ue000{}"\ue001'
_PLACES = re.compile('\ue000([0-9]+)((?:\\\\?")?)\ue001')
_LEAF = re.compile("\ue002([0-9]+)")


class EscapedText(int):
    """The number of a text that stands within JSON."""


def modalities_of_role(role: str, modalities: Collection[str]) -> dict[str, str]:
    """Types of parts, besides text, that messages of a role may have, with the modality of each. What the assistant
    shows is generated, where the model generates such media; everything else is read.
    """
    read = {name: name for name in modalities if not name.startswith(TARGET_PREFIX)}
    written = {name.removeprefix(TARGET_PREFIX): name for name in modalities if name.startswith(TARGET_PREFIX)}
    return read | written if role == "assistant" else read


def check_messages(messages: Any, learns_all: bool = False, fixes: Mapping[str, str] = WHAT_TO_DO) -> None:
    """Refuses what is no list of messages, each with a role and a content, and nothing besides that would have to be
    read: ValueError says which message, and why. With `learns_all`, messages of others than the assistant are learned
    too; `fixes` says what to do with keys that are not read. Parts of contents are not looked at.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"a conversation is {_short(messages)}; give a list of messages, at least one")
    for number, message in enumerate(messages):
        needed = {"role"} if isinstance(message, dict) and message.get("tool_calls") else {"role", "content"}
        if not isinstance(message, dict) or not needed <= message.keys():
            raise ValueError(f"message {number} is {_short(message)}; give a dict with role and content")
        role, content = message["role"], _content_of(message)
        if not isinstance(role, str) or role not in ROLE_TOKENS:
            raise ValueError(f"message {number} has role {_short(role)}; choose one of {', '.join(ROLE_TOKENS)}")
        if reason := reason_against_message(message, learns_all or role == "assistant", fixes):
            raise ValueError(f"message {number} ({role}) {reason}")
        if not isinstance(content, (str, list, tuple)):
            raise ValueError(f"message {number} has content {_short(content)}; give a string or a list of parts")
        _check_fields(number, message)


def _content_of(message: Mapping[str, Any]) -> Any:
    """The content of a message, which is an empty text where it is None beside calls of tools."""
    content = message.get("content")
    return "" if content is None and message.get("tool_calls") else content


def _check_fields(number: int, message: Mapping[str, Any]) -> None:
    if not isinstance(message.get("reasoning_content"), (str, type(None))):
        raise ValueError(f"message {number} has reasoning_content {_short(message['reasoning_content'])}; give a text")
    try:
        calls_of(message)
    except ValueError as error:
        raise ValueError(f"message {number} ({message['role']}) {error}") from error


def said_content(message: Mapping[str, Any]) -> Any:
    """The content of a message with its reasoning in front and its calls of tools behind, as our template says them:
    `<think>` and `</think>` around the one, and of the others NAME(ARGUMENTS), a line each.
    """
    content, calls = _content_of(message), calls_of(message)
    before = f"<think>\n{message['reasoning_content']}\n</think>\n\n" if message.get("reasoning_content") else ""
    said = [call["name"] + f"({it if isinstance(it := call['arguments'], str) else _json(it)})" for call in calls]
    has_content = bool(content) if isinstance(content, str) else any(part != _NOTHING for part in content)
    behind = "\n".join([*([""] if has_content and said else []), *said])
    if isinstance(content, str):
        return before + content + behind
    parts = [{"type": "text", "text": text} for text in (before, behind)]
    return [part for part in (parts[0], *content, parts[1]) if part != _NOTHING] or content


_NOTHING = {"type": "text", "text": ""}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _fields_of(message: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Calls of tools and reasoning of a message as JSON in the form that templates take, "" if it has none, and the
    texts of its leaves.
    """
    texts: list[str] = []

    def leaf(text: str) -> str:
        texts.append(text)
        return f"\ue002{len(texts) - 1}"

    def with_leaves(value: Any) -> Any:
        if isinstance(value, dict):
            return {leaf(key): with_leaves(item) for key, item in value.items()}
        if isinstance(value, list):
            return [with_leaves(item) for item in value]
        return leaf(value) if isinstance(value, str) else value

    fields: dict[str, Any] = {}
    if message.get("reasoning_content"):
        fields["reasoning_content"] = leaf(message["reasoning_content"])
    calls = [{"name": leaf(call["name"]), "arguments": with_leaves(call["arguments"])} for call in calls_of(message)]
    if calls:
        fields["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return _json(fields) if fields else "", texts


def _filled(value: Any, texts: Sequence[str]) -> Any:
    """Fields with texts in the places of leaves."""
    if isinstance(value, dict):
        return {_filled(key, texts): _filled(item, texts) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, texts) for item in value]
    found = _LEAF.fullmatch(value) if isinstance(value, str) else None
    return texts[int(found[1])] if found else value


Items = Mapping[str, Sequence[dict[str, Any]]]
"""Parts of messages that are media, by type."""


def place_items(messages: Iterable[Any], items: Items) -> tuple[list[Any], Items]:
    """Messages in which items stand where marks in the texts say, such as "<image>", as LLaVA writes them; and those of
    which there are no marks.

    Args:
        items: Items that are given beside the messages, in the order of their marks.

    Raises:
        ValueError: there are marks of a type, but more or fewer than items.
    """
    placed, left = list(messages), {}
    for kind, parts in items.items():
        mark = f"<{kind}>"
        num_marks = sum(_text_of(part).count(mark) for message in placed for part in _parts_of(message))
        if num_marks not in (0, len(parts)):
            raise ValueError(
                f"{len(parts)} media of type {kind!r}, but {num_marks} marks {mark!r} in the texts for them; give as "
                "many of both, or no marks"
            )
        if num_marks == 0:
            left[kind] = parts
            continue
        rest = iter(parts)
        placed = [_with_items(message, mark, rest) for message in placed]
    return placed, left


def _parts_of(message: Any) -> list[Any]:
    """The content of what may be no message as parts, which may be none."""
    content = message.get("content") if isinstance(message, dict) else None
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return list(content) if isinstance(content, (list, tuple)) else []


def _text_of(part: Any) -> str:
    """The text of a part, "" if it has none."""
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    return text if isinstance(text, str) else ""


def _with_items(message: Any, mark: str, items: Iterator[dict[str, Any]]) -> Any:
    placed, is_changed = [], False
    for part in _parts_of(message):
        before, *others = _text_of(part).split(mark)
        if not others:
            placed.append(part)
            continue
        is_changed = True
        placed += [{**part, "text": before}] if before else []
        for text in others:
            placed += [next(items), *([{**part, "text": text}] if text else [])]
    return {**message, "content": placed} if is_changed else message


def items_at_marks(content: Sequence[Any], kinds: Iterable[str]) -> Sequence[Any]:
    """The parts of a message, of which the items stand where marks in its texts say, if it has marks.

    Raises:
        ValueError: see `place_items`.
    """
    for kind in kinds:
        is_item = [isinstance(part, dict) and part.get("type") == kind for part in content]
        items = [part for part, is_one in zip(content, is_item, strict=True) if is_one]
        others = [part for part, is_one in zip(content, is_item, strict=True) if not is_one]
        (message,), left = place_items([{"content": others}], {kind: items} if items else {})
        content = message["content"] if items and not left else content
    return content


def outline_of(
    messages: Any, modalities: Collection[str], may_end_empty: bool = False, has_fields: bool = False
) -> tuple[Outline, list[str], list[dict[str, Any]]]:
    """The outline of a conversation, its texts and the parts that are media, in order, with their modalities as types.
    Texts side by side in a message become one, as they will be read. `may_end_empty`: the last message may say nothing;
    `has_fields`: the template writes calls of tools and reasoning, which become part of the content else. ValueError
    says which part of which message cannot be used, and why.
    """
    check_messages(messages)
    outline: list[tuple[Any, ...]] = []
    texts: list[str] = []
    media: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        role, content = message["role"], _content_of(message) if has_fields else said_content(message)
        num_texts, num_media, types = len(texts), len(media), None
        if isinstance(content, str):
            texts.append(content)
        else:
            types = _outline_of_parts(content, number, modalities_of_role(role, modalities), texts, media)
        fields, leaves = _fields_of(message) if has_fields else ("", [])
        outline.append((role, types, fields) if fields else (role, types))
        texts += leaves
        may_be_empty = may_end_empty and number == len(messages) - 1
        if not may_be_empty and len(media) == num_media and not "".join(texts[num_texts:]).strip():
            raise ValueError(f"message {number} ({role}) says nothing; give it a text or a medium, or leave it out")
    return tuple(outline), texts, media


def _outline_of_parts(
    parts: Any, number: int, modalities: dict[str, str], texts: list[str], media: list[dict[str, Any]]
) -> tuple[str, ...]:
    types: list[str] = []
    for part in items_at_marks(list(map(own_part, parts)), modalities):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise ValueError(f"message {number} has a part of type 'text' with text {_short(part.get('text'))}")
            if types[-1:] == ["text"]:
                texts[-1] += part["text"]
                continue
            texts.append(part["text"])
            types.append("text")
        elif isinstance(kind, str) and kind in modalities:
            types.append(modalities[kind])
            media.append({**part, "type": modalities[kind], modalities[kind]: part.get(kind)})
        else:
            raise ValueError(
                f"message {number} has a part of type {_short(kind)}; choose one of {', '.join(['text', *modalities])}"
            )
    return tuple(types)


@dataclass(frozen=True)
class RenderedOutline:
    """What a template makes of a conversation, around its texts."""

    outline: Outline
    """In the form that the template takes: what has texts alone as strings, or else as lists of parts."""
    pieces: tuple[tuple[str | int, int | None], ...]
    """In order: what the template writes, media as single placeholders, or the number of a text; and of which answer of
    the assistant this is a part, if of any."""
    num_answers: int | None
    """How many answers there are; None where it is not known what the assistant says, and `pieces` has none."""


@lru_cache(maxsize=4096)
def render_outline(
    template: str,
    outline: Outline,
    special_tokens: SpecialTokens,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> RenderedOutline:
    """What the template writes around the texts of a conversation.

    What the assistant says is what stands in the template between `generation` and `endgeneration`. Where it has no
    such marks, it is what a message adds to the conversation before it, with that which lets the assistant speak.

    Raises:
        ValueError: the template cannot be rendered (`chat_rendering.render_template`), leaves out what a message
            says, or writes what no message says.
    """
    problems = []
    for types_of_text in (None, ("text",)):
        form = tuple(
            (role, types_of_text if types in (None, ("text",)) else types, *fields) for role, types, *fields in outline
        )
        rendered = _render_places(template, form, special_tokens, add_generation_prompt, continue_final_message)
        if not isinstance(rendered, ValueError):
            answers = rendered[1] or _answers_by_prefixes(template, form, special_tokens, rendered[0])
            num_answers = None if answers is None else len(answers)
            return RenderedOutline(form, tuple(_pieces(rendered[0], answers or [])), num_answers)
        problems.append(str(rendered))
    raise ValueError(problems[0])


@lru_cache(maxsize=4096)
def _render_places(
    template: str, outline: Outline, special_tokens: SpecialTokens, is_asked: bool = False, is_open: bool = False
) -> Rendered | ValueError:
    """A rendered conversation with places for its texts, or the problem, which many conversations may have."""
    places = _places_of(outline)
    messages = messages_of(outline, places)
    open_end = {"add_generation_prompt": is_asked, "continue_final_message": is_open}
    try:
        text, spans = render_messages(template, messages, **open_end, **dict(special_tokens))
        _check_places(text, len(places))
    except UnboundedTemplateError:
        raise
    except ValueError as error:
        return error
    return text, spans


def _answers_by_prefixes(
    template: str, outline: Outline, special_tokens: SpecialTokens, text: str
) -> list[tuple[int, int]] | None:
    """The spans of what the assistant says in a rendered conversation; None where a message changes those before it."""
    spans = []
    for number, (role, *_) in enumerate(outline):
        if role != "assistant":
            continue
        before = _render_places(template, outline[:number], special_tokens, True)
        after = _render_places(template, outline[: number + 1], special_tokens)
        if isinstance(before, ValueError) or isinstance(after, ValueError) or not after[0].startswith(before[0]):
            return None
        is_cut = number + 1 == len(outline) and after[0].startswith(text)  # a last message that stays open
        if not (is_cut or text.startswith(after[0])):
            return None
        spans.append((len(before[0]), min(len(after[0]), len(text))))
    return spans


def _pieces(text: str, answers: list[tuple[int, int]]) -> Iterable[tuple[str | int, int | None]]:
    edges = sorted({0, len(text), *(min(edge, len(text)) for span in answers for edge in span)})
    for start, end in pairwise(edges):
        answer = next((number for number, (first, last) in enumerate(answers) if first <= start and end <= last), None)
        parts = iter(_PLACES.split(text[start:end]))
        for piece in parts:
            if piece:
                yield piece, answer
            number, quote = next(parts, None), next(parts, "")
            if number is not None:
                yield EscapedText(number) if len(quote) > 1 else int(number), answer


def render_messages(template: str, messages: list[dict[str, Any]], **variables: Any) -> Rendered:
    """`chat_rendering.render_template`, which trusts what was made here."""
    return render_template(template, messages, is_trusted=template in _MADE_HERE, **variables)


def _check_places(text: str, num_texts: int) -> None:
    """Raises ValueError for a rendered conversation that lacks a text, or has a place without one."""
    found, known = {number for number, _ in _PLACES.findall(text)}, set(map(str, range(num_texts)))
    if found != known:
        what = "leaves out what a message says" if known - found else "writes what no message says"
        raise ValueError(f"the chat template {what}; correct it, or use another checkpoint")


def messages_of(outline: Outline, texts: Iterable[str]) -> list[dict[str, Any]]:
    """Messages of an outline, with texts in their places, and media as parts that say nothing but their kind."""
    messages, rest = [], iter(texts)
    for role, types, *fields in outline:
        modalities = ("text",) if types is None else types
        content = [{"type": kind, "text": next(rest)} if kind == "text" else {"type": kind} for kind in modalities]
        messages.append({"role": role, "content": content[0]["text"] if types is None else content})
        for skeleton in fields:
            leaves = [next(rest) for _ in _LEAF.findall(skeleton)]
            messages[-1] |= _filled(json.loads(skeleton), leaves)
    return messages


def _num_texts(types: tuple[str, ...] | None) -> int:
    return 1 if types is None else types.count("text")


def _places_of(outline: Outline) -> list[str]:
    """What stands for the texts of a conversation while it is rendered."""
    forms = []
    for _, types, *fields in outline:
        num_leaves = sum(len(_LEAF.findall(skeleton)) for skeleton in fields)
        forms += [_PLACE] * _num_texts(types) + [_PLACE_OF_LEAF] * num_leaves
    return [form.format(number) for number, form in enumerate(forms)]


def prepare_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Makes a tokenizer that may never have seen conversations ready for them. It gets `CHAT_TEMPLATE`, and
    `ROLE_TOKENS` at the end of its vocabulary as far as the model, of `vocab_size` rows of embeddings, has some that no
    token uses. Roles without a token are spelled. A tokenizer with a template of its own keeps that and its vocabulary.
    Either way the template and the normalizer keep texts from becoming special tokens (`chat_guard.py`), also where
    what is saved is used without this code. ValueError: the cases of `guard_tokenizer`; or the tokenizer's own template
    takes too much time or memory.
    """
    if is_own_template(tokenizer.chat_template):
        known = tokenizer.get_vocab()
        missing = [token for token in ROLE_TOKENS.values() if token not in known]
        free = max(vocab_size - max(known.values()) - 1, 0)
        special = [token for token in ROLE_TOKENS.values() if token in known or token in missing[:free]]
        if not set(special) <= set(control_tokens(tokenizer)):
            tokenizer.add_special_tokens({"extra_special_tokens": special}, replace_extra_special_tokens=False)
    tokenizer.chat_template = guard(tokenizer, tokenizer.chat_template)
    check_template(tokenizer)


def check_template(tokenizer: Any) -> None:
    """Sees to it that the template of a tokenizer or processor, if it has one, ends (else UnboundedTemplateError), and
    is a text (else ValueError). It may refuse messages.
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
    """Keeps texts from passing for special tokens or roles: changes a tokenizer, as far as it has to be, and gives its
    chat template, or several by their names, a guard. None is `CHAT_TEMPLATE`. ValueError: the cases of
    `guard_tokenizer`; or a template is no text.
    """
    if isinstance(template, dict):
        return {name: guard(tokenizer, one) for name, one in template.items()}
    guard_tokenizer(tokenizer)
    if not is_own_template(template):
        return guard_template(template_of(template), tokenizer)
    special = set(control_tokens(tokenizer))
    names = [token[2:-2] for token in sorted(special) if token.startswith("<|") and token.endswith("|>")]
    types = [name for name in names if f"<|{name.removeprefix(TARGET_PREFIX)}_start|>" in special]
    spelled = [role for role, token in ROLE_TOKENS.items() if token in spelled_roles(tokenizer)]
    if spelled:
        split_at_marks(tokenizer)
    plain = _SPELLING_TEMPLATE if spelled else CHAT_TEMPLATE
    made = guard_template(plain, tokenizer, tuple(ROLE_TOKENS), types, spelled)
    _MADE_HERE.add(made)
    return made


def is_own_template(template: str | dict[str, str] | None) -> bool:
    """Whether a template is `CHAT_TEMPLATE`, behind a guard or not, or none is given."""
    if not isinstance(template, str):
        return template is None
    return without_guard(template) in (CHAT_TEMPLATE, _SPELLING_TEMPLATE)


def spelled_roles(tokenizer: Any) -> list[str]:
    """The beginnings of messages whose roles have no token."""
    return [token for token in ROLE_TOKENS.values() if tokenizer.backend_tokenizer.token_to_id(token) is None]


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation as token ids, in which each item is one placeholder."""

    ids: np.ndarray
    """int32 (tokens,)"""
    is_answer: np.ndarray
    """bool (tokens,): what the assistant says, and what ends it, but for what is left out."""
    is_left_out: np.ndarray
    """bool (tokens,): what is kept out of the loss: of an answer all, of other messages their texts."""
    answer_start: int
    """Where the last answer begins; the number of tokens if there is none."""
    media: list[dict[str, Any]]
    """The parts that are media, in order, with their modalities as types."""


class ConversationEncoder:
    """Conversations to token ids, in which no text can pass for anything but text, by a fast tokenizer. `modalities`
    are what the model reads and writes besides text, by name, `chat_template` is one, or several by their names.
    ValueError: the vocabulary lacks a token of media.
    """

    def __init__(
        self,
        tokenizer: Any,
        modalities: Mapping[str, Any] | None = None,
        chat_template: str | dict[str, str] | None = None,
    ):
        self.tokenizer, self.modalities, self.chat_template = tokenizer, modalities or {}, chat_template
        self.token_ids: dict[str, tuple[int, ...]] = {}
        """The placeholder of each modality, and what stands before and behind those of an item."""
        for name, kind in self.modalities.items():
            tokens = kind.token, kind.start_token, kind.end_token
            self.token_ids[name] = tuple(special_id(tokenizer, token) for token in tokens)
        self._ids_of_structure: dict[str, np.ndarray] = {}

    @property
    def placeholders(self) -> dict[str, int]:
        """The id of the placeholder of each kind."""
        return {name: ids[0] for name, ids in self.token_ids.items()}

    def encode(
        self, messages: Any, add_generation_prompt: bool = False, continue_final_message: bool = False
    ) -> EncodedConversation:
        """One conversation, which ends with what lets the assistant speak, or with its last message open, where that is
        asked for. ValueError: the cases of `outline_of`, `check_texts` and `render_outline`; or the template does not
        write one placeholder for each item.
        """
        open_end = add_generation_prompt, continue_final_message
        (found,) = self.encode_all([messages], False, continue_final_message, open_end)
        if isinstance(found, ValueError):
            raise found
        return found

    def encode_all(
        self,
        conversations: Sequence[Any],
        needs_answers: bool = True,
        may_end_empty: bool = False,
        open_end: tuple[bool, bool] = (False, False),
    ) -> list[EncodedConversation | ValueError]:
        """Many conversations, which is faster than one after another; of one that cannot be used, why. `needs_answers`:
        it has to be known what the assistant says; `may_end_empty`: the last message may say nothing; `open_end`: see
        `encode`. UnboundedTemplateError: the template takes more time or memory than it may.
        """
        template, special_tokens = template_of(self.chat_template), special_tokens_of(self.tokenizer)
        plans: list[tuple[RenderedOutline, int, list[dict[str, Any]], list[bool]] | ValueError] = []
        texts: list[str] = []
        for messages in conversations:
            try:
                has_fields = not is_own_template(template)
                outline, own_texts, media = outline_of(messages, self.modalities, may_end_empty, has_fields)
                check_texts(self.tokenizer, own_texts, template)
                rendered = render_outline(template, outline, special_tokens, *open_end)
            except UnboundedTemplateError:
                raise
            except ValueError as error:
                plans.append(error)
                continue
            left_out = list(map(is_left_out, messages))
            if problem := _problem_of_answers(rendered, left_out, needs_answers):
                plans.append(ValueError(problem))
                continue
            plans.append((rendered, len(texts), media, left_out))
            escaped = {piece for piece, _ in rendered.pieces if isinstance(piece, EscapedText)}
            texts += [_json(text)[1:-1] if number in escaped else text for number, text in enumerate(own_texts)]
        ids = encode_texts(self.tokenizer, texts)
        return [plan if isinstance(plan, ValueError) else self._assemble(*plan, ids) for plan in plans]

    def _assemble(
        self,
        rendered: RenderedOutline,
        first_text: int,
        media: list[dict[str, Any]],
        left_out: list[bool],
        ids_of_texts: list[np.ndarray],
    ) -> EncodedConversation | ValueError:
        parts, answers = [], [answer for _, answer in rendered.pieces]
        for piece, _ in rendered.pieces:
            is_text = isinstance(piece, int)
            parts.append(ids_of_texts[first_text + piece] if is_text else self._encode_structure(piece))
        ids, counts = np.concatenate(parts), list(map(len, parts))
        if problem := self._problem_of_media(ids, [part["type"] for part in media]):
            return ValueError(problem)
        last = max((answer for answer in answers if answer is not None), default=None)
        start = len(ids) if last is None else sum(counts[: answers.index(last)])
        is_out = np.repeat(_pieces_left_out(rendered, left_out), counts)
        is_answer = np.repeat([answer is not None for answer in answers], counts) & ~is_out
        return EncodedConversation(ids, is_answer, is_out, start, media)

    def _encode_structure(self, piece: str) -> np.ndarray:
        """Ids of what the template writes, which are few and recur."""
        if piece not in self._ids_of_structure:
            ids = self.tokenizer.encode(piece, add_special_tokens=False)
            self._ids_of_structure[piece] = np.array(ids, dtype=np.int32)
        return self._ids_of_structure[piece]

    def _problem_of_media(self, ids: np.ndarray, wanted: list[str]) -> str:
        """Why the placeholders that a template has written cannot be filled, or ""."""
        names = {token_id: name for name, token_id in self.placeholders.items()}
        found = [names[token_id] for token_id in ids[np.isin(ids, list(names))].tolist()] if names else []
        for name in names.values():
            if found.count(name) < wanted.count(name):
                return f"the chat template leaves out the {name} of a message; correct it"
            if found.count(name) > wanted.count(name):
                return f"the chat template writes more places for {name} than messages have"
        return "" if found == wanted else "the chat template writes media in another order than messages; correct it"

    def expand(
        self, ids: np.ndarray, is_learned: np.ndarray, media: Mapping[str, Sequence[Any]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids (tokens,) with start, placeholders and end of each item in place of its one placeholder, and which are
        learned, (tokens,) of bool: of media that are, what their modality says (`Modality.learned`). `media` are
        preprocessed, by modality, in the order of their placeholders.
        """
        counts, is_inside = np.ones(len(ids), dtype=np.int64), is_learned.copy()
        places = {name: (ids == self.token_ids[name][0]).nonzero()[0] for name in media}
        for name, here in places.items():
            counts[here] = [self.modalities[name].num_tokens(tensor) + 2 for tensor in media[name]]
            is_inside[here] &= self.modalities[name].learned[1]
        expanded, learned, ends = ids.repeat(counts), is_inside.repeat(counts), counts.cumsum()
        for name, here in places.items():
            (_, start, end), (at_start, _, at_end) = self.token_ids[name], self.modalities[name].learned
            for edge, token_id, is_own in ((ends - counts, start, at_start), (ends - 1, end, at_end)):
                expanded[edge[here]], learned[edge[here]] = token_id, is_learned[here] & is_own
        return expanded, learned


def _problem_of_answers(rendered: RenderedOutline, left_out: list[bool], needs_answers: bool) -> str:
    """Why it cannot be told what is learned, or ""."""
    if rendered.num_answers is None and (needs_answers or any(left_out)):
        return NO_ANSWERS
    wanted = sum(role == "assistant" for role, *_ in rendered.outline)
    if any(left_out) and rendered.num_answers != wanted:
        return (
            f"the chat template marks {rendered.num_answers} answers of {wanted}, so that none can be left out of the "
            "loss; put {% generation %} and {% endgeneration %} around each"
        )
    return ""


def _pieces_left_out(rendered: RenderedOutline, left_out: list[bool]) -> list[bool]:
    """Whether each piece of a conversation belongs to a message that is left out."""
    if not any(left_out):
        return [False] * len(rendered.pieces)
    roles = [role for role, *_ in rendered.outline]
    answers = [is_out for role, is_out in zip(roles, left_out, strict=True) if role == "assistant"]
    num_texts = [
        _num_texts(types) + sum(len(_LEAF.findall(skeleton)) for skeleton in fields)
        for _, types, *fields in rendered.outline
    ]
    texts = [is_out for is_out, number in zip(left_out, num_texts, strict=True) for _ in range(number)]
    return [
        answers[answer] if answer is not None else isinstance(piece, int) and texts[piece]
        for piece, answer in rendered.pieces
    ]


def special_id(tokenizer: Any, token: str) -> int:
    """The id of a special token; ValueError if the tokenizer does not have it."""
    index = tokenizer.backend_tokenizer.token_to_id(token)  # get_vocab() would copy the whole of it
    if index is None:
        raise ValueError(f"the tokenizer has no token {token!r}, which media need; train or load it with media")
    return index


def special_tokens_of(tokenizer: Any) -> SpecialTokens:
    """What templates find of a tokenizer; a begin or end token that it lacks is empty."""
    found = {"bos_token": "", "eos_token": "", **tokenizer.special_tokens_map}
    return tuple((name, tuple(token) if isinstance(token, list) else token) for name, token in found.items())


def encode_conversation(
    tokenizer: Any, messages: list[dict[str, Any]], add_generation_prompt: bool = False
) -> list[int]:
    """Token ids of a conversation without media, by the template of a tokenizer (`ConversationEncoder.encode`)."""
    encoder = ConversationEncoder(tokenizer, chat_template=tokenizer.chat_template)
    return encoder.encode(messages, add_generation_prompt).ids.tolist()


def check_texts(tokenizer: Any, texts: Iterable[str], template: str) -> None:
    """Refuses, with ValueError, texts that contain a role which the vocabulary has no token for, and which is spelled
    for this reason: they would be read as the beginning of a message. A template that is not ours begins messages
    otherwise.
    """
    spelled = spelled_roles(tokenizer) if is_own_template(template) else []
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
