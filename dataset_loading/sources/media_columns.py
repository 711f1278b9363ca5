"""Columns of tables that hold media, or name files with them."""

import os
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name

from ..bad_rows import checked_columns
from ..configuration import SourceConfig
from .messages import template_columns
from .references import Reference, UnusableRow, reference_to

# What a cell holds: nothing, the name of a file, True for what is to be read there, and of a list a list of these.
Cell = str | bool | list | None


def needed_columns(source: SourceConfig) -> list[str]:
    """The columns that rows of a source must have."""
    if source.messages_column is not None:
        return [source.messages_column, *source.media_columns]
    columns = list(source.media_columns)
    for direction, prompt in source.directed_prompts:
        columns += template_columns(prompt)
        if "text" in direction.answered or ("text" in direction.given and prompt is None):
            columns.append(source.answer_column or source.text_column)
    return list(dict.fromkeys(columns))


def required_columns(source: SourceConfig) -> list[str]:
    """The needed columns of a table, without those that rows of its format may lack."""
    optional = source.defaults.keys() - source.media_columns.keys()
    return [column for column in needed_columns(source) if column not in optional]


def used_columns(source: SourceConfig) -> list[str]:
    """The columns that are read for a source, or by another pass over it."""
    return [*needed_columns(source), *filter(None, [source.rejected_column])]


def table_columns(source: SourceConfig, found: list[str]) -> list[str]:
    """The needed columns, and those that tell whether a row may be learned from by them."""
    checked = checked_columns(used_columns(source), source.messages_column is not None)
    needed = (column for column in needed_columns(source) if column in found)
    return list(dict.fromkeys([*needed, *sorted(checked.intersection(found))]))


def named_references(kind: str, column: str, row: dict[str, object], folder: Path | None) -> list[dict]:
    if column not in row:
        raise UnusableRow(f"no column {column!r} (has {', '.join(map(repr, row)) or 'none'})")
    values = row[column] if isinstance(row[column], list) else [row[column]]
    if values == [None]:
        return []
    return [value if isinstance(value, Reference) else reference_to(kind, value, folder) for value in values]


def plain_rows(batch: pa.Table) -> list[dict[str, object] | UnicodeDecodeError]:
    """The rows of a table; where one is not UTF-8, the error instead."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        parts = [batch.slice(number, 1) for number in range(len(batch))] if len(batch) > 1 else []
        return [row for part in parts for row in plain_rows(part)] or [error]


def checked_row(row: dict[str, object] | UnicodeDecodeError) -> dict[str, object]:
    if isinstance(row, UnicodeDecodeError):
        raise UnusableRow(f"a text is not UTF-8 ({row.reason} at position {row.start})")
    return row


def label_names(features: Mapping[str, object]) -> dict[str, list[str]]:
    return {column: feature.names for column, feature in features.items() if isinstance(feature, ClassLabel)}


def with_label_names(row: dict[str, object], names: dict[str, list[str]]) -> dict[str, object]:
    """Numbers of classes as their names; -1, which stands for none, as None."""
    numbers = {column: row[column] for column in names if column in row}
    named = {column: names[column][it] if it is not None and it >= 0 else None for column, it in numbers.items()}
    return {**row, **named}


def stored_cells(column: str, values: pa.ChunkedArray) -> list[Cell]:
    """What each row has; raises ValueError for a column of a type that holds no media. Bytes are not looked at."""
    if not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
        return _cells(column, values)
    cells = iter(_cells(column, pc.list_flatten(values)))
    return [list(islice(cells, length or 0)) for length in pc.list_value_length(values).to_pylist()]


def _cells(column: str, values: pa.ChunkedArray) -> list[Cell]:
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


def cell_of(value: object) -> Cell:
    """The same for a value of a row."""
    if isinstance(value, list):
        return [cell_of(item) for item in value]
    if isinstance(value, Mapping) and value.get("bytes") is None and isinstance(value.get("path"), str):
        return value["path"] or True
    return value if value is None or isinstance(value, str) else True


def attached_references(
    source: SourceConfig, kind: str, column: str, found: Cell, folder: Path | None
) -> list[Reference]:
    if found is None:
        return []
    references, unpacked = [], datasets.config.EXTRACTED_DATASETS_PATH
    for item, cell in enumerate(found) if isinstance(found, list) else [(None, found)]:
        if isinstance(cell, list):
            raise UnusableRow(f"column {column!r} holds lists of lists; give each row one list")
        if isinstance(cell, str):
            is_unpacked = source.kind == "hub" and cell.startswith(f"{unpacked}{os.sep}")
            references.append(reference_to(kind, cell, Path(unpacked) if is_unpacked else folder))
        else:
            references.append(Reference(type=kind, column=column, item=item))
    return references


def media_folder(source: SourceConfig, path: Path) -> Path:
    """The folder that the names in a file of rows are relative to."""
    if source.path is None:
        return path.parent / "clips" if source.format == "common_voice" else path.parent
    if not os.path.isdir(source.path):
        raise ValueError(f"source {source.label!r}: {source.path!r} is no folder; correct the path")
    return Path(source.path)


def folder_of(source: SourceConfig) -> Path | None:
    """Where the files lie that rows of a source of kind hub name: its own folder, or that of its cache."""
    if source.kind != "hub" or os.path.isdir(source.path):
        return Path(source.path) if source.kind == "hub" else None
    return Path(HF_HUB_CACHE, repo_folder_name(repo_id=source.path, repo_type="dataset"))
