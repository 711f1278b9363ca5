"""What messages, their parts and rows may say besides what is read of them.

A key that changes what is to be learned, and is not read, makes its row a bad one: left out in silence, it would teach
something else. `model.chat` has the same lists for what a model is asked.
"""

from collections.abc import Collection, Mapping

HARMLESS_KEYS = frozenset(
    {
        *("id", "uuid", "message_id", "msg_id", "parent_id", "index", "turn", "tool_call_id", "cache_control"),
        *("created", "created_at", "date", "datetime", "time", "timestamp", "metadata", "meta"),
        *("model", "source", "language", "lang", "content_type", "num_tokens", "token_count"),
    }
)
"""Of messages and parts, whatever they hold: nothing of it is to be read or said."""
LEARNED_KEYS = ("weight", "train", "trainable", "training", "learn", "loss")
"""Of messages: whether they are learned."""
WHAT_TO_DO = {
    **dict.fromkeys(("tool_calls", "function_call"), "write the calls into its content"),
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking", "thought", "refusal", "prefix"), "write it into its content"
    ),
    "name": "write it into its content",
    **dict.fromkeys(("tools", "functions", "system", "system_prompt"), "write it into a message of the system"),
    **dict.fromkeys(("images", "image"), "set image_column, with kind: files for files of messages"),
    **dict.fromkeys(("audio", "audios"), "set audio_column, with kind: files for files of messages"),
    "history": "write it into messages",
    "input": "name it in prompt",
}
"""For keys that others write: how their content is kept."""

_CHAT_COLUMNS = frozenset({"system", "system_prompt", "tools", "functions", "loss_mask", "train_mask", *LEARNED_KEYS})
_CHAT_MEDIA_COLUMNS = frozenset({"images", "image", "audio", "audios", "video", "videos"})
_PROMPT_COLUMNS = frozenset({"system", "system_prompt", "tools", "functions", "history"})
KEPT_COLUMNS = _CHAT_COLUMNS | _PROMPT_COLUMNS | {"input"}
"""What readers of tables read besides the columns that they are asked for."""


def checked_columns(used: Collection[str], is_chat: bool) -> frozenset[str]:
    """Columns without media that may not be left out, where a table has them.

    Args:
        used: columns that are read.
        is_chat: whether these are messages, rather than a prompt and its answer.
    """
    columns = _CHAT_COLUMNS if is_chat else _PROMPT_COLUMNS | ({"input"} if "instruction" in used else frozenset())
    return columns - set(used)


def reason_against_columns(row: Mapping[str, object], used: Collection[str], is_chat: bool) -> str | None:
    """Why a row must not be learned from by the columns that are used of it, or None."""
    columns = checked_columns(used, is_chat) | (_CHAT_MEDIA_COLUMNS - set(used) if is_chat else frozenset())
    for column in sorted(columns):
        value = row.get(column)
        is_default = column in LEARNED_KEYS and value == 1  # True is, too
        if not (is_empty(value) or is_default):
            return f"column {column!r} is not read and changes what is to be learned; {what_to_do(column)}"
    return None


def reason_against_message(message: Mapping[str, object], is_learned: bool) -> str | None:
    """Why a message must not be read by its role and content alone, or None.

    Args:
        is_learned: whether it is going to be.
    """
    role = message.get("role")
    for key, value in message.items():
        if key in ("role", "content") or key in HARMLESS_KEYS or is_empty(value):
            continue
        if key == "name" and role == "tool":  # which tool answers, the call before it says
            continue
        if key in LEARNED_KEYS:
            if isinstance(value, (bool, int, float)) and value in (0, 1) and bool(value) == is_learned:
                continue
            does = "is" if is_learned else "is not"
            return (
                f"a message ({role}) has {key!r} {value!r:.40}, which is not honoured: it {does} learned; remove either"
            )
        known = "is not read" if key in WHAT_TO_DO else "is unknown"
        return f"a message ({role}) has {key!r:.80}, which {known}; {what_to_do(key)}"
    return None


def reason_against_part(part: Mapping[str, object], read: Collection[str]) -> str | None:
    """Why a part of a message must not be read by some of its keys alone, or None."""
    for key, value in part.items():
        if key not in read and key not in HARMLESS_KEYS and not is_empty(value):
            return f"a part of type {part.get('type')!r} has {key!r}, which is not read; remove it"
    return None


def is_empty(value: object) -> bool:
    """Whether a value says nothing, as columns of tables have it that only other rows fill."""
    return value is None or (isinstance(value, (str, list, tuple, dict)) and not value)


def what_to_do(key: str) -> str:
    """The fix for a key that is not read."""
    return f"{WHAT_TO_DO[key]}, or remove it" if key in WHAT_TO_DO else "remove it"
