"""Sources to rows: every kind of source becomes a `datasets.Dataset` of checked rows. Texts have the columns text, or
prompt and answer, and conversations those of `conversations.py`.
"""

from collections.abc import Mapping

import datasets
from datasets import Dataset, Features, Value

from ..bad_rows import BadRows, checked_columns, reason_against, reason_against_columns
from ..configuration import DataConfig, SourceConfig
from ..tasks.base import Role
from .conversations import conversations_of_stream, load_conversations, open_conversations, rows_of_task
from .tables import CHECKED_AT_ONCE, Rows, check_columns, columns_of_stream, expand_paths, load_hub, read_rows


def columns_of(source: SourceConfig) -> dict[str, str]:
    """The columns that the source's rows must have, and the names they get here."""
    if source.prompt_column is not None:
        rejected = {} if source.rejected_column is None else {source.rejected_column: "rejected"}
        return {source.prompt_column: "prompt", source.answer_column: "answer", **rejected}
    return {"prompt": "prompt", "answer": "answer"} if source.kind == "generated" else {source.text_column: "text"}


def reason_against_text(source: SourceConfig, row: Mapping[str, object]) -> str | None:
    """Why a raw row of a source of texts cannot be used, or None."""
    columns = tuple(columns_of(source))
    asks = source.prompt_column is not None
    return reason_against(row, columns) or (reason_against_columns(row, columns, is_chat=False) if asks else None)


def load_rows(
    source: SourceConfig, role: Role, config: DataConfig, seed: int, bad_rows: BadRows, limit: int | None = None
) -> Dataset:
    """All usable rows of a source that is not streaming: column text, or prompt, answer and (generated) difficulty, or
    the columns of `load_conversations`.

    Args:
        role: Role that a generated source is drawn for, where it names no role itself.
        limit: Most rows of a hub or generated source to load.

    Raises:
        ValueError: Missing file, unknown task or column, nothing usable, or too many bad rows.
    """
    if source.is_media:
        rows = load_conversations(source, role, config, seed, bad_rows, limit)
    elif source.kind == "generated":
        return rows_of_task(source, role, config, seed, limit)
    elif source.kind == "files":
        columns = tuple(columns_of(source))
        read = (row for path in expand_paths(source) for row in read_rows(path, columns))
        rows = _usable_texts(source, read, bad_rows)
    else:
        rows = _read_hub(source, bad_rows, limit)
    if len(rows) == 0:
        raise ValueError(
            f"source {source.label!r} has no usable rows: {bad_rows.reasons_of(source.label) or 'it has none'}"
        )
    return rows


def open_stream(source: SourceConfig) -> datasets.IterableDataset:
    """The raw rows of a streaming source."""
    if source.is_media:
        return open_conversations(source)
    stream = load_hub(source)
    check_columns(source, columns_of(source), columns_of_stream(stream))
    return stream


def rows_of_stream(source: SourceConfig, stream: datasets.IterableDataset, bad_rows: BadRows) -> Dataset:
    """The usable rows of a finite stream, read into memory."""
    if source.is_media:
        return conversations_of_stream(source, stream, bad_rows)
    rows = ((f"row {number}", row, None) for number, row in enumerate(stream, start=1))
    return _usable_texts(source, rows, bad_rows)


def _usable_texts(source: SourceConfig, rows: Rows, bad_rows: BadRows) -> Dataset:
    columns = columns_of(source)
    kept: dict[str, list[str]] = {name: [] for name in columns.values()}
    for where, row, reason in rows:
        reason = reason or reason_against_text(source, row)
        if reason is not None:
            bad_rows.add(source.label, where, reason)
            continue
        for column, name in columns.items():
            kept[name].append(row[column])
    return Dataset.from_dict(kept, features=Features(dict.fromkeys(kept, Value("large_string"))))


def _read_hub(source: SourceConfig, bad_rows: BadRows, limit: int | None) -> Dataset:
    rows, columns = load_hub(source), columns_of(source)
    check_columns(source, columns, rows.column_names)
    asks = source.prompt_column is not None
    checked = checked_columns(columns, is_chat=False).intersection(rows.column_names) if asks else ()
    rows = rows.select_columns([*columns, *sorted(checked)])
    rows = rows if limit is None else rows.take(min(limit, len(rows)))
    kept = []
    for start in range(0, len(rows), CHECKED_AT_ONCE):
        batch = rows[start : start + CHECKED_AT_ONCE]
        for offset in range(len(batch[rows.column_names[0]])):
            reason = reason_against_text(source, {name: batch[name][offset] for name in rows.column_names})
            if reason is None:
                kept.append(start + offset)
            else:
                bad_rows.add(source.label, f"row {start + offset + 1}", reason)
    rows = rows.select_columns(list(columns)).rename_columns(columns)
    return rows if len(kept) == len(rows) else rows.select(kept)
