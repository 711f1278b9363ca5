"""References to items of media: small mappings that JSON can hold, from which the bytes are read when needed.

{"type": modality, "path"}                    a file
{"type": modality, "path", "offset", "size"}  a part of a file, such as a member of a tar
{"type": modality, "column", "item"}          bytes in a column of its row; item: null, or which of a list
{"type": modality, "task", "medium"}          made by a generated task from a line of text

Data name files, and never where else something lies: only our code makes a `Reference`.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path, PurePath
from unicodedata import normalize

import pyarrow as pa

from model import MODALITIES

from ..tasks.registry import get_task

MAX_ITEM_BYTES = 2**28
"""Most bytes of an item that a tar or a table holds, since it is read as a whole."""
MAX_FILE_BYTES = 2**32
"""Most bytes of a file with an item, of which a digest is taken piece by piece."""
_CHUNK = 2**20
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|data:|file:", re.IGNORECASE)


class UnusableRow(ValueError):
    """A row that is skipped; the message is the reason."""


class Reference(dict):
    """A reference that was made here. What stands in data as an object of JSON or a struct of a table is a plain dict,
    and therefore none, whatever its keys are.
    """


class ArrowRow(Mapping):
    """One row of a table, of which only those values are read that are asked for."""

    def __init__(self, table: pa.Table, number: int = 0):
        self.table, self.number = table, number

    def __getitem__(self, column: str) -> object:
        return self.table[column][self.number].as_py()

    def __iter__(self) -> Iterator[str]:
        return iter(self.table.column_names)

    def __len__(self) -> int:
        return len(self.table.column_names)


def reference_to(kind: str, value: object, folder: Path | None) -> Reference:
    """The reference to a file that is named in a row.

    Args:
        folder: Folder that the name is relative to, and which it may not leave, by links neither; None: there is none.

    Raises:
        UnusableRow: The value is no name, an address, or leads out of the folder, or there is no such file.
    """
    if not isinstance(value, str) or not value:
        raise UnusableRow(f"the file of type {kind!r} is {value!r:.80}, not a name")
    if _ADDRESS.match(value):
        raise UnusableRow(f"{value!r:.80} is an address; media are never fetched while training, download it first")
    if folder is None:
        raise UnusableRow(f"{value!r:.80} names a file, and the row lies in no folder; put the medium itself there")
    path = os.path.join(folder, os.path.normpath(value))
    if not os.path.exists(path):
        path = in_other_form(str(folder), os.path.normpath(value)) or path
    if not is_within(path, str(folder)):
        raise UnusableRow(f"{value!r} leads out of the folder {str(folder)!r}; move the file into it")
    if not os.path.isfile(path):
        is_there = os.path.exists(path)
        raise UnusableRow(f"{path!r} is no regular file; replace it" if is_there else f"no file {path!r}; correct it")
    return Reference(type=kind, path=path)


def is_within(path: str, folder: str) -> bool:
    """Whether a path leads into a folder when all links are followed."""
    try:
        resolved = os.path.realpath(path)
    except ValueError:  # a zero, or half of a character, which no name of a file has
        return True
    return any(os.path.commonpath((resolved, root)) == root for root in _roots(folder))


@lru_cache(maxsize=64)
def _roots(folder: str) -> tuple[str, ...]:
    """A folder, and, of a snapshot in the cache of the hub, that which its links lead to."""
    resolved = os.path.realpath(folder)
    repository, snapshots, _ = resolved.rpartition(f"{os.sep}snapshots{os.sep}")
    is_cache = snapshots and os.path.basename(repository).startswith("datasets--")
    return (resolved, os.path.join(repository, "blobs")) if is_cache else (resolved,)


def read_reference(reference: Mapping, row: Mapping[str, object]) -> object:
    """What a processor loads an item from: a path, bytes, or what a task makes.

    Raises:
        OSError: A part of a file cannot be read.
        ValueError: There is nothing in the row, or too much.
    """
    if "task" in reference:
        return get_task(reference["task"]).render(reference["medium"])
    if "offset" in reference:
        path, size = reference["path"], reference["size"]
        _check_size(size, MAX_ITEM_BYTES)
        with open(path, "rb") as file:
            file.seek(reference["offset"])
            content = file.read(size)
        if len(content) < size:
            raise ValueError(f"{path!r} ends within it, after {len(content)} of {size} bytes; write the file again")
        return content
    if "column" not in reference:
        return reference["path"]
    value = row[reference["column"]]
    value = value if reference["item"] is None else value[reference["item"]]
    if isinstance(value, Mapping):  # how `datasets` keeps images and audio
        value = value.get("bytes")
    if not isinstance(value, bytes):
        held = "nothing" if value is None else type(value).__name__
        raise ValueError(f"column {reference['column']!r} holds {held}, neither the bytes of a medium nor its name")
    _check_size(len(value), MAX_ITEM_BYTES)
    return value


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise ValueError(f"the medium has {size} bytes, and at most {most} are read; scale it down or split it")


def place_of(reference: Mapping) -> str:
    """The position of an item, for people."""
    if "task" in reference:
        return f"{reference['task']} {reference['medium']!r}"
    return reference.get("path") or f"column {reference['column']!r}"


def fingerprint(messages: list[dict], row: Mapping[str, object]) -> bytes:
    """A digest of what is said and of the bytes of the media. That of a text and its media is the same in all
    directions, so that validation and training share none; raises OSError or ValueError for an item that is not there.
    """
    mark = blake2b(digest_size=16)
    for message in _as_read(messages):
        fields = [message[name] for name in ("reasoning_content", "tool_calls") if name in message]
        mark.update(f"\0{message['role']}{json.dumps(fields) if fields else ''}".encode())
        for part in message["content"]:
            mark.update(f"\0{part['type']}\0".encode())
            for chunk in [part["text"].encode()] if part["type"] == "text" else _chunks(read_reference(part, row)):
                mark.update(chunk)
    return mark.digest()


def _as_read(messages: list[dict]) -> list[dict]:
    """A question and its answer as they are where media are read, if the answer has any: images first, then audio,
    other modalities, and then the text as the answer.
    """
    if len(messages) != 2 or all(part["type"] == "text" for part in messages[1]["content"]):
        return messages
    parts = [part for message in messages for part in message["content"]]
    order = list(MODALITIES)
    media = sorted((part for part in parts if part["type"] != "text"), key=lambda part: order.index(part["type"]))
    texts = [part for part in parts if part["type"] == "text"]
    return [{"role": "user", "content": media}, {"role": "assistant", "content": texts}]


def _chunks(source: object) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with open(source, "rb") as file:
        _check_size(os.fstat(file.fileno()).st_size, MAX_FILE_BYTES)
        while chunk := file.read(_CHUNK):
            yield chunk


def in_other_form(folder: str, name: str) -> str | None:
    """The path of the one file in a folder that has a name in another Unicode form; None: there is none, or several."""
    path = folder
    for part in PurePath(name).parts:
        below = os.path.join(path, part)
        if not os.path.exists(below):
            found = _names(path).get(normalize("NFC", part), [])
            if len(found) != 1:
                return None
            below = os.path.join(path, found[0])
        path = below
    return path if os.path.isfile(path) else None


@lru_cache(maxsize=16)
def _names(folder: str) -> dict[str, list[str]]:
    """The names in a folder by their composed form."""
    names: dict[str, list[str]] = {}
    for name in os.listdir(folder) if os.access(folder, os.R_OK) and os.path.isdir(folder) else ():
        names.setdefault(normalize("NFC", name), []).append(name)
    return names
