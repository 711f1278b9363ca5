"""Sources of conversations to rows of messages, checked, that say where each item of their media is.

Nothing is decoded here, and of files only a digest is taken; `packing/documents.py` looks into them.
"""

import json
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets

from model import MODALITIES
from model.terminal import one_line

from ..bad_rows import SYSTEM_COLUMNS, BadRows, reason_against, reason_against_columns
from ..configuration import DataConfig, SourceConfig
from ..tasks.base import Role
from ..tasks.registry import generate_rows, get_task
from .folders import read_folder
from .media_columns import (
    attached_references,
    cell_of,
    checked_row,
    folder_of,
    label_names,
    media_folder,
    named_references,
    needed_columns,
    plain_rows,
    required_columns,
    stored_cells,
    table_columns,
    used_columns,
    with_label_names,
)
from .messages import answer_to, fill_template, parse_messages, with_system
from .references import ArrowRow, Reference, UnusableRow, fingerprint
from .tables import (
    CHECKED_AT_ONCE,
    PARQUET_ERRORS,
    RowsInFolders,
    check_columns,
    columns_of_stream,
    expand_paths,
    format_of,
    load_hub,
    map_in_memory,
    open_parquet,
    read_rows,
)
from .tars import read_tar

logger = logging.getLogger(__name__)
FEATURES = Features({"messages": Value("large_string"), "where": Value("string"), "difficulty": Value("int64")})
"""Columns of conversations: messages as JSON (see `messages.py`), "" for a row that cannot be used; where the row is
from; the difficulty of generated ones."""
STORED_MEDIA = List({"bytes": Value("binary"), "path": Value("string")})
"""Type of a column of media that come with their row."""
_CONVERTED_AT_ONCE = 100  # rows of parquet with media


def load_conversations(
    source: SourceConfig, role: Role, config: DataConfig, seed: int, bad_rows: BadRows, limit: int | None = None
) -> Dataset:
    """All usable rows of a source with media that is not streaming: the columns of FEATURES, and `digest` of text and
    media (empty for generated ones); tables that hold media keep their columns, too.

    Args:
        limit: Most rows to load.

    Raises:
        ValueError: Missing file or column, or too many bad rows.
    """
    if source.kind == "generated":
        return _generated(source, role, config, seed, limit)
    if source.kind == "hub":
        rows = _of_table(source, load_hub(source), None, folder_of(source), bad_rows, limit)
    elif source.kind == "files" and _are_parquet(source):
        tables = [(path, _parquet_table(path)) for path in expand_paths(source)]
        parts = [_of_table(source, table, path, media_folder(source, path), bad_rows, limit) for path, table in tables]
        rows = concatenate_datasets(parts)
    else:
        rows = _of_rows(source, bad_rows, limit)
    return _usable(source, rows, config.preprocessing_workers, bad_rows) if len(rows) else rows


def open_conversations(source: SourceConfig) -> IterableDataset:
    """The rows of a streaming source with media, for `conversation_of_stream`."""
    if source.kind == "webdataset":
        paths = [str(path) for path in expand_paths(source)]
        return IterableDataset.from_generator(_stream_tars, gen_kwargs={"paths": paths, "source": source})
    stream = load_hub(source)
    stream = stream.decode(False) if stream.features else stream
    check_columns(source, required_columns(source), columns_of_stream(stream))
    names = label_names(stream.features or {})
    return stream.map(with_label_names, fn_kwargs={"names": names}) if names else stream


def conversation_of_stream(source: SourceConfig, row: dict[str, object], number: int) -> tuple[list[dict], list[dict]]:
    """The messages of a row of a stream, or of rows in memory that are mixed with streams, and the media that stand in
    columns of row `number` (from 0), as {"bytes", "path"}: references say column "media".

    Raises:
        UnusableRow: The message is the reason.
    """
    if source.streaming and source.kind == "hub":
        folder = folder_of(source)
        attached = {
            kind: attached_references(source, kind, column, cell_of(row.get(column)), folder)
            for column, kind in source.media_columns_of(number).items()
        }
        messages = conversation_of(source, row, attached, folder, number)
    elif row.get("problem"):
        raise UnusableRow(row["problem"])
    else:
        messages = json.loads(row["messages"])
    media = []
    for message in messages:
        for place, part in enumerate(message["content"]):
            if "column" in part:
                value = row[part["column"]] if part["item"] is None else row[part["column"]][part["item"]]
                content = value.get("bytes") if isinstance(value, dict) else value
                if not isinstance(content, bytes):
                    raise UnusableRow(f"column {part['column']!r} holds {type(content).__name__} and no medium")
                message["content"][place] = {"type": part["type"], "column": "media", "item": len(media)}
                media.append({"bytes": content, "path": None})
    return messages, media


def conversations_of_stream(source: SourceConfig, stream: IterableDataset, bad_rows: BadRows) -> Dataset:
    """The usable rows of a finite stream, read into memory, with the columns of `load_conversations`."""
    found, digests, held = _Found(), [], []
    for number, row in enumerate(stream, start=1):
        try:
            messages, media = conversation_of_stream(source, row, number - 1)
            digests.append(fingerprint(messages, {"media": media}))
        except (OSError, ValueError) as error:
            bad_rows.add(source.label, f"row {number}", str(error))
            continue
        found.add(messages, f"row {number}")
        held.append(media)
    features = Features(FEATURES | {"digest": Value("binary"), "media": STORED_MEDIA})
    return Dataset.from_dict(found.columns | {"digest": digests, "media": held}, features=features)


def conversation_of(
    source: SourceConfig, row: dict[str, object], attached: dict[str, list[dict]], folder: Path | None, number: int
) -> list[dict]:
    """The messages of a row.

    Args:
        attached: References to the media in columns of the row, by modality.
        folder: Folder that names of files in messages are relative to.
        number: Number of the row, from 0, which decides its direction.

    Raises:
        UnusableRow: A column is missing, empty or of a wrong type.
    """
    row, used = source.defaults | row, used_columns(source)
    if reason := reason_against_columns(row, (*used, *SYSTEM_COLUMNS), source.messages_column is not None):
        raise UnusableRow(reason)
    return with_system(_messages_of(source, row, attached, folder, number), row, used)


def _messages_of(
    source: SourceConfig, row: dict[str, object], attached: dict[str, list[dict]], folder: Path | None, number: int
) -> list[dict]:
    if source.messages_column is not None:
        if source.messages_column not in row:
            hint = "; set messages_column: conversations" if "conversations" in row else ""
            has = ", ".join(map(repr, row)) or "none"
            raise UnusableRow(f"no column {source.messages_column!r} (has {has}){hint}")
        return parse_messages(row[source.messages_column], attached, folder, source.loss_on)
    direction, prompt = source.directed_prompts[number % len(source.directed_prompts)]
    for column, kind in source.media_columns_of(number).items():
        if not attached[kind]:
            raise UnusableRow(f"column {column!r} holds nothing")
    column = source.answer_column or source.text_column
    says_text, asks_text = "text" in direction.answered, "text" in direction.given
    is_asked_itself = asks_text and prompt is None
    if (says_text or is_asked_itself) and (reason := reason_against(row, (column,))):
        raise UnusableRow(reason)
    question = row[column] if is_asked_itself else fill_template(prompt or "", row)
    question = question.rstrip() if source.format == "alpaca" else question  # where the input is empty
    if (asks_text or not direction.given) and not question.strip():
        raise UnusableRow(f"the prompt {prompt!r} is empty for it")
    given, shown = (
        [reference for kind in MODALITIES if kind in side for reference in attached[kind]]
        for side in (direction.given, direction.answered)
    )
    return answer_to(given, question, row[column] if says_text else "", shown)


# ------------------------------------------------------------------------------------------------------ generated tasks


def rows_of_task(source: SourceConfig, role: Role, config: DataConfig, seed: int, limit: int | None) -> Dataset:
    """What `generate_rows` gives of a generated source, at most `limit` rows."""
    num_rows = source.num_rows if limit is None else min(source.num_rows, limit)
    seeds, workers = (seed, source.seed), config.preprocessing_workers
    return generate_rows(get_task(source.task), source.difficulty, source.role or role, seeds, num_rows, workers)


def _generated(source: SourceConfig, role: Role, config: DataConfig, seed: int, limit: int | None) -> Dataset:
    task, rows = get_task(source.task), rows_of_task(source, role, config, seed, limit)
    found, turns = _Found(), source.directed_prompts
    for number, row in enumerate(rows, start=1):
        direction, prompt = turns[(number - 1) % len(turns)]
        gives_text = source.has_media and "text" in direction.given
        question = row["answer" if gives_text else "prompt"] if prompt is None else fill_template(prompt, row)
        if not source.has_media:
            messages = parse_messages([{"role": "user", "content": question}, *task.replies(row)], {}, None)
        else:
            item = Reference(type=task.modality, task=task.name, medium=row["medium"])
            given, answer, shown = ([], "", [item]) if gives_text else ([item], row["answer"], ())
            messages = answer_to(given, question, answer, shown)
        found.add(messages, f"row {number}", row["difficulty"])
    return found.dataset().add_column("digest", [b""] * len(rows))


class _Found:
    """Collects the columns of FEATURES."""

    def __init__(self):
        self.columns: dict[str, list] = {name: [] for name in FEATURES}

    def add(self, messages: list[dict] | None, where: str, difficulty: int | None = None) -> None:
        values = (json.dumps(messages) if messages else "", where, difficulty)
        for column, value in zip(self.columns.values(), values, strict=True):
            column.append(value)

    def dataset(self) -> Dataset:
        return Dataset.from_dict(self.columns, features=FEATURES)


def _of_rows(source: SourceConfig, bad_rows: BadRows, limit: int | None) -> Dataset:
    found, rows = _Found(), islice(_READERS.get(source.kind, read_folder)(source), limit)
    for number, (where, row, reason, folder) in enumerate(rows):
        try:
            found.add(_of_row(source, row, reason, folder, number), where)
        except UnusableRow as error:
            bad_rows.add(source.label, where, str(error))
    return found.dataset()


def _of_row(
    source: SourceConfig, row: dict[str, object], reason: str | None, folder: Path | None, number: int
) -> list[dict]:
    if reason is not None:
        raise UnusableRow(reason)
    row = source.defaults | row
    columns = source.media_columns_of(number)
    attached = {kind: named_references(kind, column, row, folder) for column, kind in columns.items()}
    return conversation_of(source, row, attached, folder, number)


def _read_files(source: SourceConfig) -> RowsInFolders:
    for path in expand_paths(source):
        folder = media_folder(source, path)
        for where, row, reason in read_rows(path, tuple(needed_columns(source))):
            yield where, row, reason, folder


def _read_tars(source: SourceConfig) -> RowsInFolders:
    for path in expand_paths(source):
        yield from read_tar(source, path)


def _stream_tars(paths: list[str], source: SourceConfig) -> Iterator[dict[str, str]]:
    for path in paths:
        for number, (_, row, reason, folder) in enumerate(read_tar(source, Path(path))):
            messages = ""
            try:
                messages = json.dumps(_of_row(source, row, reason, folder, number))
            except UnusableRow as error:
                reason = str(error)
            yield {"messages": messages, "problem": reason or ""}


_READERS = {"files": _read_files, "chat": _read_files, "webdataset": _read_tars}


# ---------------------------------------------------------------------------------------- tables that hold the media


def _are_parquet(source: SourceConfig) -> bool:
    suffixes = {format_of(path) for path in expand_paths(source)}
    if ".txt" in suffixes or (".parquet" in suffixes and len(suffixes) > 1):
        raise ValueError(
            f"source {source.label!r} has files {', '.join(sorted(suffixes))}; of conversations, all are "
            ".jsonl, .json, .csv and .tsv, or all are .parquet"
        )
    return suffixes == {".parquet"}


def _parquet_table(path: Path) -> Dataset:
    """A table on the disk; raises ValueError for one that is damaged, or would fill the memory."""
    open_parquet(path)
    try:
        return Dataset.from_parquet(str(path), batch_size=_CONVERTED_AT_ONCE)
    except PARQUET_ERRORS as error:
        raise ValueError(f"{str(path)!r} is damaged: {one_line(error.__cause__ or error)}; write it again") from error


def _of_table(
    source: SourceConfig, table: Dataset, path: Path | None, folder: Path | None, bad_rows: BadRows, limit: int | None
) -> Dataset:
    """Conversations whose media stand, undecoded, in columns of their own rows, one for each row of the table."""
    check_columns(source, required_columns(source), table.column_names)
    table = table.select_columns(table_columns(source, table.column_names)).with_format("arrow")
    table = table if limit is None else table.take(min(limit, len(table)))
    texts = [column for column in table.column_names if column not in source.media_columns]
    names = label_names(table.features)
    found = _Found()
    for start in range(0, len(table), CHECKED_AT_ONCE):
        batch = table[start : start + CHECKED_AT_ONCE]
        media = {column: stored_cells(column, batch[column]) for column in source.media_columns}
        for offset, row in enumerate(plain_rows(batch.select(texts))):
            where, messages = f"{path or ''} row {start + offset + 1}".strip(), None
            try:
                row = with_label_names(checked_row(row), names)
                attached = {
                    kind: attached_references(source, kind, column, media[column][offset], folder)
                    for column, kind in source.media_columns_of(start + offset).items()
                }
                messages = conversation_of(source, row, attached, folder, start + offset)
            except UnusableRow as error:
                bad_rows.add(source.label, where, str(error))
            found.add(messages, where)
    stored = table.select_columns(list(source.media_columns)).with_format(None)
    return concatenate_datasets([found.dataset(), stored], axis=1) if source.media_columns else found.dataset()


# ----------------------------------------------------------------------------------------------------------- digests


def _usable(source: SourceConfig, rows: Dataset, workers: int, bad_rows: BadRows) -> Dataset:
    """The rows that have messages, and whose media are there, with their digests."""
    features = Features({"digest": Value("binary"), "problem": Value("string")})
    purpose = f"reading {source.label}"
    found = map_in_memory(rows.with_format("arrow"), _digest_batch, features, workers, purpose)[:].to_pydict()
    for where, problem in zip(rows["where"], found["problem"], strict=True):
        if problem:
            bad_rows.add(source.label, where, problem)
    seen: dict[bytes, str] = {}
    again = [
        (where, first)
        for where, mark in zip(rows["where"], found["digest"], strict=True)
        if mark and (first := seen.setdefault(mark, where)) != where
    ]
    if again:  # as those of a file and its copy are
        logger.warning(
            "%s: %d rows have the text and the media of a row before them, the first of them %s, as %s; all are used",
            *(source.label, len(again), *again[0]),
        )
    rows = rows.add_column("digest", found["digest"])
    return rows.select([number for number, digest in enumerate(found["digest"]) if digest])


def _digest_batch(batch: pa.Table) -> dict[str, list]:
    digests, problems = [], []
    for number, messages in enumerate(batch["messages"].to_pylist()):
        digest, problem = b"", ""
        if messages:
            try:
                digest = fingerprint(json.loads(messages), ArrowRow(batch, number))
            except (OSError, ValueError) as error:
                problem = str(error)
        digests.append(digest)
        problems.append(problem)
    return {"digest": digests, "problem": problems}
