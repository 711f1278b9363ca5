"""Tar shards: members that share a name make a row."""

import json
import tarfile
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO

from model.terminal import one_line

from ..configuration import SourceConfig
from .references import Reference
from .tables import RowsInFolders
from .texts import MAX_ROW_BYTES, decode_text


def read_tar(source: SourceConfig, path: Path) -> RowsInFolders:
    """One row for the members of a tar that share what stands before the first dot of their names: a column for each,
    named by what stands behind it. Media are references into the tar, text is read, keys of a JSON object are columns.
    """
    for key, members in groupby(_members(source, path), itemgetter(0)):
        row, reason = {"__key__": key}, None
        for _, found, problem in members:
            twice = next((column for column in found if column in row), None)
            problem = problem or (twice and f"column {twice!r} is there twice")
            row, reason = row | found, reason or problem
        yield f"{path} {key}", row, reason, None


def _members(source: SourceConfig, path: Path) -> Iterator[tuple[str, dict[str, object], str | None]]:
    """The key of each member of a tar, the columns that it gives, and the reason against its row."""
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
                yield folder + slash + stem, *_columns_of(tar, entry, extension, source, path)
                tar.members.clear()  # or it would keep the headers of all, which are more than a worker can hold
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{str(path)!r} is not a whole, uncompressed tar: {one_line(error)}; write it again"
        ) from error


def _columns_of(
    tar: tarfile.TarFile, entry: tarfile.TarInfo, extension: str, source: SourceConfig, path: Path
) -> tuple[dict[str, object], str | None]:
    if not entry.isfile() or entry.issparse():  # so that its bytes are not those in the tar
        return {}, f"member {extension!r} is a link or sparse, and only plain members are read; write it anew"
    if kind := source.media_columns.get(extension):
        return {extension: Reference(type=kind, path=str(path), offset=entry.offset_data, size=entry.size)}, None
    if extension.rpartition(".")[2] not in ("txt", "text", "json", "cls", "caption", "transcript"):
        return {}, None
    if entry.size > MAX_ROW_BYTES:
        return {}, f"member {extension!r} has {entry.size} bytes, and of text at most {MAX_ROW_BYTES} are read"
    content = tar.extractfile(entry).read()
    try:
        text = decode_text(content)
        value = json.loads(text) if extension.endswith("json") else text
    except (ValueError, RecursionError) as error:
        return {}, f"member {extension!r} cannot be read: {error}"
    return value if isinstance(value, dict) else {extension: value}, None


class _BoundedReads:
    """A file of which no header makes anybody read very much at once."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= 2 * MAX_ROW_BYTES:
            raise tarfile.ReadError(f"a header asks for {size} bytes")
        return self._file.read(size)
