"""Tar shards: members that share a name make a row."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from model.terminal import one_line

from ..configuration import SourceConfig
from .references import Reference
from .tables import (
    RowsInFolders,
)
from .texts import MAX_ROW_BYTES, decode_text


def read_tar(source: SourceConfig, path: Path) -> RowsInFolders:
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
