"""The guard that keeps texts of users from becoming control tokens, also where a tokenizer is used without this code.

A tokenizer finds its special tokens in a rendered conversation by their spelling, whoever wrote it. Two things that are
saved with it stand against that. The chat template begins with a guard, which puts a mark into whatever could begin a
special token in a text, so that no spelling is found there. The normalizer takes the marks out again after special
tokens were found, so that the text has the tokens, and after decoding the characters, that it has anywhere else.
"""

from collections.abc import Collection, Iterator
from itertools import groupby
from typing import Any

from transformers import AddedToken
from transformers.utils import is_tokenizers_available

from .text_encoding import encode_texts, normalized

if is_tokenizers_available():
    from tokenizers import normalizers, pre_tokenizers

MARK = "\ufdd0"
"""A noncharacter of Unicode, which no text has; the guard deletes it from those of messages."""
_END_OF_GUARD = "{# guarded #}"


def guard_tokenizer(tokenizer: Any) -> None:
    """Makes a fast tokenizer read special tokens only where they are written as they are, and take marks out of texts.
    Its special tokens are found before a text is normalized; else another spelling, such as full-width letters, would
    become one. Where the model of the tokenizer itself makes a special token of its characters, as some unigram models
    do, the normalizer puts a blank behind the first. Other texts keep their tokens. A second call changes nothing.
    ValueError: an ordinary text becomes a special token all the same.
    """
    backend = tokenizer.backend_tokenizer
    found_late = [token for token in tokenizer.added_tokens_decoder.values() if token.special and token.normalized]
    if found_late:
        tokenizer.add_tokens([_found_before_normalization(token) for token in found_late], special_tokens=True)
    firsts = sorted({token[0] for token in control_tokens(tokenizer)})
    marked = [first for first in firsts if MARK in normalized(tokenizer, first + MARK)]
    steps = [normalizers.Replace(first + MARK, first) for first in marked]
    if steps:
        before = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence([*steps, *before])
    steps = [normalizers.Replace(token, f"{token[0]} {token[1:]}") for token in _forged(tokenizer)]
    if steps:
        backend.normalizer = normalizers.Sequence([backend.normalizer, *steps])
        still = _forged(tokenizer)
        if still:
            raise ValueError(
                f"the tokenizer makes its special token {still[0]!r} of an ordinary text; choose another tokenizer"
            )


def split_at_marks(tokenizer: Any) -> None:
    """Make a fast tokenizer split texts at marks, so that no token spans what is spelled and what stands beside it."""
    backend = tokenizer.backend_tokenizer
    steps = [] if backend.pre_tokenizer is None else [backend.pre_tokenizer]
    pieces, whole = (
        "".join(piece for step in steps for piece, _ in step.pre_tokenize_str(text)) for text in (f"a{MARK}b", "ab")
    )
    if not steps or pieces != whole:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(MARK, "removed"), *steps])


def control_tokens(tokenizer: Any) -> list[str]:
    """The special tokens of a vocabulary."""
    return sorted(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


def _found_before_normalization(token: AddedToken) -> AddedToken:
    options = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip")}
    return AddedToken(token.content, **options, normalized=False, special=True)


def _forged(tokenizer: Any) -> list[str]:
    """Special tokens that become of their characters in a text, besides that for what is unknown."""
    tokens = [token for token in control_tokens(tokenizer) if token != tokenizer.unk_token]
    ids = tokenizer.convert_tokens_to_ids(tokens)
    forms = ("{}", "a{}b", "a {} b")
    return [
        token
        for token, token_id in zip(tokens, ids, strict=True)
        if any(token_id in found for found in encode_texts(tokenizer, [form.format(token) for form in forms]))
    ]


# ----------------------------------------------------------------------------------------------------------- templates


def guard_template(
    template: str,
    tokenizer: Any,
    roles: Collection[str] = (),
    types: Collection[str] = (),
    spelled: Collection[str] = (),
) -> str:
    """A chat template behind a guard, which marks the texts of its messages for this tokenizer.

    Args:
        template: A template with a guard, which is replaced, or without one.
        tokenizer: One that `guard_tokenizer` has seen, and `split_at_marks`, if there are roles that are spelled.
        roles: If given, other roles are refused, since the template writes them as tokens.
        types: Types of parts besides text, if roles are given; others are refused.
        spelled: Those of the roles that are written in ordinary tokens; no text may have these. The template finds a
            macro `spell`, which writes any role, between marks if it is one of them.
    """
    checks = _refuse_spelled([f"<|{role}|>" for role in spelled], tokenizer) if spelled else ""
    if roles:
        checks += _raise_if(
            f"message.role not in {_listed(roles)}", f"the role of a message is none of {', '.join(roles)}"
        )
    check_part = ""
    if roles:
        known = ["text", *types]
        check_part = _raise_if(f"part.type not in {_listed(known)}", f"a part's type is none of {', '.join(known)}")
    guard = (
        f"{_mark_macro(tokenizer)}{_spell_macro(spelled) if spelled else ''}"
        "{%- set guard = namespace(messages=[]) -%}"
        "{%- for message in messages -%}"
        "{%- set guard.message = dict(message) -%}"
        "{%- for key, value in message.items() if value is string and key != 'role' -%}"
        "{%- set guard.message = dict(guard.message, **{key: guarded(value)}) -%}"
        "{%- endfor -%}"
        "{%- set guard.text = message.content if message.content is string else '' -%}"
        "{%- if message.content is iterable and message.content is not string and message.content is not mapping -%}"
        "{%- set guard.parts = [] -%}"
        "{%- for part in message.content -%}"
        f"{check_part}"
        "{%- if part is mapping and part.text is string -%}"
        "{%- set guard.text = guard.text ~ part.text -%}"
        "{%- set guard.parts = guard.parts + [dict(part, text=guarded(part.text))] -%}"
        "{%- else -%}{%- set guard.parts = guard.parts + [guarded(part) if part is string else part] -%}{%- endif -%}"
        "{%- endfor -%}"
        "{%- set guard.message = dict(guard.message, content=guard.parts) -%}"
        "{%- endif -%}"
        f"{{%- set guard.text = guard.text | replace('{MARK}', '') -%}}{checks}"
        "{%- set guard.messages = guard.messages + [guard.message] -%}"
        "{%- endfor -%}"
        "{%- set messages = guard.messages -%}"
    )
    return guard + _END_OF_GUARD + without_guard(template)


def without_guard(template: str) -> str:
    """A chat template as it was before it was guarded."""
    return template.split(_END_OF_GUARD)[-1]


def _mark_macro(tokenizer: Any) -> str:
    """Marks what could begin a special token: its first two characters, and the first at the end of a text, which the
    next text may continue. Where both are the same, each of them, since pairs could overlap.
    """
    beginnings, at_end = [], []
    for first, group in groupby(control_tokens(tokenizer), key=lambda token: token[0]):
        seconds = sorted({token[1:2] for token in group})
        if "" in seconds or first in seconds:
            beginnings.append((first, ""))
        else:
            beginnings += [(first, second) for second in seconds]
            at_end.append(first)
    steps = [f" | replace({_quoted(one + other)}, {_quoted(one + MARK + other)})" for one, other in beginnings]
    return (
        "{%- macro guarded(text) -%}"
        f"{{%- set text = text | replace('{MARK}', '') -%}}{{{{- text{''.join(steps)} -}}}}"
        f"{{%- if text[-1:] in {_listed(at_end)} -%}}{{{{- '{MARK}' -}}}}{{%- endif -%}}{{%- endmacro -%}}"
    )


def _spell_macro(spelled: Collection[str]) -> str:
    """Tokens are made of what stands between marks alone."""
    mark = f"{{%- if role in {_listed(spelled)} -%}}{{{{- '{MARK}' -}}}}{{%- endif -%}}"
    return f"{{%- macro spell(role) -%}}{mark}{{{{- '<|' ~ role ~ '|>' -}}}}{mark}{{%- endmacro -%}}"


def _refuse_spelled(spelled: Collection[str], tokenizer: Any) -> str:
    """Compared with a text as it stands, or, where others become one of these when they are normalized, with any text
    that has whatever becomes the two characters with which they begin.
    """
    variants = ["".join(_variants(tokenizer, character)) for character in "<|"]
    if variants == ["<", "|"]:
        return "".join(
            _raise_if(
                f"{_quoted(token)} in guard.text",
                f"a message contains '{token}', for which the vocabulary has no token, so that it would begin another "
                "message; leave it out",
            )
            for token in spelled
        )
    has_both = " and ".join(f"guard.text | select('in', {_quoted(them)}) | list" for them in variants)
    return _raise_if(
        has_both,
        f"a message contains < and |, and the vocabulary has no token for {', '.join(spelled)}, so that it could begin "
        "another message; leave one of them out",
    )


def _variants(tokenizer: Any, wanted: str) -> Iterator[str]:
    """Characters of the first two planes in which a character is found once they are normalized, itself first."""
    yield wanted
    for start in range(0, 0x20000, 256):
        chunk = [chr(code) for code in range(start, start + 256) if not 0xD800 <= code <= 0xDFFF]
        if wanted in normalized(tokenizer, "".join(chunk)):
            yield from (it for it in chunk if it != wanted and wanted in normalized(tokenizer, it))


def _raise_if(condition: str, reason: str) -> str:
    return f"{{%- if {condition} -%}}{{{{- raise_exception({_quoted(reason)}) -}}}}{{%- endif -%}}"


def _listed(strings: Collection[str]) -> str:
    return f"[{', '.join(map(_quoted, strings))}]"


def _quoted(string: str) -> str:
    escaped = string.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
