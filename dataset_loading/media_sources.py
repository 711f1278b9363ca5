"""Sources with media to conversations: checked rows of messages that say where each image and recording is.

Nothing is decoded here, and of files only a digest is taken; `media_documents.py` looks into them.
"""

import json
import logging
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name

from model import MODALITIES

from .bounded import MAX_ROW_BYTES
from .configuration import DataConfig, SourceConfig
from .conversations import answer_to, parse_messages
from .message_keys import checked_columns, reason_against_columns
from .readers import CHECKED_AT_ONCE, PARQUET_ERRORS, READERS, expand_paths, load_hub, one_line, open_parquet
from .references import ArrowRow, Reference, UnusableRow, fingerprint, is_within, reference_to
from .synthetic import Role, generate_rows, get_task
from .templates import fill_template, template_columns
from .text_files import decode_text
from .validation import BadRows, reason_against

logger = logging.getLogger(__name__)

FEATURES = Features({"messages": Value("large_string"), "where": Value("string"), "difficulty": Value("int64")})
"""Columns of conversations: messages as JSON (see `conversations.py`), "" of a row that cannot be used; where the row
is from; difficulty of generated ones."""
STORED_MEDIA = List({"bytes": Value("binary"), "path": Value("string")})
"""Of a column of media that come with their row."""

_CONVERTED_AT_ONCE = 100  # rows of parquet with media
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_SUFFIXES = {"imagefolder": set(ImageFolder.EXTENSIONS), "audiofolder": set(AudioFolder.EXTENSIONS)}


def load_conversations(
    source: SourceConfig, role: Role, config: DataConfig, seed: int, bad_rows: BadRows, limit: int | None = None
) -> Dataset:
    """All usable rows of a source with media that is not streaming: the columns of FEATURES, and `digest` of text and
    media (empty for generated ones); of tables that hold images and recordings, the columns with those as well.

    Args:
        limit: the most rows to load.

    Raises:
        ValueError: missing file or column, nothing usable, or too many bad rows.
    """
    if source.kind == "generated":
        return _generated(source, role, config, seed, limit)
    if source.kind == "hub":
        rows = _of_table(source, _raw_table(source, load_hub(source)), None, _folder_of(source), bad_rows, limit)
    elif source.kind == "files" and _are_parquet(source):
        tables = [(path, _parquet_table(path)) for path in expand_paths(source)]
        parts = [
            _of_table(source, _raw_table(source, table), path, path.parent, bad_rows, limit) for path, table in tables
        ]
        rows = concatenate_datasets(parts)
    else:
        rows = _of_rows(source, _ROWS[source.kind](source), bad_rows, limit)
    rows = _usable(source, rows, config.preprocessing_workers, bad_rows) if len(rows) else rows
    if len(rows) == 0:
        raise ValueError(
            f"source {source.label!r} has no usable rows: {bad_rows.reasons_of(source.label) or 'it has none'}"
        )
    return rows


def open_conversations(source: SourceConfig) -> IterableDataset:
    """The rows of a streaming source with media, for `conversation_of_stream`.

    Raises:
        ValueError: it cannot be opened, or lacks a column.
    """
    if source.kind == "webdataset":
        paths = [str(path) for path in expand_paths(source)]
        return IterableDataset.from_generator(_stream_tars, gen_kwargs={"paths": paths, "source": source})
    stream = load_hub(source)
    stream = stream.decode(False) if stream.features else stream
    _check_columns(source, stream.column_names or list(next(iter(stream), {})))  # not every format names them in front
    names = _label_names(stream.features or {})
    return stream.map(_with_label_names, fn_kwargs={"names": names}) if names else stream


def conversation_of_stream(source: SourceConfig, row: dict[str, object], number: int) -> tuple[list[dict], list[dict]]:
    """The messages of a row of a stream, or of rows in memory that are mixed with streams, and the media that stand in
    columns of the row, as {"bytes", "path"}: references say column "media".

    Args:
        number: of the row, from 0.

    Raises:
        UnusableRow: the reason.
    """
    if source.streaming and source.kind == "hub":
        folder = _folder_of(source)
        attached = {
            kind: _attached(source, kind, column, _found_in(row.get(column)), folder)
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


def needed_columns(source: SourceConfig) -> list[str]:
    """The columns that rows of a source must have."""
    if source.messages_column is not None:
        return [source.messages_column, *source.media_columns]
    columns = list(source.media_columns)
    for direction, prompt in source.turns:
        columns += template_columns(prompt)
        if "text" in direction.answered or ("text" in direction.given and prompt is None):
            columns.append(source.answer_column or source.text_column)
    return list(dict.fromkeys(columns))


def used_columns(source: SourceConfig) -> list[str]:
    """The columns that are read for a source, or by another pass over it."""
    rejected = [] if source.rejected_column is None else [source.rejected_column]
    return [*needed_columns(source), *rejected]


def _table_columns(source: SourceConfig, found: list[str]) -> list[str]:
    """The needed columns, and those that tell whether a row may be learned from by them."""
    checked = checked_columns(used_columns(source), source.messages_column is not None)
    return list(dict.fromkeys([*needed_columns(source), *sorted(checked.intersection(found))]))


def conversation_of(
    source: SourceConfig, row: dict[str, object], attached: dict[str, list[dict]], folder: Path | None, number: int
) -> list[dict]:
    """The messages of a row.

    Args:
        attached: references to the media in columns of the row, by kind.
        folder: that which names of files in messages are relative to.
        number: of the row, from 0, by which the directions take turns.

    Raises:
        UnusableRow: a column is missing, empty or of a wrong type.
    """
    if reason := reason_against_columns(row, used_columns(source), source.messages_column is not None):
        raise UnusableRow(reason)
    if source.messages_column is not None:
        if source.messages_column not in row:
            hint = "; set messages_column: conversations" if "conversations" in row else ""
            has = ", ".join(map(repr, row)) or "none"
            raise UnusableRow(f"no column {source.messages_column!r} (has {has}){hint}")
        return parse_messages(row[source.messages_column], attached, folder, source.loss_on)
    direction, prompt = source.turns[number % len(source.turns)]
    for column, kind in source.media_columns_of(number).items():
        if not attached[kind]:
            raise UnusableRow(f"column {column!r} holds nothing")
    column = source.answer_column or source.text_column
    says_text, asks_text = "text" in direction.answered, "text" in direction.given
    is_asked_itself = asks_text and prompt is None
    if (says_text or is_asked_itself) and (reason := reason_against(row, (column,))):
        raise UnusableRow(reason)
    question = row[column] if is_asked_itself else fill_template(prompt or "", row)
    if (asks_text or not direction.given) and not question.strip():
        raise UnusableRow(f"the prompt {prompt!r} is empty for it")
    given, shown = (
        [reference for kind in MODALITIES if kind in side for reference in attached[kind]]
        for side in (direction.given, direction.answered)
    )
    return answer_to(given, question, row[column] if says_text else "", shown)


# ------------------------------------------------------------------------------------------------------ generated tasks


def _generated(source: SourceConfig, role: Role, config: DataConfig, seed: int, limit: int | None) -> Dataset:
    task = get_task(source.task)
    num_rows = source.num_rows if limit is None else min(source.num_rows, limit)
    difficulty = tuple(source.difficulty or task.default_difficulty)
    seeds = (seed, source.seed)
    rows = generate_rows(task, difficulty, source.role or role, seeds, num_rows, config.preprocessing_workers)
    found = _Found()
    turns = source.turns
    for number, row in enumerate(rows, start=1):
        direction, prompt = turns[(number - 1) % len(turns)]
        if not source.has_media:
            question = {"role": "user", "content": fill_template(prompt or "{prompt}", row)}
            found.add(parse_messages([question, *task.replies(row)], {}, None), f"row {number}", row["difficulty"])
            continue
        medium = Reference(type=task.modality, task=task.name, medium=row["medium"])
        if "text" in direction.given:
            question = row["answer"] if prompt is None else fill_template(prompt, row)
            messages = answer_to([], question, "", [medium])
        else:
            question = row["prompt"] if prompt is None else fill_template(prompt, row)
            messages = answer_to([medium], question, row["answer"])
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


# ------------------------------------------------------------------------------------------- rows that name their files

# A row with where it is, the reason against it, and the folder that its names of files are relative to, if any are.
_Rows = Iterator[tuple[str, dict[str, object], str | None, Path | None]]


def _of_rows(source: SourceConfig, rows: _Rows, bad_rows: BadRows, limit: int | None) -> Dataset:
    found = _Found()
    for number, (where, row, reason, folder) in enumerate(rows if limit is None else islice(rows, limit)):
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
    columns = source.media_columns_of(number)
    attached = {kind: _named_media(kind, column, row, folder) for column, kind in columns.items()}
    return conversation_of(source, row, attached, folder, number)


def _named_media(kind: str, column: str, row: dict[str, object], folder: Path | None) -> list[dict]:
    if column not in row:
        raise UnusableRow(f"no column {column!r} (has {', '.join(map(repr, row)) or 'none'})")
    values = row[column] if isinstance(row[column], list) else [row[column]]
    if values == [None]:
        return []
    return [value if isinstance(value, Reference) else reference_to(kind, value, folder) for value in values]


def _read_files(source: SourceConfig) -> _Rows:
    for path in expand_paths(source):
        for where, row, reason in READERS[path.suffix](path, tuple(needed_columns(source))):
            yield where, row, reason, path.parent


def _read_folder(source: SourceConfig) -> _Rows:
    """The rows of the metadata files in a folder and those below, or, where there are none, each file with the name of
    its folder as `label`.
    """
    folder = Path(source.path)
    if not folder.is_dir():
        raise ValueError(f"source {source.label!r}: {source.path!r} is no folder; correct the path")
    metadata = sorted(path for name in _METADATA for path in folder.rglob(name))
    named = _NamedMedia(source)
    for path in metadata:
        if not (path.is_file() and is_within(str(path), str(folder))):
            raise ValueError(f"source {source.label!r}: {str(path)!r} is no regular file of the folder; replace it")
        for where, row, reason in READERS[path.suffix](path, tuple(needed_columns(source))):
            named.add(path, where, row)
            yield where, row, reason, path.parent
    if metadata:
        named.report()
        return
    suffixes = _suffixes(source)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    _check_without_metadata(source, folder, files, suffixes)
    for path in files:
        yield str(path), {"file_name": str(path.relative_to(folder)), "label": path.parent.name}, None, folder


def _suffixes(source: SourceConfig) -> set[str]:
    """How names of media end, by what a folder holds."""
    if source.kind in _SUFFIXES:
        return _SUFFIXES[source.kind]
    return {suffix for kind in source.media_columns.values() for suffix in MODALITIES[kind].file_suffixes}


def _check_without_metadata(source: SourceConfig, folder: Path, files: list[Path], suffixes: set[str]) -> None:
    """What would be the same reason against each row is said once."""
    missing = [column for column in needed_columns(source) if column not in ("file_name", "label")]
    if files and not missing:
        return
    tables = [
        path for path in folder.rglob("*") if path.suffix.lower() in (".jsonl", ".json", ".csv", ".tsv", ".parquet")
    ]
    near = f", though {str(min(tables).relative_to(folder))!r}, which is not read" if tables else ""
    names = f"{', '.join(_METADATA[:-1])} or {_METADATA[-1]}"
    if missing:
        raise ValueError(
            f"source {source.label!r}: {str(folder)!r} has no {names}{near}, so that its rows have file_name and label "
            f"alone, and no column {missing[0]!r}; write metadata, or set answer_column: label"
        )
    raise ValueError(
        f"source {source.label!r}: {str(folder)!r} has no {names}{near}, and no file that is one of "
        f"{', '.join(sorted(suffixes))}; correct the path"
    )


class _NamedMedia:
    """The files that metadata name, of which each is to be shown as often as one of them says."""

    def __init__(self, source: SourceConfig):
        self.source = source
        self.first: dict[str, tuple[Path, str]] = {}
        self.again: list[tuple[str, str]] = []

    def add(self, metadata: Path, where: str, row: dict[str, object]) -> None:
        """Takes a row.

        Raises:
            ValueError: another file of metadata names one of its media too.
        """
        for column in self.source.media_columns:
            values = row.get(column) if isinstance(row.get(column), list) else [row.get(column)]
            for name in (value for value in values if isinstance(value, str)):
                path = os.path.normpath(os.path.join(metadata.parent, name))
                first, first_where = self.first.setdefault(path, (metadata, where))
                if first != metadata:
                    raise ValueError(
                        f"source {self.source.label!r}: {str(first)!r} and {str(metadata)!r} both name {path!r}, which "
                        "would be learned twice as often; remove one of them, or leave each file in one"
                    )
                if first_where != where:
                    self.again.append((where, first_where))

    def report(self) -> None:
        """Says how many rows name what another one of the same file names, as several texts of one picture do."""
        if self.again:
            logger.warning(
                "%s: %d rows name a file that a row before them names too, the first of them %s, as %s; all are used",
                *(self.source.label, len(self.again), *self.again[0]),
            )


def _read_tars(source: SourceConfig) -> _Rows:
    for path in expand_paths(source):
        yield from _read_tar(source, path)


def _stream_tars(paths: list[str], source: SourceConfig) -> Iterator[dict[str, str]]:
    for path in paths:
        for number, (_, row, reason, folder) in enumerate(_read_tar(source, Path(path))):
            messages = ""
            try:
                messages = json.dumps(_of_row(source, row, reason, folder, number))
            except UnusableRow as error:
                reason = str(error)
            yield {"messages": messages, "problem": reason or ""}


def _read_tar(source: SourceConfig, path: Path) -> _Rows:
    """One row for the members of a tar that share what stands before the first dot of their names: a column for each,
    named by what stands behind it. Media are references into the tar, text is read, keys of a JSON object are columns.
    """
    for key, members in _samples(path):
        row, reason = {"__key__": key}, None
        for member in members:
            found, problem = _columns_of(member, source, path)
            twice = next((column for column in found if column in row), None)
            problem = problem or (twice and f"column {twice!r} is there twice")
            row, reason = row | found, reason or problem
        yield f"{path} {key}", row, reason, None


@dataclass
class _Member:
    """A member of a tar."""

    extension: str
    offset: int
    size: int
    is_plain: bool
    """Neither a link nor sparse, so that its bytes are those in the tar."""
    content: bytes | None
    """Of text and JSON."""


def _columns_of(member: _Member, source: SourceConfig, path: Path) -> tuple[dict[str, object], str | None]:
    """The columns that a member gives, and the reason against its row."""
    kind = source.media_columns.get(member.extension)
    if not member.is_plain:
        return {}, f"member {member.extension!r} is a link or sparse, and only plain members are read; write it anew"
    if kind is not None:
        return {member.extension: Reference(type=kind, path=str(path), offset=member.offset, size=member.size)}, None
    if member.content is None:
        too_long = f"member {member.extension!r} has {member.size} bytes, and of text at most {MAX_ROW_BYTES} are read"
        return {}, too_long if _is_text_member(member.extension) else None
    return _decode_member(member.extension, member.content)


def _samples(path: Path) -> Iterator[tuple[str, list[_Member]]]:
    """The members of a tar by key."""
    key, members = None, []
    try:
        with path.open("rb") as file, tarfile.open(fileobj=_BoundedReads(file), mode="r:") as tar:
            end = -1
            for entry in tar:
                if entry.offset_data <= end or entry.size < 0:
                    raise tarfile.ReadError(f"the header of {entry.name!r} leads backwards")
                end = entry.offset_data
                folder, slash, name = entry.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if not (entry.isfile() or entry.islnk() or entry.issym()) or not stem or not extension:
                    continue
                if folder + slash + stem != key and members:
                    yield key, members
                    members = []
                key = folder + slash + stem
                members.append(_member(tar, entry, extension))
                tar.members.clear()  # or it would keep the headers of all, which are more than a worker can hold
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{str(path)!r} is not a whole, uncompressed tar: {one_line(error)}; write it again"
        ) from error
    if members:
        yield key, members


def _member(tar: tarfile.TarFile, entry: tarfile.TarInfo, extension: str) -> _Member:
    is_plain = entry.isfile() and not entry.issparse()
    is_read = is_plain and _is_text_member(extension) and entry.size <= MAX_ROW_BYTES
    content = tar.extractfile(entry).read() if is_read else None
    return _Member(extension, entry.offset_data, entry.size, is_plain, content)


def _is_text_member(extension: str) -> bool:
    return extension.rpartition(".")[2] in ("txt", "text", "json", "cls", "caption", "transcript")


class _BoundedReads:
    """A file of which no header makes anybody read very much at once."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= 2 * MAX_ROW_BYTES:
            raise tarfile.ReadError(f"a header asks for {size} bytes")
        return self._file.read(size)


def _decode_member(extension: str, content: bytes) -> tuple[dict[str, object], str | None]:
    try:
        text = decode_text(content)
        if not extension.endswith("json"):
            return {extension: text}, None
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return {}, f"member {extension!r} cannot be read: {error}"
    return value if isinstance(value, dict) else {extension: value}, None


_ROWS: dict[str, Callable[[SourceConfig], _Rows]] = {
    "files": _read_files,
    "chat": _read_files,
    "imagefolder": _read_folder,
    "audiofolder": _read_folder,
    "folder": _read_folder,
    "webdataset": _read_tars,
}


# ---------------------------------------------------------------------------------------- tables that hold the media


def _are_parquet(source: SourceConfig) -> bool:
    suffixes = {path.suffix for path in expand_paths(source)}
    if ".txt" in suffixes or len(suffixes) > 1:
        raise ValueError(
            f"source {source.label!r} has files {', '.join(sorted(suffixes))}; of conversations, all are .jsonl or "
            ".parquet"
        )
    return suffixes == {".parquet"}


def _parquet_table(path: Path) -> Dataset:
    """A table on the disk.

    Raises:
        ValueError: it is damaged, or would fill the memory.
    """
    open_parquet(path)
    try:
        return Dataset.from_parquet(str(path), batch_size=_CONVERTED_AT_ONCE)
    except PARQUET_ERRORS as error:
        raise ValueError(f"{str(path)!r} is damaged: {one_line(error.__cause__ or error)}; write it again") from error


def _raw_table(source: SourceConfig, rows: Dataset) -> Dataset:
    """The needed columns, undecoded.

    Raises:
        ValueError: one is missing.
    """
    _check_columns(source, rows.column_names)
    return rows.select_columns(_table_columns(source, rows.column_names)).with_format("arrow")


def _check_columns(source: SourceConfig, found: list[str]) -> None:
    for column in needed_columns(source):
        if column not in found:
            there = ", ".join(found) or "none"
            raise ValueError(f"source {source.label!r} has no column {column!r}, only {there}; correct it")


def _of_table(
    source: SourceConfig, table: Dataset, path: Path | None, folder: Path | None, bad_rows: BadRows, limit: int | None
) -> Dataset:
    """Conversations whose media stand in columns of their own rows, one for each row of the table."""
    table = table if limit is None else table.take(min(limit, len(table)))
    texts = [column for column in table.column_names if column not in source.media_columns]
    names = _label_names(table.features)
    found = _Found()
    for start in range(0, len(table), CHECKED_AT_ONCE):
        batch = table[start : start + CHECKED_AT_ONCE]
        media = {column: _stored_media(column, batch[column]) for column in source.media_columns}
        for offset, row in enumerate(_plain_rows(batch.select(texts))):
            where, messages = f"{path or ''} row {start + offset + 1}".strip(), None
            try:
                row = _with_label_names(_checked(row), names)
                attached = {
                    kind: _attached(source, kind, column, media[column][offset], folder)
                    for column, kind in source.media_columns_of(start + offset).items()
                }
                messages = conversation_of(source, row, attached, folder, start + offset)
            except UnusableRow as error:
                bad_rows.add(source.label, where, str(error))
            found.add(messages, where)
    stored = table.select_columns(list(source.media_columns)).with_format(None)
    return concatenate_datasets([found.dataset(), stored], axis=1) if source.media_columns else found.dataset()


def _plain_rows(batch: pa.Table) -> list[dict[str, object] | UnicodeDecodeError]:
    """The rows of a table, and in place of one that is not UTF-8 the error."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        parts = [batch.slice(number, 1) for number in range(len(batch))] if len(batch) > 1 else []
        return [row for part in parts for row in _plain_rows(part)] or [error]


def _checked(row: dict[str, object] | UnicodeDecodeError) -> dict[str, object]:
    if isinstance(row, UnicodeDecodeError):
        raise UnusableRow(f"a text is not UTF-8 ({row.reason} at position {row.start})")
    return row


def _label_names(features: Mapping[str, object]) -> dict[str, list[str]]:
    return {column: feature.names for column, feature in features.items() if isinstance(feature, ClassLabel)}


def _with_label_names(row: dict[str, object], names: dict[str, list[str]]) -> dict[str, object]:
    """Numbers of classes as their names; -1, which stands for none, as None."""
    numbers = {column: row[column] for column in names if column in row}
    named = {column: names[column][it] if it is not None and it >= 0 else None for column, it in numbers.items()}
    return {**row, **named}


# What a cell holds: nothing, the name of a file, True for what is to be read there, and of a list a list of these.
_Cell = str | bool | list | None


def _stored_media(column: str, values: pa.ChunkedArray) -> list[_Cell]:
    """What each row has. Bytes are not looked at.

    Raises:
        ValueError: the column is of a type that holds no media.
    """
    if not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
        return _cells(column, values)
    cells = iter(_cells(column, pc.list_flatten(values)))
    return [list(islice(cells, length or 0)) for length in pc.list_value_length(values).to_pylist()]


def _cells(column: str, values: pa.ChunkedArray) -> list[_Cell]:
    there = values.is_valid().to_pylist()
    if _is_text(values.type):
        return _names(values)
    if _is_bytes(values.type):
        return [is_there or None for is_there in there]
    fields = {field.name: field.type for field in values.type} if pa.types.is_struct(values.type) else {}
    if not fields.keys() & {"bytes", "path"} or not _is_bytes(fields.get("bytes", pa.null())):
        raise ValueError(
            f"column {column!r} holds {values.type}, neither bytes of media nor names of files; correct it"
        )
    names, held = [None] * len(values), [False] * len(values)
    if _is_text(fields.get("path", pa.null())):
        names = _names(pc.struct_field(values, "path"))
    if "bytes" in fields:
        held = pc.struct_field(values, "bytes").is_valid().to_pylist()
    cells = zip(there, held, names, strict=True)
    return [(True if is_held else name or True) if is_there else None for is_there, is_held, name in cells]


def _is_text(type_: pa.DataType) -> bool:
    return pa.types.is_string(type_) or pa.types.is_large_string(type_)


def _is_bytes(type_: pa.DataType) -> bool:
    return pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_null(type_)


def _names(values: pa.ChunkedArray) -> list[str | None]:
    """Names of files, which need not be UTF-8."""
    return [name if name is None else os.fsdecode(name) for name in values.cast(pa.large_binary()).to_pylist()]


def _found_in(value: object) -> _Cell:
    """The same for a value of a row."""
    if isinstance(value, list):
        return [_found_in(item) for item in value]
    if isinstance(value, Mapping) and value.get("bytes") is None and isinstance(value.get("path"), str):
        return value["path"] or True
    return value if value is None or isinstance(value, str) else True


def _attached(source: SourceConfig, kind: str, column: str, found: _Cell, folder: Path | None) -> list[Reference]:
    if found is None:
        return []
    if isinstance(found, list):
        return [_reference(source, kind, column, cell, item, folder) for item, cell in enumerate(found)]
    return [_reference(source, kind, column, found, None, folder)]


def _reference(
    source: SourceConfig, kind: str, column: str, cell: _Cell, item: int | None, folder: Path | None
) -> Reference:
    if isinstance(cell, list):
        raise UnusableRow(f"column {column!r} holds lists of lists; give each row one list")
    if not isinstance(cell, str):
        return Reference(type=kind, column=column, item=item)
    unpacked = datasets.config.EXTRACTED_DATASETS_PATH
    is_unpacked = source.kind == "hub" and cell.startswith(f"{unpacked}{os.sep}")
    return reference_to(kind, cell, Path(unpacked) if is_unpacked else folder)


def _folder_of(source: SourceConfig) -> Path | None:
    """Where the files lie that rows of a source of kind hub name: its own folder, or that of its cache."""
    if source.kind != "hub" or os.path.isdir(source.path):
        return Path(source.path) if source.kind == "hub" else None
    return Path(HF_HUB_CACHE, repo_folder_name(repo_id=source.path, repo_type="dataset"))


# ----------------------------------------------------------------------------------------------------------- digests


def _usable(source: SourceConfig, rows: Dataset, workers: int, bad_rows: BadRows) -> Dataset:
    """The rows that have messages, and whose media are there, with their digests."""
    found = (
        rows.with_format("arrow")
        .map(
            _digest_batch,
            batched=True,
            batch_size=100,
            remove_columns=rows.column_names,
            features=Features({"digest": Value("binary"), "problem": Value("string")}),
            num_proc=min(workers, len(rows)) if workers > 1 else None,
            keep_in_memory=True,
            load_from_cache_file=False,
            new_fingerprint="digests",
            desc=f"reading {source.label}",
        )[:]
        .to_pydict()
    )
    for where, problem in zip(rows["where"], found["problem"], strict=True):
        if problem:
            bad_rows.add(source.label, where, problem)
    _report_repeated(source, rows["where"], found["digest"])
    rows = rows.add_column("digest", found["digest"])
    return rows.select([number for number, digest in enumerate(found["digest"]) if digest])


def _report_repeated(source: SourceConfig, places: Iterable[str], digests: Iterable[bytes]) -> None:
    """Says how many rows are others again, as those of a file and its copy are."""
    seen: dict[bytes, str] = {}
    again = [
        (where, first)
        for where, mark in zip(places, digests, strict=True)
        if mark and (first := seen.setdefault(mark, where)) != where
    ]
    if again:
        logger.warning(
            "%s: %d rows have the text and the media of a row before them, the first of them %s, as %s; all are used",
            *(source.label, len(again), *again[0]),
        )


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
