"""Texts of files: UTF-8, with or without a byte-order mark. Any other encoding is named, with what to do."""

import codecs
from collections.abc import Iterable
from pathlib import Path

_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),  # behind the mark of UTF-32, which begins with it
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_LOOKED_AT = 4096
_LONGEST_LINE = 2**24


def decode_text(raw: bytes) -> str:
    """A text without its byte-order mark.

    Raises:
        ValueError: it is not UTF-8; the message is the reason and the fix.
    """
    encoding = _wide_encoding(raw[:_LOOKED_AT])
    if encoding is not None:
        raise ValueError(_reason(encoding))
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte 0x{raw[error.start]:02x} at position {error.start})") from error


def check_encoding(path: Path, whole: bool = True) -> None:
    """Refuse a file of lines that has another encoding as a whole. One damaged line is none.

    Args:
        whole: look at all lines, and not at its beginning only, by which UTF-16 and UTF-32 are known.

    Raises:
        ValueError: it is in another encoding; the message names the file, the encoding and the fix.
    """
    with path.open("rb") as file:
        encoding = _wide_encoding(file.read(_LOOKED_AT))
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
