"""Text piece by piece, so that what has no end costs no more memory than its beginning."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, AnyStr, TextIO

import pyarrow.parquet as pq

MAX_ROW_BYTES = 2**24
"""Most bytes of a line, of an item of a list, of a cell, and of a member of text: a row is read as a whole. As JSON the
worst of them becomes objects of 27 times its size."""
MAX_TEXT_FILE_BYTES = 2**30
"""Most bytes of a file of plain text, which is one document."""
MAX_CHUNK_BYTES = 2**28
"""Of a column of a row group: only one that is compressed well within reason may become larger."""
MAX_RATIO = 50
"""How much smaller such a column may have been in its file."""

_PIECE = 2**20


class NoListError(ValueError):
    """A file of JSON is something else than a list."""


def too_long(most: int) -> str:
    """The reason against what is longer."""
    return f"longer than {most} bytes, which are the most that are read at once; split it"


def bounded_lines(file: IO[AnyStr]) -> Iterator[AnyStr]:
    """The lines of a file. Of one that is longer than `MAX_ROW_BYTES` one byte more than those, and the rest of it is
    passed over.
    """
    while line := file.readline(MAX_ROW_BYTES + 1):
        end = line[-1:]
        while len(line) > MAX_ROW_BYTES and end and end not in (b"\n", "\n"):
            end = file.readline(_PIECE)[-1:]
        yield line


def list_items(path: Path) -> Iterator[object]:
    """The items of the list that a file of JSON is, of which no more than one and a piece of the file are in memory.

    Raises:
        NoListError: it is something else.
        ValueError: it is no JSON, or an item is longer than `MAX_ROW_BYTES` characters.
    """
    with path.open(encoding="utf-8-sig") as file:
        reader = _ItemReader(file)
        if reader.next_sign() != "[":
            raise NoListError(f"holds {type(reader.take_value()).__name__}, not a list")
        reader.take_sign()
        sign = reader.next_sign()
        while sign != "]":
            yield reader.take_value()
            sign = reader.next_sign()
            if sign not in tuple(",]"):
                raise ValueError("an item is not followed by a comma or the end of the list")
            if sign == ",":
                reader.take_sign()
                reader.next_sign()
        reader.take_sign()
        if reader.next_sign():
            raise ValueError("there is something behind the list")


class _ItemReader:
    """Values and signs of JSON, one after another."""

    def __init__(self, file: TextIO):
        self._file, self._text, self._place = file, "", 0
        self._decode = json.JSONDecoder().raw_decode

    def _grow(self) -> bool:
        """Reads as much again as there is; False at the end of the file."""
        more = self._file.read(max(_PIECE, len(self._text) - self._place))
        self._text, self._place = self._text[self._place :] + more, 0
        return bool(more)

    def next_sign(self) -> str:
        """What comes next and is no blank; "" at the end."""
        while True:
            while self._text[self._place : self._place + 1] in tuple(" \t\r\n"):
                self._place += 1
            if self._place < len(self._text) or not self._grow():
                return self._text[self._place : self._place + 1]

    def take_sign(self) -> None:
        """Passes over what `next_sign` gave."""
        self._place += 1

    def take_value(self) -> object:
        """The value that comes next. Where no sign ends it, it may go on, as a number does.

        Raises:
            ValueError: it is none, or too long.
        """
        while True:
            try:
                value, end = self._decode(self._text, self._place)
            except json.JSONDecodeError:
                end = len(self._text)
                if end - self._place > MAX_ROW_BYTES:
                    raise ValueError(f"an item has more than {MAX_ROW_BYTES} characters, or is no JSON") from None
                if not self._grow():
                    raise
                continue
            length = end - self._place
            if self._text[end : end + 1] in tuple(", ]\t\r\n") or not self._grow():
                self._place += length
                return value


def check_compression(path: str, file: pq.ParquetFile) -> None:
    """Refuses tables of which a small file would fill the memory.

    Raises:
        ValueError: a column becomes more than `MAX_CHUNK_BYTES` at once, and more than `MAX_RATIO` times its size.
    """
    for group in range(file.metadata.num_row_groups):
        for number in range(file.metadata.num_columns):
            chunk = file.metadata.row_group(group).column(number)
            before, after = chunk.total_compressed_size, chunk.total_uncompressed_size
            if after > MAX_CHUNK_BYTES and after > MAX_RATIO * before:
                raise ValueError(
                    f"{path!r} has {after} bytes of column {chunk.path_in_schema!r} in {before}; write it anew, in "
                    "smaller row groups"
                )
