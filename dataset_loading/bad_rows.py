"""Rows that cannot be used: the reasons, how many there are, and past a limit an error.

A key that changes what is to be learned, and is not read, makes its row a bad one: left out in silence, it would teach
something else. `model.message_keys` has what messages may say.
"""

import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence

from model.message_keys import HARMLESS_KEYS, LEARNED_KEYS, WHAT_TO_DO, is_empty, what_to_do

logger = logging.getLogger(__name__)
_SHOWN = 5  # bad rows quoted in the error; the log has all of them
_REASONS_SHOWN = 10
_VALUES = re.compile(r"""'[^']*'|"[^"]*"|\S*/\S+|\d+(?:\.\d+)?""")
FIXES = {
    **WHAT_TO_DO,
    **dict.fromkeys(("tools", "functions"), "write it into a message of the system"),
    **dict.fromkeys(("system", "system_prompt"), "set prompt, which makes a conversation of it"),
    **dict.fromkeys(("images", "image"), "set image_column, with kind: files for files of messages"),
    **dict.fromkeys(("audio", "audios"), "set audio_column, with kind: files for files of messages"),
    "history": "write it into messages",
    "input": "name it in prompt",
}
"""For columns and keys that others write: how their content is kept."""
SYSTEM_COLUMNS = ("system", "system_prompt")
"""What the system says before all messages of a row."""
_CHAT_COLUMNS = frozenset({"system", "system_prompt", "tools", "functions", "loss_mask", "train_mask", *LEARNED_KEYS})
_CHAT_MEDIA_COLUMNS = frozenset({"images", "image", "audio", "audios", "video", "videos"})
_PROMPT_COLUMNS = frozenset({"system", "system_prompt", "tools", "functions", "history"})
KEPT_COLUMNS = _CHAT_COLUMNS | _PROMPT_COLUMNS | {"input"}
"""What readers of tables read besides the columns that they are asked for."""


class BadRows:
    """Collects the rows of one run that are skipped.

    Args:
        limit: Number of rows that may be skipped before the run stops (`data.max_invalid_rows`).
        silent: Whether the log is left out, as in a first pass over rows that are read again.
    """

    def __init__(self, limit: int, silent: bool = False):
        self.limit = limit
        self.level = logging.DEBUG if silent else logging.WARNING
        self.counts: dict[str, int] = {}
        self.found: list[tuple[str, str, str]] = []
        """Source, position and reason of each."""

    @classmethod
    def of_building(cls, limit: int) -> "BadRows":
        """The collection for rows that every rank of a run reads, of which only the first one logs what is skipped."""
        return cls(limit, silent=os.environ.get("RANK", "0") != "0")

    def add(self, source: str, where: str, reason: str) -> None:
        """Report one bad row of `source`; `where` says which (e.g. "notes.jsonl line 3"). Raises ValueError, with the
        first rows and their reasons, where more than `limit` are bad.
        """
        self.counts[source] = self.counts.get(source, 0) + 1
        self.found.append((source, where, reason))
        logger.log(self.level, "skipped a bad row of %s, %s: %s", source, where, reason)
        if len(self.found) > self.limit:
            more = f"; and {len(self.found) - _SHOWN} more" if len(self.found) > _SHOWN else ""
            first = [f"{source}, {where}: {reason}" for source, where, reason in self.found[:_SHOWN]]
            raise ValueError(
                f"{len(self.found)} rows are bad, data.max_invalid_rows is {self.limit}: "
                f"{'; '.join(first)}{more}; repair them or raise data.max_invalid_rows"
            )

    def report(self) -> None:
        """Say in one line how many rows were skipped, of which source and for which reasons; nothing, if none was."""
        if self.found:
            by_source = [f"{count} of {source} ({self.reasons_of(source)})" for source, count in self.counts.items()]
            logger.log(self.level, "%d rows cannot be used and are left out: %s", len(self.found), ", ".join(by_source))

    def reasons_of(self, source: str) -> str:
        """The reasons against rows of a source, each with its count and, where it is one of several that differ in
        names and numbers alone, the first of them.
        """
        groups: dict[str, list[str]] = {}
        for label, _, reason in self.found:
            if label == source:
                groups.setdefault(_VALUES.sub("...", reason), []).append(reason)
        ordered = sorted(groups.values(), key=len, reverse=True)
        shown = [
            f"{len(reasons)} x {'' if len(set(reasons)) == 1 else 'such as '}{reasons[0]}"
            for reasons in ordered[:_REASONS_SHOWN]
        ]
        rest = len(ordered) - len(shown)
        return "; ".join([*shown, *([f"and {rest} more reasons"] if rest else [])])


def reason_against(row: Mapping[str, object], columns: Sequence[str]) -> str | None:
    """Why `row` cannot be used, or None when every column in `columns` is a non-empty string that UTF-8 can hold."""
    for column in columns:
        if column not in row:
            return f"no column {column!r} (has {', '.join(map(repr, row)) or 'none'})"
        value = row[column]
        if not isinstance(value, str):
            return f"column {column!r} is {type(value).__name__}, not a string"
        if not value.strip():
            return f"column {column!r} is empty"
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"column {column!r} is not UTF-8 ({error.reason} at character {error.start})"
    return None


def checked_columns(used: Collection[str], is_chat: bool) -> frozenset[str]:
    """Columns without media that may not be left out, where a table has them, besides those that are used: of messages,
    or of prompts and answers.
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


def system_of(row: Mapping[str, object], used: Collection[str]) -> str | None:
    """What the system says in a column of its own that is not used otherwise; None: nothing.

    Raises:
        ValueError: It is no text, or there are two.
    """
    said = [row[name] for name in SYSTEM_COLUMNS if name not in used and not is_empty(row.get(name))]
    if not said:
        return None
    if len(said) > 1 or not isinstance(said[0], str):
        raise ValueError(f"columns {' and '.join(SYSTEM_COLUMNS)} have {said!r:.80}; give one text for the system")
    return said[0]


def reason_against_part(part: Mapping[str, object], read: Collection[str]) -> str | None:
    """Why a part of a message must not be read by some of its keys alone, or None."""
    for key, value in part.items():
        if key not in read and key not in HARMLESS_KEYS and not is_empty(value):
            return f"a part of type {part.get('type')!r} has {key!r}, which is not read; remove it"
    return None
