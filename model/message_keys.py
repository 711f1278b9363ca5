"""What messages may say besides their role and content. `dataset_loading` has the same lists for what is learned."""

from collections.abc import Mapping
from typing import Any

HARMLESS_KEYS = frozenset(
    {
        *("id", "uuid", "message_id", "msg_id", "parent_id", "index", "turn", "tool_call_id", "cache_control"),
        *("created", "created_at", "date", "datetime", "time", "timestamp", "metadata", "meta"),
        *("model", "source", "language", "lang", "content_type", "num_tokens", "token_count"),
    }
)
"""Whatever they hold: nothing of it is to be read or said."""
LEARNED_KEYS = ("weight", "train", "trainable", "training", "learn", "loss")
"""Whether a message is learned."""
WHAT_TO_DO = {
    **dict.fromkeys(("tool_calls", "function_call"), "write the calls into its content"),
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking", "thought", "refusal", "prefix"), "write it into its content"
    ),
    "name": "write it into its content",
}
"""For keys that others write: how their content is kept."""


def reason_against_message(message: Mapping[str, Any], is_learned: bool) -> str | None:
    """Why a message must not be read by its role and content alone, or None.

    Args:
        is_learned: Whether it is going to be, where an answer is.
    """
    for key, value in message.items():
        is_empty = value is None or (isinstance(value, (str, list, tuple, dict)) and not value)
        if is_empty or key in ("role", "content") or key in HARMLESS_KEYS:
            continue
        if key == "name" and message.get("role") == "tool":  # which tool answers, the call before it says
            continue
        if key in LEARNED_KEYS:
            if isinstance(value, (bool, int, float)) and value in (0, 1) and bool(value) == is_learned:
                continue
            does = "is" if is_learned else "is not"
            return f"has {key!r} {value!r:.40}, which is not honoured: it {does} learned; remove either"
        known = "is not read" if key in WHAT_TO_DO else "is unknown"
        what_to_do = f"{WHAT_TO_DO[key]}, or remove it" if key in WHAT_TO_DO else "remove it"
        return f"has {key!r:.80}, which {known}; {what_to_do}"
    return None
