"""Rows that cannot be used: found, counted, reported, and past a limit fatal."""

import logging
from collections.abc import Mapping, Sequence

logger = logging.getLogger(__name__)

_SHOWN = 5  # bad rows quoted in the error; the log has all of them


class BadRows:
    """Collects the rows of one run that are skipped.

    Args:
        limit: how many rows may be skipped before the run stops (`data.max_bad_rows`).
        silent: leave out the log, for a first pass over rows that are read again.
    """

    def __init__(self, limit: int, silent: bool = False):
        self.limit = limit
        self.level = logging.DEBUG if silent else logging.WARNING
        self.counts: dict[str, int] = {}
        self._found: list[str] = []

    def add(self, source: str, where: str, reason: str) -> None:
        """Report one bad row of `source`; `where` says which (e.g. "notes.jsonl line 3").

        Raises:
            ValueError: more than `limit` rows are bad; the message names the first of them with their reasons.
        """
        self.counts[source] = self.counts.get(source, 0) + 1
        self._found.append(f"{source}, {where}: {reason}")
        logger.log(self.level, "skipped a bad row of %s, %s: %s", source, where, reason)
        if len(self._found) > self.limit:
            more = f"; and {len(self._found) - _SHOWN} more" if len(self._found) > _SHOWN else ""
            raise ValueError(
                f"{len(self._found)} rows are bad, data.max_bad_rows is {self.limit}: "
                f"{'; '.join(self._found[:_SHOWN])}{more}; repair them or raise data.max_bad_rows"
            )


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
