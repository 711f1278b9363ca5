"""Rows that cannot be used: found, counted, reported, and past a limit fatal."""

import logging
import os
import re
from collections.abc import Mapping, Sequence

logger = logging.getLogger(__name__)

_SHOWN = 5  # bad rows quoted in the error; the log has all of them
_REASONS_SHOWN = 10
_VALUES = re.compile(r"""'[^']*'|"[^"]*"|\S*/\S+|\d+(?:\.\d+)?""")


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
        self.found: list[tuple[str, str, str]] = []
        """Source, place and reason of each."""

    @classmethod
    def of_building(cls, limit: int) -> "BadRows":
        """For rows that every rank of a run reads: the first one alone says what is skipped."""
        return cls(limit, silent=os.environ.get("RANK", "0") != "0")

    def add(self, source: str, where: str, reason: str) -> None:
        """Report one bad row of `source`; `where` says which (e.g. "notes.jsonl line 3").

        Raises:
            ValueError: more than `limit` rows are bad; the message names the first of them with their reasons.
        """
        self.counts[source] = self.counts.get(source, 0) + 1
        self.found.append((source, where, reason))
        logger.log(self.level, "skipped a bad row of %s, %s: %s", source, where, reason)
        if len(self.found) > self.limit:
            more = f"; and {len(self.found) - _SHOWN} more" if len(self.found) > _SHOWN else ""
            first = [f"{source}, {where}: {reason}" for source, where, reason in self.found[:_SHOWN]]
            raise ValueError(
                f"{len(self.found)} rows are bad, data.max_bad_rows is {self.limit}: "
                f"{'; '.join(first)}{more}; repair them or raise data.max_bad_rows"
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
