"""Folders of media, with metadata or without."""

import logging
import os
from pathlib import Path

from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from model import MODALITIES

from ..configuration import SourceConfig
from .media_columns import needed_columns
from .references import is_within
from .tables import READERS, RowsInFolders

logger = logging.getLogger(__name__)

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_SUFFIXES = {"imagefolder": set(ImageFolder.EXTENSIONS), "audiofolder": set(AudioFolder.EXTENSIONS)}


def read_folder(source: SourceConfig) -> RowsInFolders:
    """The rows of the metadata files in a folder and those below, or, where there are none, each file with the name of
    its folder as `label`.
    """
    folder = Path(source.path)
    if not folder.is_dir():
        raise ValueError(f"source {source.label!r}: {source.path!r} is no folder; correct the path")
    if metadata := sorted(path for name in _METADATA for path in folder.rglob(name)):
        yield from _read_metadata(source, folder, metadata)
        return
    suffixes = _SUFFIXES.get(source.kind) or {
        suffix for kind in source.media_columns.values() for suffix in MODALITIES[kind].file_suffixes
    }
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    _check_without_metadata(source, folder, files, suffixes)
    for path in files:
        yield str(path), {"file_name": str(path.relative_to(folder)), "label": path.parent.name}, None, folder


def _read_metadata(source: SourceConfig, folder: Path, metadata: list[Path]) -> RowsInFolders:
    """The rows of metadata. A file may be named in several rows of one file of metadata, and in no second one."""
    first: dict[str, tuple[Path, str]] = {}
    again: list[tuple[str, str]] = []
    for path in metadata:
        if not (path.is_file() and is_within(str(path), str(folder))):
            raise ValueError(f"source {source.label!r}: {str(path)!r} is no regular file of the folder; replace it")
        for where, row, reason in READERS[path.suffix](path, tuple(needed_columns(source))):
            cells = [row.get(column) for column in source.media_columns]
            names = (name for cell in cells for name in (cell if isinstance(cell, list) else [cell]))
            for name in (name for name in names if isinstance(name, str)):
                found = os.path.normpath(os.path.join(path.parent, name))
                other, place = first.setdefault(found, (path, where))
                if other != path:
                    raise ValueError(
                        f"source {source.label!r}: {str(other)!r} and {str(path)!r} both name {found!r}, which would "
                        "be learned twice as often; remove one of them, or leave each file in one"
                    )
                again += [(where, place)] * (place != where)
            yield where, row, reason, path.parent
    if again:  # as several captions of one image do
        logger.warning(
            "%s: %d rows name a file that a row before them names too, the first of them %s, as %s; all are used",
            *(source.label, len(again), *again[0]),
        )


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
