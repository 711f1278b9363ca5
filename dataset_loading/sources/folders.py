"""Folders of media, with metadata or without, and those in the shapes of LJSpeech and LibriSpeech."""

import csv
import logging
import os
from collections.abc import Callable
from pathlib import Path

from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from model import MODALITIES

from ..configuration import SourceConfig
from .media_columns import needed_columns
from .references import is_within
from .tables import READERS, Rows, RowsInFolders, read_csv
from .texts import MAX_ROW_BYTES, bounded_lines, check_utf8, decode_text, open_text, too_long

logger = logging.getLogger(__name__)

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_TRANSCRIPTS = "*.trans.txt"
_SUFFIXES = {"imagefolder": set(ImageFolder.EXTENSIONS), "audiofolder": set(AudioFolder.EXTENSIONS)}


def read_folder(source: SourceConfig) -> RowsInFolders:
    """The rows of the metadata files or transcripts in a folder and those below, or, where there are none, each file
    with the name of its folder as `label`, and the text in the file of its name that ends in .txt as `text`.
    """
    folder = Path(source.path)
    if not folder.is_dir():
        raise ValueError(f"source {source.label!r}: {source.path!r} is no folder; correct the path")
    if metadata := sorted(path for name in (*_METADATA, _TRANSCRIPTS) for path in folder.rglob(name)):
        yield from _read_metadata(source, folder, metadata)
        return
    suffixes = _SUFFIXES.get(source.kind) or {
        suffix for kind in source.media_columns.values() for suffix in MODALITIES[kind].file_suffixes
    }
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    rows = [_row_of_file(path, folder) for path in files]
    _check_without_metadata(source, folder, [row for row, _ in rows], suffixes)
    for path, (row, reason) in zip(files, rows, strict=True):
        is_needed = "text" in needed_columns(source)
        yield str(path), row, reason if is_needed else None, folder


def _row_of_file(path: Path, folder: Path) -> tuple[dict[str, object], str | None]:
    """The row of a file without metadata, and the reason against its text."""
    row: dict[str, object] = {"file_name": str(path.relative_to(folder)), "label": path.parent.name}
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        return row, f"no file {str(beside)!r} with its text; write it"
    if not is_within(str(beside), str(folder)):
        return row, f"{str(beside)!r} leads out of the folder {str(folder)!r}; move the file into it"
    if beside.stat().st_size > MAX_ROW_BYTES:
        return row, f"{str(beside)!r} is {too_long(MAX_ROW_BYTES)}"
    try:
        return row | {"text": decode_text(beside.read_bytes()).strip()}, None
    except ValueError as error:
        return row | {"text": ""}, f"{str(beside)!r} is {error}"


def _metadata_reader(path: Path) -> Callable[[Path, tuple[str, ...]], Rows]:
    """The reader of a file of metadata, of those called metadata.csv by whether a bar or a comma parts its columns."""
    if path.suffix == ".txt":
        return _read_transcripts
    if path.suffix == ".csv":
        check_utf8(path, whole=False)
        with open_text(path, errors="surrogateescape") as lines:
            first = next(bounded_lines(lines), "")
        if "|" in first and "file_name" not in first and (path.parent / "wavs").is_dir():
            return _read_ljspeech
    return READERS[path.suffix]


def _read_ljspeech(path: Path, columns: tuple[str, ...]) -> Rows:
    """The lines `ID|text|text in words` as columns transcription and text; the file is wavs/ID.wav."""
    names = ("id", "transcription", "text")
    for where, row, reason in read_csv(path, columns, names=names, delimiter="|", quoting=csv.QUOTE_NONE):
        if reason is None:
            row["file_name"] = os.path.join("wavs", f"{row['id']}.wav")
            row["text"] = row["text"] or row["transcription"]
        yield where, row, reason


def _read_transcripts(path: Path, columns: tuple[str, ...]) -> Rows:
    """The lines `ID TEXT` of LibriSpeech; the file is ID.flac or, converted, ID.wav, .mp3, .ogg or .opus."""
    check_utf8(path)
    with open_text(path, errors="surrogateescape") as lines:
        for number, line in enumerate(bounded_lines(lines), start=1):
            name, _, text = line.strip().partition(" ")
            reason = too_long(MAX_ROW_BYTES) if len(line) > MAX_ROW_BYTES else None
            if name:
                files = [f"{name}{suffix}" for suffix in (".flac", ".wav", ".mp3", ".ogg", ".opus")]
                file = next((file for file in files if (path.parent / file).is_file()), files[0])
                yield f"{path} line {number}", {"file_name": file, "text": text}, reason


def _read_metadata(source: SourceConfig, folder: Path, metadata: list[Path]) -> RowsInFolders:
    """The rows of metadata. A file may be named in several rows of one file of metadata, and in no second one."""
    first: dict[str, tuple[Path, str]] = {}
    again: list[tuple[str, str]] = []
    for path in metadata:
        if not (path.is_file() and is_within(str(path), str(folder))):
            raise ValueError(f"source {source.label!r}: {str(path)!r} is no regular file of the folder; replace it")
        for where, row, reason in _metadata_reader(path)(path, tuple(needed_columns(source))):
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


def _check_without_metadata(
    source: SourceConfig, folder: Path, rows: list[dict[str, object]], suffixes: set[str]
) -> None:
    """What would be the same reason against each row is said once."""
    there = {"file_name", "label"}.union(*rows)
    missing = [column for column in needed_columns(source) if column not in there]
    if rows and not missing:
        return
    tables = [
        path for path in folder.rglob("*") if path.suffix.lower() in (".jsonl", ".json", ".csv", ".tsv", ".parquet")
    ]
    near = f", though {str(min(tables).relative_to(folder))!r}, which is not read" if tables else ""
    names = f"{', '.join(_METADATA[:-1])} or {_METADATA[-1]}"
    if missing:
        raise ValueError(
            f"source {source.label!r}: {str(folder)!r} has no {names}{near}, so that its rows have "
            f"{' and '.join(sorted(there))} alone, and no column {missing[0]!r}; write metadata, or a file .txt beside "
            "each, or set answer_column: label"
        )
    raise ValueError(
        f"source {source.label!r}: {str(folder)!r} has no {names}{near}, and no file that is one of "
        f"{', '.join(sorted(suffixes))}; correct the path"
    )
