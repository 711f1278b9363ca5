"""Files by name and format, and datasets of the hub, as they are: nothing is checked but that they can be read."""

import codecs
import csv
import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset

from model.terminal import one_line

from ..bad_rows import KEPT_COLUMNS
from ..configuration import SourceConfig
from .references import in_other_form, is_within
from .texts import (
    MAX_ROW_BYTES,
    MAX_TEXT_FILE_BYTES,
    NoListError,
    bounded_lines,
    check_utf8,
    decode_text,
    list_items,
    lists_in_object,
    open_bytes,
    open_text,
    too_long,
)

MAX_CHUNK_BYTES = 2**28
"""Most bytes of a column of a row group, unless it is compressed within reason."""
MAX_RATIO = 50
"""How many times smaller a larger column may have been in its file."""
PARQUET_ERRORS = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError),
    *(pa.ArrowException, datasets.exceptions.DatasetsError),
)
"""What pyarrow and datasets raise of damaged files, and of what they say about their columns."""
CHECKED_AT_ONCE = 1000
"""Rows of a table that are in memory at the same time."""
_SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` writes, and no builder reads
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_MOST_OF_RANGE = 100_000
_HEAD_CHARACTERS = 4096
_BLANK = codecs.BOM_UTF8 + b" \t\r\n\f\v"
# A reader yields (where, row, None), or (where, {}, reason) for what cannot be read as a row.
Rows = Iterator[tuple[str, dict[str, object], str | None]]
_TEXT_FORMATS = (".txt", ".jsonl", ".json", ".csv", ".tsv")
# A row with where it is, the reason against it, and the folder that its names of files are relative to, if any are.
RowsInFolders = Iterator[tuple[str, dict[str, object], str | None, Path | None]]


def expand_paths(source: SourceConfig) -> list[Path]:
    """The files that `source.paths` names, patterns and braces such as `{000..009}` expanded, each once, whatever names
    it has, in the order of the config, then of the names.

    Raises:
        ValueError: A path or pattern names no file, or a file of an unknown format.
    """
    found: dict[Path, Path] = {}
    for path in (name for given in source.paths for name in _expand_braces(given)):
        matches = _matches(Path(path))
        if os.path.isdir(path):
            raise ValueError(
                f"source {source.label!r}: {path!r} is a folder; name its files, e.g. {os.path.join(path, '*.txt')!r}"
            )
        if not matches:
            raise ValueError(f"source {source.label!r}: no file {path!r} (from {os.getcwd()}); correct the path")
        for match in matches:
            found.setdefault(match.resolve(), match)
    known = FORMATS[source.kind]
    for path in found.values():
        if format_of(path) not in known or (path.suffix == ".gz" and format_of(path) not in _UNPACKED):
            raise ValueError(
                f"source {source.label!r}: format of {str(path)!r} is unknown; use one of {', '.join(known)}"
            )
    return list(found.values())


def format_of(path: Path) -> str:
    """The ending that says the format of a file, by which `READERS` has its reader; of one of gzip that in front."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _expand_braces(path: str) -> list[str]:
    """The names that a range of numbers, or a list of parts, in braces stands for, as WebDataset writes them; what
    exists is taken by its name.
    """
    found = _BRACES.search(path)
    if found is None or os.path.exists(path):
        return [path]
    if found[3] is not None:
        parts = found[3].split(",")
    else:
        first, last = int(found[1]), int(found[2])
        if not 0 <= last - first < _MOST_OF_RANGE:
            raise ValueError(
                f"the range {found[0]} of {path!r} has {last - first + 1} files; give the smaller number first, and "
                f"at most {_MOST_OF_RANGE} files"
            )
        parts = [f"{number:0{len(found[1])}}" for number in range(first, last + 1)]
    names = (f"{path[: found.start()]}{part}{path[found.end() :]}" for part in parts)
    return [name for expanded in names for name in _expand_braces(expanded)]


def read_rows(path: Path, columns: tuple[str, ...]) -> "Rows":
    """The rows of a file of any format in `READERS`.

    Args:
        columns: Columns that its rows must have.

    Raises:
        ValueError: The file cannot be read, or a table has no such column.
    """
    try:
        yield from READERS[format_of(path)](path, columns)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{str(path)!r} is no whole file of gzip: {one_line(error)}; write it again") from error


def _matches(path: Path) -> list[Path]:
    """The files of a path or pattern. What exists is taken by its name, even if that has brackets or stars in it, or
    another Unicode form.
    """
    if path.is_file():
        return [path]
    if other := in_other_form("", str(path)):
        return [Path(other)]
    folder = next((parent for parent in path.parents if parent.is_dir()), Path())
    names = glob.glob(str(path.relative_to(folder)), root_dir=folder, recursive=True)
    return sorted(match for name in names if (match := folder / name).is_file())


def _decode(raw: bytes, most: int = MAX_ROW_BYTES) -> tuple[str, str | None]:
    if len(raw) > most:
        return "", too_long(most)
    try:
        return decode_text(raw), None
    except ValueError as error:
        return "", str(error)


def _read_txt(path: Path, columns: tuple[str, ...]) -> Rows:
    """The whole file is one row; its bytes are kept as they are, line ends included, but for a byte-order mark."""
    if len(columns) != 1:
        raise ValueError(
            f"{str(path)!r} is plain text and has no columns {', '.join(columns)}; use .jsonl, .csv or .parquet "
            "for answers"
        )
    is_read = path.stat().st_size <= MAX_TEXT_FILE_BYTES
    with open_bytes(path) as file:
        raw = file.read(MAX_TEXT_FILE_BYTES + 1) if is_read else b""
    text, reason = _decode(raw, MAX_TEXT_FILE_BYTES) if is_read else ("", too_long(MAX_TEXT_FILE_BYTES))
    yield f"{path} row 1", {columns[0]: text}, reason


def _read_jsonl(path: Path, columns: tuple[str, ...]) -> Rows:
    """One row a line, read one by one so that a damaged line costs itself only; blank lines are no rows."""
    check_utf8(path, whole=False)
    is_checked = False
    with open_bytes(path) as lines:
        for number, raw in enumerate(bounded_lines(lines), start=1):
            if not raw.strip(_BLANK):
                continue
            where, (line, reason) = f"{path} line {number}", _decode(raw.rstrip(b"\r\n"))
            if reason is not None and not is_checked:
                check_utf8(path)
                is_checked = True
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


def _read_parquet(path: Path, columns: tuple[str, ...]) -> Rows:
    """One row a table row; strings are decoded here, so that one that is not UTF-8 costs its row only."""
    table = open_parquet(path)
    missing = [column for column in columns if column not in table.schema_arrow.names]
    if missing:
        raise ValueError(
            f"{str(path)!r} has no column {missing[0]!r}, only {', '.join(table.schema_arrow.names)}; correct it"
        )
    number, wanted = 0, dict.fromkeys(columns)
    columns = (*columns, *(name for name in table.schema_arrow.names if name in KEPT_COLUMNS and name not in wanted))
    for arrays in _values_of(table, path, columns):
        for values in zip(*arrays, strict=True):
            number += 1
            row, reason = {}, None
            for column, value in zip(columns, values, strict=True):
                if isinstance(value, bytes):
                    value, problem = _decode(value)
                    reason = reason or (problem and f"column {column!r} is {problem}")
                elif isinstance(value, Exception):
                    value, reason = None, reason or f"column {column!r} is damaged: {one_line(value)}"
                row[column] = value
            yield f"{path} row {number}", row, reason


def open_parquet(path: Path) -> pq.ParquetFile:
    """A table whose columns of text come as the different texts and their numbers: one that stands in all rows would
    fill the memory otherwise. Raises ValueError for what is none, or would fill the memory all the same.
    """
    try:
        table = pq.ParquetFile(path)
        names = [table.schema.column(number).path for number in range(len(table.schema))]
        table = pq.ParquetFile(path, read_dictionary=names)
    except PARQUET_ERRORS as error:
        reason = one_line(error)
        raise ValueError(
            f"{str(path)!r} is not a parquet file: {reason}; correct the path or write it again"
        ) from error
    for group in range(table.metadata.num_row_groups):
        for number in range(table.metadata.num_columns):
            chunk = table.metadata.row_group(group).column(number)
            before, after = chunk.total_compressed_size, chunk.total_uncompressed_size
            if after > MAX_CHUNK_BYTES and after > MAX_RATIO * before:
                raise ValueError(
                    f"{str(path)!r} has {after} bytes of column {chunk.path_in_schema!r} in {before}; write it anew, "
                    "in smaller row groups"
                )
    return table


def _plain_values(array: pa.Array) -> Iterator[object]:
    """The values of a column, texts as bytes; where one is not UTF-8 deep inside, or damaged, the error instead."""
    if pa.types.is_dictionary(array.type):
        texts, indices = array.dictionary, array.indices
        size = pc.sum(pc.take(pc.binary_length(texts), indices)).as_py() or 0
        if size <= MAX_ROW_BYTES:  # and not one long text, a thousand times
            return iter(pc.take(texts, indices).cast(pa.large_binary()).to_pylist())
        array = pa.DictionaryArray.from_arrays(indices, texts.cast(pa.large_binary()))
    return map(_value_or_error, array)


def _value_or_error(scalar: pa.Scalar) -> object:
    try:
        return scalar.as_py()
    except (UnicodeDecodeError, pa.ArrowException) as error:
        return error


def _values_of(table: pq.ParquetFile, path: Path, columns: tuple[str, ...]) -> Iterator[list[Iterator[object]]]:
    """The values of the columns, for some rows after others."""
    try:
        for batch in table.iter_batches(batch_size=CHECKED_AT_ONCE, columns=list(columns)):
            yield [_plain_values(batch.column(column)) for column in columns]
    except PARQUET_ERRORS as error:
        raise ValueError(f"{str(path)!r} is damaged: {one_line(error)}; write it again") from error


def read_csv(path: Path, columns: tuple[str, ...], names: Sequence[str] | None = None, **dialect: Any) -> Rows:
    """One row a line, all values text; the first line names the columns, if `names` do not.

    Args:
        dialect: Arguments of `csv.reader`.
    """
    check_utf8(path)
    with open_text(path, errors="surrogateescape", newline="") as lines:
        reader = csv.DictReader(map(_checked_line, bounded_lines(lines)), names, **dialect)
        try:
            for row in reader:
                reason = "more values than there are columns" if None in row else None
                yield f"{path} line {reader.line_num}", row if reason is None else {}, reason
        except csv.Error as error:
            raise ValueError(f"{str(path)!r} is damaged at line {reader.line_num}: {error}; write it again") from error


def _checked_line(line: str) -> str:
    if len(line) > MAX_ROW_BYTES:
        raise csv.Error(f"longer than {MAX_ROW_BYTES} characters")
    return line


def _read_json(path: Path, columns: tuple[str, ...]) -> Rows:
    """One row an item of the list that the file is, or a caption of COCO; raises ValueError for a file that is none."""
    check_utf8(path, whole=False)
    try:
        for number, row in enumerate(_coco_captions(path) or list_items(path), start=1):
            reason = None if isinstance(row, dict) else f"not a JSON object but {type(row).__name__}"
            yield f"{path} item {number}", row if reason is None else {}, reason
    except NoListError as error:
        raise ValueError(
            f"{str(path)!r} {error}; write a list of objects, images and annotations as COCO has them, or .jsonl"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not usable JSON: {error}; repair it or write .jsonl") from error


def _coco_captions(path: Path) -> Iterator[object] | None:
    """The annotations of a file of COCO, each with the columns of its image; None: it is no such file."""
    with open_text(path) as file:
        if not file.read(_HEAD_CHARACTERS).lstrip().startswith("{"):
            return None
    images: dict[object, dict] = {}
    keys = set()
    for key, item in lists_in_object(path):
        keys.add(key)
        if key == "images" and isinstance(item, dict) and isinstance(item.get("id"), (int, str)):
            images[item["id"]] = item
    if not {"images", "annotations"} <= keys:
        return None
    annotations = (item for key, item in lists_in_object(path) if key == "annotations")
    return (_with_image(item, images) for item in annotations)


def _with_image(annotation: object, images: Mapping[object, dict]) -> object:
    """An annotation behind the columns of its image; without them where the file has no such image."""
    number = annotation.get("image_id") if isinstance(annotation, dict) else None
    return images.get(number, {}) | annotation if isinstance(number, (int, str)) else annotation


READERS = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".json": _read_json,
}
FORMATS = {
    "files": (".txt", ".jsonl", ".parquet", ".json", ".csv", ".tsv"),
    "chat": (".json", ".jsonl", ".parquet"),
    "webdataset": (".tar",),
}
"""Formats of files, by the kinds of source that have `paths`."""
_UNPACKED = (".txt", ".jsonl", ".json", ".csv", ".tsv")  # those that may be files of gzip


def load_hub(source: SourceConfig) -> Dataset | datasets.IterableDataset:
    try:
        if any(os.path.isfile(os.path.join(source.path, name)) for name in _SAVED):
            return _load_saved(source)
        builder = datasets.load_dataset_builder(source.path, name=source.config_name)
        names = [name.rpartition("::")[2] for it in (builder.config.data_files or {}).values() for name in it]
        if others := [name for name in names if not _is_own_file(source, name)]:
            raise ValueError(f"its file {others[0]!r} is no regular file inside of it; put it there")
        return datasets.load_dataset(
            source.path, name=source.config_name, split=source.split, streaming=source.streaming
        )
    except (StopIteration, *PARQUET_ERRORS) as error:  # of what has no rows at all, `datasets` takes the first one
        reason = (
            "it is empty" if isinstance(error, StopIteration) else one_line(f"{error} {error.__cause__ or ''}")[:500]
        )
        for path in sorted(it for it in Path(source.path).rglob("*") if it.suffix in _TEXT_FORMATS and it.is_file()):
            check_utf8(path)
        raise ValueError(f"source {source.label!r}: {source.path!r} cannot be loaded: {reason}") from error


def _load_saved(source: SourceConfig) -> Dataset | datasets.IterableDataset:
    """A dataset that `save_to_disk` has written, alone or as one of several splits."""
    saved = datasets.load_from_disk(source.path)
    splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
    if source.split not in splits and not (splits is not saved and source.split == "train"):
        raise ValueError(
            f"it has no split {source.split!r}, only {', '.join(splits)}, which are read whole; choose one"
        )
    rows = splits.get(source.split, next(iter(splits.values())))
    if others := [file["filename"] for file in rows.cache_files if not _is_own_file(source, file["filename"])]:
        raise ValueError(f"its file {others[0]!r} is no regular file inside of it; put it there")
    return rows.to_iterable_dataset() if source.streaming else rows


def _is_own_file(source: SourceConfig, name: str) -> bool:
    """A dataset says itself where its files are, which might be anywhere on this machine or elsewhere."""
    if os.path.isdir(source.path):
        return is_within(name, source.path) and os.path.isfile(name)
    return name.startswith("hf://")


def check_columns(source: SourceConfig, needed: Iterable[str], found: Sequence[str]) -> None:
    """Raises ValueError for a table that lacks a column."""
    if missing := [column for column in needed if column not in found]:
        there = ", ".join(found) or "none"
        raise ValueError(f"source {source.label!r} has no column {missing[0]!r}, only {there}; correct it")


def map_in_memory(
    rows: Dataset,
    function: Callable[..., Mapping[str, list]],
    features: datasets.Features,
    workers: int,
    purpose: str,
    batch_size: int = 100,
    **options: object,
) -> Dataset:
    """What a function makes of batches of rows, in `workers` processes; it stays in memory and leaves no files.

    Args:
        function: Takes a batch and the `options`, and gives the columns of `features`, a value for each row.
        purpose: Text that is shown with the progress.
    """
    return rows.map(
        function,
        batched=True,
        batch_size=batch_size,
        fn_kwargs=options,
        remove_columns=rows.column_names,
        features=features,
        num_proc=min(workers, len(rows)) if workers > 1 else None,
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint=f"{zlib.crc32(purpose.encode()):08x}",
        desc=purpose,
    )


def columns_of_stream(stream: datasets.IterableDataset) -> list[str]:
    """The columns of a stream, of its first row where its format does not name them in front."""
    return stream.column_names or list(next(iter(stream), {}))
