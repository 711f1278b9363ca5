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
    """The files that metadata name. A file may occur in several rows of one metadata file, and in no second one."""

    def __init__(self, source: SourceConfig):
        self.source = source
        self.first: dict[str, tuple[Path, str]] = {}
        self.again: list[tuple[str, str]] = []

    def add(self, metadata: Path, where: str, row: dict[str, object]) -> None:
        """Take a row.

        Raises:
            ValueError: Another file of metadata names one of its media too.
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
        """Log how many rows name what another one of the same file names, as several captions of one image do."""
        if self.again:
            logger.warning(
                "%s: %d rows name a file that a row before them names too, the first of them %s, as %s; all are used",
                *(self.source.label, len(self.again), *self.again[0]),
            )
