"""Where a medium is: a small mapping that JSON can hold, from which its bytes are read when needed.

{"type": kind, "path"}                    a file
{"type": kind, "path", "offset", "size"}  a part of a file, such as a member of a tar
{"type": kind, "column", "item"}          bytes or path in a column of its row; item: null, or which of a list
{"type": kind, "task", "medium"}          made by a generated task
"""

import os
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path

import pyarrow as pa

from .file_names import in_other_form
from .synthetic import get_task

_CHUNK = 2**20


class UnusableRow(ValueError):
    """A row that is skipped; the message is the reason."""


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


def reference_to(kind: str, value: object, folder: Path | None) -> dict:
    """The reference to a file that is named in a row.

    Args:
        folder: that which the name is relative to; None: it may be anywhere.

    Raises:
        UnusableRow: it is no name, an address, or leads out of the folder, or there is no such file.
    """
    if not isinstance(value, str) or not value:
        raise UnusableRow(f"the file of type {kind!r} is {value!r:.80}, not a name")
    if "://" in value or value.startswith("data:"):
        raise UnusableRow(f"{value!r:.80} is an address; media are never fetched while training, download it first")
    name = os.path.normpath(value)
    if folder is not None and (os.path.isabs(name) or name.split(os.sep)[0] == ".."):
        raise UnusableRow(f"{value!r} leads out of the folder {str(folder)!r}; move the file into it")
    path = name if folder is None else os.path.join(folder, name)
    if not os.path.isfile(path):
        path = in_other_form(str(folder or ""), name) or path
    if not os.path.isfile(path):
        raise UnusableRow(f"no file {path!r}; correct its name")
    return {"type": kind, "path": path}


def read_medium(reference: Mapping, row: Mapping[str, object]) -> object:
    """What a processor loads a medium from: a path, bytes, or what a task makes.

    Raises:
        OSError: a part of a file cannot be read.
        ValueError: there is nothing in the row.
    """
    if "task" in reference:
        return get_task(reference["task"]).render(reference["medium"])
    if "offset" in reference:
        with open(reference["path"], "rb") as file:
            file.seek(reference["offset"])
            return file.read(reference["size"])
    if "column" in reference:
        return _stored(reference, row)
    return reference["path"]


def _stored(reference: Mapping, row: Mapping[str, object]) -> object:
    value = row[reference["column"]]
    value = value if reference["item"] is None else value[reference["item"]]
    if isinstance(value, Mapping):  # how `datasets` keeps images and recordings
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None:
        raise ValueError(f"column {reference['column']!r} has neither bytes nor a path")
    return value


def place_of(reference: Mapping) -> str:
    """Where a medium is, for people."""
    if "task" in reference:
        return f"{reference['task']} {reference['medium']!r}"
    return reference.get("path") or f"column {reference['column']!r}"


def fingerprint(messages: list[dict], row: Mapping[str, object]) -> bytes:
    """A digest of what is said and of the bytes of the media.

    Of a text and its media it is the same whoever shows them, so that validation and training share none.

    Raises:
        OSError, ValueError: a medium is not there.
    """
    mark = blake2b(digest_size=16)
    for message in _as_read(messages):
        mark.update(f"\0{message['role']}".encode())
        for part in message["content"]:
            mark.update(f"\0{part['type']}\0".encode())
            for chunk in [part["text"].encode()] if part["type"] == "text" else _chunks(read_medium(part, row)):
                mark.update(chunk)
    return mark.digest()


def _as_read(messages: list[dict]) -> list[dict]:
    """A question and its answer as they are where media are read, if the answer shows any: images first, then
    recordings, and then the text as the answer.
    """
    if len(messages) != 2 or all(part["type"] == "text" for part in messages[1]["content"]):
        return messages
    parts = [part for message in messages for part in message["content"]]
    media = sorted((part for part in parts if part["type"] != "text"), key=lambda part: part["type"] == "audio")
    texts = [part for part in parts if part["type"] == "text"]
    return [{"role": "user", "content": media}, {"role": "assistant", "content": texts}]


def _chunks(source: object) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with open(source, "rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk
