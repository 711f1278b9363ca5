"""What rows and parts of messages may say besides what is read of them; `model.message_keys` has what messages may say.

A key that changes what is to be learned, and is not read, makes its row a bad one: left out in silence, it would teach
something else.
"""

from collections.abc import Collection, Mapping

from model.message_keys import HARMLESS_KEYS, LEARNED_KEYS, WHAT_TO_DO, is_empty, what_to_do

FIXES = {
    **WHAT_TO_DO,
    **dict.fromkeys(("tools", "functions", "system", "system_prompt"), "write it into a message of the system"),
    **dict.fromkeys(("images", "image"), "set image_column, with kind: files for files of messages"),
    **dict.fromkeys(("audio", "audios"), "set audio_column, with kind: files for files of messages"),
    "history": "write it into messages",
    "input": "name it in prompt",
}
"""For columns and keys that others write: how their content is kept."""
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
            return f"column {column!r} is not read and changes what is to be learned; {what_to_do(column, FIXES)}"
    return None


def reason_against_part(part: Mapping[str, object], read: Collection[str]) -> str | None:
    """Why a part of a message must not be read by some of its keys alone, or None."""
    for key, value in part.items():
        if key not in read and key not in HARMLESS_KEYS and not is_empty(value):
            return f"a part of type {part.get('type')!r} has {key!r}, which is not read; remove it"
    return None
