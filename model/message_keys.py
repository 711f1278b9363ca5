"""What messages may say besides their role and content.

A key that changes what is to be learned, or asked, and is not read, is refused: left out in silence, it would teach or
ask something else.
"""

import json
from collections.abc import Mapping
from typing import Any

HARMLESS_KEYS = frozenset(
    {
        *("id", "uuid", "message_id", "msg_id", "parent_id", "index", "turn", "tool_call_id", "cache_control"),
        *("created", "created_at", "date", "datetime", "time", "timestamp", "metadata", "meta"),
        *("model", "source", "language", "lang", "content_type", "num_tokens", "token_count"),
    }
)
"""Keys of messages and parts of which nothing is to be read or said, whatever they hold."""
LEARNED_KEYS = ("weight", "train", "trainable", "training", "learn", "loss")
"""Whether a message is learned: 0 or false keeps it out of the loss, and 1 or true is what it is anyway."""
WHAT_TO_DO = {
    "function_call": "write it as tool_calls",
    **dict.fromkeys(("reasoning", "thinking", "thought"), "call it reasoning_content"),
    **dict.fromkeys(("refusal", "prefix", "name"), "write it into its content"),
}
"""How the content of keys that others write is kept."""


def reason_against_message(
    message: Mapping[str, object], is_learned: bool, fixes: Mapping[str, str] = WHAT_TO_DO
) -> str | None:
    """Why a message must not be read by its role and content alone, or None; `is_learned`: whether it is going to be,
    where an answer is; `fixes`: what to do with keys that are not read.
    """
    for key, value in message.items():
        if key in ("role", "content") or key in HARMLESS_KEYS or is_empty(value):
            continue
        if key == "name" and message.get("role") == "tool":  # which tool answers, the call before it says
            continue
        if key in ("tool_calls", "reasoning_content"):
            if message.get("role") == "assistant":
                continue
            return f"has {key!r}, which only the assistant may have; remove it"
        if key in LEARNED_KEYS:
            if isinstance(value, (bool, int, float)) and (value == 0 or (value == 1 and is_learned)):
                continue
            what = "0 or 1" if is_learned else "0, as it is not learned"
            return f"has {key!r} {value!r:.40}, which is not honoured; give {what}"
        known = "is not read" if key in fixes else "is unknown"
        return f"has {key!r:.80}, which {known}; {what_to_do(key, fixes)}"
    return None


def calls_of(message: Mapping[str, object]) -> list[dict[str, Any]]:
    """The calls of tools in a message, each {"name", "arguments"}; arguments are a dict, or a text that is no JSON
    object. What is None in them is left out, as columns of tables have it that only other rows fill.

    Raises:
        ValueError: they have another form.
    """
    calls = message.get("tool_calls") or []
    return [_call_of(call) for call in (calls if isinstance(calls, (list, tuple)) else [calls])]


def _call_of(call: object) -> dict[str, Any]:
    said = call.get("function", call) if isinstance(call, dict) else None
    name = said.get("name") if isinstance(said, dict) else None
    arguments = {} if name is None or said.get("arguments") is None else said["arguments"]
    if isinstance(arguments, str):
        try:
            found = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            found = None
        arguments = found if isinstance(found, dict) else arguments
    if not isinstance(name, str) or not name.strip() or not isinstance(arguments, (str, dict)):
        raise ValueError(f'has a call {call!r:.80}; give {{"function": {{"name": ..., "arguments": {{...}}}}}}')
    return {"name": name, "arguments": _without_none(arguments)}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, (list, tuple)) else value


def is_left_out(message: Mapping[str, object]) -> bool:
    """Whether a message, for which there is no reason, is kept out of the loss."""
    return any(message.get(key) is not None and message[key] == 0 for key in LEARNED_KEYS)  # False is, too


def is_empty(value: object) -> bool:
    """Whether a value says nothing, as columns of tables have it that only other rows fill."""
    return value is None or (isinstance(value, (str, list, tuple, dict)) and not value)


def what_to_do(key: str, fixes: Mapping[str, str]) -> str:
    """The fix for a key that is not read."""
    return f"{fixes[key]}, or remove it" if key in fixes else "remove it"
