"""Texts of files: UTF-8, with or without a byte-order mark, read piece by piece, so that what has no end costs no more
memory than its beginning. Any other encoding is named, with what to do.
"""

import codecs
import gzip
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, AnyStr, BinaryIO, TextIO

_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),  # behind the mark of UTF-32, which begins with it
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_HEAD_BYTES = 4096
_LONGEST_LINE = 2**24
MAX_ROW_BYTES = 2**24
"""Most bytes of a line, of an item of a list, of a cell, and of a member of text: a row is read as a whole. As JSON the
worst of them becomes objects of 27 times its size."""
MAX_TEXT_FILE_BYTES = 2**30
"""Most bytes of a file of plain text, which is one document."""
_PIECE = 2**20


def open_bytes(path: Path) -> BinaryIO:
    """A file as it is read, one of gzip unpacked."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def open_text(path: Path, **options: str) -> TextIO:
    """A file as text of UTF-8 without a byte-order mark, one of gzip unpacked; the options are those of `open`."""
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", **options)


def decode_text(raw: bytes) -> str:
    """A text without its byte-order mark; raises ValueError, with reason and fix, for what is not UTF-8."""
    encoding = _wide_encoding(raw[:_HEAD_BYTES])
    if encoding is not None:
        raise ValueError(_reason(encoding))
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte 0x{raw[error.start]:02x} at position {error.start})") from error


def check_utf8(path: Path, whole: bool = True) -> None:
    """Raises ValueError for a file of lines that has another encoding as a whole. One damaged line is none.

    Args:
        whole: Whether all lines are read, and not the beginning only, by which UTF-16 and UTF-32 are known.
    """
    with open_bytes(path) as file:
        encoding = _wide_encoding(file.read(_HEAD_BYTES))
        file.seek(0)
        if encoding is None and whole and _are_single_bytes(iter(lambda: file.readline(_LONGEST_LINE), b"")):
            encoding = "Latin-1 or Windows-1252"
    if encoding is not None:
        raise ValueError(f"{str(path)!r} is {_reason(encoding)}")


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, with a byte-order mark, or by its zeros without."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    zeros = head.count(0)
    if zeros < 2 or zeros * 5 < len(head) * 2:
        return None
    return "UTF-32" if zeros * 5 > len(head) * 3 else "UTF-16"


def _are_single_bytes(lines: Iterable[bytes]) -> bool:
    """Whether more than one line is not UTF-8, and none is that has more than ASCII."""
    wrong = 0
    for line in lines:
        try:
            if not line.decode("utf-8").removeprefix("\ufeff").isascii():
                return False
        except UnicodeDecodeError:
            wrong += 1
    return wrong > 1


def _reason(encoding: str) -> str:
    name = encoding.split()[-1]
    return f"{encoding}, not UTF-8; save it as UTF-8, e.g. iconv -f {name} -t UTF-8 OLD > NEW"


class NoListError(ValueError):
    """A file of JSON is something else than a list."""


def too_long(most: int) -> str:
    """The reason against what is longer."""
    return f"longer than {most} bytes, which are the most that are read at once; split it"


def bounded_lines(file: IO[AnyStr]) -> Iterator[AnyStr]:
    """The lines of a file. A line longer than `MAX_ROW_BYTES` is cut after one byte more, and its rest is skipped."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        end = line[-1:]
        while len(line) > MAX_ROW_BYTES and end and end not in (b"\n", "\n"):
            end = file.readline(_PIECE)[-1:]
        yield line


def list_items(path: Path) -> Iterator[object]:
    """The items of the list that a file of JSON is, of which no more than one and a piece of the file are in memory.

    Raises:
        NoListError: It is something else.
        ValueError: It is no JSON, or an item is longer than `MAX_ROW_BYTES` characters.
    """
    with open_text(path) as file:
        reader = _ItemReader(file)
        if reader.next_sign() != "[":
            raise NoListError(f"holds {type(reader.take_value()).__name__}, not a list")
        yield from _items_of(reader)
        if reader.next_sign():
            raise ValueError("there is something behind the list")


def lists_in_object(path: Path) -> Iterator[tuple[str, object]]:
    """The items of the lists in the object that a file of JSON is, each with the key of its list; a value that is no
    list comes as one item. The memory is that of `list_items`, and so are the errors.
    """
    with open_text(path) as file:
        reader = _ItemReader(file)
        if reader.next_sign() != "{":
            raise NoListError("holds no object")
        sign = reader.next_sign(passed=1)
        while sign != "}":
            key = reader.take_value()
            if not isinstance(key, str) or reader.next_sign() != ":":
                raise ValueError("a key of the object is no text, or has no value")
            values = _items_of(reader) if reader.next_sign(passed=1) == "[" else iter([reader.take_value()])
            for value in values:
                yield key, value
            sign = reader.next_sign()
            if sign not in tuple(",}"):
                raise ValueError("a value is not followed by a comma or the end of the object")
            if sign == ",":
                reader.next_sign(passed=1)


def _items_of(reader: "_ItemReader") -> Iterator[object]:
    """The items of the list that comes next, which is then passed over."""
    sign = reader.next_sign(passed=1)
    while sign != "]":
        yield reader.take_value()
        sign = reader.next_sign()
        if sign not in tuple(",]"):
            raise ValueError("an item is not followed by a comma or the end of the list")
        if sign == ",":
            reader.next_sign(passed=1)
    reader.next_sign(passed=1)


class _ItemReader:
    """Values and signs of JSON, one after another."""

    def __init__(self, file: TextIO):
        self._file, self._text, self._place = file, "", 0
        self._decode = json.JSONDecoder().raw_decode

    def _grow(self) -> bool:
        """Read as much again as there is; False at the end of the file."""
        more = self._file.read(max(_PIECE, len(self._text) - self._place))
        self._text, self._place = self._text[self._place :] + more, 0
        return bool(more)

    def next_sign(self, passed: int = 0) -> str:
        """What comes next and is no blank, behind so many signs that are passed over; "" at the end."""
        self._place += passed
        while True:
            while self._text[self._place : self._place + 1] in tuple(" \t\r\n"):
                self._place += 1
            if self._place < len(self._text) or not self._grow():
                return self._text[self._place : self._place + 1]

    def take_value(self) -> object:
        """The value that comes next. Where no sign ends it, it may go on, as a number does."""
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
            if self._text[end : end + 1] in tuple(", ]:}\t\r\n") or not self._grow():
                self._place += length
                return value
