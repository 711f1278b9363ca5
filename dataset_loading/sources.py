"""Sources to rows: every kind becomes a `datasets.Dataset` of checked rows, with column text, or prompt and answer."""

import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Value

from .configuration import DataConfig, SourceConfig
from .synthetic import Role, generate_rows, get_task
from .validation import BadRows, reason_against

_CHECKED_AT_ONCE = 1000


def columns_of(source: SourceConfig) -> dict[str, str]:
    """The columns that the source's rows must have, and the names they get here."""
    if source.prompt_column is not None:
        return {source.prompt_column: "prompt", source.answer_column: "answer"}
    return {"prompt": "prompt", "answer": "answer"} if source.kind == "generated" else {source.text_column: "text"}


def load_rows(
    source: SourceConfig, role: Role, config: DataConfig, seed: int, bad_rows: BadRows, limit: int | None = None
) -> Dataset:
    """All usable rows of a source that is not streaming: column text, or prompt, answer and (generated) difficulty.

    Args:
        role: what a generated source is drawn for, where it names no role itself.
        limit: the most rows of a hub or generated source to load.

    Raises:
        ValueError: missing file, unknown task or column, nothing usable, or too many bad rows.
    """
    if source.kind == "generated":
        num_rows = source.num_rows if limit is None else min(source.num_rows, limit)
        task = get_task(source.task)
        difficulty = tuple(source.difficulty or task.default_difficulty)
        role, seeds = source.role or role, (seed, source.seed)
        return generate_rows(task, difficulty, role, seeds, num_rows, config.preprocessing_workers)
    rows = _read_files(source, bad_rows) if source.kind == "files" else _read_hub(source, bad_rows, limit)
    if len(rows) == 0:
        skipped = bad_rows.counts.get(source.label, 0)
        raise ValueError(f"source {source.label!r} has no usable rows ({skipped} bad ones); check its path and columns")
    return rows


def open_stream(source: SourceConfig) -> datasets.IterableDataset:
    """The raw rows of a streaming hub source.

    Raises:
        ValueError: it cannot be opened, or lacks a column.
    """
    stream = _load_hub(source)
    _check_columns(source, stream.column_names or list(next(iter(stream), {})))  # not every format names them in front
    return stream


def expand_paths(source: SourceConfig) -> list[Path]:
    """The files that `source.paths` names, patterns expanded, each once, in the order of the config, then of the names.

    Raises:
        ValueError: a path or pattern names no file, or a file of an unknown format.
    """
    found: dict[Path, None] = {}
    for path in source.paths:
        matches = _matches(Path(path))
        if os.path.isdir(path):
            raise ValueError(
                f"source {source.label!r}: {path!r} is a folder; name its files, e.g. {os.path.join(path, '*.txt')!r}"
            )
        if not matches:
            raise ValueError(f"source {source.label!r}: no file {path!r} (from {os.getcwd()}); correct the path")
        found |= dict.fromkeys(matches)
    for path in found:
        if path.suffix not in _READERS:
            raise ValueError(
                f"source {source.label!r}: format of {str(path)!r} is unknown; use one of {', '.join(_READERS)}"
            )
    return list(found)


def _matches(path: Path) -> list[Path]:
    """The files of a path or pattern. What exists is taken by its name, even if that has brackets or stars in it."""
    if path.is_file():
        return [path]
    folder = next((parent for parent in path.parents if parent.is_dir()), Path())
    names = glob.glob(str(path.relative_to(folder)), root_dir=folder, recursive=True)
    return sorted(match for name in names if (match := folder / name).is_file())


def _read_files(source: SourceConfig, bad_rows: BadRows) -> Dataset:
    columns = columns_of(source)
    kept: dict[str, list[str]] = {name: [] for name in columns.values()}
    for path in expand_paths(source):
        for where, row, reason in _READERS[path.suffix](path, tuple(columns)):
            reason = reason or reason_against(row, tuple(columns))
            if reason is not None:
                bad_rows.add(source.label, where, reason)
                continue
            for column, name in columns.items():
                kept[name].append(row[column])
    return Dataset.from_dict(kept, features=Features(dict.fromkeys(kept, Value("large_string"))))


# A reader yields (where, row, None), or (where, {}, reason) for what cannot be read as a row.
_Rows = Iterator[tuple[str, dict[str, object], str | None]]


def _decode(raw: bytes) -> tuple[str, str | None]:
    try:
        return raw.decode("utf-8"), None
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 (byte 0x{raw[error.start]:02x} at position {error.start})"


def _read_txt(path: Path, columns: tuple[str, ...]) -> _Rows:
    """The whole file is one row; its bytes are kept as they are, line ends included."""
    if len(columns) != 1:
        raise ValueError(
            f"{str(path)!r} is plain text and has no columns {', '.join(columns)}; use .jsonl or .parquet for answers"
        )
    text, reason = _decode(path.read_bytes())
    yield f"{path} row 1", {columns[0]: text}, reason


def _read_jsonl(path: Path, columns: tuple[str, ...]) -> _Rows:
    """One row a line, read one by one so that a damaged line costs itself only; blank lines are no rows."""
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if not raw.strip():
                continue
            where, (line, reason) = f"{path} line {number}", _decode(raw.rstrip(b"\r\n"))
            row: object = {}
            if reason is None:
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    reason = f"not JSON ({error.msg} at column {error.colno})"
                except ValueError:  # of int(), which reads 4300 digits at most
                    reason = "not usable JSON (a number with too many digits)"
                except RecursionError:
                    reason = "not usable JSON (nested too deeply)"
            if reason is None and not isinstance(row, dict):
                reason = f"not a JSON object but {type(row).__name__}"
            yield where, row if reason is None else {}, reason


def _read_parquet(path: Path, columns: tuple[str, ...]) -> _Rows:
    """One row a table row; strings are decoded here, so that one that is not UTF-8 costs its row only."""
    try:
        table = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{str(path)!r} is not a parquet file: {error}; correct the path or write it again") from error
    missing = [column for column in columns if column not in table.schema_arrow.names]
    if missing:
        raise ValueError(
            f"{str(path)!r} has no column {missing[0]!r}, only {', '.join(table.schema_arrow.names)}; correct it"
        )
    number = 0
    for batch in _batches_of(table, path, columns):
        arrays = [_binary_if_text(batch.column(column)).to_pylist() for column in columns]
        for values in zip(*arrays, strict=True):
            number += 1
            row, reason = {}, None
            for column, value in zip(columns, values, strict=True):
                if isinstance(value, bytes):
                    value, problem = _decode(value)
                    reason = reason or (problem and f"column {column!r} is {problem}")
                row[column] = value
            yield f"{path} row {number}", row, reason


def _binary_if_text(array: pa.Array) -> pa.Array:
    is_text = pa.types.is_string(array.type) or pa.types.is_large_string(array.type)
    return array.cast(pa.large_binary()) if is_text else array


def _batches_of(table: pq.ParquetFile, path: Path, columns: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    try:
        yield from table.iter_batches(batch_size=_CHECKED_AT_ONCE, columns=list(columns))
    except OSError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}; write it again") from error


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _load_hub(source: SourceConfig) -> Dataset | datasets.IterableDataset:
    try:
        return datasets.load_dataset(
            source.path, name=source.config_name, split=source.split, streaming=source.streaming
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"source {source.label!r}: {source.path!r} cannot be loaded: {reason}") from error


def _check_columns(source: SourceConfig, found: list[str]) -> None:
    for column in columns_of(source):
        if column not in found:
            there = ", ".join(found) or "none"
            raise ValueError(f"source {source.label!r} has no column {column!r}, only {there}; correct it")


def _read_hub(source: SourceConfig, bad_rows: BadRows, limit: int | None) -> Dataset:
    rows, columns = _load_hub(source), columns_of(source)
    _check_columns(source, rows.column_names)
    rows = rows.select_columns(list(columns)).rename_columns(columns)
    rows = rows if limit is None else rows.take(min(limit, len(rows)))
    kept = []
    for start in range(0, len(rows), _CHECKED_AT_ONCE):
        batch = rows[start : start + _CHECKED_AT_ONCE]
        for offset in range(len(batch[rows.column_names[0]])):
            reason = reason_against({name: batch[name][offset] for name in rows.column_names}, rows.column_names)
            if reason is None:
                kept.append(start + offset)
            else:
                bad_rows.add(source.label, f"row {start + offset + 1}", reason)
    return rows if len(kept) == len(rows) else rows.select(kept)
