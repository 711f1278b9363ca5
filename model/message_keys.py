"""What messages may say besides their role and content.

A key that changes what is to be learned, or asked, and is not read, is refused: left out in silence, it would teach or
ask something else.
"""

from collections.abc import Mapping

HARMLESS_KEYS = frozenset(
    {
        *("id", "uuid", "message_id", "msg_id", "parent_id", "index", "turn", "tool_call_id", "cache_control"),
        *("created", "created_at", "date", "datetime", "time", "timestamp", "metadata", "meta"),
        *("model", "source", "language", "lang", "content_type", "num_tokens", "token_count"),
    }
)
"""Keys of messages and parts of which nothing is to be read or said, whatever they hold."""
LEARNED_KEYS = ("weight", "train", "trainable", "training", "learn", "loss")
"""Whether a message is learned."""
WHAT_TO_DO = {
    **dict.fromkeys(("tool_calls", "function_call"), "write the calls into its content"),
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking", "thought", "refusal", "prefix"), "write it into its content"
    ),
    "name": "write it into its content",
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
        if key in LEARNED_KEYS:
            if isinstance(value, (bool, int, float)) and value in (0, 1) and bool(value) == is_learned:
                continue
            does = "is" if is_learned else "is not"
            return f"has {key!r} {value!r:.40}, which is not honoured: it {does} learned; remove either"
        known = "is not read" if key in fixes else "is unknown"
        return f"has {key!r:.80}, which {known}; {what_to_do(key, fixes)}"
    return None


def is_empty(value: object) -> bool:
    """Whether a value says nothing, as columns of tables have it that only other rows fill."""
    return value is None or (isinstance(value, (str, list, tuple, dict)) and not value)


def what_to_do(key: str, fixes: Mapping[str, str]) -> str:
    """The fix for a key that is not read."""
    return f"{fixes[key]}, or remove it" if key in fixes else "remove it"
